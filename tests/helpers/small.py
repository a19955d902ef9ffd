"""Small models of random weights."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel

from model_lib.model.captioner import Captioner, CaptionerConfig
from model_lib.model.tokens import train_tokenizer


def small_model(seed: int = 0, **decoder: int) -> Captioner:
    """Return a small captioner of random weights that really uses its image, with a tokenizer."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(["a red circle on a white background", "two blue squares"] * 5, 300)
    shape = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 48,
        "vocab_size": len(tokenizer),
        **decoder,
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
    }
    config = CaptionerConfig(
        vision_config=vision, decoder_config={**shape, "bos_token_id": 0, "eos_token_id": 0}
    )
    model = Captioner(config).eval()
    model.tokenizer = tokenizer
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # the initial weights are too small for anything to depend on them
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
    return model


def save_parts(folder: Path, tokenizer: Path) -> tuple[Path, Path]:
    """Save a whole CLIP and a GPT-2 of another width as their hubs do; return their folders."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    clip = CLIPConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 16}, text_config=text
    )
    CLIPModel(clip).save_pretrained(folder / "clip")
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4)).save_pretrained(folder / "gpt2")
    for file in tokenizer.iterdir():
        (folder / "gpt2" / file.name).write_bytes(file.read_bytes())
    return folder / "clip", folder / "gpt2"
