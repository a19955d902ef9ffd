"""A vision tower in float8: nearly the same visual tokens, and the same weights back."""

from pathlib import Path

import pytest
import torch

from model_lib import Captioner, UserError
from model_lib.model.captioner import CaptionerConfig
from model_lib.model.float8 import Float8Linear
from model_lib.model.rivals import load_captioner
from tests.helpers.small import pixels, small_model, small_model_with_equal_widths

CPU = torch.device("cpu")


def test_features_are_close_and_weights_unchanged() -> None:
    model = small_model_with_equal_widths().to(torch.bfloat16)
    images, weights = pixels(model, 4), model.state_dict()
    exact = model.encode(images).float()
    model.for_inference(CPU, torch.bfloat16, float8=True)
    packed = [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]
    assert packed and all(name.startswith("vision.") for name in packed)
    features = model.encode(images).float()
    assert 0 < (features - exact).norm() / exact.norm() < 0.05
    assert all(torch.equal(value, model.state_dict()[n]) for n, value in weights.items())
    model.train()
    assert not any(isinstance(module, Float8Linear) for module in model.modules())


def test_a_row_of_zeros_stays_zero() -> None:
    linear = Float8Linear(torch.nn.Linear(16, 16, bias=False))
    assert not linear(torch.zeros(3, 16)).any()


def test_it_is_chosen_by_its_precision(tmp_path: Path) -> None:
    with_tokenizer = small_model()
    vision = small_model_with_equal_widths().config.vision_config  # its sides are multiples of 16
    decoder = with_tokenizer.config.decoder_config
    model = Captioner(CaptionerConfig(vision_config=vision, decoder_config=decoder))
    model.tokenizer = with_tokenizer.tokenizer
    model.save_pretrained(tmp_path)
    for precision, kind in (("float8", Float8Linear), ("bfloat16", torch.nn.Linear)):
        model = Captioner.from_pretrained(str(tmp_path), device="cpu", precision=precision)
        assert isinstance(model.vision.encoder.layers[0].mlp.fc2, kind)
        assert model.dtype == torch.bfloat16


def test_other_captioners_have_none() -> None:
    with pytest.raises(UserError, match="float8"):
        load_captioner("hf:nothing/here", precision="float8")
