"""Small models of random weights, their images, and transformers' GPT-2 with the same weights."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel
from transformers import initialization as init

from model_lib.model.captioner import Captioner, CaptionerConfig
from model_lib.model.tokens import train_tokenizer


def small_model(seed: int = 0, **decoder: int) -> Captioner:
    """Return a small captioner of random weights, with a tokenizer, which depends on its image."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(["a red circle on a white background", "two blue squares"] * 5, 300)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
    shape |= {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, **decoder}
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    model = Captioner(CaptionerConfig(vision_config=vision, decoder_config=shape)).eval()
    model.tokenizer = tokenizer
    # The initial weights are too small for anything to depend on them.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
    return model


def small_model_with_equal_widths() -> Captioner:
    """Return a small captioner, without a tokenizer, whose tower is as wide as its decoder."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    decoder = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "vocab_size": 97}
    decoder |= {"bos_token_id": 0, "eos_token_id": 0}
    model = Captioner(CaptionerConfig(vision_config=vision, decoder_config=decoder)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def ending_model(images: int) -> tuple[Captioner, torch.Tensor]:
    """Return a model whose captions end by themselves now and then, and visual tokens for it."""
    model = small_model_with_equal_widths()
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(images, 5, 32, generator=generator)
    tokens = torch.randint(1, 97, (images, 8, 10), generator=generator)
    let_captions_end(model, features, tokens)
    return model, features


def let_captions_end(model: Captioner, features: torch.Tensor, tokens: torch.Tensor) -> None:
    """Change the head so that captions are sharper than random weights make them, and end by
    themselves now and then.

    Args:
        model: of random weights.
        features: visual tokens [B, S, E].
        tokens: some ids, int64 [B, N, T].
    """
    with torch.no_grad():
        usual = model.decoder(tokens, model.decoder.cross_cache(features)).mean((0, 1, 2))
        model.head.weight.mul_(3)
        # The end gains 1.5 in logit where the state is usual.
        model.head.weight[model.end_token] += 1.5 * usual / usual.norm() ** 2


def pixels(model: Captioner, count: int, seed: int = 0) -> torch.Tensor:
    """Return random pixels for the model, uint8 [count, 3, image_size, image_size]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, model.image_size, model.image_size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def reference_decoder(model: Captioner) -> GPT2LMHeadModel:
    """Return transformers' GPT-2 with cross-attention and the model's weights.

    It has no norm of the visual tokens, so they are normalised before, and the model's norm neither
    scales nor shifts.
    """
    config = GPT2Config(**{**model.config.decoder_config.to_dict(), "add_cross_attention": True})
    config.tie_word_embeddings = False
    with init.no_init_weights():
        reference = GPT2LMHeadModel(config).eval()
    for block in model.decoder.blocks:
        block.ln_visual.reset_parameters()
    weights = model.decoder.state_dict()
    reference.transformer.load_state_dict({n: w for n, w in weights.items() if "visual" not in n})
    reference.lm_head.weight.data.copy_(model.head.weight)

    def normalise(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        features = kwargs["encoder_hidden_states"]
        return args, {
            **kwargs,
            "encoder_hidden_states": F.layer_norm(features, features.shape[-1:]),
        }

    reference.register_forward_pre_hook(normalise, with_kwargs=True)
    return reference


def save_parts(folder: Path, tokenizer: Path) -> tuple[Path, Path]:
    """Save a whole CLIP and a GPT-2 of another width as their hubs do; return their folders."""
    torch.manual_seed(0)
    vision = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 16}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text))
    clip.save_pretrained(folder / "clip")
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4)).save_pretrained(folder / "gpt2")
    for file in tokenizer.iterdir():
        (folder / "gpt2" / file.name).write_bytes(file.read_bytes())
    return folder / "clip", folder / "gpt2"
