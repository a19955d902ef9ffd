"""What is listed to be captioned: folders, stores and lists, by patterns and depth, in shards; all, or an error."""

import os
import shutil
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model_lib import UserError
from model_lib.batch.batching import batch
from model_lib.errors import WorkError
from tests.model_lib.batch.test_batch import config, planned, written


def listed(*arguments: object, **options: object) -> list[str]:
    made = planned(config(*arguments, **options))  # type: ignore[arg-type]
    return [Path(picture.uri).name for index in range(len(made.shards)) for picture in made.pictures(index)]


def test_patterns_and_depth_choose_what_is_captioned(pictures: Path, saved_model: Path, tmp_path: Path) -> None:
    (pictures / "deep").mkdir()
    shutil.copy(pictures / "000000000001.jpg", pictures / "deep" / "x.jpg")
    shutil.copy(pictures / "000000000001.jpg", pictures / "y.png")
    (pictures / "notes.md").write_text("no picture")
    everything = (pictures, tmp_path / "out", saved_model)
    assert len(listed(*everything)) == 14
    assert listed(*everything, include=("*.png", "deep/*")) == ["x.jpg", "y.png"]
    assert len(listed(*everything, exclude=("0*",))) == 2
    assert "x.jpg" not in listed(*everything, recursive=False)
    with pytest.raises(UserError, match=r"no pictures in it .*; look at --include and --exclude"):
        listed(*everything, include=("*.tif",))


@pytest.mark.parametrize("kind", ["txt", "csv", "headless.csv", "parquet"])
def test_a_list_of_pictures_is_captioned_too(kind: str, pictures: Path, saved_model: Path, tmp_path: Path) -> None:
    names = ["000000000001.jpg", "pictures/gone.jpg", str(pictures / "000000000003.jpg"), "000000000001.jpg"]
    names[0] = names[3] = f"pictures/{names[0]}"
    file = tmp_path / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"id": [1, 2, 3, 4], "uri": names}), file)
    elif kind == "csv":
        file.write_text("id,uri\n" + "".join(f"{number},{name}\n" for number, name in enumerate(names)))
    else:
        file.write_text("\n".join(names) + "\n\n")
    summary = batch(config(file, tmp_path / "out", saved_model))
    assert (summary.pictures, summary.ok, summary.errors) == (3, 2, {"missing": 1})


def test_a_table_says_in_which_column_its_pictures_are(pictures: Path, saved_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("label,filename\nx,pictures/000000000001.jpg\n")
    assert listed(file, tmp_path / "out", saved_model) == ["000000000001.jpg"]
    file.write_text("pictures/000000000001.jpg,x\n")
    assert listed(file, tmp_path / "other", saved_model) == ["000000000001.jpg"]
    file.write_text("path,filename\n/far/b.jpg,b.jpg\n")
    assert planned(config(file, tmp_path / "third", saved_model)).pictures(0)[0].uri == "/far/b.jpg"
    file.write_text("gs://bucket/objects/123,x\n")
    assert listed(file, tmp_path / "fourth", saved_model) == ["123"]
    file.write_text("photo,label\npictures/000000000001.jpg,x\n")
    with pytest.raises(UserError, match="which column is it\\? head it with one of uri, file"):
        listed(file, tmp_path / "out", saved_model)


def test_shards_are_bounded_by_count_and_by_bytes(pictures: Path, saved_model: Path, tmp_path: Path) -> None:
    for number in range(4):
        (pictures / f"big-{number}.jpg").write_bytes(bytes(600_000))
    made = planned(config(pictures, tmp_path / "out", saved_model, shard_mb=1))
    assert [shard.pictures for shard in made.shards] == [5, 5, 3, 1, 1, 1]
    assert [len(made.pictures(index)) for index in range(6)] == [5, 5, 3, 1, 1, 1]


def test_an_output_inside_the_pictures_is_not_captioned(pictures: Path, saved_model: Path, tmp_path: Path) -> None:
    (pictures / "out").mkdir()
    shutil.copy(pictures / "000000000001.jpg", pictures / "out" / "x.jpg")
    assert len(listed(pictures, pictures / "out", saved_model)) == 12
    assert len(listed(pictures, tmp_path / "o", saved_model)) == 13


@pytest.mark.parametrize("above", ["the folder above", "the same folder"])
def test_an_output_around_the_pictures_hides_none(above: str, pictures: Path, saved_model: Path) -> None:
    output = pictures.parent if above == "the folder above" else pictures
    assert len(listed(pictures, output, saved_model)) == 12
    summary = batch(config(pictures, output, saved_model))
    assert summary.ok == 12 and len(listed(pictures, output, saved_model)) == 12


def test_links_stand_for_their_pictures_and_folders(pictures: Path, saved_model: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    first, second, *_ = sorted(pictures.iterdir())
    os.utime(first, (1, 1))  # a link is younger than its picture
    (links / "a.jpg").symlink_to(first)
    (links / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (links / "folder").symlink_to(pictures)
    (pictures / "round").symlink_to(links)  # and so on, without an end
    (pictures / "itself").symlink_to(pictures)
    summary = batch(config(links, tmp_path / "out", saved_model))
    assert (summary.pictures, summary.ok, summary.errors) == (14, 13, {"missing": 1})
    before = written(summary)
    first.write_bytes(second.read_bytes())
    again = batch(config(links, tmp_path / "out", saved_model))
    assert again.ok == 13 and written(again) != before, "what a link leads to has changed"


def test_a_store_that_its_driver_names_otherwise_is_listed_and_captioned_all_the_same(
    scenes: Path, saved_model: Path, tmp_path: Path
) -> None:
    fs = fsspec.filesystem("memory")  # memory://shown to a user is memory:///shown to its driver, as gcs:// is gs://
    for name in ("shown/a.jpg", "shown/out/x.jpg"):
        fs.pipe_file(f"/{name}", (scenes / "val2017" / "000000000001.jpg").read_bytes())
    assert listed("memory://shown", "memory://shown/out", saved_model) == ["a.jpg"]
    summary = batch(config("memory://shown", tmp_path, saved_model))
    assert (summary.pictures, summary.ok) == (2, 2)


def test_a_folder_that_cannot_be_listed_ends_the_run_and_takes_no_rows(
    pictures: Path, saved_model: Path, tmp_path: Path
) -> None:
    options = config(pictures, tmp_path / "out", saved_model)
    before = written(batch(options))
    place = os.open(pictures, os.O_RDONLY)
    for _ in range(20):  # root may read everything, but no path that is longer than the system takes
        os.mkdir("d" * 250, dir_fd=place)
        above, place = place, os.open("d" * 250, os.O_RDONLY, dir_fd=place)
        os.close(above)
    os.close(place)
    (pictures / "000000000003.jpg").unlink()
    with pytest.raises(WorkError, match=r"ddd: cannot be listed: File name too long; let it be read, and start again"):
        batch(options)
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*/captions/*")} == before


def test_no_pictures_or_no_folder_is_refused(tmp_path: Path, saved_model: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        batch(config(tmp_path / "gone", tmp_path / "out", saved_model))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        batch(config(tmp_path / "empty", tmp_path / "out", saved_model))
    with pytest.raises(UserError, match=r"typo"):
        batch(config(tmp_path / "empty", tmp_path / "out", Path("./typo")))
