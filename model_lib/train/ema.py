"""An exponential moving average (EMA) of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """average = d * average + (1 - d) * weights, with d = min(decay, n / (10 + n)) in update n.

    The smaller d of the first updates lets it forget the initial weights soon.

    Args:
        model: the model; its present weights are the first average.
        decay: share of the average kept in a step; 0: no average, the weights themselves.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p for n, p in model.named_parameters() if decay and p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Take a step's weights into the average; `number` counts the updates, from 1."""
        if self.weights:
            d = min(self.decay, number / (10 + number))
            torch._foreach_lerp_(list(self.averages.values()), list(self.weights.values()), 1 - d)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the average into the model, and the model's own weights back afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.weights.items():
            weight.data, self.averages[name] = self.averages[name], weight.data
