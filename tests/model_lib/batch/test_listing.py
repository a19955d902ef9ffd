"""The images to caption: of folders, stores and lists, by patterns and depth, in shards."""

import os
import shutil
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model_lib import UserError
from model_lib.batch.batching import batch
from tests.helpers.batches import batch_config, file_times, make_plan


def listed(*arguments: object, **options: object) -> list[str]:
    plan = make_plan(batch_config(*arguments, **options))  # type: ignore[arg-type]
    return [
        Path(image.uri).name for index in range(len(plan.shards)) for image in plan.images(index)
    ]


def test_patterns_and_depth_choose_what_is_captioned(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    (images / "deep").mkdir()
    shutil.copy(images / "000000000001.jpg", images / "deep" / "x.jpg")
    shutil.copy(images / "000000000001.jpg", images / "y.png")
    (images / "notes.md").write_text("no image")
    everything = (images, tmp_path / "out", saved_model)
    assert len(listed(*everything)) == 14
    assert listed(*everything, include=("*.png", "deep/*")) == ["x.jpg", "y.png"]
    assert len(listed(*everything, exclude=("0*",))) == 2
    assert "x.jpg" not in listed(*everything, recursive=False)
    with pytest.raises(UserError, match=r"no images in it .*; look at --include and --exclude"):
        listed(*everything, include=("*.tif",))


@pytest.mark.parametrize("kind", ["txt", "csv", "headless.csv", "parquet"])
def test_a_list_of_images_is_captioned_too(
    kind: str, images: Path, saved_model: Path, tmp_path: Path
) -> None:
    names = [
        "000000000001.jpg",
        "images/gone.jpg",
        str(images / "000000000003.jpg"),
        "000000000001.jpg",
    ]
    names[0] = names[3] = f"images/{names[0]}"
    file = tmp_path / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"id": [1, 2, 3, 4], "uri": names}), file)
    elif kind == "csv":
        file.write_text(
            "id,uri\n" + "".join(f"{number},{name}\n" for number, name in enumerate(names))
        )
    else:
        file.write_text("\n".join(names) + "\n\n")
    summary = batch(batch_config(file, tmp_path / "out", saved_model))
    assert (summary.images, summary.ok, summary.errors) == (3, 2, {"missing": 1})


def test_the_column_of_images_is_known_by_its_heading(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "list.csv"
    file.write_text("label,filename\nx,images/000000000001.jpg\n")
    assert listed(file, tmp_path / "out", saved_model) == ["000000000001.jpg"]
    file.write_text("images/000000000001.jpg,x\n")
    assert listed(file, tmp_path / "other", saved_model) == ["000000000001.jpg"]
    file.write_text("path,filename\n/far/b.jpg,b.jpg\n")
    assert (
        make_plan(batch_config(file, tmp_path / "third", saved_model)).images(0)[0].uri
        == "/far/b.jpg"
    )
    file.write_text("gs://bucket/objects/123,x\n")
    assert listed(file, tmp_path / "fourth", saved_model) == ["123"]
    file.write_text("photo,label\nimages/000000000001.jpg,x\n")
    with pytest.raises(UserError, match="which column is it\\? head it with one of uri, file"):
        listed(file, tmp_path / "out", saved_model)


def test_shards_are_bounded_by_count_and_by_bytes(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    for number in range(4):
        (images / f"big-{number}.jpg").write_bytes(bytes(600_000))
    plan = make_plan(batch_config(images, tmp_path / "out", saved_model, shard_mb=1))
    assert [shard.images for shard in plan.shards] == [5, 5, 3, 1, 1, 1]
    assert [len(plan.images(index)) for index in range(6)] == [5, 5, 3, 1, 1, 1]


def test_an_output_inside_the_images_is_not_captioned(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    (images / "out").mkdir()
    shutil.copy(images / "000000000001.jpg", images / "out" / "x.jpg")
    assert len(listed(images, images / "out", saved_model)) == 12
    assert len(listed(images, tmp_path / "o", saved_model)) == 13


@pytest.mark.parametrize("above", ["the folder above", "the same folder"])
def test_an_output_around_the_images_hides_none(
    above: str, images: Path, saved_model: Path
) -> None:
    output = images.parent if above == "the folder above" else images
    assert len(listed(images, output, saved_model)) == 12
    summary = batch(batch_config(images, output, saved_model))
    assert summary.ok == 12 and len(listed(images, output, saved_model)) == 12


def test_links_stand_for_their_images_and_folders(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    first, second, *_ = sorted(images.iterdir())
    os.utime(first, (1, 1))  # a link is younger than its image
    (links / "a.jpg").symlink_to(first)
    (links / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (links / "folder").symlink_to(images)
    (images / "round").symlink_to(links)  # and so on, without an end
    (images / "itself").symlink_to(images)
    summary = batch(batch_config(links, tmp_path / "out", saved_model))
    assert (summary.images, summary.ok, summary.errors) == (14, 13, {"missing": 1})
    before = file_times(summary)
    first.write_bytes(second.read_bytes())
    again = batch(batch_config(links, tmp_path / "out", saved_model))
    assert again.ok == 13 and file_times(again) != before, "what a link leads to has changed"


def test_a_store_that_its_driver_names_otherwise_is_listed_and_captioned_all_the_same(
    scenes: Path, saved_model: Path, tmp_path: Path
) -> None:
    # memory://shown to a user is memory:///shown to its driver, as gcs:// is gs://.
    fs = fsspec.filesystem("memory")
    for name in ("shown/a.jpg", "shown/out/x.jpg"):
        fs.pipe_file(f"/{name}", (scenes / "val2017" / "000000000001.jpg").read_bytes())
    assert listed("memory://shown", "memory://shown/out", saved_model) == ["a.jpg"]
    summary = batch(batch_config("memory://shown", tmp_path, saved_model))
    assert (summary.images, summary.ok) == (2, 2)


def test_a_folder_that_cannot_be_listed_ends_the_run_and_takes_no_rows(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    options = batch_config(images, tmp_path / "out", saved_model)
    summary = batch(options)
    before = file_times(summary)
    # Root may read everything, but no path that is longer than the system allows.
    folder = os.open(images, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=folder)
        parent, folder = folder, os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(parent)
    os.close(folder)
    (images / "000000000003.jpg").unlink()
    with pytest.raises(UserError, match="images: cannot be listed: File name too long"):
        batch(options)
    assert file_times(summary) == before


def test_no_images_or_no_folder_is_refused(tmp_path: Path, saved_model: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        batch(batch_config(tmp_path / "gone", tmp_path / "out", saved_model))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        batch(batch_config(tmp_path / "empty", tmp_path / "out", saved_model))
    with pytest.raises(UserError, match=r"typo"):
        batch(batch_config(tmp_path / "empty", tmp_path / "out", Path("./typo")))
