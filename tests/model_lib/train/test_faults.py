"""Faults while a model is trained: gradients, memory, disks, shards."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

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
from model_lib.train.loss import Targets
from model_lib.train.step import MAX_SKIPPED, TrainStep
from model_lib.train.training import train
from tests.helpers.training import (
    Curve,
    before_steps,
    best_weights,
    change_targets,
    newest_step,
    same_best,
    set_validation_scores,
)
from tests.helpers.training import train_config as config


def ruin(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let the losses of some steps be no number."""

    def ruined(targets: Targets, numbers: Sequence[int], step: int) -> Targets:
        nan = torch.full(targets.rows.tokens.shape, float("nan"))
        return Targets(targets.rows, lambda: (nan, {})) if step in steps else targets

    change_targets(monkeypatch, ruined)


def test_a_step_without_finite_gradients_changes_nothing_and_is_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruin(monkeypatch, 2)
    weights: list[Tensor] = []
    before_steps(monkeypatch, lambda step, _: weights.append(step.model.head.weight.clone()))
    curve = Curve()
    train(config(data, tmp_path, log_steps=1), curve)
    assert curve.points["skipped_steps"] == [0, 0, 1, 1]
    assert torch.equal(weights[2], weights[3]) and not torch.equal(weights[1], weights[2])
    assert all(weight.isfinite().all() for weight in best_weights(tmp_path).values())


def test_a_run_that_no_longer_learns_stops_with_its_checkpoint_intact(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruin(monkeypatch, *range(4, 999))
    message = r"gradients of the last \d+ steps are not finite; .* float32"
    with pytest.raises(WorkError, match=message):
        train(config(data, tmp_path, epochs=20, batch_size=16, log_steps=1, validate_every=4))
    tensors, position = load(Checkpoints(str(tmp_path)).newest() or "")
    assert position.step + 4 >= MAX_SKIPPED
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_validation_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_validation_scores(monkeypatch, (3.0, 0.1), (float("nan"), 0.0))
    with pytest.raises(WorkError, match="validation loss is nan after step 4"):
        train(config(data, tmp_path, epochs=3))
    assert json.loads((tmp_path / "best" / "training.json").read_text())["validation_loss"] == 3.0


def little_memory(monkeypatch: pytest.MonkeyPatch, images: int) -> list[int]:
    """Let the device run out of memory with more than so many images, as an accelerator does;
    return the list of those that went through."""
    sizes: list[int] = []

    def limited(targets: Targets, numbers: Sequence[int], step: int) -> Targets:
        if len(numbers) > images:
            raise torch.OutOfMemoryError("too many")
        sizes.append(len(numbers))
        return targets

    change_targets(monkeypatch, limited)
    return sizes


def test_out_of_memory_the_batch_goes_through_in_parts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = little_memory(monkeypatch, 10)
    halved, set_by_option = Curve(), Curve()
    train(config(data, tmp_path / "halved", log_steps=1), halved)
    assert sizes == [8] * 4 * 4
    message = "out of memory in step 0 with 16 images at once; going on with 8, gradients added up"
    assert message in caplog.text
    train(config(data, tmp_path / "option", log_steps=1, micro_batch_size=8), set_by_option)
    assert halved.points["train_loss"] == set_by_option.points["train_loss"]


def test_without_memory_for_one_image_the_message_names_the_remedy(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little_memory(monkeypatch, 0)
    message = r"cpu: out of memory in step 0 with 1 images .* --recompute needs less"
    with pytest.raises(WorkError, match=message):
        train(config(data, tmp_path))


@pytest.mark.gpu
def test_a_gpu_with_little_memory_trains_in_parts(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    memory = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(120e6 / memory)
    try:
        options = {"device": "cuda", "batch_size": 64, "epochs": 1, "compile": False}
        train(config(data, tmp_path, **options))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "out of memory in step 0" in caplog.text


def test_a_full_disk_stops_the_run_and_spares_the_checkpoint(
    finished: Path, data: Path, small_disk: Path
) -> None:
    run, filler = small_disk / "run", small_disk / "filler"
    message = r"disk/run: needs 0\.\d+ GB more for 20 checkpoints, .* choose another folder"
    with pytest.raises(UserError, match=message):
        train(config(data, run, epochs=3, checkpoints_kept=20))

    def fill(_: TrainStep, step: int) -> None:
        if step == 3:
            filler.write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - 1_000_000)))

    message = "cannot be written: the disk is full; make room there and start again"
    with pytest.MonkeyPatch.context() as patched, pytest.raises(WorkError, match=message):
        before_steps(patched, fill)
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


@pytest.fixture()
def damaged(data: Path, tmp_path: Path) -> tuple[Manifest, Path]:
    """A copy of the data set in which an image has another byte, and that image's shard."""
    manifest = read_manifest(shutil.copytree(data, tmp_path / "data").as_posix())
    file = Path(next(shard.uri for shard in manifest.shards if shard.split == "train"))
    group = pq.ParquetFile(file).metadata.row_group(0)
    columns = map(group.column, range(group.num_columns))
    image = next(column for column in columns if column.path_in_schema == "image")
    content = bytearray(file.read_bytes())
    start = image.dictionary_page_offset or image.data_page_offset
    content[start + image.total_compressed_size // 2] ^= 1
    file.write_bytes(content)
    return manifest, file


def test_a_damaged_shard_is_refused_before_anything_is_learned(
    damaged: tuple[Manifest, Path], tmp_path: Path
) -> None:
    manifest, file = damaged
    message = rf"{file}: does not have the manifest's sha256: .*; ingest anew"
    with pytest.raises(UserError, match=message):
        train(config(tmp_path / "data", tmp_path / "out"))
    verify([shard for shard in manifest.shards if shard.uri != str(file)], "others")


def test_a_shard_damaged_later_is_noticed_when_it_is_read(damaged: tuple[Manifest, Path]) -> None:
    manifest, file = damaged
    reader = SplitReader(manifest, "train", Preprocessing(32))
    with pytest.raises(UserError, match=rf"{file}: is not a shard .*; ingest anew"):
        list(reader.batches(reader.in_order(8)))
