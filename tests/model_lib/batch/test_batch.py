"""Captioning a folder: each listed image has one row, also after faults, kills and second runs."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from model_lib import Caption, Captioner, UserError
from model_lib.batch import captions as captions_module
from model_lib.batch.batching import batch
from model_lib.batch.captions import caption_planned
from model_lib.batch.config import BatchConfig
from model_lib.batch.merging import merge
from model_lib.batch.rows import METADATA_KEY
from model_lib.errors import WorkError
from model_lib.io import storage
from tests.helpers.batches import batch_config, file_times, make_plan, read_rows
from tests.helpers.killed import killed
from tests.helpers.services import Faults, faulty_bucket
from tests.helpers.small import small_model

# ---- rows ----------------------------------------------------------------------------------------


def test_every_image_has_one_row_with_a_status(
    odd_images: Path, saved_model: Path, tmp_path: Path
) -> None:
    summary = batch(batch_config(odd_images, tmp_path, saved_model))
    table = pq.read_table(summary.captions)
    names = ["uri", "status", "caption", "score", "error", "width", "height", "bytes", "model"]
    names += ["captioned_at"]
    kinds = ["string"] * 3 + ["float", "string", "int32", "int32", "int64", "string"]
    kinds += ["timestamp[us, tz=UTC]"]
    assert [(f.name, str(f.type)) for f in table.schema] == list(zip(names, kinds, strict=True))
    rows = read_rows(summary)
    assert [row["uri"] for row in rows] == sorted(map(str, odd_images.iterdir()))
    for row in rows:
        assert row["model"] == str(saved_model) and row["bytes"] == Path(row["uri"]).stat().st_size
        if row["status"] == "ok":
            assert row["caption"] is not None and row["error"] is None
            assert row["score"] < 0 and row["width"] > 0
        else:
            assert row["status"] == "error" and row["caption"] is None and row["error"]
    assert summary.images == 26 and summary.ok == 19
    assert summary.errors == {"unreadable": 3, "truncated": 3, "too_large": 1}
    assert json.loads((tmp_path / "latest.json").read_text())["ok"] == 19


def test_captions_are_those_of_the_model_one_by_one(
    scenes: Path, saved_model: Path, tmp_path: Path
) -> None:
    summary = batch(batch_config(scenes / "val2017", tmp_path, saved_model, batch_size=4))
    model = Captioner.from_pretrained(str(saved_model))
    for row in read_rows(summary):
        (alone,) = model.caption([row["uri"]])
        assert row["caption"] == alone.text and row["score"] == pytest.approx(alone.score, abs=1e-4)


def test_a_file_says_how_its_captions_can_be_made_again(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    options = {"top_p": 0.9, "temperature": 1.5, "num_captions": 3, "rank": True, "seed": 7}
    summary = batch(batch_config(images, tmp_path / "out", saved_model, **options))
    (file, *_) = Path(summary.captions).iterdir()
    metadata = json.loads(pq.ParquetFile(file).schema_arrow.metadata[METADATA_KEY])
    again = batch(
        BatchConfig.from_options(**{**metadata["configuration"], "output": str(tmp_path / "again")})
    )
    rows = read_rows(summary)
    for key in ("uri", "captions", "scores"):
        assert [row[key] for row in rows] == [row[key] for row in read_rows(again)]
    assert any(len(set(row["captions"])) > 1 for row in rows)
    for row in rows:
        assert row["scores"] == sorted(row["scores"], reverse=True) and len(row["captions"]) == 3
        assert (row["caption"], row["score"]) == (row["captions"][0], row["scores"][0])


def test_an_image_that_cannot_be_read_has_its_reason(
    images: Path, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = batch_config(images, tmp_path / "out", saved_model, shard_images=20)
    monkeypatch.setattr("model_lib.io.images.LARGEST_FILE", 10_000)
    (images / "big.png").write_bytes(bytes(20_000))
    plan = make_plan(options)
    first, second, third, *_ = sorted(images.glob("0*.jpg"))
    first.unlink()
    shutil.copy(third, second)
    original = storage.read_bytes

    def forbidden(uri: str, *options: object) -> bytes:
        if uri == str(third):
            raise UserError(f"{uri}: cannot be read: Permission denied") from PermissionError(
                13, "Permission denied"
            )
        return original(uri, *options)

    monkeypatch.setattr("model_lib.io.storage.read_bytes", forbidden)  # root may read everything
    caption_planned(plan.reference, 0)
    summary = merge(plan)
    assert summary.errors == {"missing": 1, "changed": 1, "forbidden": 1, "too_large": 1}
    assert (summary.images, summary.ok) == (13, 9)


def test_an_image_removed_while_it_is_read_has_its_row_too(
    images: Path, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = captions_module.read_image

    def reading(uri: str, *options: float, **named: bool) -> bytes:
        content = original(uri, *options, **named)
        if uri.endswith("3.jpg"):
            Path(uri).unlink()
        return content

    monkeypatch.setattr(captions_module, "read_image", reading)
    summary = batch(batch_config(images, tmp_path / "out", saved_model))
    assert (summary.images, summary.ok, summary.errors) == (12, 11, {"changed": 1})


# ---- again ---------------------------------------------------------------------------------------


def test_a_run_that_was_interrupted_does_only_the_missing_shards_again(
    scenes: Path, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = batch_config(scenes / "val2017", tmp_path, saved_model)
    original, calls = Captioner.caption_pixels, []

    def break_off(*arguments: object) -> list[list[Caption]]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(Captioner, "caption_pixels", break_off)
    with pytest.raises(KeyboardInterrupt):
        batch(options)
    (first,) = tmp_path.glob("*/captions/*.parquet")
    before = first.stat().st_mtime_ns
    summary = batch(options)
    assert summary.images == 12 and len(calls) == 4 and first.stat().st_mtime_ns == before
    uris = [row["uri"] for row in read_rows(summary)]
    assert len(uris) == len(set(uris)) == 12


def test_a_second_run_captions_only_what_is_new_or_changed(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    options = batch_config(images, tmp_path / "out", saved_model)
    before = batch(options)
    files, captioned = (
        file_times(before),
        {row["uri"]: row["captioned_at"] for row in read_rows(before)},
    )
    untouched, changed, gone = (
        str(images / f"0000000000{number}.jpg") for number in ("12", "01", "02")
    )
    shutil.copy(images / "000000000003.jpg", images / "new.jpg")
    shutil.copy(images / "000000000004.jpg", changed)
    Path(gone).unlink()
    after = batch(options)
    assert (after.images, after.ok) == (12, 12) and after.captions == before.captions
    again = {
        row["uri"] for row in read_rows(after) if row["captioned_at"] != captioned.get(row["uri"])
    }
    assert again == {changed, str(images / "new.jpg")}
    assert gone not in {row["uri"] for row in read_rows(after)} and untouched in captioned
    kept = {name: time for name, time in file_times(after).items() if name in files}
    assert len(kept) == 2 and kept.items() <= files.items(), "of three files, one lost two rows"
    assert file_times(batch(options)) == file_times(after), "and then nothing is left to do"


def test_an_image_whose_store_failed_is_tried_again(
    images: Path, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, down = (
        batch_config(images, tmp_path / "out", saved_model),
        str(images / "000000000003.jpg"),
    )
    original = storage.read_bytes

    def failing(uri: str, *options: object) -> bytes:
        if uri == down:
            raise WorkError(f"{uri}: cannot be read: ConnectionResetError")
        return original(uri, *options)

    with monkeypatch.context() as patched:
        patched.setattr("model_lib.io.storage.read_bytes", failing)
        for _ in range(3):
            assert batch(options).errors == {"unreachable": 1}
    summary = batch(options)
    assert (summary.images, summary.ok, summary.errors) == (12, 12, {})
    assert len(read_rows(summary)) == 12


def test_images_whose_store_failed_for_all_are_tried_again(
    images: Path, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(uri: str, *_: object, **__: object) -> bytes:
        raise WorkError(f"{uri}: cannot be read: ConnectionResetError")

    options = batch_config(images, tmp_path / "out", saved_model)
    with monkeypatch.context() as patched:
        patched.setattr("model_lib.batch.captions.read_image", failing)
        assert batch(options).errors == {"unreachable": 12}
    assert batch(options).ok == 12


def test_a_missing_image_that_was_added_is_tried_again(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text(f"{images}/000000000001.jpg\n{images}/later.jpg\n")
    options = batch_config(tmp_path / "list.txt", tmp_path / "out", saved_model)
    assert batch(options).errors == {"missing": 1}
    shutil.copy(images / "000000000001.jpg", images / "later.jpg")
    assert batch(options).ok == 2


def test_a_folder_of_a_web_server_is_refused_in_one_line(saved_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a web server lists no folders; name a"):
        batch(batch_config("http://127.0.0.1:9/images/", tmp_path / "out", saved_model))


def test_another_model_or_other_options_are_another_output_and_not_a_mixture(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved_model, tmp_path / "second")
    configs = [
        batch_config(images, tmp_path / "out", saved_model),
        batch_config(images, tmp_path / "out", tmp_path / "second"),
        batch_config(images, tmp_path / "out", saved_model, num_beams=2),
    ]
    summaries = list(map(batch, configs))
    assert len({summary.captions for summary in summaries}) == 3
    assert [summary.images for summary in summaries] == [12, 12, 12]
    assert {row["model"] for row in read_rows(summaries[1])} == {str(tmp_path / "second")}
    latest = json.loads((tmp_path / "out" / "latest.json").read_text())
    assert latest["captions"] == summaries[2].captions


def test_other_weights_in_the_place_of_a_model_are_another_model(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "best"
    shutil.copytree(saved_model, model)
    first = batch(batch_config(images, tmp_path / "out", model))
    plan = make_plan(batch_config(images, tmp_path / "later", model))
    small_model(seed=1).save_pretrained(model)
    second = batch(batch_config(images, tmp_path / "out", model))
    assert second.captions != first.captions
    assert [row["score"] for row in read_rows(first)] != [row["score"] for row in read_rows(second)]
    assert batch(batch_config(images, tmp_path / "out", model)).captions == second.captions
    with pytest.raises(
        UserError, match="best: has changed since the images were planned; start again"
    ):
        caption_planned(plan.reference, 0)


def test_other_images_take_no_captions_place(
    images: Path, scenes: Path, saved_model: Path, tmp_path: Path
) -> None:
    first = batch(batch_config(images, tmp_path / "out", saved_model))
    before = file_times(first)
    other = batch(batch_config(scenes / "val2017", tmp_path / "out", saved_model))
    assert other.captions != first.captions and other.ok == 12 and file_times(first) == before
    assert json.loads((tmp_path / "out" / "latest.json").read_text())["captions"] == other.captions


def test_a_stop_waits_for_no_more_than_one_read_a_thread(
    images: Path, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    go_on = threading.Event()

    def slow(uri: str, *_: object, **__: object) -> bytes:
        reads.append(uri)
        if len(reads) == 1:
            raise KeyboardInterrupt
        go_on.wait(60)
        return Path(uri).read_bytes()

    monkeypatch.setattr("model_lib.batch.captions.read_image", slow)
    with pytest.raises(KeyboardInterrupt):
        batch(batch_config(images, tmp_path / "out", saved_model, workers=2))
    go_on.set()
    assert len(reads) <= 4, "of twelve that were to be read"


# ---- kills and faults, in a bucket ---------------------------------------------------------------


@pytest.fixture()
def bucket(scenes: Path, tmp_path: Path) -> Iterator[tuple[fsspec.AbstractFileSystem, Faults]]:
    """A bucket with 64 images and a broken one, behind a proxy."""
    faults = Faults(0.0, seed=0)
    with faulty_bucket("b", tmp_path / "gcs", faults) as fs:
        fs.put(f"{scenes / 'train2017'}/", "b/in/", recursive=True)
        fs.pipe_file("b/in/broken.jpg", b"no image")
        yield fs, faults


def in_bucket(fs: fsspec.AbstractFileSystem, output: str) -> list[dict]:
    fs.invalidate_cache()
    files = fs.glob(f"b/{output}/*/captions/*.parquet")
    return [row for file in files for row in pq.ParquetFile(fs.open(file)).read().to_pylist()]


def test_one_request_in_twenty_failing_loses_nothing(
    bucket: tuple[fsspec.AbstractFileSystem, Faults], saved_model: Path
) -> None:
    fs, faults = bucket
    faults.share = 0.05
    summary = batch(batch_config("gcs://b/in", "gs://b/out", saved_model, shard_images=10))
    assert faults.failed > 5
    assert (summary.images, summary.ok, summary.errors) == (65, 64, {"unreadable": 1})
    assert len({row["uri"] for row in in_bucket(fs, "out")}) == len(in_bucket(fs, "out")) == 65


@pytest.mark.soak
def test_killed_at_random_moments_each_image_has_one_row(
    bucket: tuple[fsspec.AbstractFileSystem, Faults], saved_model: Path, tmp_path: Path
) -> None:
    fs, _ = bucket
    options = {"images": "gs://b/in", "model": str(saved_model), "shard_images": 4}
    kills = killed("batch", options, "gs://b", seed=0, kills=2)
    assert sum(map(len, kills)) == 2
    for number in range(len(kills)):
        rows = in_bucket(fs, f"killed-{number}")
        assert len(rows) == len({row["uri"] for row in rows}) == 65
        assert sum(row["status"] == "ok" for row in rows) == 64
