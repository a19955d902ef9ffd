"""Ingest of real and of broken images, and of invalid lists."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from model_lib import UserError
from model_lib.data.shards import Manifest, SplitReader, read_manifest
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.ingesting import ingest
from model_lib.io import storage
from model_lib.io.images import decode_image, reduced_size
from model_lib.io.pixels import Preprocessing
from tests.helpers.coco_files import write_captions
from tests.helpers.ingests import ingested, read_quarantine, read_rows


def ingest_files(folder: Path, names: list[str], **options: Any) -> Manifest:
    """Ingest images of a folder, each with a caption, into a folder below."""
    file = write_captions(folder / "captions.json", list(enumerate(names)))
    return ingested(folder / "out", annotations=file, images=folder, **options)


def test_coco_becomes_shards_of_the_designs_schema(coco: Path, tmp_path: Path) -> None:
    manifest = ingested(tmp_path, dataset=coco)
    assert manifest.counts == {"train": 29, "val": 56} and manifest.quarantined == {}
    (shard,) = [s for s in manifest.shards if s.split == "train"]
    table = pq.read_table(tmp_path / shard.uri)
    schema = (
        "image_id int64, file_name string, split string, width int32, height int32, image binary, "
        "captions list<element: string>, sha256 string, source string"
    )
    assert ", ".join(f"{field.name} {field.type}" for field in table.schema) == schema
    truth = json.loads((coco / "annotations" / "captions_train2017.json").read_text())
    for row in table.to_pylist():
        assert min(row["width"], row["height"]) == 256
        assert decode_image(row["image"]).size == (row["width"], row["height"])
        theirs = {
            a["caption"].strip() for a in truth["annotations"] if a["image_id"] == row["image_id"]
        }
        assert set(row["captions"]) == {" ".join(text.split()) for text in theirs}
    assert read_manifest(str(tmp_path)).fingerprint == manifest.fingerprint
    assert pq.read_table(tmp_path / "quarantine.parquet").num_rows == 0


def test_an_unusable_image_is_quarantined_and_the_rest_goes_on(
    scenes: Path, odd_images: Path, tmp_path: Path
) -> None:
    shutil.copy(scenes / "train2017" / "000000000001.jpg", tmp_path / "good.jpg")
    shutil.copy(odd_images / "truncated_jpeg.jpg", tmp_path / "cut.jpg")
    Image.new("RGB", (20, 70_000)).save(tmp_path / "strip.png")  # JPEG cannot hold it
    manifest = ingest_files(
        tmp_path, ["good.jpg", "cut.jpg", "gone.jpg", "strip.png"], split="train"
    )
    assert manifest.counts == {"train": 1}
    reasons = {"cut.jpg": "truncated", "gone.jpg": "missing", "strip.png": "not_storable"}
    assert manifest.quarantined == dict.fromkeys(reasons.values(), 1)
    rows = read_quarantine(manifest)
    assert {row["file_name"]: row["reason"] for row in rows} == reasons


def test_the_same_input_gives_the_same_bytes_whatever_the_workers(
    scenes: Path, tmp_path: Path
) -> None:
    for workers in (1, 4):
        ingested(tmp_path / str(workers), dataset=scenes, workers=workers)
    for file in sorted((tmp_path / "1").glob("*.parquet")):
        assert file.read_bytes() == (tmp_path / "4" / file.name).read_bytes(), file.name


def test_large_data_is_cut_into_shards(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_lib.ingest.ingesting.ROW_GROUP", 8)
    manifest = ingest(IngestConfig(dataset=str(scenes), output=str(tmp_path), shard_images=20))
    assert len([shard for shard in manifest.shards if shard.split == "train"]) > 2
    reader = SplitReader(read_manifest(str(tmp_path)), "train", Preprocessing(16))
    plan = reader.shuffled(7, seed=0, epoch=0, lengths=np.zeros(64))
    image_ids = [i for batch in reader.batches(plan) for i in batch.image_ids]
    assert sorted(image_ids) == list(range(1, 65))


def test_an_ingest_by_mistake_leaves_the_data_set_that_was_there(
    scenes: Path, tmp_path: Path
) -> None:
    annotations, output = scenes / "annotations" / "captions_train2017.json", tmp_path / "out"
    first = ingested(output, annotations=annotations, images=scenes / "train2017")
    assert sum(first.counts.values()) == 64 and 1 <= first.counts["val"] <= 16
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"among 64 rows \(missing: 64\); the first: .*empty/0+1\.jpg: no such"
    ):
        ingested(output, annotations=annotations, images=tmp_path / "empty")
    manifest = read_manifest(str(output))
    assert manifest.fingerprint == first.fingerprint
    assert len(read_rows(manifest)) == 64


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg", "gs://b/x.jpg"]
)
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="outside: 1"):
        ingest_files(tmp_path, [name])
    assert not list((tmp_path / "out").glob("*-0*"))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"images": 1, "annotations": []}',
        '{"images": [{"id": "1", "file_name": "a.jpg"}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1}]}',
        '{"images": [], "annotations": []}',
    ],
)
def test_what_is_not_coco_captions_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "captions.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"captions\.json") as refused:
        ingested(tmp_path / "out", annotations=file, images=tmp_path)
    assert "\n" not in str(refused.value)


def test_an_output_that_cannot_be_written_is_refused(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ingested(tmp_path / "file" / "out", dataset=scenes)


@pytest.mark.parametrize("missing", ["annotations/captions_val2017.json", "val2017"])
def test_a_data_set_without_a_part_is_refused(scenes: Path, tmp_path: Path, missing: str) -> None:
    shutil.copytree(scenes, tmp_path / "set")
    gone = tmp_path / "set" / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(UserError, match=missing):
        ingested(tmp_path / "out", dataset=tmp_path / "set")


def test_images_and_shards_may_be_in_a_bucket(scenes: Path) -> None:
    storage.upload_folder(str(scenes), "memory://bucket/scenes")
    manifest = ingested("memory://bucket/data", dataset="memory://bucket/scenes")
    assert manifest.counts == {"train": 64, "val": 12}
    reader = SplitReader(read_manifest("memory://bucket/data"), "val", Preprocessing(16))
    assert sum(len(batch.image_ids) for batch in reader.batches(reader.in_order(5))) == 12


# ---- what is stored ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "mean", "most"),
    [(256, 2, 3), (60, 2.5, 4.5)],  # photographs decoded whole; and at half their size
)
def test_stored_images_stay_true(
    coco: Path, tmp_path: Path, side: int, mean: float, most: float
) -> None:
    manifest = ingested(tmp_path, dataset=coco, shortest_side=side)
    distances = []
    for row in read_rows(manifest):
        image = ImageOps.exif_transpose(Image.open(row["source"])).convert("RGB")
        size = reduced_size(*image.size, side) if min(image.size) > side else image.size
        truth = image.resize(size, Image.Resampling.BICUBIC)
        kept = np.asarray(Image.open(io.BytesIO(row["image"])), dtype=float)
        distances.append(np.abs(kept - np.asarray(truth, dtype=float)).mean())
    assert len(distances) == 85 and np.mean(distances) <= mean and max(distances) <= most


def test_turned_grey_and_odd_images_are_stored_as_pillow_shows_them(
    odd_images: Path, tmp_path: Path
) -> None:
    names = sorted(file.name for file in odd_images.iterdir() if file.is_file())
    file = write_captions(tmp_path / "c.json", list(enumerate(names)))
    options = {"annotations": file, "images": odd_images, "split": "train", "shortest_side": 64}
    for store in ("reduced", "original"):
        manifest = ingested(tmp_path / "out", store=store, **options)
        rows = read_rows(manifest)
        assert len(rows) + sum(manifest.quarantined.values()) == len(names) and len(rows) > 15
        for row in rows:
            truth = decode_image((odd_images / row["file_name"]).read_bytes())
            side = 64 if store == "reduced" else 10**6
            size = reduced_size(*truth.size, side) if min(truth.size) > side else truth.size
            assert (row["width"], row["height"]) == size, row["file_name"]
            kept = np.asarray(decode_image(row["image"]), dtype=float)
            exact = np.asarray(truth.resize(size, Image.Resampling.BICUBIC))
            assert np.abs(kept - exact).mean() < 6, row["file_name"]


def test_originals_are_kept_to_the_byte_and_still_refused_if_broken(
    coco: Path, odd_images: Path, tmp_path: Path
) -> None:
    shutil.copy(odd_images / "exif_Portrait_8.jpg", tmp_path / "turned.jpg")
    shutil.copy(coco / "val2017" / "000000000802.jpg", tmp_path / "good.jpg")
    shutil.copy(odd_images / "truncated_jpeg.jpg", tmp_path / "cut.jpg")
    names = ["good.jpg", "cut.jpg", "turned.jpg"]
    manifest = ingest_files(tmp_path, names, split="train", store="original")
    assert manifest.quarantined == {"truncated": 1}
    for row in read_rows(manifest):
        assert row["image"] == (tmp_path / row["file_name"]).read_bytes()
    reader = SplitReader(read_manifest(manifest.uri), "train", Preprocessing(16))
    (batch,) = reader.batches(reader.in_order(2))
    upright = decode_image((tmp_path / "turned.jpg").read_bytes())
    assert np.array_equal(batch.pixels[1], Preprocessing(16)(upright))


def test_the_fingerprint_changes_with_content_and_shaping_options_only(
    scenes: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    first = ingested(output, dataset=scenes).fingerprint
    shutil.copytree(scenes, tmp_path / "set")
    assert ingested(tmp_path / "other", dataset=tmp_path / "set", workers=1).fingerprint == first
    fingerprints = {first}
    for option in ({"jpeg_quality": 90}, {"shortest_side": 32}, {"shard_images": 7}):
        fingerprints.add(ingested(output, dataset=scenes, **option).fingerprint)
    original = ingested(output, dataset=scenes, store="original").fingerprint
    assert len({*fingerprints, original}) == 5
    kept = ingested(output, dataset=scenes, store="original", jpeg_quality=3)
    assert kept.fingerprint == original
    lists = tmp_path / "set" / "annotations" / "captions_val2017.json"
    lists.write_text(lists.read_text().replace("a ", "one ", 1))
    changed = ingested(output, dataset=tmp_path / "set").fingerprint
    assert changed not in {*fingerprints, original}


def test_shards_are_read_by_pandas_duckdb_arrow_and_datasets(data: Path, tmp_path: Path) -> None:
    import datasets
    import duckdb
    import pandas as pd
    import pyarrow.dataset

    train = str(data / "train-00000.parquet")
    frame = pd.read_parquet(train)
    assert len(frame) == 64 and Image.open(io.BytesIO(frame["image"][0])).size == (64, 64)
    query = (
        f"select count(*), sum(len(captions)), min(octet_length(image)) from '{data}/t*.parquet'"
    )
    (row,) = duckdb.sql(query).fetchall()
    assert row[0] == 64 and row[1] == frame["captions"].map(len).sum() and row[2] > 100
    assert pyarrow.dataset.dataset(train).count_rows() == 64
    files = {"train": f"{data}/train-*.parquet", "val": f"{data}/val-*.parquet"}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 64, "val": 12}
    first = loaded["train"].cast_column("image", datasets.Image())[0]
    assert first["image"].size == (64, 64) and first["captions"] == list(frame["captions"][0])


def test_shards_of_an_earlier_ingest_are_removed(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "train-00007.parquet").write_bytes(b"old")
    (tmp_path / "mine.parquet").write_bytes(b"kept")
    (tmp_path / ".part-x").write_bytes(b"of a killed one")
    ingested(tmp_path, dataset=scenes)
    shards = ["mine.parquet", "quarantine.parquet", "train-00000.parquet", "val-00000.parquet"]
    assert sorted(os.listdir(tmp_path)) == [".lock", "manifest.json", *shards]
