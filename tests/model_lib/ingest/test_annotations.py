"""Every form of input: archives, Karpathy's splits, tables; and captions that cannot be used."""

import csv
import json
import shutil
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model_lib import UserError
from model_lib.data.captions import LONGEST_CAPTION
from model_lib.data.coco import read_captions
from model_lib.data.leaks import require_apart, require_unseen
from model_lib.data.shards import Manifest, read_manifest
from model_lib.io.storage import upload_folder
from tests.helpers.coco_files import write_captions
from tests.helpers.http_server import website
from tests.helpers.ingests import ingested, read_quarantine, read_rows

EMPTY = '{"images": [], "annotations": []}'


def rows(manifest: Manifest) -> list[dict]:
    """Return the data set's rows without where they came from."""
    return [{**row, "source": ""} for row in read_rows(manifest)]


@pytest.fixture()
def unpacked(scenes: Path, tmp_path: Path) -> Manifest:
    """The scenes, ingested from folders."""
    return ingested(tmp_path / "unpacked", dataset=scenes)


def test_cocos_archives_are_read_in_place(
    archives: Path, unpacked: Manifest, tmp_path: Path
) -> None:
    files = sorted(archives.iterdir())
    manifest = ingested(tmp_path / "out", dataset=archives)
    assert rows(manifest) == rows(unpacked) and manifest.fingerprint == unpacked.fingerprint
    assert sorted(archives.iterdir()) == files
    source = pq.read_table(tmp_path / "out" / "val-00000.parquet")["source"][0].as_py()
    assert fsspec.open(source).open().read(2) == b"\xff\xd8"


def test_an_archive_may_be_in_a_bucket_and_hold_images_at_its_top(
    archives: Path, scenes: Path, tmp_path: Path
) -> None:
    upload_folder(str(archives), "memory://zips")
    counts = ingested(tmp_path / "a", dataset="memory://zips").counts
    assert counts == {"train": 64, "val": 12}
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as flat:
        for file in (scenes / "val2017").iterdir():
            flat.write(file, file.name)
    lists, images = scenes / "annotations" / "captions_val2017.json", tmp_path / "flat.zip"
    counts = ingested(tmp_path / "b", annotations=lists, images=images).counts
    assert sum(counts.values()) == 12


def test_a_damaged_member_is_quarantined_and_a_damaged_archive_refused(
    archives: Path, tmp_path: Path
) -> None:
    archive = archives / "val2017.zip"
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as listed:
        info = listed.infolist()[3]
    content[info.header_offset + 30 + len(info.filename) + info.file_size // 2] ^= 0xFF
    archive.write_bytes(content)
    manifest = ingested(tmp_path / "out", dataset=archives)
    assert manifest.counts["val"] == 11 and manifest.quarantined == {"unreadable": 1}
    assert "CRC" in read_quarantine(manifest)[0]["detail"]
    archive.write_bytes(content[:-30])
    with pytest.raises(UserError, match=r"val2017\.zip: is not a whole zip archive"):
        ingested(tmp_path / "out", dataset=archives)


def test_images_of_any_name_may_be_on_a_web_server(scenes: Path, tmp_path: Path) -> None:
    names = ["a #1.jpg", "what?.jpg", "a%20b.jpg", "äß 猫.jpg", "deep/a+b&c=d.jpg"]
    (tmp_path / "deep").mkdir()
    for number, name in enumerate(names, 1):
        shutil.copy(scenes / "val2017" / f"00000000000{number}.jpg", tmp_path / name)
    file = write_captions(tmp_path / "captions.json", list(enumerate([*names, "gone.jpg"])))
    with website(tmp_path) as address:
        manifest = ingested(tmp_path / "out", annotations=file, images=address)
    assert manifest.quarantined == {"missing": 1}
    assert {row["file_name"] for row in rows(manifest)} == set(names)


# ---- Karpathy's splits ---------------------------------------------------------------------------


def karpathy(scenes: Path, file: Path, splits: list[str], names: bool = True) -> Path:
    """Write Karpathy's list of the training scenes, with these splits by turns."""
    images, captions = read_captions(str(scenes / "annotations" / "captions_train2017.json"))
    listed = []
    for number, (image_id, name) in enumerate(images):
        sentences = [{"raw": text, "imgid": number} for text in captions[image_id]]
        name = name if names else f"COCO_train2014_{name}"
        image = {"filepath": "train2017", "filename": name, "imgid": number, "cocoid": image_id}
        listed.append({**image, "split": splits[number % len(splits)], "sentences": sentences})
    file.write_text(json.dumps({"images": listed, "dataset": "coco"}))
    return file


@pytest.mark.parametrize("layout", ["dataset", "images"])
def test_karpathys_splits_and_restval_counts_as_train(
    scenes: Path, tmp_path: Path, layout: str
) -> None:
    splits = ["train", "restval", "val", "test"]
    listed = karpathy(scenes, tmp_path / "dataset_coco.json", splits, layout == "images")
    source = scenes
    if layout == "dataset":  # of scenes alone that have ids of their own
        source = tmp_path / "set"
        shutil.copytree(scenes, source)
        (source / "annotations" / "captions_val2017.json").write_text(EMPTY)
    manifest = ingested(tmp_path / "out", karpathy=listed, **{layout: source})
    assert manifest.counts == {"test": 16, "train": 32, "val": 16} and manifest.quarantined == {}
    theirs = {row["cocoid"]: row for row in json.loads(listed.read_text())["images"]}
    for row in rows(manifest):
        image = theirs[row["image_id"]]
        assert row["captions"] == [sentence["raw"] for sentence in image["sentences"]]
        assert row["split"] == image["split"].replace("restval", "train")


def test_a_list_that_leaks_its_test_images_is_refused(scenes: Path, tmp_path: Path) -> None:
    listed = karpathy(scenes, tmp_path / "dataset_coco.json", ["train", "test"])
    document = json.loads(listed.read_text())
    document["images"].append({**document["images"][1], "split": "restval"})
    listed.write_text(json.dumps(document))
    with pytest.raises(UserError, match="leaks: image 2 is in both test and train"):
        ingested(tmp_path / "out", karpathy=listed, images=scenes)
    assert not (tmp_path / "out").exists()


def test_training_on_train2017_and_evaluating_on_karpathys_test_is_a_leak(
    scenes: Path, unpacked: Manifest, tmp_path: Path
) -> None:
    listed = karpathy(scenes, tmp_path / "dataset_coco.json", ["train", "train", "test", "val"])
    manifest = ingested(tmp_path / "k", karpathy=listed, images=scenes)
    whole, split = read_manifest(unpacked.uri), read_manifest(manifest.uri)
    with pytest.raises(
        UserError, match=r"leaks: 16 of its training images .* are test images of .*--karpathy"
    ):
        require_apart(whole, split, "test")
    record = {"configuration": {"data": unpacked.uri}, "data_fingerprint": unpacked.fingerprint}
    with pytest.raises(UserError, match="leaks: 16"):
        require_unseen(record, split, "test")
    require_unseen(record, split, "train")
    require_unseen({**record, "data_fingerprint": "of data that is no longer there"}, split, "test")
    require_unseen({}, split, "test")
    require_apart(split, split, "test")
    require_apart(split, split, "val")
    require_apart(whole, whole, "val")  # the ids are the same, the images are not

    lists = json.loads((scenes / "annotations" / "captions_val2017.json").read_text())
    for image in lists["images"]:  # own images, which have COCO's ids
        shutil.copy(scenes / "val2017" / image["file_name"], tmp_path / f"mine-{image['id']}.jpg")
        image["file_name"] = f"mine-{image['id']}.jpg"
    (tmp_path / "own.json").write_text(json.dumps(lists))
    options = {"annotations": tmp_path / "own.json", "images": tmp_path, "split": "val"}
    own = ingested(tmp_path / "own", **options)
    require_apart(split, read_manifest(own.uri), "val")


def test_names_that_leave_the_folder_are_quarantined_in_cocos_lists_under_karpathys_too(
    scenes: Path, tmp_path: Path
) -> None:
    dataset = tmp_path / "coco"
    shutil.copytree(scenes, dataset)
    coco = dataset / "annotations" / "captions_train2017.json"
    document = json.loads(coco.read_text())
    image = document["images"][0]
    image["file_name"] = str(scenes / "train2017" / image["file_name"])
    coco.write_text(json.dumps(document))
    coco.with_name("captions_val2017.json").write_text(EMPTY)  # its ids are the same
    listed = karpathy(scenes, tmp_path / "dataset_coco.json", ["train", "test"])
    manifest = ingested(tmp_path / "out", dataset=dataset, karpathy=listed)
    assert manifest.quarantined == {"outside": 1} and sum(manifest.counts.values()) == 63


def test_karpathys_list_given_as_annotations_is_named(scenes: Path, tmp_path: Path) -> None:
    listed = karpathy(scenes, tmp_path / "dataset_coco.json", ["train", "test"])
    with pytest.raises(UserError, match="give it as --karpathy"):
        ingested(tmp_path / "out", annotations=listed, images=scenes)
    lists = scenes / "annotations" / "captions_val2017.json"
    with pytest.raises(UserError, match="is not Karpathy's splits"):
        ingested(tmp_path / "out", karpathy=lists, images=scenes)


# ---- tables --------------------------------------------------------------------------------------


def write_table(file: Path, table: list[tuple[str, str]]) -> None:
    objects = [{"file": name, "caption": text} for name, text in table]
    if file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8-sig") as opened:
            csv.writer(opened).writerows([("file", "caption"), *table])
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, objects)))
    else:
        pq.write_table(pa.Table.from_pylist(objects), file)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_rows_of_one_file_are_its_captions(scenes: Path, tmp_path: Path, ending: str) -> None:
    names = [f"00000000000{n}.jpg" for n in range(1, 6)]
    table = [(name, f'caption {n}, "quoted"\nof two lines') for n in range(3) for name in names]
    file, images = tmp_path / f"captions.{ending}", scenes / "train2017"
    images_of = {}
    for count in (5, 4):  # the order of rows, and other rows, do not matter to an image
        write_table(file, [row for row in table if row[0] in names[:count]])
        manifest = ingested(tmp_path / str(count), annotations=file, images=images)
        images_of[count] = {row["file_name"]: {**row, "split": ""} for row in rows(manifest)}
        # Of few images one is for validation.
        assert manifest.counts == {"train": count - 1, "val": 1}
        assert min(row["image_id"] for row in images_of[count].values()) > 0
    captions = [f'caption {n}, "quoted" of two lines' for n in range(3)]
    assert images_of[5][names[0]]["captions"] == captions
    assert images_of[4] == {name: images_of[5][name] for name in names[:4]}


def test_a_file_under_two_names_is_not_in_two_splits(scenes: Path, tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(61)]
    for name in names:
        number = 2 if name == "60.jpg" else 1
        shutil.copy(scenes / "train2017" / f"00000000000{number}.jpg", tmp_path / name)
    write_table(file := tmp_path / "captions.csv", [(name, "a scene") for name in names])
    for _ in range(2):  # also from the journal of one that was there
        manifest = ingested(tmp_path / "out", annotations=file, images=tmp_path)
        assert manifest.quarantined["duplicate_of_train"] > 0 and sum(manifest.counts.values()) < 61
        require_apart(read_manifest(manifest.uri), read_manifest(manifest.uri), "val")


def test_official_splits_are_whole_whatever_is_in_them_twice(scenes: Path, tmp_path: Path) -> None:
    """Scores on them are compared with published ones."""
    dataset, name = tmp_path / "coco", "000000000001.jpg"
    shutil.copytree(scenes, dataset)
    shutil.copy(scenes / "train2017" / name, dataset / "val2017" / name)
    manifest = ingested(tmp_path / "out", dataset=dataset)
    assert manifest.counts == {"train": 64, "val": 12} and manifest.quarantined == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"name,caption\na.jpg,x\n", "has no file column; its columns are name, caption"),
        ("a.csv", b"file,title\na.jpg,x\n", "has no caption column; .* --columns file=…,caption=…"),
        ("a.csv", b"file,caption,caption\na.jpg,x,y\n", "has several columns caption"),
        ("a.csv", b"", "has no file column; its columns are none"),
        ("a.csv", b"file,caption\na.jpg,\xff\n", "the first: row 1 is not UTF-8; save the list in"),
        ("a.csv", b"file,caption\xff\n", "is not a list in UTF-8; save it as CSV in UTF-8"),
        ("a.json", '[{"file": "a.jpg"}]'.encode("utf-16"), "is JSON in UTF-16; save it in UTF-8"),
        ("a.xlsx", b"PK\3\4", "is zip, which is not read as a list; .*save a spreadsheet as CSV"),
        (
            "a.csv",
            b"a.jpg,a red cat, a dog\nb.jpg,x\n",
            "columns are a.jpg, a red cat, a dog; ",
        ),
        ("a.jsonl", b'{"file": "a.jpg"}\n', "has no caption column; its columns are file"),
        ("a.jsonl", b"[]\n", "no usable image among 0 rows: it is empty"),
        ("a.jsonl", b"{\n", "is not COCO captions"),
        ("a.parquet", b"no parquet", "has no file column"),
        ("a.parquet", b"PAR1 damaged", "is not a list of images"),
        ("a.csv", b"file,caption\n../a.jpg,x\n", "outside: 1.; the first: leaves "),
    ],
)
def test_a_table_of_another_form_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        ingested(tmp_path / "out", annotations=tmp_path / name, images=tmp_path)
    assert "\n" not in str(refused.value) and name in str(refused.value)


# ---- unusable captions ---------------------------------------------------------------------------


def test_unusable_captions_are_counted_and_quarantined(scenes: Path, tmp_path: Path) -> None:
    shutil.copy(scenes / "train2017" / "000000000001.jpg", tmp_path / "a.jpg")
    names = {1: "a.jpg", 2: "a.jpg", 3: "a.jpg", 4: "a\x00.jpg", 5: "a.jpg"}
    texts = [(1, "a\x00 b\tc"), (1, " \n\x07"), (1, "x" * (LONGEST_CAPTION + 1)), (1, "plain")]
    texts += [(1, "\u200b"), (3, "\u200ex\x1f"), (4, "named"), (5, "ok " * 333)]
    texts += [(9, "no image"), (9, "no image")]
    file = tmp_path / "captions.json"
    write_captions(file, [(1, "a.jpg"), *names.items()], texts)
    manifest = ingested(tmp_path / "out", annotations=file, images=tmp_path, split="train")
    captions = {row["image_id"]: row["captions"] for row in rows(manifest)}
    assert captions.keys() == {1, 3, 5} and captions[1] == ["a b c", "plain"]
    reasons = ["duplicate_id", "caption_empty", "caption_too_long", "no_captions", "bad_name"]
    counts = dict.fromkeys([*reasons, "caption_without_image"], 1)
    assert manifest.quarantined == {**counts, "caption_empty": 2}
    assert manifest.cleaned_captions == 1 and len(read_quarantine(manifest)) == 7
    assert read_manifest(manifest.uri).cleaned_captions == 1
