"""The training loss: next-token cross-entropy over all captions of a batch.

Logits of a batch would take gigabytes: tokens × 50,257 floats. The head's product, the softmax and
both gradients are therefore computed a slice of tokens at a time, in the forward pass, and only the
gradients are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from model_lib.model.captioner import Captioner
from model_lib.model.decoder import PackedLayout
from model_lib.model.head import MULTIPLE, centred, float32_product, head_logits
from model_lib.model.tokens import PackedCaptions, pack_captions

SLICE = 2048
"""Tokens whose logits exist at the same time."""


@dataclass(frozen=True)
class Targets:
    """The captions to learn for some images."""

    rows: PackedCaptions
    weigh: Callable[[], tuple[Tensor, dict[str, float]]] | None = None
    """Returns the weight of each token's loss, float32 [B, T], and sums over drawn captions to log;
    called while the device computes. None: all weights are 1."""


class Objective(Protocol):
    """What is learned from images, which are known by their numbers in the training split."""

    def pack(self, numbers: Sequence[int]) -> PackedCaptions | None:
        """Return what is known of the targets before a step, on the CPU; for several threads."""

    def make_targets(
        self,
        model: Captioner,
        features: Tensor,
        numbers: Sequence[int],
        step: int,
        rows: PackedCaptions | None,
    ) -> Targets:
        """Return the targets of B images with visual tokens `features` [B, S, E], on their device;
        `rows` is what `pack` returned."""

    def normalizer(self, numbers: Sequence[int]) -> int:
        """Return the divisor of a batch's summed loss."""


class CrossEntropyObjective:
    """Makes each image's own captions likelier.

    Args:
        ids: of each image's captions, as `encode_captions` returns them.
        start: the model's start token.
    """

    def __init__(self, ids: Sequence[Sequence[Sequence[int]]], start: int) -> None:
        self.ids, self.start = ids, start

    def normalizer(self, numbers: Sequence[int]) -> int:
        """Return the number of tokens of the images' captions."""
        return sum(len(caption) for number in numbers for caption in self.ids[number])

    def pack(self, numbers: Sequence[int]) -> PackedCaptions:
        return pack_captions([self.ids[number] for number in numbers], self.start)

    def make_targets(
        self,
        model: Captioner,
        features: Tensor,
        numbers: Sequence[int],
        step: int,
        rows: PackedCaptions | None,
    ) -> Targets:
        rows = self.pack(numbers) if rows is None else rows
        return Targets(rows.to(features.device))


def caption_loss(
    model: Captioner,
    features: Tensor,
    rows: PackedCaptions,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the summed cross-entropy of all tokens that have a target.

    Divide by `rows.count` for the mean a token.

    Args:
        model: the captioner.
        features: visual tokens [B, S, E] from `Captioner.encode`.
        rows: each image's captions side by side.
        label_smoothing, weights: see `head_loss`.

    Returns:
        Sum in nats, float32 scalar.
    """
    return head_loss(model, states(model, features, rows), rows, label_smoothing, weights)


def states(model: Captioner, features: Tensor, rows: PackedCaptions) -> Tensor:
    """Return the decoder's last hidden states [B, T, D] of captions and visual tokens [B, S, E].

    Each image's keys and values are computed once for all its captions.
    """
    layout = PackedLayout(rows.positions, rows.mask(autocast_dtype_on(features) or model.dtype))
    visual = model.decoder.cross_cache(features)
    return model.decoder(rows.tokens.unsqueeze(1), visual, layout=layout).squeeze(1)


def head_loss(
    model: Captioner,
    hidden: Tensor,
    rows: PackedCaptions,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Return the summed cross-entropy; the head runs on tokens with a target only.

    Args:
        model: the captioner.
        hidden: its `states` of `rows`.
        rows: each image's captions side by side.
        label_smoothing: share of the target that is spread over the vocabulary (Szegedy et al.,
            2016).
        weights: of each token's loss, float32 [B, T]; None: all 1.
        compiled: compute softmax and its gradient by a kernel of torch.compile.

    Returns:
        Sum in nats, float32 scalar.
    """
    if weights is None:
        weights = torch.ones_like(rows.targets, dtype=torch.float32)
    learned, targets, shares = (
        tensor.flatten(0, 1).index_select(0, rows.target_indices)
        for tensor in (hidden, rows.targets, weights)
    )
    return ChunkedCrossEntropy.apply(
        learned,
        model.head.weight,
        targets,
        shares,
        label_smoothing,
        autocast_dtype_on(hidden),
        compiled,
    )


def autocast_dtype_on(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype of autocast on a tensor's device, if it is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _score(
    logits: Tensor, target: Tensor, share: Tensor, smoothing: float, words: int, dtype: Any
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of some tokens and, in `dtype`, its gradient by their logits; None: no
    gradient.

    Args:
        logits: float32 [n, V + padding]: a mean of zero, and -inf; used up.
        target: int64 [n, 1].
        share: weight of each token's loss, float32 [n, 1].
        smoothing: share of the target that is spread over the vocabulary.
        words: V.
        dtype: of the gradient.
    """
    log_total, at_target = logits.logsumexp(1, keepdim=True), logits.gather(1, target)
    loss = ((log_total - (1 - smoothing) * at_target) * share).sum()
    if dtype is None:
        return loss, None
    shift = smoothing / words
    # A compiled kernel would write the input too if it were changed.
    in_place = not torch.compiler.is_compiling()
    by_logits = logits.sub_(log_total) if in_place else logits - log_total
    by_logits = by_logits.exp_().sub_(shift).mul_(share).to(dtype)
    own = ((at_target - log_total).exp() - shift - (1 - smoothing)) * share
    return loss, by_logits.scatter_(1, target, own.to(dtype))


@cache
def _compiled_score() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(_score)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of the cross-entropies of `hidden @ weight.T`, its gradients computed with it.

    With p the softmax of a token's logits and q its smoothed target, (1 - s) at the target plus s /
    V everywhere, the loss is -sum(q log p), and its gradient by the logits is p - q. For a centred
    head both are the same, as p is, and as a row of p - q sums to zero.
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
        compiled: bool,
    ) -> Tensor:
        score = _compiled_score() if compiled else _score
        with torch.autocast(hidden.device.type, enabled=False):
            kind, words = dtype or weight.dtype, len(weight)
            # Matrix units are slow with rows whose length is no multiple of 16 bytes.
            matrix = centred(weight, kind, MULTIPLE)
            inputs = hidden.to(kind)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            gradient_dtype = kind if ctx.needs_input_grad[0] else None
            by_hidden, by_weight = torch.empty_like(inputs), matrix.new_empty(0)
            for start in range(0, len(inputs), SLICE):
                part = slice(start, start + SLICE)
                target, share = targets[part].unsqueeze(1), chosen[part].unsqueeze(1)
                logits = head_logits(inputs[part], matrix)
                logits[:, words:].fill_(-torch.inf)
                loss, by_logits = score(logits, target, share, smoothing, words, gradient_dtype)
                total += loss
                if by_logits is not None:
                    torch.mm(by_logits, matrix, out=by_hidden[part])
                    product = float32_product(by_logits.t(), inputs[part])
                    by_weight = by_weight.add_(product) if start else product
                    del product
                del logits, by_logits  # before the next slice's are computed
        if gradient_dtype is not None:
            ctx.gradients = by_hidden.to(hidden.dtype), by_weight[:words]
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        by_hidden, by_weight = ctx.gradients
        ctx.gradients = None  # used up: scaled in place
        return by_hidden.mul_(gradient), by_weight.mul_(gradient), None, None, None, None, None
