"""Captioning a folder: one row for each picture listed, whatever is wrong with some, killed or not."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from model_lib import UserError
from model_lib import batch as batch_module
from model_lib.batch import batch, begin, caption_planned, merge, plan, read_plan, shard_uri
from model_lib.config import BatchConfig


def config(images: Path, output: Path, model: Path, **options: object) -> BatchConfig:
    return BatchConfig(images=str(images), output=str(output), model=str(model), **{"shard_pictures": 5, **options})


def rows(output: Path) -> list[dict]:
    return [row for file in sorted((output / "captions").iterdir()) for row in pq.read_table(file).to_pylist()]


def test_every_picture_has_one_row_with_a_status(odd_images: Path, saved_model: Path, tmp_path: Path) -> None:
    summary = batch(config(odd_images, tmp_path, saved_model))
    table = pq.read_table(tmp_path / "captions")
    names = ["uri", "status", "caption", "score", "error", "width", "height", "bytes", "model", "captioned_at"]
    kinds = ["string"] * 3 + ["float", "string", "int32", "int32", "int64", "string", "timestamp[us, tz=UTC]"]
    assert [(f.name, str(f.type)) for f in table.schema] == list(zip(names, kinds, strict=True))
    assert [row["uri"] for row in rows(tmp_path)] == sorted(str(file) for file in odd_images.iterdir())
    for row in rows(tmp_path):
        assert row["model"] == str(saved_model) and row["bytes"] == Path(row["uri"]).stat().st_size
        if row["status"] == "ok":
            assert row["caption"] is not None and row["score"] < 0 and row["error"] is None and row["width"] > 0
        else:
            assert row["status"] == "error" and row["caption"] is None and row["error"]
    assert summary.pictures == 26 and summary.ok == 19
    assert summary.errors == {"unreadable": 3, "truncated": 3, "too_large": 1}
    assert json.loads((tmp_path / "summary.json").read_text())["ok"] == 19


def test_captions_are_those_of_the_model_one_by_one(scenes: Path, saved_model: Path, tmp_path: Path) -> None:
    from model_lib import Captioner

    batch(config(scenes / "val2017", tmp_path, saved_model, batch_size=4))
    model = Captioner.from_pretrained(str(saved_model))
    for row in rows(tmp_path):
        (alone,) = model.caption([row["uri"]])
        assert row["caption"] == alone.text and row["score"] == pytest.approx(alone.score, abs=1e-4)


def test_broken_off_and_started_again_only_the_missing_is_done(
    scenes: Path, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(scenes / "val2017", tmp_path, saved_model)
    original, calls = batch_module._captioned, []

    def break_off(*arguments: object) -> Iterator[dict]:
        calls.append(arguments)
        for number, row in enumerate(original(*arguments)):
            if len(calls) == 2 and number == 1:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(batch_module, "_captioned", break_off)
    with pytest.raises(KeyboardInterrupt):
        batch(options)
    first = Path(shard_uri(str(tmp_path), 0)).stat().st_mtime_ns
    assert batch(options).pictures == 12
    assert Path(shard_uri(str(tmp_path), 0)).stat().st_mtime_ns == first
    uris = [row["uri"] for row in rows(tmp_path)]
    assert len(uris) == len(set(uris)) == 12


def test_changed_pictures_or_options_make_the_output_anew(scenes: Path, saved_model: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes / "val2017", tmp_path / "pictures")
    made = [plan(config(tmp_path / "pictures", tmp_path / "out", saved_model)).identity]
    batch(config(tmp_path / "pictures", tmp_path / "out", saved_model))
    shutil.copy(tmp_path / "pictures" / "000000000001.jpg", tmp_path / "pictures" / "new.jpg")
    assert batch(config(tmp_path / "pictures", tmp_path / "out", saved_model)).pictures == 13
    made.append(plan(config(tmp_path / "pictures", tmp_path / "out", saved_model)).identity)
    with_beams = config(tmp_path / "pictures", tmp_path / "out", saved_model, num_beams=2)
    made.append(plan(with_beams).identity)
    assert len(set(made)) == 3
    assert begin(plan(with_beams), with_beams.output) == [0, 1, 2]
    assert not (tmp_path / "out" / "captions").exists()


def test_a_mistyped_model_leaves_finished_captions_alone(scenes: Path, saved_model: Path, tmp_path: Path) -> None:
    batch(config(scenes / "val2017", tmp_path, saved_model))
    before = rows(tmp_path)
    with pytest.raises(UserError, match="typo"):
        batch(config(scenes / "val2017", tmp_path, Path("./typo")))
    assert rows(tmp_path) == before


def test_a_folder_of_somebody_elses_captions_is_not_touched(scenes: Path, saved_model: Path, tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not from captioner batch"):
        batch(config(scenes / "val2017", tmp_path, saved_model))
    assert (tmp_path / "captions" / "mine.txt").read_text() == "precious"


def test_an_output_inside_the_pictures_is_not_captioned(scenes: Path, saved_model: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes / "val2017", tmp_path / "pictures")
    (tmp_path / "pictures" / "out").mkdir()
    shutil.copy(tmp_path / "pictures" / "000000000001.jpg", tmp_path / "pictures" / "out" / "x.jpg")
    assert len(plan(config(tmp_path / "pictures", tmp_path / "pictures" / "out", saved_model)).shards[0]) == 5
    assert sum(map(len, plan(config(tmp_path / "pictures", tmp_path / "o", saved_model)).shards)) == 13
    assert sum(map(len, plan(config(tmp_path / "pictures", tmp_path / "pictures" / "out", saved_model)).shards)) == 12


def test_no_pictures_or_no_folder_is_refused(tmp_path: Path, saved_model: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        batch(config(tmp_path / "gone", tmp_path / "out", saved_model))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        batch(config(tmp_path / "empty", tmp_path / "out", saved_model))


def test_planned_captioned_and_merged_apart_is_the_same_as_at_once(
    scenes: Path, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the pipeline does it: each step knows only the output and the number of its shard."""
    whole = batch(config(scenes / "val2017", tmp_path / "whole", saved_model))
    apart = config(scenes / "val2017", tmp_path / "apart", saved_model)
    for index in begin(plan(apart), apart.output):
        caption_planned(apart.output, index)
    summary = merge(read_plan(apart.output))
    assert (summary.pictures, summary.ok) == (whole.pictures, whole.ok) == (12, 12)
    captions = [[row["caption"] for row in rows(tmp_path / name)] for name in ("whole", "apart")]
    assert captions[0] == captions[1]

    monkeypatch.setattr(batch_module, "load_model", None)  # a shard that is there needs no model
    caption_planned(apart.output, 0)
    with pytest.raises(UserError, match=r"gone/plan\.json: no such file"):
        caption_planned(str(tmp_path / "gone"), 0)
