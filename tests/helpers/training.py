"""Runs of training in tests: their options, interruptions, and what they leave behind."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from model_lib import Captioner
from model_lib.model.tokens import PackedCaptions
from model_lib.tracking.runs import NO_TRACKING, Run, Tracking
from model_lib.train.checkpoint import Checkpoints, load
from model_lib.train.config import TrainConfig
from model_lib.train.loss import CrossEntropyObjective, Targets
from model_lib.train.step import TrainStep
from model_lib.train.training import train

RECIPE: dict[str, Any] = {"dropout": 0.3, "ema": 0.9, "augment": True, "label_smoothing": 0.1}
"""Everything that is random or goes on from step to step."""


def train_config(data: Path, output: Path, **options: Any) -> TrainConfig:
    defaults = {"data": str(data), "output": str(output), "preset": "tiny", "epochs": 2}
    return TrainConfig(**{**defaults, **options})


def set_validation_scores(monkeypatch: pytest.MonkeyPatch, *scores: tuple[float, float]) -> None:
    """Let the validations return these losses and CIDErs, one after another."""
    remaining = iter(scores)

    def measure(*_: object) -> dict[str, float]:
        loss, cider = next(remaining)
        return {"val_loss": loss, "val_slice_CIDEr": cider}

    monkeypatch.setattr("model_lib.train.validation.Validator.measure", measure)


def before_steps(
    monkeypatch: pytest.MonkeyPatch, action: Callable[[TrainStep, int], object]
) -> None:
    """Let training call `action` with the model's `TrainStep` and the number before each step."""
    run = TrainStep.run

    def run_after_action(
        train_step: TrainStep, batch: np.ndarray, pixels: Tensor, n: int, rows: PackedCaptions
    ) -> dict:
        action(train_step, n)
        return run(train_step, batch, pixels, n, rows)

    monkeypatch.setattr(TrainStep, "run", run_after_action)


def interrupt_at(step: int, config: TrainConfig, tracking: Tracking = NO_TRACKING) -> None:
    """Train until a step, and be interrupted before it."""

    def interrupt(_: TrainStep, number: int) -> None:
        if number == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        before_steps(patched, interrupt)
        train(config, tracking)


def change_targets(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Targets, Sequence[int], int], Targets]
) -> None:
    """Let each training pass learn what `change` makes of its targets, images and step."""
    make_targets = CrossEntropyObjective.make_targets

    def changed(
        objective: CrossEntropyObjective,
        model: Captioner,
        features: Tensor,
        numbers: Sequence[int],
        step: int,
        rows: PackedCaptions | None,
    ) -> Targets:
        targets = make_targets(objective, model, features, numbers, step, rows)
        return change(targets, numbers, step)

    monkeypatch.setattr(CrossEntropyObjective, "make_targets", changed)


class Curve(Tracking, Run):
    """Keeps what training logs."""

    def __init__(self) -> None:
        Run.__init__(self)
        self.points: dict[str, list[float]] = {}
        self.key = ""

    def start(self, name: str, key: str | None, *_: object, step: int = 0, **__: object) -> Run:
        self.key, self.step = str(key), step
        return self

    def log(self, metrics: Any, step: int) -> None:
        for name, value in metrics.items():
            self.points.setdefault(name, []).append(value)


def best_step(output: Path) -> int:
    return int(json.loads((output / "best" / "training.json").read_text())["step"])


def best_weights(output: Path) -> dict[str, Tensor]:
    return Captioner.from_pretrained(str(output / "best"), device="cpu").state_dict()


def same_best(ours: Path, theirs: Path) -> bool:
    """Return whether two runs' best models are the same, bit for bit."""
    files = [folder / "best" / "model.safetensors" for folder in (ours, theirs)]
    return files[0].read_bytes() == files[1].read_bytes()


def newest_step(output: Path) -> int:
    """Return the step of a run's newest checkpoint."""
    uri = Checkpoints(str(output)).newest()
    assert uri is not None
    return load(uri)[1].step


def curves(database: Path) -> dict[str, dict[int, set[float]]]:
    """Return each metric's values by step, of the only run in an MLflow store."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{database}")
    (run,) = client.search_runs([client.get_experiment_by_name("captioner").experiment_id])
    assert run.info.status == "FINISHED"
    values: dict[str, dict[int, set[float]]] = {}
    for name in run.data.metrics:
        if not name.startswith("system/") and name != "images_per_second":
            for point in client.get_metric_history(run.info.run_id, name):
                values.setdefault(name, {}).setdefault(point.step, set()).add(point.value)
    return values
