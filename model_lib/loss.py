"""The training loss: next-token cross-entropy over a picture's captions."""

import torch.nn.functional as F
from torch import Tensor

from model_lib.model import Captioner
from model_lib.tokens import IGNORED


def caption_loss(model: Captioner, pixels: Tensor, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of all captions' tokens and how many tokens those are.

    Each picture is encoded once for all its captions, and the head runs on positions with a target only.

    Args:
        model: the captioner.
        pixels: RGB, uint8 [B, 3, size, size].
        tokens: decoder input, int64 [B, N, T].
        targets: next tokens, int64 [B, N, T], `IGNORED` where there is none.

    Returns:
        Sum in nats, float32 scalar; count, int64 scalar.
    """
    hidden = model.hidden(tokens, model.cross_cache(model.encode(pixels)))
    wanted = targets != IGNORED
    logits = model.head(hidden[wanted]).float()
    return F.cross_entropy(logits, targets[wanted], reduction="sum"), wanted.sum()
