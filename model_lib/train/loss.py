"""The training loss: next-token cross-entropy over all captions of a batch, without the logits ever
lying in memory.

Logits of a batch at full size would take gigabytes: tokens × 50,257 floats. The head's product, the
softmax and both gradients are therefore computed a slice of tokens at a time, in the forward pass,
and only the gradients are kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_lib.model.captioner import Captioner
from model_lib.model.decoder import PackedLayout
from model_lib.model.tokens import PackedCaptions

SLICE = 1024
"""Tokens whose logits exist at the same time."""


def caption_loss(
    model: Captioner,
    features: Tensor,
    rows: PackedCaptions,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the summed cross-entropy of all tokens that have a target.

    Each image's keys and values are computed once for all its captions, and the head runs on tokens
    with a target only. Divide by `rows.count` for the mean a token.

    Args:
        model: the captioner.
        features: visual tokens [B, S, E] from `Captioner.encode`.
        rows: each image's captions side by side.
        label_smoothing: share of the target that is spread over the vocabulary (Szegedy et al.,
            2016).
        weights: of each token's loss, float32 [B, T]; None: all 1.

    Returns:
        Sum in nats, float32 scalar.
    """
    layout = PackedLayout(rows.positions, rows.mask())
    hidden = model.hidden(
        rows.tokens.unsqueeze(1), model.cross_cache(features), layout=layout
    ).squeeze(1)
    if weights is None:
        weights = torch.ones_like(rows.targets, dtype=torch.float32)
    dtype = (
        torch.get_autocast_dtype(hidden.device.type)
        if torch.is_autocast_enabled(hidden.device.type)
        else None
    )
    chosen = (
        tensor.flatten(0, 1).index_select(0, rows.places)
        for tensor in (hidden, rows.targets, weights)
    )
    states, targets, shares = chosen
    return ChunkedCrossEntropy.apply(
        states, model.head.weight, targets, shares, label_smoothing, dtype
    )


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of the cross-entropies of `hidden @ weight.T`, its gradients computed with it.

    With p the softmax of a token's logits and q its smoothed target, (1 - s) at the target plus s /
    V everywhere, the loss is -sum(q log p), and its gradient by the logits is p - q.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chosen: Tensor,
        smoothing: float,
        dtype: torch.dtype | None,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            kind = dtype or weight.dtype
            matrix, inputs = weight.to(kind), hidden.to(kind)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            need_hidden, need_weight = ctx.needs_input_grad[:2]
            by_hidden = torch.empty_like(inputs) if need_hidden else None
            by_weight = None
            for start in range(0, len(inputs), SLICE):
                part = slice(start, start + SLICE)
                target, share = targets[part].unsqueeze(1), chosen[part].unsqueeze(1)
                logits = F.linear(inputs[part], matrix).float()
                log_total = logits.logsumexp(1, keepdim=True)
                loss = log_total - (1 - smoothing) * logits.gather(1, target)
                if smoothing:
                    loss = loss - smoothing * logits.mean(1, keepdim=True)
                total += (loss * share).sum()
                if not (need_hidden or need_weight):
                    continue
                by_logits = logits.sub_(log_total).exp_().sub_(smoothing / logits.shape[1])
                by_logits.scatter_add_(1, target, torch.full_like(log_total, smoothing - 1))
                by_logits = by_logits.mul_(share).to(kind)
                if by_hidden is not None:
                    torch.mm(by_logits, matrix, out=by_hidden[part])
                if need_weight:
                    if kind == torch.float16:  # the sum over a slice's tokens could leave its range
                        product = by_logits.float().t() @ inputs[part].float()
                    else:
                        product = by_logits.t() @ inputs[part]
                    by_weight = product.float() if by_weight is None else by_weight.add_(product)
        ctx.gradients = by_hidden, by_weight
        ctx.kind = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        by_hidden, by_weight = ctx.gradients
        ctx.gradients = None  # used up: scaled in place
        by_hidden = None if by_hidden is None else by_hidden.to(ctx.kind).mul_(gradient)
        by_weight = None if by_weight is None else by_weight.mul_(gradient)
        return by_hidden, by_weight, None, None, None, None
