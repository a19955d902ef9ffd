"""The moving average of the weights."""

import pytest
import torch
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


def test_later_every_eighth_step_enters_and_a_resumed_average_goes_on_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Linear(50, 1, bias=False)
    average, resumed = EMA(model, decay=0.99), EMA(model, decay=0.99)
    expected, passes = model.weight.detach().clone(), 0
    for update in range(1, 501):
        model.weight.data += 0.1 + torch.randn(1, 50)  # a drift, and noise
        before = average.averages["weight"].clone()
        average.update(update)
        passes += not torch.equal(before, average.averages["weight"])
        expected.lerp_(model.weight.detach(), 1 - min(0.99, update / (10 + update)))
        if update == 205:
            resumed.averages["weight"].copy_(average.averages["weight"])
        elif update > 205:
            resumed.update(update)
    assert passes == 100 + 50
    assert torch.equal(average.averages["weight"], resumed.averages["weight"])
    behind = model.weight.detach() - expected
    assert (average.averages["weight"] - expected).norm() < 0.1 * behind.norm()


def test_frozen_weights_have_no_average_and_without_a_decay_nothing_has() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert list(EMA(model, decay=0.9).averages) == ["weight"]
    assert EMA(model, decay=0.0).averages == {}
