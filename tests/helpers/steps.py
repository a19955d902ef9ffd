"""What happens between the steps of a training."""

from collections.abc import Callable

import numpy as np
import pytest
from torch import Tensor

from model_lib.model.tokens import PackedCaptions
from model_lib.train.step import TrainStep


def before_steps(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object]) -> None:
    """Call `act` with the number of each step before training takes it."""
    run = TrainStep.run

    def acting(
        train_step: TrainStep, batch: np.ndarray, pixels: Tensor, step: int, rows: PackedCaptions
    ) -> dict:
        act(step)
        return run(train_step, batch, pixels, step, rows)

    monkeypatch.setattr("model_lib.train.step.TrainStep.run", acting)
