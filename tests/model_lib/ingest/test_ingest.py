"""Ingest of real and of broken images, and of invalid lists."""

import io
import json
import os
import shutil
from dataclasses import replace
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


def ingest_files(folder: Path, annotations: Path, **options: Any) -> Manifest:
    """Ingest images of a folder into a folder below."""
    sources = {"annotations": str(annotations), "images": str(folder)}
    return ingest(IngestConfig(**sources, output=str(folder / "out"), **options))


def test_coco_becomes_shards_of_the_designs_schema(coco: Path, tmp_path: Path) -> None:
    manifest = ingest(IngestConfig(dataset=str(coco), output=str(tmp_path)))
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


def test_a_broken_image_is_quarantined_and_the_rest_goes_on(
    scenes: Path, odd_images: Path, tmp_path: Path
) -> None:
    shutil.copy(scenes / "train2017" / "000000000001.jpg", tmp_path / "good.jpg")
    shutil.copy(odd_images / "truncated_jpeg.jpg", tmp_path / "cut.jpg")
    names = [(1, "good.jpg"), (2, "cut.jpg"), (3, "gone.jpg"), (4, "good.jpg")]
    file = write_captions(tmp_path / "c.json", names, [(1, "a scene"), (2, "cut"), (3, "gone")])
    manifest = ingest_files(tmp_path, file, split="train")
    assert manifest.counts == {"train": 1}
    assert manifest.quarantined == {"truncated": 1, "missing": 1, "no_captions": 1}
    rows = {
        row["file_name"]: row
        for row in pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    }
    assert rows["cut.jpg"]["reason"] == "truncated" and rows["gone.jpg"]["reason"] == "missing"


def test_an_image_that_jpeg_cannot_hold_is_quarantined(scenes: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 70_000)).save(tmp_path / "strip.png")
    shutil.copy(scenes / "train2017" / "000000000001.jpg", tmp_path / "good.jpg")
    file = write_captions(tmp_path / "c.json", [(1, "strip.png"), (2, "good.jpg")])
    manifest = ingest_files(tmp_path, file, split="train")
    assert manifest.counts == {"train": 1} and manifest.quarantined == {"not_storable": 1}


def test_the_same_input_gives_the_same_bytes_whatever_the_workers(
    scenes: Path, tmp_path: Path
) -> None:
    for workers in (1, 4):
        ingest(
            IngestConfig(
                dataset=str(scenes),
                output=str(tmp_path / str(workers)),
                workers=workers,
                shard_mb=1,
            )
        )
    for file in sorted((tmp_path / "1").glob("*.parquet")):
        assert file.read_bytes() == (tmp_path / "4" / file.name).read_bytes(), file.name
    fingerprints = {read_manifest(str(tmp_path / n)).fingerprint for n in ("1", "4")}
    ingest(IngestConfig(dataset=str(scenes), output=str(tmp_path / "other"), jpeg_quality=80))
    shutil.copytree(scenes, tmp_path / "moved")
    ingest(
        IngestConfig(dataset=str(tmp_path / "moved"), output=str(tmp_path / "again"), shard_mb=1)
    )
    fingerprints.add(read_manifest(str(tmp_path / "again")).fingerprint)
    assert (
        len(fingerprints) == 1
        and read_manifest(str(tmp_path / "other")).fingerprint not in fingerprints
    )


def test_large_data_is_cut_into_shards(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_lib.ingest.ingesting.ROW_GROUP", 8)
    config = IngestConfig(dataset=str(scenes), output=str(tmp_path), shard_mb=1)
    object.__setattr__(config, "shard_mb", 0.02)  # 64 small images do not fill a whole MB
    manifest = ingest(config)
    assert len([shard for shard in manifest.shards if shard.split == "train"]) > 2
    reader = SplitReader(read_manifest(str(tmp_path)), "train", Preprocessing(16))
    plan = reader.shuffled(7, seed=0, epoch=0, lengths=np.zeros(64))
    assert sorted(i for batch in reader.batches(plan) for i in batch.image_ids) == list(
        range(1, 65)
    )


def test_lone_annotations_keep_some_images_for_validation(scenes: Path, tmp_path: Path) -> None:
    annotations, images = scenes / "annotations" / "captions_train2017.json", scenes / "train2017"
    manifest = ingest(
        IngestConfig(annotations=str(annotations), images=str(images), output=str(tmp_path))
    )
    assert (
        manifest.counts["train"] + manifest.counts["val"] == 64
        and 1 <= manifest.counts["val"] <= 16
    )


def test_an_ingest_by_mistake_leaves_the_data_set_that_was_there(
    scenes: Path, tmp_path: Path
) -> None:
    annotations, output = scenes / "annotations" / "captions_train2017.json", str(tmp_path / "out")
    first = ingest(
        IngestConfig(annotations=str(annotations), images=str(scenes / "train2017"), output=output)
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no usable image among 64 listed"):
        ingest(
            IngestConfig(
                annotations=str(annotations), images=str(tmp_path / "empty"), output=output
            )
        )
    assert read_manifest(output).fingerprint == first.fingerprint
    assert all(storage.exists(shard.uri) for shard in read_manifest(output).shards)


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg", "gs://b/x.jpg"]
)
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    file = write_captions(tmp_path / "c.json", [(1, name)])
    with pytest.raises(UserError, match="leaves the image folder"):
        ingest_files(tmp_path, file)
    assert not (tmp_path / "out").exists()


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
        ingest_files(tmp_path, file)
    assert "\n" not in str(refused.value)


def test_no_usable_image_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    file = write_captions(tmp_path / "c.json", [(1, "a.jpg")])
    with pytest.raises(UserError, match=r"no usable image among 1 listed \(unreadable: 1\)"):
        ingest_files(tmp_path, file)


def test_an_output_that_cannot_be_written_is_refused(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ingest(IngestConfig(dataset=str(scenes), output=str(tmp_path / "file" / "out")))


@pytest.mark.parametrize("missing", ["annotations/captions_val2017.json", "val2017"])
def test_a_data_set_without_a_part_is_refused(scenes: Path, tmp_path: Path, missing: str) -> None:
    shutil.copytree(scenes, tmp_path / "set")
    gone = tmp_path / "set" / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(UserError, match=missing):
        ingest(IngestConfig(dataset=str(tmp_path / "set"), output=str(tmp_path / "out")))


def test_images_and_shards_may_be_in_a_bucket(scenes: Path) -> None:
    storage.upload_folder(str(scenes), "memory://bucket/scenes")
    manifest = ingest(IngestConfig(dataset="memory://bucket/scenes", output="memory://bucket/data"))
    assert manifest.counts == {"train": 64, "val": 12}
    reader = SplitReader(read_manifest("memory://bucket/data"), "val", Preprocessing(16))
    assert sum(len(batch.image_ids) for batch in reader.batches(reader.in_order(5))) == 12


# ---- what is stored ------------------------------------------------------------------------------


def stored(manifest: Manifest) -> list[dict]:
    return [
        row for s in read_manifest(manifest.uri).shards for row in pq.read_table(s.uri).to_pylist()
    ]


def test_stored_images_stay_true(coco: Path, tmp_path: Path) -> None:
    manifest = ingest(IngestConfig(dataset=str(coco), output=str(tmp_path)))
    distances = []
    for row in stored(manifest):
        image = ImageOps.exif_transpose(Image.open(row["source"])).convert("RGB")
        size = reduced_size(*image.size, 256) if min(image.size) > 256 else image.size
        truth = image.resize(size, Image.Resampling.BICUBIC)
        kept = np.asarray(Image.open(io.BytesIO(row["image"])), dtype=float)
        distances.append(np.abs(kept - np.asarray(truth, dtype=float)).mean())
    assert len(distances) == 85 and np.mean(distances) <= 2 and max(distances) <= 3


def test_turned_grey_and_odd_images_are_stored_as_pillow_shows_them(
    odd_images: Path, tmp_path: Path
) -> None:
    names = sorted(file.name for file in odd_images.iterdir() if file.is_file())
    file = write_captions(tmp_path / "c.json", list(enumerate(names)))
    config = IngestConfig(
        annotations=str(file), images=str(odd_images), output=str(tmp_path / "out"), split="train"
    )
    for store in ("reduced", "original"):
        manifest = ingest(replace(config, store=store, shortest_side=64))
        rows = stored(manifest)
        assert len(rows) + sum(manifest.quarantined.values()) == len(names) and len(rows) > 15
        for row in rows:
            truth = decode_image((odd_images / row["file_name"]).read_bytes())
            side = 64 if store == "reduced" else 10**6
            size = reduced_size(*truth.size, side) if min(truth.size) > side else truth.size
            assert (row["width"], row["height"]) == size, row["file_name"]
            kept = decode_image(row["image"])
            exact = truth.resize(size, Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(kept, dtype=float) - np.asarray(exact)).mean() < 6, row[
                "file_name"
            ]


def test_originals_are_kept_to_the_byte_and_still_refused_if_broken(
    coco: Path, odd_images: Path, tmp_path: Path
) -> None:
    shutil.copy(odd_images / "exif_Portrait_8.jpg", tmp_path / "turned.jpg")
    shutil.copy(coco / "val2017" / "000000000802.jpg", tmp_path / "good.jpg")
    shutil.copy(odd_images / "truncated_jpeg.jpg", tmp_path / "cut.jpg")
    names = ["good.jpg", "cut.jpg", "turned.jpg"]
    file = write_captions(tmp_path / "c.json", list(enumerate(names)))
    manifest = ingest_files(tmp_path, file, split="train", store="original")
    assert manifest.quarantined == {"truncated": 1}
    for row in stored(manifest):
        assert row["image"] == (tmp_path / row["file_name"]).read_bytes()
    reader = SplitReader(read_manifest(manifest.uri), "train", Preprocessing(16))
    (batch,) = reader.batches(reader.in_order(2))
    upright = decode_image((tmp_path / "turned.jpg").read_bytes())
    assert np.array_equal(batch.pixels[1], Preprocessing(16)(upright))


def test_the_fingerprint_changes_with_content_and_shaping_options_only(
    scenes: Path, tmp_path: Path
) -> None:
    base = IngestConfig(dataset=str(scenes), output=str(tmp_path / "out"))
    first = ingest(base).fingerprint
    for same in ({"workers": 1}, {"output": str(tmp_path / "other")}):
        assert ingest(replace(base, **same)).fingerprint == first
    seen = {first}
    for other in (
        {"jpeg_quality": 90},
        {"shortest_side": 32},
        {"shard_mb": 7},
        {"store": "original"},
    ):
        seen.add(ingest(replace(base, **other)).fingerprint)
    kept = ingest(replace(base, store="original", jpeg_quality=3)).fingerprint
    assert kept in seen and len(seen) == 5
    shutil.copytree(scenes, tmp_path / "set")
    lists = tmp_path / "set" / "annotations" / "captions_val2017.json"
    lists.write_text(lists.read_text().replace("a ", "one ", 1))
    assert ingest(replace(base, dataset=str(tmp_path / "set"))).fingerprint not in seen


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
    ingest(IngestConfig(dataset=str(scenes), output=str(tmp_path)))
    assert sorted(os.listdir(tmp_path)) == [
        ".lock",
        "manifest.json",
        "mine.parquet",
        "quarantine.parquet",
        "train-00000.parquet",
        "val-00000.parquet",
    ]
