"""Captioning a folder: each listed image has one row, also after faults, kills and second runs."""

import io
import json
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from model_lib import Caption, Captioner, UserError
from model_lib.batch import captions as captions_module
from model_lib.batch.batching import batch
from model_lib.batch.captions import caption_part
from model_lib.batch.config import BatchConfig
from model_lib.batch.merging import merge
from model_lib.batch.rows import METADATA_KEY
from model_lib.errors import WorkError
from model_lib.io import storage
from model_lib.model.config import DecodeConfig
from model_lib.scores.cider import consensus
from tests.helpers.batches import batch_config, file_times, make_plan, read_rows
from tests.helpers.killed import killed
from tests.helpers.services import Faults, faulty_bucket
from tests.helpers.small import small_model

FIRST = "000000000001.jpg"

# ---- rows ----------------------------------------------------------------------------------------


def test_every_image_has_one_row_with_a_status(
    odd_images: Path, saved_model: Path, tmp_path: Path
) -> None:
    summary = batch(batch_config(odd_images, tmp_path, saved_model))
    table = pq.read_table(summary.captions)
    schema = (
        "uri string, status string, caption string, score float, error string, width int32, "
        "height int32, bytes int64, model string, captioned_at timestamp[us, tz=UTC]"
    )
    assert ", ".join(f"{field.name} {field.type}" for field in table.schema) == schema
    rows = read_rows(summary)
    assert [row["uri"] for row in rows] == sorted(map(str, odd_images.iterdir()))
    for row in rows:
        assert row["model"] == str(saved_model) and row["bytes"] == Path(row["uri"]).stat().st_size
        if row["status"] == "ok":
            assert row["caption"] is not None and row["error"] is None
            assert row["score"] < 0 and row["width"] > 0
        else:
            assert row["status"] == "error" and row["caption"] is None and row["error"]
    assert summary.images == 26 and summary.ok == 20
    assert summary.errors == {"unreadable": 2, "truncated": 3, "too_large": 1}
    assert json.loads((tmp_path / "latest.json").read_text())["ok"] == 20


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
    options = {"top_p": 0.9, "temperature": 1.5, "num_captions": 3, "seed": 7}
    options |= {"rank": "likelihood"}
    summary = batch(batch_config(images, tmp_path / "out", saved_model, **options))
    (file, *_) = Path(summary.captions).iterdir()
    metadata = json.loads(pq.ParquetFile(file).schema_arrow.metadata[METADATA_KEY])
    config = {**metadata["configuration"], "output": str(tmp_path / "again")}
    again = batch(BatchConfig.from_options(**config))
    rows = read_rows(summary)
    for key in ("uri", "captions", "scores"):
        assert [row[key] for row in rows] == [row[key] for row in read_rows(again)]
    assert any(len(set(row["captions"])) > 1 for row in rows)
    for row in rows:
        assert row["scores"] == sorted(row["scores"], reverse=True) and len(row["captions"]) == 3
        assert (row["caption"], row["score"]) == (row["captions"][0], row["scores"][0])


def test_the_caption_that_agrees_best_with_its_siblings_comes_first(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    options = {"temperature": 1.5, "num_captions": 4, "shard_images": 100}
    drawn = batch(batch_config(images, tmp_path / "drawn", saved_model, **options))
    options["rank"] = "consensus"
    ranked = batch(batch_config(images, tmp_path / "ranked", saved_model, **options))
    rows = [row for row in read_rows(drawn) if row["status"] == "ok"]
    best = consensus([row["captions"] for row in rows])
    chosen = {row["uri"]: row for row in read_rows(ranked)}
    for row, agreement in zip(rows, best, strict=True):
        other = chosen[row["uri"]]
        assert sorted(other["captions"]) == sorted(row["captions"])
        first = row["captions"].index(other["caption"])
        assert agreement[first] == max(agreement) and other["caption"] == other["captions"][0]
        assert other["score"] in other["scores"][:1]
    with pytest.raises(UserError, match="rank consensus: needs several captions"):
        batch_config(images, tmp_path, saved_model, rank="consensus")


def test_an_image_that_cannot_be_read_has_its_reason(
    config: BatchConfig, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_lib.io.images.LARGEST_FILE", 10_000)
    (images / "big.png").write_bytes(bytes(20_000))
    plan = make_plan(replace(config, shard_images=20))
    first, second, third, *_ = sorted(images.glob("0*.jpg"))
    first.unlink()
    shutil.copy(third, second)
    original = storage.read_bytes

    def forbidden(uri: str, *options: object) -> bytes:
        if uri == str(third):  # root may read everything
            raise UserError(f"{uri}: cannot be read") from PermissionError(13, "Permission denied")
        return original(uri, *options)

    monkeypatch.setattr("model_lib.io.storage.read_bytes", forbidden)
    caption_part(plan.reference, 0, 1)
    summary = merge(plan)
    assert summary.errors == {"missing": 1, "changed": 1, "forbidden": 1, "too_large": 1}
    assert (summary.images, summary.ok) == (13, 9)


def test_an_image_removed_while_it_is_read_has_its_row_too(
    config: BatchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = captions_module.read_image

    def reading(uri: str, *options: float, **named: bool) -> bytes:
        content = original(uri, *options, **named)
        if uri.endswith("3.jpg"):
            Path(uri).unlink()
        return content

    monkeypatch.setattr(captions_module, "read_image", reading)
    summary = batch(config)
    assert (summary.images, summary.ok, summary.errors) == (12, 11, {"changed": 1})


# ---- again ---------------------------------------------------------------------------------------


def test_a_run_that_was_interrupted_does_only_the_missing_shards_again(
    config: BatchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Captioner.caption_pixels, []

    def break_off(*arguments: object) -> list[list[Caption]]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(Captioner, "caption_pixels", break_off)
    with pytest.raises(KeyboardInterrupt):
        batch(config)
    (first,) = tmp_path.glob("out/*/captions/*.parquet")
    before = first.stat().st_mtime_ns
    summary = batch(config)
    assert summary.images == 12 and len(calls) == 4 and first.stat().st_mtime_ns == before
    uris = [row["uri"] for row in read_rows(summary)]
    assert len(uris) == len(set(uris)) == 12


def test_a_second_run_captions_only_what_is_new_or_changed(
    config: BatchConfig, images: Path
) -> None:
    before = batch(config)
    files = file_times(before)
    captioned = {row["uri"]: row["captioned_at"] for row in read_rows(before)}
    new, changed, gone = (str(images / name) for name in ("new.jpg", FIRST, "000000000002.jpg"))
    shutil.copy(images / "000000000003.jpg", new)
    shutil.copy(images / "000000000004.jpg", changed)
    Path(gone).unlink()
    after = batch(config)
    assert (after.images, after.ok) == (12, 12) and after.captions == before.captions
    times = {row["uri"]: row["captioned_at"] for row in read_rows(after)}
    assert {uri for uri in times if times[uri] != captioned.get(uri)} == {changed, new}
    assert gone not in times
    kept = {name: time for name, time in file_times(after).items() if name in files}
    assert len(kept) == 2 and kept.items() <= files.items(), "of three files, one lost two rows"
    assert file_times(batch(config)) == file_times(after), "and then nothing is left to do"


@pytest.mark.parametrize("name", ["000000000003.jpg", ""])
def test_an_image_whose_store_failed_is_tried_again(
    config: BatchConfig, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them, and all."""
    original = storage.read_bytes

    def failing(uri: str, *options: object) -> bytes:
        if "/images/" in uri and uri.endswith(name):
            raise WorkError(f"{uri}: cannot be read: ConnectionResetError")
        return original(uri, *options)

    with monkeypatch.context() as patched:
        patched.setattr("model_lib.io.storage.read_bytes", failing)
        for _ in range(2):
            if name:
                assert batch(config).errors == {"unreachable": 1}
                continue
            with pytest.raises(WorkError, match="none of 12 images captioned: unreachable 12; "):
                batch(config)
            assert json.loads((tmp_path / "out/latest.json").read_text())["ok"] == 0
    summary = batch(config)
    assert (summary.images, summary.ok, summary.errors) == (12, 12, {})
    assert len(read_rows(summary)) == 12


def test_a_missing_image_that_was_added_is_tried_again(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text(f"{images}/{FIRST}\n{images}/later.jpg\n")
    config = batch_config(tmp_path / "list.txt", tmp_path / "out", saved_model)
    assert batch(config).errors == {"missing": 1}
    shutil.copy(images / FIRST, images / "later.jpg")
    assert batch(config).ok == 2


def test_other_images_models_or_options_are_another_output_and_not_a_mixture(
    config: BatchConfig, scenes: Path, saved_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved_model, tmp_path / "second")
    first = batch(config)
    before = file_times(first)
    others = [
        replace(config, images=str(scenes / "val2017")),
        replace(config, model=str(tmp_path / "second")),
        replace(config, decode=DecodeConfig(num_beams=2)),
    ]
    summaries = [first, *map(batch, others)]
    assert len({summary.captions for summary in summaries}) == 4
    assert [summary.ok for summary in summaries] == [12, 12, 12, 12]
    assert {row["model"] for row in read_rows(summaries[2])} == {str(tmp_path / "second")}
    assert file_times(first) == before
    latest = json.loads((tmp_path / "out" / "latest.json").read_text())
    assert latest["captions"] == summaries[3].captions


def test_other_weights_in_the_place_of_a_model_are_another_model(
    config: BatchConfig, saved_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved_model, tmp_path / "best")
    config = replace(config, model=str(tmp_path / "best"))
    first = batch(config)
    plan = make_plan(replace(config, output=str(tmp_path / "later")))
    small_model(seed=1).save_pretrained(tmp_path / "best")
    second = batch(config)
    assert second.captions != first.captions
    assert [row["score"] for row in read_rows(first)] != [row["score"] for row in read_rows(second)]
    with pytest.raises(UserError, match="best: has changed since the images were planned; start"):
        caption_part(plan.reference, 0, 1)


def test_a_stop_waits_for_no_more_than_one_read_a_thread(
    config: BatchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    go_on = threading.Event()

    def slow(uri: str, *_: object, **__: object) -> bytes:
        reads.append(uri)
        if len(reads) == 1:
            raise KeyboardInterrupt
        go_on.wait(60)
        return Path(uri).read_bytes()

    monkeypatch.setattr(captions_module, "read_image", slow)
    with pytest.raises(KeyboardInterrupt):
        batch(replace(config, workers=2))
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


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_in_a_bucket_is_captioned_in_place(
    kind: str, bucket: tuple[fsspec.AbstractFileSystem, Faults], scenes: Path, saved_model: Path
) -> None:
    fs, faults = bucket
    content = io.BytesIO()
    files = sorted((scenes / "train2017").iterdir())
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as zipped:
            for file in files:
                zipped.write(file, file.stem)
    else:
        with tarfile.open(fileobj=content, mode="w") as tar:
            for file in files:
                tar.add(file, file.stem)
    fs.pipe_file("b/photos", content.getvalue())
    faults.share = 0.05
    options = {"shard_images": 40, "format": "jsonl"}
    summary = batch(batch_config("gs://b/photos", f"gs://b/{kind}", saved_model, **options))
    assert faults.failed > 2 and (summary.images, summary.ok) == (64, 64)
    rows = in_bucket(fs, kind)
    name = files[0].stem
    assert {row["uri"] for row in rows} > {f"{kind}://{name}::gs://b/photos"}
    fs.invalidate_cache()
    assert fs.cat_file(summary.files[0]).count(b"\n") == 64


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
