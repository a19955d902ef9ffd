"""The model sizes that have a name, each with the training settings that suit it."""

from dataclasses import dataclass, replace


def stored_side(image_size: int) -> int:
    """Return the shorter side in pixels at which ingest stores images for a vision tower that takes
    `image_size`: some more, for random crops."""
    return image_size * 8 // 7


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A captioner's parts and defaults."""

    vision: str | None
    """Hub name of the CLIP or SigLIP; None for a model that is trained whole from scratch."""
    decoder: str | None
    """Hub name of GPT-2; None for a model that is trained whole from scratch."""
    vision_shape: dict
    """Its configuration, for a model from scratch and to count parameters."""
    decoder_shape: dict
    """Options of `GPT2Config`, likewise."""
    epochs: int
    batch_size: int
    """Images a step."""
    learning_rate: float
    patience: int
    """Validations without a better CIDEr after which training stops; 0: it does not."""
    precision: str
    """Of training."""
    label_smoothing: float
    dropout: float
    """Of the cross-attention and feed-forward blocks' results."""
    ema: float
    """Decay of the weights' moving average; 0: none."""
    augment: bool
    max_tokens: int
    """Of a caption in training."""
    sort_batches: int
    """Batches' worth of images that are sorted by length together."""

    @property
    def stored_side(self) -> int:
        """See `stored_side`."""
        return stored_side(self.vision_shape["image_size"])


_CLIP_L = Preset(
    vision="openai/clip-vit-large-patch14",
    decoder="openai-community/gpt2-medium",
    vision_shape={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
    decoder_shape={"n_embd": 1024, "n_layer": 24, "n_head": 16},
    epochs=10,
    batch_size=64,
    learning_rate=1e-4,
    patience=2,
    precision="auto",
    label_smoothing=0.1,
    dropout=0.1,
    ema=0.999,
    augment=True,
    max_tokens=40,
    sort_batches=8,
)
_CLIP_L_336 = replace(
    _CLIP_L,
    vision="openai/clip-vit-large-patch14-336",
    vision_shape={**_CLIP_L.vision_shape, "image_size": 336},
)
_SIGLIP2_L = replace(
    _CLIP_L,
    vision="google/siglip2-large-patch16-256",
    vision_shape={
        **_CLIP_L.vision_shape,
        "model_type": "siglip_vision_model",
        "image_size": 256,
        "patch_size": 16,
    },
)
_TINY = Preset(
    vision=None,
    decoder=None,
    vision_shape={
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
    },
    decoder_shape={
        "n_embd": 96,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    epochs=6,
    batch_size=32,
    learning_rate=2e-3,
    patience=0,
    precision="float32",  # its matrices are too small to gain from bfloat16: docs/benchmarks.md
    label_smoothing=0.0,
    dropout=0.0,
    ema=0.0,
    augment=False,
    max_tokens=40,
    # In the scenes, length tells of content, and batches alike teach less: docs/benchmarks.md.
    sort_batches=1,
)
DEFAULT_PRESET = "clip-l-gpt2-medium"
PRESETS = {
    DEFAULT_PRESET: _CLIP_L,
    "clip-l-336-gpt2-medium": _CLIP_L_336,
    "siglip2-l-gpt2-medium": _SIGLIP2_L,
    "tiny": _TINY,
}
