"""The useful arithmetic of training, against torch's count of what is computed."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model_lib.model.captioner import CaptionerConfig
from model_lib.model.tokens import pack_captions
from model_lib.presets import PRESETS
from model_lib.train.flops import COCO_TOKENS, peak_flops, useful_flops
from model_lib.train.loss import caption_loss
from tests.helpers.small import pixels, small_model


def test_nearly_all_that_is_computed_is_useful_without_padding() -> None:
    model = small_model(n_embd=128, n_layer=6)
    rows = pack_captions([[[7] * 8]] * 4, 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        caption_loss(model, model.encode(pixels(model, 4)), rows).backward()
    useful = useful_flops(model.config, 4, rows.count)
    assert useful == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_an_image_of_coco_is_363_billion() -> None:
    config = CaptionerConfig.from_preset(PRESETS["clip-l-gpt2-medium"])
    assert round(useful_flops(config, 1, COCO_TOKENS) / 1e9) == 363


def test_a_cpu_has_no_known_peak_nor_has_float32() -> None:
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert peak_flops(torch.device("cuda"), torch.float32) is None
