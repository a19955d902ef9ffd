"""The moving average of the weights."""

import pytest
from torch import nn

from model_lib.train.ema import EMA


def test_the_average_follows_the_weights_by_its_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = EMA(model, decay=0.5)
    expected = float(model.weight)
    for update in range(1, 20):
        model.weight.data.fill_(update)
        average.update(update)
        decay = min(0.5, update / (10 + update))
        expected = decay * expected + (1 - decay) * update
    with average.applied():
        assert float(model.weight) == pytest.approx(expected)
    assert float(model.weight) == 19


def test_frozen_weights_have_no_average_and_without_a_decay_nothing_has() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert list(EMA(model, decay=0.9).averages) == ["weight"]
    assert EMA(model, decay=0.0).averages == {}
