"""Packed matrices: the same values out, and the same weights back."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, GPT2Config

from model_lib import Captioner
from model_lib.model.captioner import CaptionerConfig
from model_lib.model.prepacking import PackedLinear, can_pack
from model_lib.model.tokens import train_tokenizer

CPU = torch.device("cpu")


def wide() -> Captioner:
    """A shallow captioner whose matrices are large enough to be packed."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    decoder = GPT2Config(n_embd=512, n_layer=1, n_head=8, bos_token_id=0, eos_token_id=0)
    model = Captioner(CaptionerConfig(vision_config=vision, decoder_config=decoder))
    model.tokenizer = train_tokenizer(["a red circle"], 300)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_it_computes_and_saves_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    if not can_pack(CPU, dtype):
        pytest.skip(f"this CPU multiplies no packed matrices of {dtype}")
    plain, model = wide().eval().to(dtype), wide()
    listed = [name for name, _ in model.named_parameters()]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.for_inference(CPU, dtype)
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert {"head", "decoder.h.0.attn.c_attn", "vision.encoder.layers.0.mlp.fc1"} <= set(packed)

    pixels, tokens = (
        torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8),
        torch.randint(0, 50257, (2, 3, 7)),
    )
    with torch.inference_mode():
        ours, theirs = model(pixels, tokens).float(), plain(pixels, tokens).float()
    assert (ours - theirs).norm() / theirs.norm() < (1e-5 if dtype == torch.float32 else 1e-2)
    model.save_pretrained(tmp_path)
    loaded = Captioner.from_pretrained(str(tmp_path), device="cpu", dtype=dtype)
    for state in (model.state_dict(), loaded.state_dict()):
        # The head stays in float32.
        assert all(
            torch.equal(state[name].to(dtype), value) for name, value in plain.state_dict().items()
        )

    assert model.train() is model and not any(
        isinstance(module, PackedLinear) for module in model.modules()
    )
    assert [name for name, _ in model.named_parameters()] == listed
    assert {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    } == trained
    model(pixels, tokens).float().sum().backward()


def test_what_moves_converts_or_loads_weights_meets_plain_ones() -> None:
    if not can_pack(CPU, torch.float32):
        pytest.skip("this CPU multiplies no packed matrices")
    other = wide()
    nn.init.ones_(other.head.weight)
    model = wide().for_inference(CPU, torch.float32)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.head.weight, other.head.weight)
    assert (
        model.for_inference(CPU, torch.float32).to(torch.float64).head.weight.dtype == torch.float64
    )
