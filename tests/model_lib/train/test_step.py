"""One step of training: its gradients are clipped as by torch, without a pass over them."""

import copy
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model_lib.model.captioner import Captioner
from model_lib.model.tokens import encode_captions, pack_captions
from model_lib.train.config import TrainConfig, resolve
from model_lib.train.distributed import World
from model_lib.train.loss import CrossEntropyObjective, caption_loss
from model_lib.train.step import TrainStep, learning_rate, make_optimizer
from tests.helpers.small import pixels

CAPTIONS = [
    ["a red circle", "two blue squares on a white background", "a"],
    ["a red circle on a white background", "two squares"],
]


def make_step(model: Captioner, device: str = "cpu", **options: Any) -> TrainStep:
    """Return a step of ten over two images with `CAPTIONS`."""
    ids = encode_captions(model.tokenizer, CAPTIONS, model.end_token, 5, 40)
    config = resolve(TrainConfig(data="data", output="out", preset="tiny", **options))
    return TrainStep(
        model,
        CrossEntropyObjective(ids, model.start_token),
        config,
        World(torch.device(device)),
        10,
    )


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scaler"])
def test_gradients_are_clipped_as_by_torch(model: Captioner, scaled: bool) -> None:
    theirs, step = copy.deepcopy(model), make_step(model, clip_norm=0.5)
    if scaled:
        step.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = make_optimizer(theirs, step.config)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    images = pixels(model, 2)
    for number in range(4):
        measured = step.run(np.arange(2), images, number)
        rows = pack_captions(step.objective.ids, 0)  # type: ignore[attr-defined]
        (caption_loss(theirs, theirs.encode(images), rows) / rows.count).backward()
        norm = nn.utils.clip_grad_norm_(trained, 0.5)
        assert norm > 0.5
        assert float(measured["gradient_norm"]) == pytest.approx(float(norm), rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(number, 10, step.config.warmup)
        optimizer.step()
        optimizer.zero_grad()
    ours = dict(model.named_parameters())
    for name, weight in theirs.named_parameters():
        # A bias of keys has no gradient but rounding, which Adam enlarges.
        if not name.endswith("crossattention.c_attn.bias"):
            torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scaler"])
def test_gradients_that_are_not_finite_change_no_weight(model: Captioner, scaled: bool) -> None:
    step = make_step(model)
    if scaled:
        step.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with torch.no_grad():
        model.head.weight[3, 4] = float("inf")
    before = copy.deepcopy(model.state_dict())
    step.run(np.arange(2), pixels(model, 2), 0)
    assert step.require_progress() == 1
    same: dict[str, Tensor] = model.state_dict()
    assert all(torch.equal(weight, same[name]) for name, weight in before.items())


class Waiting(TorchDispatchMode):
    """Raises where a program would wait for a GPU: where it needs values, or sizes that depend on
    them."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.__name__.partition(".")[0]
        indices = args[1] if name in ("index", "index_put_", "_index_put_impl_") else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if name in self.WAITS or by_mask:
            raise AssertionError(f"a step waits for the device: {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scaler"])
def test_nothing_in_a_step_waits_for_the_device(model: Captioner, scaled: bool) -> None:
    options = {"ema": 0.9, "dropout": 0.1, "label_smoothing": 0.1, "precision": "bfloat16"}
    step, images = make_step(model.train(), **options), pixels(model, 2)
    if scaled:
        step.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    rows = step.objective.pack([0, 1])
    step.run(np.arange(2), images, 0, rows)  # makes the optimizer's state
    with Waiting():
        step.run(np.arange(2), images, 1, rows)
    with pytest.raises(AssertionError, match="waits"), Waiting():
        float(step.skipped)


@pytest.mark.soak
def test_compiled_it_computes_the_same_by_few_graphs(model: Captioner) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU (apt-get install g++)")
    plain = make_step(copy.deepcopy(model), label_smoothing=0.1)
    compiled = make_step(model, label_smoothing=0.1, compile=True)
    rng = np.random.default_rng(0)
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()

    def losses(step: TrainStep, images: int, ids: list, number: int) -> list[float]:
        """Return those of a training step and of a validation."""
        objective = step.objective = step.loss.objective = CrossEntropyObjective(ids, 0)
        step.model.train()
        trained = step.run(np.arange(images), pixels(model, images), number)["train_loss"]
        step.model.eval()
        with torch.no_grad():
            features = step.loss.encode(pixels(model, images))
            valued = caption_loss(step.model, features, objective.pack(range(images)))
        return [float(trained), float(valued)]

    # As many images as heads (4) and as tokens (8), and other numbers.
    for number, (images, longest) in enumerate([(4, 9), (8, 2), (3, 12), (5, 7)]):
        ids = [[rng.integers(1, 290, longest).tolist() for _ in range(4)] for _ in range(images)]
        expected = losses(plain, images, ids, number)
        with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
            assert losses(compiled, images, ids, number) == pytest.approx(expected, rel=1e-4)
    # Two of the tower and two of the decoder's layers, and of softmax one for each number of
    # tokens in the first step, and one for any.
    assert graphs["unique_graphs"] == 6
