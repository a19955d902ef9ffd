"""The captioner that training starts from, on the CPU in float32."""

import hashlib

import torch

from model_lib.data.shards import Manifest, SplitReader
from model_lib.errors import UserError
from model_lib.model.captioner import Captioner, CaptionerConfig
from model_lib.model.tokens import train_tokenizer
from model_lib.presets import PRESETS
from model_lib.train.config import TrainConfig


def build_model(config: TrainConfig, manifest: Manifest) -> Captioner:
    """Return the captioner to train: a trained one, the preset's parts, or one from scratch with
    its own tokenizer.

    Raises:
        UserError: weights cannot be used, or the decoder has too few positions for
            `config.max_tokens`.
    """
    torch.manual_seed(config.seed)
    model = _build(config, manifest)
    positions = model.config.decoder_config.n_positions
    if config.max_tokens >= positions:
        raise UserError(
            f"max_tokens: {config.max_tokens} leaves no place for the end in {positions} positions"
        )
    return model


def _build(config: TrainConfig, manifest: Manifest) -> Captioner:
    preset = PRESETS[config.preset]
    if config.init_from is not None:
        model = Captioner.from_pretrained(
            config.init_from, device="cpu", dtype=torch.float32
        ).train()
        if model.config.train_everything != (preset.vision is None):
            kind = (
                "from scratch, as by preset tiny"
                if model.config.train_everything
                else "over frozen parts"
            )
            raise UserError(
                f"{config.init_from}: was trained {kind}, which preset {config.preset} does not do"
            )
        return model
    if preset.vision is not None and preset.decoder is not None:
        return Captioner.from_parts(
            config.vision or preset.vision, config.decoder or preset.decoder, config.tokenizer
        )
    captions = SplitReader(manifest, "train", size=1).captions()
    tokenizer = train_tokenizer(
        (text for texts in captions for text in texts), preset.decoder_shape["vocab_size"]
    )
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = Captioner(CaptionerConfig.of(preset, vocab_size=len(tokenizer), **ends))
    model.tokenizer = tokenizer
    return model


def identity(model: Captioner) -> str:
    """Return what tells a captioner from others, whatever its folder is called."""
    return hashlib.sha256(model.head.weight.detach().float().cpu().numpy().tobytes()).hexdigest()
