"""Captions in other formats than Parquet: CSV, JSON lines, text files and COCO's results."""

import csv
import io
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from model_lib import UserError
from model_lib.batch.batching import batch
from model_lib.batch.config import BatchConfig
from model_lib.batch.merging import Summary, merge
from model_lib.batch.rows import FIELDS
from model_lib.data.coco import name_id
from tests.helpers.batches import batch_config, file_times, make_plan, read_rows, write_captions

FIRST = "000000000001.jpg"
ALL = "parquet,csv,jsonl,txt,coco"


def folder_of(summary: Summary) -> Path:
    return Path(summary.captions).parent


def merged(config: BatchConfig, captions: list[str]) -> Path:
    """Return the output of images whose captions are given."""
    plan = make_plan(replace(config, shard_images=100))
    write_captions(plan, 0, [{"caption": caption} for caption in captions])
    return folder_of(merge(plan))


def test_all_formats_hold_what_parquet_does(config: BatchConfig, images: Path) -> None:
    (images / "broken.jpg").write_bytes(b"no image")
    (images / "sub").mkdir()
    shutil.copy(images / FIRST, images / "sub" / "COCO_val2014_000000000042.jpg")
    summary = batch(replace(config, format=ALL))
    folder, rows = folder_of(summary), read_rows(summary)
    names = ("captions.csv", "captions.jsonl", "captions.json", "txt")
    assert summary.files == [str(folder / name) for name in names] and not summary.not_written
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert list(cells[0]) == [name for name, _ in FIELDS]
    for row, cell in zip(rows, sorted(cells, key=lambda cell: cell["uri"]), strict=True):
        for name in ("uri", "status", "caption", "error"):
            assert cell[name] == (row[name] or "")
        assert row["score"] is None or float(cell["score"]) == pytest.approx(row["score"])
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    for row, line in zip(rows, sorted(lines, key=lambda line: line["uri"]), strict=True):
        assert line == {**row, "captioned_at": row["captioned_at"].isoformat()}
    good = {row["uri"]: row["caption"] for row in rows if row["status"] == "ok"}
    results = json.loads((folder / "captions.json").read_text())
    ids = {row["image_id"]: row["caption"] for row in results}
    assert len(results) == len(good) == 13 and {1, 42} < set(ids)
    assert ids[42] == good[f"{images}/sub/COCO_val2014_000000000042.jpg"]
    texts = {str(path.relative_to(folder / "txt")): path for path in folder.rglob("*.txt")}
    expected = {f"{os.path.relpath(uri, images)[:-4]}.txt": good[uri] for uri in good}
    assert {name: path.read_text() for name, path in texts.items()} == expected


def test_another_format_captions_nothing_again(config: BatchConfig, images: Path) -> None:
    first = batch(config)
    before = file_times(first)
    second = batch(replace(config, format="csv, coco"))
    assert file_times(second) == before and second.captions == first.captions
    names = {path.name for path in folder_of(second).glob("captions*.*")}
    assert names == {"captions.csv", "captions.json"}
    (images / FIRST).unlink()
    third = batch(config)
    assert third.files == second.files, "they would hold what is gone"
    assert (folder_of(third) / "captions.csv").read_text().count("\n") == 1 + 11


def test_csv_is_safe_against_formulas_and_whole(config: BatchConfig) -> None:
    formulas = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "＝1", '=HYPERLINK("http://x";"y")']
    plain = ['a "red", cat', "two\nlines", "größe – 日本", "a = b"]
    folder = merged(replace(config, format="csv,jsonl"), [*formulas, *plain])
    content = (folder / "captions.csv").read_bytes()
    assert content.count(b"\r\n") == 14 - 1  # rows end so, by RFC 4180
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    assert [row["caption"] for row in rows] == [*(f"'{text}" for text in formulas), *plain]
    assert {row["score"] for row in rows} == {"-1.5"}, "a number is none"
    lines = (folder / "captions.jsonl").read_text().split("\n")
    assert [json.loads(line)["caption"] for line in lines[:-1]] == [*formulas, *plain]


def test_results_of_coco_have_the_ids_of_ingest_and_each_only_once(
    config: BatchConfig, images: Path
) -> None:
    for number, path in enumerate(sorted(images.iterdir())):
        path.rename(images / f"{'ab'[number % 2]}{number}.jpg")
    for name in ("x", "y"):
        (images / name).mkdir()
        shutil.copy(images / "a0.jpg", images / name / FIRST)
    summary = batch(replace(config, format="coco"))
    results = json.loads((folder_of(summary) / "captions.json").read_text())
    ids = [row["image_id"] for row in results]
    assert len(ids) == len(set(ids)) == 13 and name_id("a0.jpg") in ids and 1 in ids
    assert summary.not_written == {"results of COCO with an image id that another one has": 1}


@pytest.mark.parametrize("store", ["", "memory://"])
def test_texts_lie_beside_their_images_and_others_stay(
    store: str, images: Path, saved_model: Path, tmp_path: Path
) -> None:
    (images / "000000000002.txt").write_text("written by a person")
    shutil.copy(images / FIRST, images / "000000000001.png")  # a second one of that name
    shutil.copy(images / FIRST, images / "t.jpg_large")
    shutil.copy(images / FIRST, images / "phone")
    fs, folder = fsspec.filesystem("memory" if store else "file"), str(images)
    if store:
        folder = f"memory://{tmp_path.name}"
        fs.put(f"{images}/", f"/{tmp_path.name}/", recursive=True)
    options = {"format": "txt", "txt_beside": True}
    for _ in range(2):
        summary = batch(batch_config(folder, tmp_path / "out", saved_model, **options))
        assert (summary.images, summary.ok, summary.files) == (15, 15, [])
        assert summary.not_written == {"text files where another one is": 2}
        captions = {Path(row["uri"]).name: row["caption"] for row in read_rows(summary)}
        texts = {Path(path).stem: fs.cat_file(path).decode() for path in fs.glob(f"{folder}/*.txt")}
        assert texts.pop("000000000002") == "written by a person"
        assert texts.pop("phone") == captions["phone"] and texts.pop("t") == captions["t.jpg_large"]
        assert texts.pop("000000000001") == captions["000000000001.jpg"]
        assert {f"{name}.jpg": text for name, text in texts.items()}.items() <= captions.items()
        assert len(texts) == 10


def test_names_that_lead_elsewhere_stay_in_the_folder_of_texts(
    config: BatchConfig, images: Path, tmp_path: Path
) -> None:
    content = (images / FIRST).read_bytes()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        for name in ("..\\../up.jpg", "/root.jpg", "./a/../b.jpg", "n" * 250):
            zipped.writestr(name, content)
    summary = batch(replace(config, images=str(tmp_path / "x.zip"), format="txt"))
    folder = folder_of(summary) / "txt"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"up.txt", "root.txt", "a/b.txt", "n" * 250 + ".txt"}
    assert summary.ok == 4 and not (tmp_path / "up.txt").exists()
    with pytest.raises(UserError, match=r"x\.zip: no file can be written beside it; leave out"):
        batch(replace(config, images=str(tmp_path / "x.zip"), format="txt", txt_beside=True))


def test_a_name_without_room_for_an_ending_loses_its_text_alone(
    config: BatchConfig, images: Path
) -> None:
    shutil.copy(images / FIRST, images / ("n" * 255))
    summary = batch(replace(config, format="txt"))
    assert summary.ok == 13 and summary.not_written == {"text files that cannot be written": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "parquet,xml"}, "format 'xml': unknown; one of parquet, csv, jsonl, txt, coco"),
        ({"txt_beside": True}, "txt_beside: needs --format txt"),
    ],
)
def test_formats_are_checked_before_anything_else(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        batch_config("i", "o", "m", **options)
