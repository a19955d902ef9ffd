"""The captioner that training starts from, on the CPU in float32."""

import hashlib

import torch

from model_lib.data.captions import in_style
from model_lib.data.shards import Manifest, SplitReader
from model_lib.errors import UserError
from model_lib.model.captioner import Captioner, CaptionerConfig
from model_lib.model.tokens import train_tokenizer
from model_lib.presets import PRESETS
from model_lib.train.config import ResolvedConfig


def build_model(config: ResolvedConfig, manifest: Manifest) -> Captioner:
    """Return the captioner to train: a trained one, one of pretrained parts, or one from scratch
    with its own tokenizer.

    Raises:
        UserError: weights cannot be used, or the decoder has too few positions for
            `config.max_tokens`.
    """
    torch.manual_seed(config.seed)
    if config.init_from is not None:
        model = _trained(config.init_from, config.preset)
    elif config.vision is not None and config.decoder is not None:
        model = Captioner.from_parts(
            config.vision, config.decoder, config.tokenizer, config.vision_layer
        )
    else:
        model = _from_scratch(config, manifest)
    _set_resize(model, config.resize)
    layers = model.config.vision_config.num_hidden_layers + 1 + model.config.vision_layer
    if config.unfreeze_vision > layers:
        raise UserError(
            f"unfreeze_vision: {config.unfreeze_vision} layers are more than the vision tower's "
            f"{layers}"
        )
    model.config.trained_vision_layers = config.unfreeze_vision
    model.freeze()
    positions = model.config.decoder_config.n_positions
    if config.max_tokens >= positions:
        raise UserError(
            f"max_tokens: {config.max_tokens} leaves no place for the end in {positions} positions"
        )
    return model


def _trained(source: str, preset: str) -> Captioner:
    model = Captioner.from_pretrained(source, device="cpu", dtype=torch.float32).train()
    from_scratch = model.config.train_everything
    if from_scratch != (PRESETS[preset].vision is None):
        kind = "from scratch, as by preset tiny" if from_scratch else "over frozen parts"
        raise UserError(f"{source}: was trained {kind}, which preset {preset} does not do")
    return model


def _set_resize(model: Captioner, resize: str | None) -> None:
    """Let the model squash or crop images; what it does already keeps its numbers."""
    stretch = resize == "squash"
    if resize is not None and model.config.image_stretch != stretch:
        model.config.image_stretch, model.config.image_resize = stretch, None


def _from_scratch(config: ResolvedConfig, manifest: Manifest) -> Captioner:
    shapes = PRESETS[config.preset]
    captions = SplitReader(manifest, "train").captions()
    tokenizer = train_tokenizer(
        (in_style(text, config.caption_style) for texts in captions for text in texts),
        shapes.decoder_shape["vocab_size"],
    )
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = Captioner(CaptionerConfig.from_preset(shapes, vocab_size=len(tokenizer), **ends))
    model.tokenizer = tokenizer
    return model


def identity(model: Captioner) -> str:
    """Return a hash that tells captioners apart, whatever their folders are called."""
    return hashlib.sha256(model.head.weight.detach().float().cpu().numpy().tobytes()).hexdigest()
