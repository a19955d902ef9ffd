"""Training: what one step learns from, its options, and which model is kept."""

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from model_lib import Captioner, UserError
from model_lib.data.shards import read_manifest
from model_lib.model import decoder
from model_lib.model.captioner import Captioner as Model
from model_lib.train.build import build_model
from model_lib.train.config import TrainConfig, resolve
from model_lib.train.loss import Targets
from model_lib.train.step import learning_rate, make_optimizer
from model_lib.train.training import train
from tests.helpers.training import (
    Curve,
    best_step,
    best_weights,
    change_targets,
    set_validation_scores,
)
from tests.helpers.training import train_config as config


def test_learning_rate_rises_then_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert rates[55] == pytest.approx(0.5) and rates[-1] < 0.001
    assert all(earlier >= later for earlier, later in pairwise(rates[9:]))


def test_norms_and_biases_do_not_decay(model: Model, data: Path, tmp_path: Path) -> None:
    options = resolve(config(data, tmp_path, weight_decay=0.5))
    groups = make_optimizer(model, options).param_groups
    others, matrices = sorted(groups, key=lambda group: group["weight_decay"])
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert {p.ndim >= 2 for p in matrices["params"]} == {True}
    assert {p.ndim for p in others["params"]} == {1}


def test_the_best_model_is_kept_self_contained(finished: Path) -> None:
    about = json.loads((finished / "best" / "training.json").read_text())
    assert about["configuration"]["preset"] == "tiny"
    model = Captioner.from_pretrained(str(finished / "best"), device="cpu")
    assert len(model.caption([Image.new("RGB", (80, 64), "white")])) == 1


def test_the_model_of_the_best_cider_is_kept_and_among_equals_that_of_the_lowest_loss(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_validation_scores(monkeypatch, (3.0, 0.1), (2.0, 0.1), (1.0, 0.05))
    trained = train(config(data, tmp_path, epochs=3))
    assert (trained.validation_loss, trained.validation_cider) == (2.0, 0.1)
    assert best_step(tmp_path) == 4


def test_validations_come_each_so_many_steps_and_at_the_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_validation_scores(monkeypatch, (3.0, 0.1), (2.0, 0.2), (1.0, 0.3))
    train(config(data, tmp_path, epochs=2, batch_size=13, validate_every=4))
    assert best_step(tmp_path) == 10


def test_a_start_from_another_kind_of_model_is_refused(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    reason = r"best: was trained from scratch, .* preset clip-l-gpt2-medium does not do"
    with pytest.raises(UserError, match=reason):
        train(TrainConfig(data=str(data), output=str(tmp_path), init_from=str(finished / "best")))


def test_another_start_in_the_same_place_is_another_run(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "best", tmp_path / "start")
    go_on = config(data, tmp_path / "run", epochs=1, init_from=str(tmp_path / "start"))
    train(go_on)
    shutil.rmtree(tmp_path / "start")
    shutil.copytree(tmp_path / "run" / "best", tmp_path / "start")
    with pytest.raises(UserError, match="holds a run on other data or from other weights"):
        train(go_on)


@pytest.mark.parametrize("options", [{"micro_batch_size": 5}, {"recompute": True}])
def test_what_saves_memory_changes_rounding_alone(
    data: Path, tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config(data, tmp_path / "whole", epochs=1))
    checkpoint = decoder.checkpoint
    sizes: list[int] = []
    recomputed: list[object] = []

    def count(targets: Targets, numbers: Sequence[int], step: int) -> Targets:
        sizes.append(len(numbers))
        return targets

    def recompute(layer: object, *inputs: object, **options: object) -> object:
        recomputed.append(layer)
        return checkpoint(layer, *inputs, **options)

    change_targets(monkeypatch, count)
    monkeypatch.setattr(decoder, "checkpoint", recompute)
    saving = train(config(data, tmp_path / "saving", epochs=1, **options))
    assert max(sizes) == options.get("micro_batch_size", 32)
    assert bool(recomputed) == ("recompute" in options)
    assert saving.validation_loss == pytest.approx(whole.validation_loss, rel=1e-4)


# The losses of the first steps on the generated scenes, as `captioner train --preset tiny` had them
# on 2026-11-23.
GOLDEN = [6.01724, 5.58503, 5.19671, 5.16695, 4.92356, 4.75261, 4.60957, 4.52771]


def test_the_losses_are_the_golden_ones(data: Path, tmp_path: Path) -> None:
    curve = Curve()
    train(config(data, tmp_path, epochs=4, log_steps=1), curve)
    assert curve.points["train_loss"] == pytest.approx(GOLDEN, rel=1e-3)


def test_clipping_bounds_the_gradient(data: Path, tmp_path: Path) -> None:
    options = config(data, tmp_path, clip_norm=0.0, weight_decay=0.0)
    train(options)
    untrained = build_model(resolve(options), read_manifest(str(data))).state_dict()
    trained = best_weights(tmp_path)
    assert all(torch.equal(trained[name], weight) for name, weight in untrained.items())


def test_a_finished_run_is_not_trained_again(finished: Path, data: Path) -> None:
    def times() -> dict[Path, int]:
        files = (file for file in finished.rglob("*") if file.is_file() and file.name != ".lock")
        return {file: file.stat().st_mtime_ns for file in files}

    before = times()
    # The preset's own values may be given.
    assert train(config(data, finished, epochs=3, batch_size=32, augment=False)).steps == 6
    assert times() == before
    message = rf"learning_rate 0\.002, not 0\.5; .* --init_from {finished / 'best'} to go on"
    with pytest.raises(UserError, match=message):
        train(config(data, finished, epochs=3, learning_rate=0.5))
    with pytest.raises(UserError, match="holds a run with epochs 3, not 4"):
        train(config(data, finished, epochs=4))


def test_training_lowers_the_loss(data: Path, tmp_path: Path) -> None:
    short = train(config(data, tmp_path / "short", epochs=1))
    longer = train(config(data, tmp_path / "longer", epochs=15))
    assert longer.validation_loss < 0.6 * short.validation_loss


def test_bfloat16_is_near_float32(data: Path, tmp_path: Path) -> None:
    losses = [
        train(config(data, tmp_path / kind, precision=kind, epochs=1)).validation_loss
        for kind in ("float32", "bfloat16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


def test_captions_longer_than_the_model_are_refused(data: Path, tmp_path: Path) -> None:
    message = "max_tokens: 64 leaves no place for the end in 64 positions"
    with pytest.raises(UserError, match=message):
        train(config(data, tmp_path, max_tokens=64))
    assert train(config(data, tmp_path, epochs=1, max_tokens=63)).steps == 2


def test_float16_on_a_cpu_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="precision float16: not supported on a CPU"):
        train(config(data, tmp_path, precision="float16"))


def test_the_tokenizer_of_a_model_from_scratch_knows_the_captions(
    data: Path, tmp_path: Path
) -> None:
    model = build_model(resolve(config(data, tmp_path)), read_manifest(str(data)))
    text = "a small red circle on a white background"
    ids = model.tokenizer(text)["input_ids"]
    assert len(ids) < 12 and model.tokenizer.decode(ids) == text
    assert model.tokenizer.decode(model.tokenizer("Ünïcödé \n")["input_ids"]) == "Ünïcödé \n"


def test_data_without_validation_images_is_refused(scenes: Path, tmp_path: Path) -> None:
    from model_lib.ingest.config import IngestConfig
    from model_lib.ingest.ingesting import ingest

    annotations, images = scenes / "annotations" / "captions_train2017.json", scenes / "train2017"
    sources = {"annotations": str(annotations), "images": str(images)}
    ingest(IngestConfig(**sources, split="train", output=str(tmp_path / "d")))
    with pytest.raises(UserError, match="has no val images"):
        train(config(tmp_path / "d", tmp_path / "out"))
