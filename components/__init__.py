"""The pipelines' stages as KFP components: definitions only, the work is in `model_lib`.

Steps pass strings, numbers and lists on to each other; artifacts are for people.
"""

from pathlib import Path

from model_lib import __version__

_LOCK = Path(__file__).parents[1] / "images" / "images.lock"


def image(name: str) -> str:
    """Return the digest of the image `name` in `images/images.lock`, else its local tag."""
    lines = _LOCK.read_text().splitlines() if _LOCK.exists() else []
    pushed = dict(line.split() for line in lines if line.strip() and not line.startswith("#"))
    return pushed.get(name, f"captioner-{name}:{__version__}")


CORE = image("core")
"""No torch: preflight, ingest, candidates, train on several machines, register, plan, merge,
close."""
MODEL = image("model")
"""Torch: train, caption."""
EVALUATE = image("evaluate")
"""Torch, Java and the caption metrics: evaluate, evaluate_champion."""
SERVE = image("serve")
"""Torch and a web server: no step of a pipeline."""
