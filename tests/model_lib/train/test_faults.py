"""Faults while a model is trained: gradients, memory, disks, shards."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from model_lib import UserError
from model_lib.data.shards import Manifest, SplitReader, read_manifest, verify
from model_lib.errors import WorkError
from model_lib.io.pixels import Preprocessing
from model_lib.model.captioner import Captioner as Model
from model_lib.train.checkpoint import Checkpoints, load
from model_lib.train.loss import CrossEntropyObjective, Targets
from model_lib.train.step import MAX_SKIPPED, TrainStep
from model_lib.train.training import train
from tests.helpers.training import (
    Curve,
    best_weights,
    newest_step,
    same_best,
    set_validation_scores,
)
from tests.helpers.training import train_config as config


def ruin(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let the losses of some steps be no number."""
    make_targets = CrossEntropyObjective.make_targets

    def ruined(
        objective: CrossEntropyObjective,
        model: Model,
        features: Tensor,
        numbers: Sequence[int],
        step: int,
    ) -> Targets:
        rows = make_targets(objective, model, features, numbers, step).rows
        return Targets(rows, torch.full(rows.tokens.shape, float("nan")) if step in steps else None)

    monkeypatch.setattr("model_lib.train.loss.CrossEntropyObjective.make_targets", ruined)


def test_a_step_without_finite_gradients_changes_nothing_and_is_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruin(monkeypatch, 2)
    weights: list[Tensor] = []
    run = TrainStep.run

    def keep(train_step: TrainStep, *batch: object) -> dict:
        measured = run(train_step, *batch)
        weights.append(train_step.model.head.weight.detach().clone())
        return measured

    monkeypatch.setattr("model_lib.train.step.TrainStep.run", keep)
    curve = Curve()
    train(config(data, tmp_path, log_steps=1), curve)
    assert curve.points["skipped_steps"] == [0, 0, 1, 1]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3])
    assert all(weight.isfinite().all() for weight in best_weights(tmp_path).values())


def test_a_run_that_no_longer_learns_stops_with_its_checkpoint_intact(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruin(monkeypatch, *range(4, 999))
    with pytest.raises(
        WorkError, match=r"gradients of the last \d+ steps are not finite; .* float32"
    ):
        train(config(data, tmp_path, epochs=20, batch_size=16, log_steps=1, validate_every=4))
    tensors, position = load(Checkpoints(str(tmp_path)).newest() or "")
    assert position.step + 4 >= MAX_SKIPPED and all(
        tensor.isfinite().all() for tensor in tensors.values()
    )


def test_a_validation_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_validation_scores(monkeypatch, (3.0, 0.1), (float("nan"), 0.0))
    with pytest.raises(WorkError, match="validation loss is nan after step 4"):
        train(config(data, tmp_path, epochs=3))
    assert json.loads((tmp_path / "best" / "training.json").read_text())["validation_loss"] == 3.0


def little_memory(monkeypatch: pytest.MonkeyPatch, images: int) -> list[int]:
    """Let the device run out of memory with more than so many images; return the list of those that
    went through.

    A stand-in for an accelerator, which the test below uses where there is one.
    """
    make_targets = CrossEntropyObjective.make_targets
    sizes: list[int] = []

    def limited(
        objective: CrossEntropyObjective,
        model: Model,
        features: Tensor,
        numbers: Sequence[int],
        step: int,
    ) -> Targets:
        if len(numbers) > images:
            raise torch.OutOfMemoryError("too many")
        sizes.append(len(numbers))
        return make_targets(objective, model, features, numbers, step)

    monkeypatch.setattr("model_lib.train.loss.CrossEntropyObjective.make_targets", limited)
    return sizes


def test_out_of_memory_the_batch_goes_through_in_parts(
    data: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = little_memory(monkeypatch, 10)
    curve = Curve()
    train(config(data, tmp_path, epochs=3, log_steps=1), curve)
    assert sizes == [8] * 4 * 6
    assert (
        "out of memory in step 0 with 16 images at once; going on with 8, gradients added up"
        in caplog.text
    )
    whole = Curve()
    train(config(data, tmp_path / "parts", epochs=3, log_steps=1, micro_batch_size=8), whole)
    assert curve.points["train_loss"] == whole.points["train_loss"]


def test_without_memory_for_one_image_it_says_what_helps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little_memory(monkeypatch, 0)
    with pytest.raises(
        WorkError, match=r"cpu: out of memory in step 0 with 1 images .* --recompute needs less"
    ):
        train(config(data, tmp_path))


@pytest.mark.gpu
def test_a_gpu_with_little_memory_trains_in_parts(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    torch.cuda.set_per_process_memory_fraction(
        120e6 / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        train(config(data, tmp_path, device="cuda", batch_size=64, epochs=1))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "out of memory in step 0" in caplog.text


def test_a_full_disk_stops_the_run_and_spares_the_checkpoint(
    finished: Path, data: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError,
        match=r"disk/run: needs 0\.\d+ GB more for 20 checkpoints, .* choose another folder",
    ):
        train(config(data, small_disk / "run", epochs=3, checkpoints_kept=20))
    run, filler = small_disk / "run", small_disk / "filler"
    with monkeypatch.context() as patched:
        take_step = TrainStep.run

        def fill(train_step: TrainStep, batch: np.ndarray, pixels: Tensor, step: int) -> dict:
            if step == 3:
                with filler.open("wb") as file:
                    file.truncate(0)
                    free = shutil.disk_usage(small_disk).free
                    file.write(bytes(max(0, free - 1_000_000)))
            return take_step(train_step, batch, pixels, step)

        patched.setattr("model_lib.train.step.TrainStep.run", fill)
        with pytest.raises(
            WorkError, match="cannot be written: the disk is full; make room there and start again"
        ):
            train(config(data, run, epochs=3))
    assert newest_step(run) == 2
    filler.unlink()
    train(config(data, run, epochs=3))
    assert same_best(run, finished)


def test_a_full_temporary_folder_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Model, "save_pretrained", save)
    with pytest.raises(WorkError, match="cannot be written: the disk is full; make room there"):
        train(config(data, tmp_path, epochs=1))


def damaged(data: Path, folder: Path) -> tuple[Manifest, Path]:
    """Return a copy of the data set of which an image has another byte."""
    shutil.copytree(data, folder)
    manifest = read_manifest(str(folder))
    file = Path(next(shard.uri for shard in manifest.shards if shard.split == "train"))
    columns = pq.ParquetFile(file).metadata.row_group(0)
    image = next(
        columns.column(n)
        for n in range(columns.num_columns)
        if columns.column(n).path_in_schema == "image"
    )
    content = bytearray(file.read_bytes())
    start = image.dictionary_page_offset or image.data_page_offset
    content[start + image.total_compressed_size // 2] ^= 1
    file.write_bytes(content)
    return manifest, file


def test_a_damaged_shard_is_refused_before_anything_is_learned(data: Path, tmp_path: Path) -> None:
    manifest, file = damaged(data, tmp_path / "data")
    with pytest.raises(
        UserError, match=rf"{file}: does not have the manifest's sha256: .*; ingest anew"
    ):
        train(config(tmp_path / "data", tmp_path / "out"))
    verify([shard for shard in manifest.shards if shard.uri != str(file)], "others")


def test_a_shard_damaged_later_is_noticed_when_it_is_read(data: Path, tmp_path: Path) -> None:
    manifest, file = damaged(data, tmp_path / "data")
    reader = SplitReader(manifest, "train", Preprocessing(32))
    with pytest.raises(UserError, match=rf"{file}: is not a shard .*; ingest anew"):
        list(reader.batches(reader.in_order(8)))
