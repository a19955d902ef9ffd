"""Images and captions in the forms that people have: all that can be used is used, and each row
that cannot is in the quarantine."""

import contextlib
import io
import json
import re
import shlex
import shutil
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model_lib import UserError
from model_lib.cli import COMMANDS, parse
from model_lib.data.coco import read_captions
from model_lib.data.shards import Manifest
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.ingesting import ingest
from model_lib.io.storage import upload_folder
from tests.helpers.coco_files import write_captions
from tests.helpers.http_server import website
from tests.helpers.ingests import ingested, read_quarantine, read_rows

CAPTION = "a red cat, a blue dog"


@pytest.fixture()
def images(scenes: Path, tmp_path: Path) -> Path:
    """A folder with 0.jpg to 5.jpg, all different."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        shutil.copy(scenes / "train2017" / f"{number + 1:012d}.jpg", folder / f"{number}.jpg")
    return folder


def stored(manifest: Manifest) -> dict[str, list[str]]:
    """Return the captions of each stored image by its name."""
    return {row["file_name"]: row["captions"] for row in read_rows(manifest)}


def rejected(manifest: Manifest) -> set[tuple[str, str]]:
    """Return name and reason of each row of the quarantine."""
    return {(row["file_name"], row["reason"]) for row in read_quarantine(manifest)}


def ingest_text(
    folder: Path, text: str | bytes, name: str = "list.txt", **options: Any
) -> Manifest:
    """Ingest a list of the images in `folder`."""
    file = folder.parent / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return ingested(folder.parent / "out", annotations=file, images=folder, **options)


# ---- the form of a list --------------------------------------------------------------------------

QUOTED = f'"{CAPTION}"'
LISTS = {
    "commas": f"file,caption\n0.jpg,{QUOTED}\n1.jpg,x",
    "Flickr8k": f"image,caption\n0.jpg,{QUOTED}\n1.jpg,x",
    "Flickr30k": f"image_name| comment_number| comment\n0.jpg| 0| {CAPTION}\n1.jpg| 0| x",
    "tabs": f"filename\ttext\n0.jpg\t{CAPTION}\n1.jpg\tx",
    "semicolons": f"Path;Caption\n0.jpg;{CAPTION}\n1.jpg;x",
    "a space after the comma, and quotation marks": f'"file", "caption"\n0.jpg, {QUOTED}\n1.jpg, x',
    "a space after the comma": f"file, caption\n0.jpg, {QUOTED}\n1.jpg, x",
    "other columns": f"id,caption,file_name\n7,{QUOTED},0.jpg\n8,x,1.jpg",
    "no heading": f"0.jpg;{CAPTION}\n1.jpg;x",
    "Flickr8k.token": f"0.jpg#0\t{CAPTION}\n1.jpg#0\tx",
    "a spreadsheet's first line": f"sep=;\r\nfile;caption\r\n0.jpg;{CAPTION}\r\n1.jpg;x",
    "a list of pandas in a cell": pd.DataFrame(
        {"file": ["0.jpg", "1.jpg"], "captions": [[CAPTION], ["x"]]}
    ).to_csv(),
    "a list of JSON in a cell": f'file|captions\n0.jpg|["{CAPTION}"]\n1.jpg|["x"]',
    "names as keys": json.dumps({"0.jpg": CAPTION, "1.jpg": ["x"]}),
    "names as keys of objects": json.dumps(
        {"0.jpg": {"tags": "cat", "caption": CAPTION}, "1.jpg": {"caption": "x"}}, indent=2
    ),
    "records of pandas by index": pd.DataFrame(
        {"file_name": ["0.jpg", "1.jpg"], "caption": [CAPTION, "x"]}
    ).to_json(orient="index"),
    "a long list of TextCaps": json.dumps(
        {
            "data": [
                {"image_path": "0.jpg", "caption_str": CAPTION},
                {"image_path": "1.jpg", "caption_str": "x", "more": "x" * 2**16},
            ]
        }
    ),
    "UTF-16": f"file\tcaption\n0.jpg\t{CAPTION}\n1.jpg\tx".encode("utf-16"),
    "carriage returns": f"file,caption\r\n0.jpg,{QUOTED}\r\n1.jpg,x\r\n",
    "an array": json.dumps(
        [{"image": "0.jpg", "caption": CAPTION}, {"image": "1.jpg", "caption": "x"}]
    ),
    "records of pandas": pd.DataFrame(
        {"file_name": ["0.jpg", "1.jpg"], "captions": [[CAPTION], ["x"]]}
    ).to_json(orient="records"),
    "JSON lines": f'{{"path": "0.jpg", "text": "{CAPTION}"}}\n{{"path": "1.jpg", "text": "x"}}',
    "TextCaps": json.dumps(
        {
            "dataset_type": "train",
            "data": [
                {"image_path": "0.jpg", "caption_str": CAPTION, "reference_strs": [CAPTION]},
                {"image_path": "1.jpg", "caption_str": "x", "reference_strs": ["x"]},
            ],
        },
        indent=1,
    ),
    "COCO, without captions' ids": json.dumps(
        {
            "images": [{"id": "1", "file_name": "0.jpg"}, {"id": "b", "file_name": "1.jpg"}],
            "annotations": [
                {"image_id": "1", "caption": CAPTION},
                {"image_id": "b", "caption": "x"},
            ],
        }
    ),
}


@pytest.mark.parametrize("form", LISTS)
@pytest.mark.parametrize("ending", [".csv", ".json", ".txt"])
def test_a_list_is_told_by_its_content(images: Path, form: str, ending: str) -> None:
    manifest = ingest_text(images, LISTS[form], f"list{ending}", split="train")
    assert stored(manifest) == {"0.jpg": [CAPTION], "1.jpg": ["x"]}
    assert manifest.quarantined == {}


def test_columns_are_named_by_an_option(images: Path) -> None:
    text = f"Photo,Title\n0.jpg,{QUOTED}\n"
    with pytest.raises(
        UserError, match=r"has no file column; its columns are Photo, Title; .*--col"
    ):
        ingest_text(images, text)
    manifest = ingest_text(images, text, columns="file=photo,caption=Title")
    assert stored(manifest) == {"0.jpg": [CAPTION]}
    text = f"9,x,0.jpg,{QUOTED}\n9,y,1.jpg,z\n"
    manifest = ingest_text(images, text, columns="file=3,caption=4")
    assert stored(manifest) == {"0.jpg": [CAPTION], "1.jpg": ["z"]}
    for columns in ("photo=file", "file", "file=", "file=3,caption=text", "file=0"):
        with pytest.raises(UserError, match="columns"):
            IngestConfig(annotations="-", output="-", columns=columns)


def test_captions_may_be_in_numbered_columns(images: Path) -> None:
    text = "image,Caption 1,Caption 2,Caption 3\n0.jpg,a,b,c\n1.jpg,d,,e\n"
    manifest = ingest_text(images, text, split="train")
    assert stored(manifest) == {"0.jpg": ["a", "b", "c"], "1.jpg": ["d", "e"]}
    assert rejected(manifest) == {("1.jpg", "caption_empty")}


def test_a_quotation_mark_among_tabs_is_text_unless_it_encloses_a_cell(images: Path) -> None:
    """Lists of web captions, such as CC12M, have no quoting."""
    texts = ['" Lone wolf " is here', '"Hello, he said', 'a 5" pipe', '"a ""fine"" cat"']
    text = "".join(f"{number}.jpg\t{text}\n" for number, text in enumerate(texts))
    manifest = ingest_text(images, text, split="train")
    captions = [*texts[:3], 'a "fine" cat']
    assert stored(manifest) == {f"{number}.jpg": [text] for number, text in enumerate(captions)}
    manifest = ingest_text(images, 'file\tcaption\n0.jpg\t"one\ntwo"\n', split="train")
    assert stored(manifest) == {"0.jpg": ["one two"]}


def test_a_caption_of_many_lines_is_no_quotation_mark_that_is_not_closed(images: Path) -> None:
    lines = "\n".join(f"- point {number}" for number in range(30))
    manifest = ingest_text(images, f'file,caption\n0.jpg,"{lines}"\n', split="train")
    assert stored(manifest) == {"0.jpg": [lines.replace("\n", " ")]}


def test_several_lists_may_caption_one_image(images: Path, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"list{number}.csv").write_text(f"file,caption\n0.jpg,caption {number}\n")
    (tmp_path / "list2.json").write_text('{"0.jpg": "caption 2"}')
    manifest = ingested(
        tmp_path / "out", annotations=tmp_path / "list?.*", images=images, split="train"
    )
    assert stored(manifest) == {"0.jpg": ["caption 0", "caption 1", "caption 2"]}


def test_one_name_in_two_folders_is_two_images(images: Path, tmp_path: Path) -> None:
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        shutil.copy(images / f"{number}.jpg", tmp_path / folder / "0.jpg")
        (tmp_path / folder / "list.csv").write_text(f"file,caption\n0.jpg,in {folder}\n")
    manifest = ingested(tmp_path / "out", annotations=tmp_path / "?" / "list.csv", split="train")
    assert stored(manifest) == {"a/0.jpg": ["in a"], "b/0.jpg": ["in b"]}
    assert len({row["image_id"] for row in read_rows(manifest)}) == 2


# ---- rows that cannot be used --------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["file,caption\n0.jpg,x\n1.jpg,café\n", '{"0": "é"}\n{"file": "0.jpg", "caption": "x"}']
)
def test_a_row_that_is_not_utf_8_does_not_end_the_others(images: Path, text: str) -> None:
    manifest = ingest_text(images, text.encode("cp1252"), split="train")
    assert stored(manifest) == {"0.jpg": ["x"]} and manifest.quarantined == {"bad_row": 1}
    assert read_quarantine(manifest)[0]["detail"].endswith("is not UTF-8; save the list in UTF-8")


def test_a_list_that_numpy_wrote_into_a_cell_is_no_caption(images: Path) -> None:
    manifest = ingest_text(images, "file,caption\n0.jpg,['a' 'b']\n0.jpg,[x] y\n", split="train")
    assert stored(manifest) == {"0.jpg": ["[x] y"]}
    assert rejected(manifest) == {("0.jpg", "caption_not_text")}


def test_objects_may_lack_a_column_that_others_have(images: Path) -> None:
    table = [{"file": "0.jpg"}, {"file": "1.jpg", "caption": "x"}, {"caption": "y"}]
    manifest = ingest_text(images, json.dumps(table), split="train")
    assert stored(manifest) == {"1.jpg": ["x"]}
    assert manifest.quarantined == {"caption_empty": 1, "no_captions": 1, "bad_row": 1}


def test_a_row_of_more_or_fewer_fields_is_quarantined_with_its_number(images: Path) -> None:
    rows = ["file,caption", f"0.jpg,{CAPTION} and a bird", "1.jpg,x", "2.jpg", "", ","]
    text = "\n".join([*rows, '3.jpg,"x" y', f"4.jpg,{QUOTED}"])
    manifest = ingest_text(images, text, split="train")
    assert stored(manifest) == {"1.jpg": ["x"], "4.jpg": [CAPTION]}
    details = [row["detail"] for row in read_quarantine(manifest)]
    assert manifest.quarantined == {"bad_row": 4}
    assert details[0] == (
        'row 1 has 3 fields under 2 headings; put a text that holds "," in quotation marks'
    )
    assert details[1].startswith("row 3 has 1 fields") and details[2] == "row 4 has no file name"
    assert details[3].startswith("row 5 ',' expected after '\"'")


@pytest.mark.parametrize(
    "last", ["", '1998.jpg,a "fine" cat\n', '1998.jpg,a cat"\n', '"1998.jpg","x"\n']
)
def test_a_quotation_mark_that_is_not_closed_is_named_with_its_line(
    images: Path, last: str
) -> None:
    rows = [f"{number}.jpg,a cat\n" for number in range(1997)]
    rows[9] = '9.jpg,"a dog\n'
    with pytest.raises(UserError, match=r"list\.csv: line 11: a quotation mark is not closed"):
        ingest_text(images, "file,caption\n" + "".join(rows) + last, "list.csv")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *((value, "caption_empty") for value in ("nan", "None", "NULL", "N/A", " null ", None)),
        (float("nan"), "caption_empty"),
        (7, "caption_not_text"),
        ({"a": 1}, "caption_not_text"),
    ],
)
@pytest.mark.parametrize("form", ["array", "lines", "coco"])
def test_no_value_is_no_caption(images: Path, value: Any, reason: str, form: str) -> None:
    texts = [("0.jpg", value), ("0.jpg", "x"), ("1.jpg", ["y", value])]
    table = [{"file": name, "caption": text} for name, text in texts]
    document: Any = "\n".join(map(json.dumps, table))
    if form == "array":
        document = json.dumps(table)
    if form == "coco":
        ids = {"0.jpg": 0, "1.jpg": 1}
        document = {"images": [{"id": n, "file_name": name} for name, n in ids.items()]}
        notes = [{"image_id": ids[name], "caption": text} for name, text in texts]
        document = json.dumps({**document, "annotations": notes})
    manifest = ingest_text(images, document, split="train")
    assert stored(manifest) == {"0.jpg": ["x"], "1.jpg": ["y"]}
    assert rejected(manifest) == {("0.jpg", reason), ("1.jpg", reason)}
    if form == "coco":
        assert read_captions(str(images.parent / "list.txt"))[1] == {0: ["x"], 1: ["y"]}


@pytest.mark.parametrize("file", [None, float("nan"), "nan", "", 7, ["0.jpg"]])
def test_a_row_without_a_file_name_does_not_end_the_others(images: Path, file: Any) -> None:
    table = [{"file": "0.jpg", "caption": "x"}, {"file": file, "caption": "y"}, 3]
    manifest = ingest_text(images, json.dumps(table), split="train")
    assert stored(manifest) == {"0.jpg": ["x"]} and manifest.quarantined == {"bad_row": 2}
    assert read_quarantine(manifest)[0]["detail"].startswith("row 2 has ")


def test_captions_that_are_marked_are_neither_trained_on_nor_references(images: Path) -> None:
    notes = [{"image_id": 1, "caption": "x", "is_rejected": False, "is_precanned": False}]
    notes += [{"image_id": 1, "caption": "quality issues", "is_precanned": True}]
    notes += [{"image_id": 2, "caption": "spam", "is_rejected": True}]
    document = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)],
        "annotations": notes,
    }
    manifest = ingest_text(images, json.dumps(document), split="train")
    assert stored(manifest) == {"1.jpg": ["x"]}
    assert manifest.quarantined == {"caption_rejected": 2, "no_captions": 1}
    assert read_captions(str(images.parent / "list.txt"))[1] == {1: ["x"], 2: []}
    text = "file,caption,is_rejected\n0.jpg,x,False\n0.jpg,spam,True\n"
    assert stored(ingest_text(images, text, split="train")) == {"0.jpg": ["x"]}


def test_annotations_of_another_task_say_what_they_have(images: Path) -> None:
    document = {"images": [], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1], "id": 1}]}
    with pytest.raises(UserError, match="annotations have no caption, only bbox, id, image_id"):
        ingest_text(images, json.dumps(document))


# ---- splits --------------------------------------------------------------------------------------


def test_a_split_column_is_used(images: Path) -> None:
    splits = ["train", "Validation", "test", "dev", "", "7"]
    table = [f"{n}.jpg,x,{split}" for n, split in enumerate(splits)]
    manifest = ingest_text(images, "file,caption,split\n" + "\n".join([*table, "0.jpg,y,val"]))
    splits_of = {row["file_name"]: row["split"] for row in read_rows(manifest)}
    assert splits_of.pop("4.jpg") in ("train", "val")
    assert splits_of == {"0.jpg": "train", "1.jpg": "val", "2.jpg": "test", "3.jpg": "val"}
    assert rejected(manifest) == {("5.jpg", "bad_row"), ("0.jpg", "other_split")}
    val = ingested(
        images.parent / "b", annotations=images.parent / "list.txt", images=images, split="val"
    )
    assert set(stored(val)) == {"0.jpg", "1.jpg", "3.jpg", "4.jpg"}


def test_lists_for_training_and_validation_are_one_data_set(images: Path, tmp_path: Path) -> None:
    shutil.copy(images / "0.jpg", images / "again.jpg")
    (tmp_path / "t.csv").write_text("file,caption\n0.jpg,x\n1.jpg,y\n")
    (tmp_path / "v.csv").write_text("file,caption\n2.jpg,z\nagain.jpg,x\n")
    lists = {"train": tmp_path / "t.csv", "val": tmp_path / "v.csv"}
    manifest = ingested(tmp_path / "out", **lists, images=images)
    assert manifest.counts == {"train": 2, "val": 1}
    assert rejected(manifest) == {("again.jpg", "duplicate_of_train")}
    for split, file in lists.items():
        other = "val" if split == "train" else "train"
        with pytest.raises(
            UserError, match=rf"holds \d {other} images, which would be lost; .*--tr"
        ):
            ingested(tmp_path / "out", annotations=file, images=images, split=split)
    assert stored(manifest) == {"0.jpg": ["x"], "1.jpg": ["y"], "2.jpg": ["z"]}


# ---- names of images -----------------------------------------------------------------------------


def test_a_name_written_otherwise_is_the_same_image(images: Path, tmp_path: Path) -> None:
    names = {"a 12:30:01.jpg": "a 12:30:01.jpg", "sub\\1.jpg": "sub/1.jpg", "./2.jpg": "2.jpg"}
    names |= {"3.jpg": "3.JPG", unicodedata.normalize("NFD", "é.jpg"): "é.jpg", "five": "five.png"}
    folder = tmp_path / "otherwise"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(names.values()):
        shutil.copy(images / f"{number}.jpg", folder / name)
    text = "file;caption\n" + "".join(f"{name};x\n" for name in names)
    manifest = ingest_text(folder, text, split="train")
    assert manifest.quarantined == {} and manifest.counts == {"train": 6}
    sources = {row["source"] for row in read_rows(manifest)}
    assert sources == {f"{folder}/{name}" for name in names.values()}
    for suffix, root in ((".zip", "otherwise/"), (".tar", "")):
        archive = pack(tmp_path / f"otherwise{suffix}", folder, root)
        inside = ingested(
            tmp_path / suffix, annotations=tmp_path / "list.txt", images=archive, split="train"
        )
        assert inside.fingerprint == manifest.fingerprint


def pack(archive: Path, folder: Path, root: str) -> Path:
    """Write the files of a folder into an archive, below `root` there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if archive.suffix == ".tar":
        with tarfile.open(archive, "w") as tar:
            for file in files:
                tar.add(file, root + str(file.relative_to(folder)))
        return archive
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in files:
            zipped.write(file, root + str(file.relative_to(folder)))
            zipped.writestr(f"__MACOSX/._{file.name}", b"x")
    return archive


def test_a_name_that_several_files_may_have_is_missing(images: Path) -> None:
    shutil.copy(images / "1.jpg", images / "A.jpg")
    shutil.copy(images / "2.jpg", images / "a.JPG")
    manifest = ingest_text(images, "file,caption\nA.JPG,x\n0.jpg,y\nA.jpg,z\n", split="train")
    assert stored(manifest) == {"0.jpg": ["y"], "A.jpg": ["z"]}
    assert rejected(manifest) == {("A.JPG", "missing")}


def test_a_wrong_folder_is_named_with_a_path_that_was_tried(images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"\(missing: 2\); the first: .*/empty/0\.jpg: no such file; give the f"
    ):
        ingest_text(tmp_path / "empty", "file,caption\n0.jpg,x\n1.jpg,y\n", split="train")
    table = pq.read_table(tmp_path / "out" / "quarantine.parquet")
    assert set(table["file_name"].to_pylist()) == {"0.jpg", "1.jpg"}


def test_a_list_of_addresses_and_paths_needs_no_folder(images: Path, tmp_path: Path) -> None:
    with website(images) as address:
        names = ["images/0.jpg", str(images / "1.jpg"), f"{address}/2.jpg", f"{address}/9.jpg"]
        names += ["http://127.0.0.1:9/3.jpg"]
        text = "url,caption\n" + "".join(f"{name},x\n" for name in names)
        (tmp_path / "list.csv").write_text(text)
        manifest = ingested(tmp_path / "out", annotations=tmp_path / "list.csv", split="train")
    assert set(stored(manifest)) == set(names[:3])
    assert rejected(manifest) == {(names[3], "missing"), (names[4], "unreachable")}


def test_a_list_in_a_bucket_names_images_of_its_bucket_alone(images: Path, tmp_path: Path) -> None:
    text = f"file,caption\n0.jpg,x\n{images}/1.jpg,y\nmemory://own/2.jpg,z\n"
    (images / "list.csv").write_text(text)
    upload_folder(str(images), "memory://own")
    manifest = ingested(tmp_path / "out", annotations="memory://own/list.csv", split="train")
    assert stored(manifest) == {"0.jpg": ["x"], "memory://own/2.jpg": ["z"]}
    assert rejected(manifest) == {(f"{images}/1.jpg", "not_allowed")}


# ---- images and captions in one place ------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["metadata.csv", "metadata.jsonl", "metadata.parquet", "captions.txt"]
)
def test_a_folder_with_a_list_of_its_images(images: Path, name: str) -> None:
    table = pd.DataFrame({"file_name": [f"{n}.jpg" for n in range(6)], "text": [CAPTION] * 6})
    if name.endswith("parquet"):
        table.to_parquet(images / name)
    elif name.endswith("jsonl"):
        table.to_json(images / name, orient="records", lines=True)
    else:
        table.to_csv(images / name, index=False)
    manifest = ingested(images.parent / "out", dataset=images)
    assert sum(manifest.counts.values()) == 6 and manifest.counts["val"] >= 1
    assert all(captions == [CAPTION] for captions in stored(manifest).values())


def test_a_folder_with_splits_and_a_list_in_each(images: Path, tmp_path: Path) -> None:
    for split, numbers in (("train", range(4)), ("validation", range(4, 6))):
        folder = tmp_path / "set" / split
        folder.mkdir(parents=True)
        rows = [f"{n}.jpg,x" for n in numbers]
        (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
        for number in numbers:
            shutil.copy(images / f"{number}.jpg", folder)
    assert ingested(tmp_path / "out", dataset=tmp_path / "set").counts == {"train": 4, "val": 2}


def test_a_list_of_names_in_folders_of_splits(images: Path, tmp_path: Path) -> None:
    for number, split in enumerate(("train", "train", "valid", "test")):
        (images / split).mkdir(exist_ok=True)
        (images / f"{number}.jpg").rename(images / split / f"{number}.jpg")
    names = ["train/0.jpg", "train/1.jpg", "valid/2.jpg", "test/3.jpg"]
    (images / "metadata.csv").write_text("file_name,text\n" + "".join(f"{n},x\n" for n in names))
    manifest = ingested(tmp_path / "splits", dataset=images)
    assert manifest.counts == {"test": 1, "train": 2, "val": 1}
    table = "file,caption\n5.jpg,x\n" + "".join(f"{n},x\n" for n in names)
    assert "test" not in ingest_text(images, table, "more.csv").counts


def test_a_folder_with_two_lists_is_refused(images: Path, tmp_path: Path) -> None:
    for name in ("metadata.csv", "metadata.jsonl"):
        (images / name).write_text("")
    with pytest.raises(
        UserError, match=r"holds several lists, metadata\.csv and metadata\.jsonl; give one of"
    ):
        ingested(tmp_path / "out", dataset=images)


def test_text_files_in_any_form(images: Path, tmp_path: Path) -> None:
    """Of trainers of image generators, or of img2dataset, which writes Parquet beside them."""
    folder = tmp_path / "set" / "00000"
    folder.parent.mkdir()
    images.rename(folder)
    contents = ["zero", "eins", "zwei", "drei".encode("utf-16"), "café".encode("cp1252")]
    for number, content in enumerate(contents):
        name = f"{number}.caption" if number == 2 else f"{number}.txt"
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / "0.caption").write_text("a zero")
    (folder / "._0.txt").write_bytes(b"\0\5\x16\7")
    pd.DataFrame({"url": ["http://127.0.0.1:9/0.jpg"], "caption": ["x"]}).to_parquet(
        tmp_path / "set" / "00000.parquet"
    )
    manifest = ingested(tmp_path / "out", dataset=tmp_path / "set", split="train")
    assert stored(manifest) == {
        "00000/0.jpg": ["a zero", "zero"],
        "00000/1.jpg": ["eins"],
        "00000/2.jpg": ["zwei"],
        "00000/3.jpg": ["drei"],
    }
    assert manifest.quarantined == {"bad_row": 1, "no_captions": 2}


def test_a_folder_with_a_text_file_beside_each_image(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        (images / f"{number}.txt").write_text(f"{CAPTION}\nanother\n\n")
    (images / "lonely.txt").write_text("x")
    shutil.move(images / "3.jpg", images / "3")  # the content decides
    (images / "._0.jpg").write_bytes(b"left by a system")
    (images / "notes.pdf").write_bytes(b"%PDF")
    manifest = ingested(tmp_path / "out", dataset=images, split="train")
    names = ["0.jpg", "1.jpg", "2.jpg", "3"]
    assert stored(manifest) == {name: [CAPTION, "another"] for name in names}
    assert "left out, as no images: .pdf 1; hidden or system files: 1" in caplog.text
    assert rejected(manifest) == {
        ("4.jpg", "no_captions"),
        ("5.jpg", "no_captions"),
        (f"{images}/lonely.txt", "caption_without_image"),
    }
    upload_folder(str(images), "memory://texts")
    remote = ingested(tmp_path / "b", dataset="memory://texts", split="train")
    assert stored(remote) == stored(manifest)


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_tar_archives_of_webdataset(images: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(2):
        with tarfile.open(shards / f"{shard:05d}.tar", "w") as tar:
            for number in range(3):
                key = f"{shard:05d}{number:04d}"
                about = {"caption": CAPTION, "url": "http://x/y.jpg", "width": 1}
                add_file(tar, f"{key}.json", json.dumps(about).encode())
                add_file(tar, f"{key}.jpg", (images / f"{3 * shard + number}.jpg").read_bytes())
                add_file(tar, f"{key}.txt", b"from the text")
            add_file(tar, "t.txt", b"only text")
            add_file(tar, "i.jpg", b"only an image")
    expected = {f"{s:05d}/{s:05d}{n:04d}.jpg": [CAPTION] for s in range(2) for n in range(3)}
    upload_folder(str(shards), "memory://shards")
    for number, uri in enumerate([shards, f"{shards}/*.tar", "memory://shards/*.tar"]):
        manifest = ingested(tmp_path / f"out{number}", dataset=uri, split="train")
        assert stored(manifest) == expected
        assert manifest.quarantined == {"no_captions": 2, "caption_without_image": 2}
    one = ingested(tmp_path / "one", dataset=shards / "00000.tar", split="train")
    assert len(stored(one)) == 3


def test_odd_samples_of_webdataset(images: Path, tmp_path: Path) -> None:
    """All are used or in the quarantine, also names with dots, as of dates."""
    documents = [b'{"caption": ["a", "b"]}', b'{"caption": null}', b"[1]", b"{", None]
    (tmp_path / "a").mkdir()
    with tarfile.open(tmp_path / "a" / "0.tar", "w") as tar:
        add_file(tar, "._0.jpg", b"x")
        for number, document in enumerate(documents):
            key = f"./2024.01.0{number}"
            add_file(tar, f"{key}.jpg", (images / f"{number}.jpg").read_bytes())
            if document is not None:
                add_file(tar, f"{key}.json", document)
            add_file(tar, f"{key}.txt", b"caf\xe9" if document is None else b"text")
        add_file(tar, "./2024.01.00.png", b"a second image of the first sample")
        add_file(tar, "cut.jpg", (images / "5.jpg").read_bytes())
    content = (tmp_path / "a" / "0.tar").read_bytes()
    (tmp_path / "a" / "0.tar").write_bytes(content[: content.index(b"cut.jpg") + 600])
    (tmp_path / "a" / "1.tar").write_bytes(bytes(10240))
    manifest = ingested(tmp_path / "out", dataset=tmp_path / "a", split="train")
    captions = [["a", "b"], ["text"], ["text"], ["text"]]
    assert stored(manifest) == {f"0/2024.01.0{n}.jpg": texts for n, texts in enumerate(captions)}
    assert rejected(manifest) == {
        ("0/2024.01.00.png", "no_captions"),
        ("0/2024.01.03.jpg", "bad_row"),
        ("0/2024.01.04.jpg", "bad_row"),
        ("0/2024.01.04.jpg", "no_captions"),
        ("0/cut.jpg", "no_captions"),
        (str(tmp_path / "a" / "0.tar"), "truncated"),
    }


def parquet(file: Path, images: Path, rows: list[tuple[str | None, int | None, Any]]) -> None:
    """Write rows of path, number of the image and captions, as Hugging Face's library does."""
    cells = []
    for path, number, _ in rows:
        content = None if number is None else (images / f"{number}.jpg").read_bytes()
        cells.append({"bytes": content, "path": path} if number is not None or path else None)
    image = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    captions = pa.array([captions for _, _, captions in rows])
    pq.write_table(pa.table({"image": image, "caption": captions}), file)


def test_parquet_files_with_images(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    # One row a caption; then names that say nothing; then images of which one is not there.
    parquet(
        folder / "train-00000-of-00002.parquet",
        images,
        [("a.jpg", 0, "x"), ("a.jpg", 0, "y"), ("b.jpg", 1, "z")],
    )
    parquet(
        folder / "train-00001-of-00002.parquet",
        images,
        [("a.jpg", 2, "other"), (None, 3, "p"), (None, 3, "q")],
    )
    parquet(
        folder / "validation-00000.parquet",
        images,
        [("v.jpg", 4, "v"), (None, None, "gone"), ("w.jpg", 5, "w")],
    )
    manifest = ingested(tmp_path / "out", dataset=tmp_path / "hub")
    assert manifest.counts == {"train": 4, "val": 2}
    captions = sorted(stored(manifest).values())
    assert captions == [["other"], ["p", "q"], ["v"], ["w"], ["x", "y"], ["z"]]
    assert manifest.quarantined == {"bad_row": 1}
    for row in read_rows(manifest):
        assert row["source"].partition("#")[0].endswith(".parquet")
    one = folder / "validation-00000.parquet"
    assert ingested(tmp_path / "one", dataset=one).counts == {"val": 2}


def test_a_data_set_with_a_train_split_alone_gets_one_for_validation(
    images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "train-00000-of-00001.parquet"
    parquet(file, images, [(f"{n}.jpg", n, "x") for n in range(6)])
    assert ingested(tmp_path / "out", dataset=file).counts.keys() == {"train", "val"}
    assert ingested(tmp_path / "all", dataset=file, split="train").counts == {"train": 6}


def test_rows_of_one_large_row_group_are_read_in_any_order(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.parquet"
    parquet(file, images, [(f"{n}.jpg", n % 6, [f"image {n}"]) for n in range(400)])
    manifest = ingested(tmp_path / "out", dataset=file, workers=4)
    assert sum(manifest.counts.values()) + manifest.quarantined["duplicate_of_train"] == 400
    assert all(captions == [f"image {name[:-4]}"] for name, captions in stored(manifest).items())


def test_a_folder_without_captions_says_what_is_expected(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no captions; expected COCO 2017's layout, a list"):
        ingested(tmp_path / "out", dataset=images)


def test_every_command_of_the_table_of_forms(images: Path, tmp_path: Path) -> None:
    """Those of docs/data.md, in a folder with what they name."""
    table = pd.DataFrame({"file": [f"{n}.jpg" for n in range(6)], "caption": [CAPTION] * 6})
    for name in ("captions.csv", "images/list.csv", "train.csv", "val.csv"):
        rows = table[4:] if name == "val.csv" else table[:4]
        rows.to_csv(tmp_path / name, index=False)
    table.rename(columns={"file": "Photo", "caption": "Title"}).to_csv(tmp_path / "named.csv")
    table.to_csv(tmp_path / "plain.csv", header=False)
    table.to_json(tmp_path / "captions.json", orient="records")
    (tmp_path / "textcaps.json").write_text(str(LISTS["TextCaps"]))
    write_captions(tmp_path / "coco.json", list(enumerate(table["file"])))
    pack(tmp_path / "images.zip", images, "photos/")
    shutil.copytree(images, tmp_path / "folder" / "train")
    table.to_json(tmp_path / "folder" / "train" / "metadata.jsonl", orient="records", lines=True)
    shutil.copytree(images, tmp_path / "texts")
    for number in range(6):
        (tmp_path / "texts" / f"{number}.txt").write_text(CAPTION)
    (tmp_path / "shards").mkdir()
    pack(tmp_path / "shards" / "0.tar", tmp_path / "texts", "")
    (tmp_path / "hub").mkdir()
    parquet(tmp_path / "hub" / "train.parquet", images, [(None, n, CAPTION) for n in range(6)])
    document = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    commands = re.findall(r"`captioner (ingest [^`]*)`", document)
    assert len(commands) > 12
    for command in commands:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        name, *options = shlex.split(command)
        with contextlib.chdir(tmp_path):
            manifest = ingest(parse(COMMANDS[name], name, options))
            assert sum(manifest.counts.values()) >= 2 and manifest.quarantined == {}, command
