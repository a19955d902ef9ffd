"""Train, evaluate, register and run a CLIP + GPT-2 image captioner.

    from model_lib import Captioner, generate_caption
    model = Captioner.from_pretrained("runs/best")
    caption = generate_caption(model, "image.jpg")

The names below load on first use, so that stages without a model (ingest, plan) start without
torch.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_EXPORTS = {
    "Caption": "model_lib.model.captioning",
    "Captioner": "model_lib.model.captioner",
    "CaptionerConfig": "model_lib.model.captioner",
    "DecodeConfig": "model_lib.model.config",
    "UserError": "model_lib.errors",
    "generate_caption": "model_lib.model.captioning",
}
__all__ = [
    "Caption",
    "Captioner",
    "CaptionerConfig",
    "DecodeConfig",
    "UserError",
    "generate_caption",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
