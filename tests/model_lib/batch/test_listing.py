"""The images to caption: of folders, stores and lists, by patterns and depth, in shards."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model_lib import UserError
from model_lib.batch.batching import batch
from model_lib.batch.config import BatchConfig
from tests.helpers.batches import batch_config, file_times, make_plan, read_rows

FIRST = "000000000001.jpg"


def listed(config: BatchConfig, **changes: object) -> list[str]:
    """Return the names of the images that are planned."""
    plan = make_plan(replace(config, **changes))  # type: ignore[arg-type]
    images = [image for index in range(len(plan.shards)) for image in plan.images(index)]
    return [Path(image.uri).name for image in images]


def test_patterns_and_depth_choose_what_is_captioned(config: BatchConfig, images: Path) -> None:
    (images / "deep").mkdir()
    shutil.copy(images / FIRST, images / "deep" / "x.jpg")
    shutil.copy(images / FIRST, images / "y.png")
    (images / "notes.md").write_text("no image")
    assert len(listed(config)) == 14
    assert listed(config, include=("*.png", "deep/*")) == ["x.jpg", "y.png"]
    assert len(listed(config, exclude=("0*",))) == 2
    assert "x.jpg" not in listed(config, recursive=False)
    with pytest.raises(UserError, match=r"no images in it; look at --include and --exclude"):
        listed(config, include=("*.tif",))


FORMS = {
    "lines": "{0}\n{1}\n\n{2}\n{0}\n",
    "csv": "id,uri\n1,{0}\n2,{1}\n3,{2}\n4,{0}\n",
    "semicolons": "\ufeffFile Name ; image;label\r\nx; {0};a\r\ny;{1};b\r\nz;{2};c\r\n",
    "no heading": "{0},x\n{1},y\n{2},z\n",
    "tsv": "image\tlabel\n{0}\ta\n{1}\tb\n{2}\tc\n",
    "jsonl": '{{"image": "{0}"}}\n{{"image": "{1}"}}\n{{"image": "{2}"}}\n',
    "json": '[{{"image": "{0}", "id": 1}}, {{"image": "{1}"}}, {{"image": "{2}"}}]',
}


@pytest.mark.parametrize("ending", [".csv", "", ".lst"])
@pytest.mark.parametrize("form", [*FORMS, "parquet"])
def test_a_list_in_any_form_is_captioned_whatever_its_ending(
    form: str, ending: str, config: BatchConfig, images: Path, tmp_path: Path
) -> None:
    third = str(images / "000000000003.jpg")
    names = [f"images/{FIRST}", "images/gone.jpg", third]
    file = tmp_path / f"list{ending}"
    if form == "parquet":
        pq.write_table(pa.table({"id": [1, 2, 3], "uri": names}), file)
    else:
        file.write_text(FORMS[form].format(*names))
    plan = make_plan(replace(config, images=str(file)))
    expected = sorted([f"{images}/{FIRST}", f"{images}/gone.jpg", third])
    assert [image.uri for image in plan.images(0)] == expected and not plan.left_out


def test_the_images_of_a_list_are_captioned_and_rows_without_one_are_counted(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    rows = [f"images/{FIRST};a", ";b", "nan;c", "images/gone.jpg;d", "images/000000000003.jpg;e;f"]
    (tmp_path / "list.csv").write_text("\n".join(["image;label", *rows]) + "\n")
    summary = batch(batch_config(tmp_path / "list.csv", tmp_path / "out", saved_model))
    assert (summary.images, summary.ok, summary.errors) == (2, 1, {"missing": 1})
    assert summary.left_out == {"rows without a name": 2, "rows that cannot be used": 1}


def test_names_may_be_written_otherwise_than_the_files(
    images: Path, saved_model: Path, tmp_path: Path
) -> None:
    names = ["images\\000000000001.jpg", "./images/000000000002.jpg", "images/000000000003.JPG"]
    (images / "a, b.jpg").write_bytes((images / FIRST).read_bytes())
    (tmp_path / "list.txt").write_text("\n".join([*names, "images/a, b.jpg"]))
    summary = batch(batch_config(tmp_path / "list.txt", tmp_path / "out", saved_model))
    assert (summary.images, summary.ok) == (4, 4)


def test_archives_are_captioned_too(images: Path, saved_model: Path, tmp_path: Path) -> None:
    captions = []
    for kind in ("zip", "tar"):
        archive = tmp_path / kind  # the ending says nothing
        Path(shutil.make_archive(str(tmp_path / "x"), kind, images)).rename(archive)
        options = {"include": ("*1.jpg",), "format": "txt"}
        config = batch_config(archive, tmp_path / "out" / kind, saved_model, **options)
        summary = batch(config)
        assert (summary.images, summary.ok) == (2, 2) and not summary.left_out
        captions.append([row["caption"] for row in read_rows(summary)])
        uri = read_rows(summary)[0]["uri"]
        assert uri.startswith(f"{kind}://") and uri.endswith(f"{FIRST}::{archive}")
        before = file_times(summary)
        assert file_times(batch(config)) == before
        os.utime(archive, (1, 1))
        assert file_times(batch(config)) != before, "the archive may be another one"
    assert captions[0] == captions[1]


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        (f"label,filename\nx,images/{FIRST}\n", f"{{folder}}/images/{FIRST}"),
        (f"images/{FIRST},x\n", f"{{folder}}/images/{FIRST}"),
        ("filename,path\n/far/b.jpg,b.jpg\n", "/far/b.jpg"),
        ("gs://bucket/objects/123,x\n", "gs://bucket/objects/123"),
    ],
)
def test_the_column_of_images_is_known_by_its_heading(
    text: str, uri: str, config: BatchConfig, tmp_path: Path
) -> None:
    (tmp_path / "list.csv").write_text(text)
    (image,) = make_plan(replace(config, images=str(tmp_path / "list.csv"))).images(0)
    assert image.uri == uri.format(folder=tmp_path)


def test_a_list_without_a_known_column_is_refused_unless_it_is_named(
    config: BatchConfig, tmp_path: Path
) -> None:
    (tmp_path / "list.csv").write_text(f"photo,label\nimages/{FIRST},x\n")
    message = "has no file column; its columns are photo, label; name it, for .* --columns file=…"
    with pytest.raises(UserError, match=message):
        listed(config, images=str(tmp_path / "list.csv"))
    assert listed(config, images=str(tmp_path / "list.csv"), columns="file=photo") == [FIRST]
    with pytest.raises(UserError, match=r"columns 'caption=x': write file=…"):
        listed(config, columns="caption=x")


def test_tables_that_hold_the_images_themselves_are_refused(
    config: BatchConfig, tmp_path: Path
) -> None:
    table = pa.table({"image": [{"bytes": b"x", "path": "a.jpg"}]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match="holds images, not their names; write them to a folder"):
        listed(config, images=str(tmp_path / "train.parquet"))


def test_shards_are_bounded_by_count_and_by_bytes(config: BatchConfig, images: Path) -> None:
    for number in range(4):
        (images / f"big-{number}.jpg").write_bytes(bytes(600_000))
    plan = make_plan(replace(config, shard_mb=1))
    assert [shard.images for shard in plan.shards] == [5, 5, 3, 1, 1, 1]
    assert [len(plan.images(index)) for index in range(6)] == [5, 5, 3, 1, 1, 1]


def test_an_output_inside_the_images_is_not_captioned(config: BatchConfig, images: Path) -> None:
    (images / "out").mkdir()
    shutil.copy(images / FIRST, images / "out" / "x.jpg")
    assert len(listed(config, output=str(images / "out"))) == 12
    assert len(listed(config)) == 13


@pytest.mark.parametrize("above", [True, False])
def test_an_output_around_the_images_hides_none(
    above: bool, config: BatchConfig, images: Path
) -> None:
    config = replace(config, output=str(images.parent if above else images))
    assert len(listed(config)) == 12
    assert batch(config).ok == 12 and len(listed(config)) == 12


def test_links_stand_for_their_images_and_folders(
    config: BatchConfig, images: Path, tmp_path: Path
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
    config = replace(config, images=str(links))
    summary = batch(config)
    assert (summary.images, summary.ok, summary.errors) == (14, 13, {"missing": 1})
    before = file_times(summary)
    first.write_bytes(second.read_bytes())
    again = batch(config)
    assert again.ok == 13 and file_times(again) != before, "what a link leads to has changed"


def test_a_store_that_its_driver_names_otherwise_is_listed_and_captioned_all_the_same(
    scenes: Path, config: BatchConfig
) -> None:
    # memory://shown to a user is memory:///shown to its driver, as gcs:// is gs://.
    fs = fsspec.filesystem("memory")
    for name in ("shown/a.jpg", "shown/out/x.jpg"):
        fs.pipe_file(f"/{name}", (scenes / "val2017" / FIRST).read_bytes())
    config = replace(config, images="memory://shown")
    assert listed(config, output="memory://shown/out") == ["a.jpg"]
    summary = batch(config)
    assert (summary.images, summary.ok) == (2, 2)


def test_a_folder_that_cannot_be_listed_ends_the_run_and_takes_no_rows(
    config: BatchConfig, images: Path
) -> None:
    summary = batch(config)
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
        batch(config)
    assert file_times(summary) == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("images", "gone", "gone: no such folder, archive or list of images"),
        ("images", ".", r"no images in it; left out, as no images: \.txt 1; hidden .* files: 1$"),
        ("images", "http://127.0.0.1:9/images/", "a web server lists no folders; name a"),
        (
            "images",
            f"../images/{FIRST}",
            "is one image; name its folder, or use captioner",
        ),
        ("images", "../page.html", "is a page or a drawing, not a list of images"),
        ("model", "./typo", "typo"),
    ],
)
def test_no_images_no_folder_or_no_model_is_refused(
    option: str,
    value: str,
    message: str,
    config: BatchConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    (tmp_path / "empty" / ".DS_Store").touch()
    (tmp_path / "page.html").write_text("<html></html>")
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match=message):
        batch(replace(config, **{option: value}))
