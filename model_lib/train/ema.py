"""An exponential moving average (EMA) of the trained weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

EVERY_STEP = 100
"""First steps, each of which enters the average."""
INTERVAL = 8
"""Steps between two that enter it later: a pass over all weights takes time."""


class EMA:
    """average = d * average + (1 - d) * weights, with d = min(decay, n / (10 + n)) in step n.

    The smaller d of the first steps lets it forget the initial weights soon. After `EVERY_STEP`
    steps only those whose number is a multiple of `INTERVAL` enter, with the product of the d since
    the one before.

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
        """Take a step's weights into the average; `number` counts the steps, from 1."""
        since = range(max(EVERY_STEP, number - INTERVAL) + 1, number + 1)
        if number <= EVERY_STEP:
            since = range(number, number + 1)
        elif number % INTERVAL:
            return
        if self.weights:
            d = math.prod(min(self.decay, n / (10 + n)) for n in since)
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
