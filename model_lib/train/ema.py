"""An exponential moving average of the trained weights: smoother, and most often better, than the
last ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The average of a model's trained weights.

    In its first steps it follows faster, so that the weights it started from are soon forgotten.

    Args:
        model: the model; its present weights are the first average.
        decay: share of the average kept in a step; 0: no average, the weights themselves.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.weights = (
            {name: p for name, p in model.named_parameters() if p.requires_grad} if decay else {}
        )
        self.averages = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take a step's weights into the average."""
        if not self.weights:
            return
        self.updates += 1
        decay = min(self.decay, self.updates / (10 + self.updates))
        torch._foreach_lerp_(list(self.averages.values()), list(self.weights.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model hold the average, and its own weights again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.weights.items():
            weight.data, self.averages[name] = self.averages[name], weight.data

    def state(self) -> dict[str, Tensor]:
        """Return the average by the weights' names."""
        return dict(self.averages)

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Go on from what `state` returned after `updates` updates."""
        self.updates = updates
        for name, average in self.averages.items():
            average.copy_(state[name])
