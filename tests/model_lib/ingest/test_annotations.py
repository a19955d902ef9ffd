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
from model_lib.data.coco import read_captions
from model_lib.data.leaks import require_apart, require_unseen
from model_lib.data.shards import Manifest, read_manifest
from model_lib.ingest.annotations import LONGEST_CAPTION
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.ingesting import ingest
from model_lib.io.storage import upload_folder
from tests.helpers.coco_files import write_captions
from tests.helpers.http_server import website


def rows(manifest: Manifest) -> list[dict]:
    """Return the data set's rows without where they came from."""
    tables = [pq.read_table(shard.uri) for shard in read_manifest(manifest.uri).shards]
    return [row for table in tables for row in table.drop_columns(["source"]).to_pylist()]


def quarantine(manifest: Manifest) -> list[dict]:
    return pq.read_table(Path(manifest.uri) / "quarantine.parquet").to_pylist()


@pytest.fixture()
def unpacked(scenes: Path, tmp_path: Path) -> Manifest:
    """The scenes, ingested from folders."""
    return ingest(IngestConfig(dataset=str(scenes), output=str(tmp_path / "unpacked")))


def test_cocos_archives_are_read_in_place(
    archives: Path, unpacked: Manifest, tmp_path: Path
) -> None:
    manifest = ingest(IngestConfig(dataset=str(archives), output=str(tmp_path / "out")))
    assert rows(manifest) == rows(unpacked) and manifest.fingerprint == unpacked.fingerprint
    assert sorted(file.name for file in archives.iterdir()) == [
        "annotations_trainval2017.zip",
        "train2017.zip",
        "val2017.zip",
    ]
    source = pq.read_table(tmp_path / "out" / "val-00000.parquet")["source"][0].as_py()
    assert fsspec.open(source).open().read(2) == b"\xff\xd8"


def test_an_archive_may_be_in_a_bucket_and_hold_images_at_its_top(
    archives: Path, scenes: Path, tmp_path: Path
) -> None:
    upload_folder(str(archives), "memory://zips")
    assert ingest(IngestConfig(dataset="memory://zips", output=str(tmp_path / "a"))).counts == {
        "train": 64,
        "val": 12,
    }
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as flat:
        for file in (scenes / "val2017").iterdir():
            flat.write(file, file.name)
    lists = scenes / "annotations" / "captions_val2017.json"
    config = IngestConfig(
        annotations=str(lists), images=str(tmp_path / "flat.zip"), output=str(tmp_path / "b")
    )
    assert sum(ingest(config).counts.values()) == 12


def test_a_damaged_member_is_quarantined_and_a_damaged_archive_refused(
    archives: Path, tmp_path: Path
) -> None:
    archive = archives / "val2017.zip"
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as listed:
        info = listed.infolist()[3]
    content[info.header_offset + 30 + len(info.filename) + info.file_size // 2] ^= 0xFF
    archive.write_bytes(content)
    manifest = ingest(IngestConfig(dataset=str(archives), output=str(tmp_path / "out")))
    assert manifest.counts["val"] == 11 and manifest.quarantined == {"unreadable": 1}
    assert "CRC" in quarantine(manifest)[0]["detail"]
    archive.write_bytes(content[:-30])
    with pytest.raises(UserError, match=r"val2017\.zip: is not a whole zip archive"):
        ingest(IngestConfig(dataset=str(archives), output=str(tmp_path / "out")))


def test_images_may_be_on_a_web_server(scenes: Path, tmp_path: Path) -> None:
    lists = json.loads((scenes / "annotations" / "captions_val2017.json").read_text())
    lists["images"].append({"id": 999, "file_name": "gone.jpg"})
    lists["annotations"].append({"id": 10**6, "image_id": 999, "caption": "gone"})
    (tmp_path / "captions.json").write_text(json.dumps(lists))
    options = {"annotations": str(tmp_path / "captions.json"), "output": str(tmp_path / "out")}
    with website(scenes) as address:
        manifest = ingest(IngestConfig(images=f"{address}/val2017", **options))
    assert sum(manifest.counts.values()) == 12 and manifest.quarantined == {"missing": 1}


def test_images_of_any_name_may_be_on_a_web_server(scenes: Path, tmp_path: Path) -> None:
    names = ["a #1.jpg", "what?.jpg", "a%20b.jpg", "äß 猫.jpg", "deep/a+b&c=d.jpg"]
    (tmp_path / "deep").mkdir()
    for number, name in enumerate(names, 1):
        shutil.copy(scenes / "val2017" / f"00000000000{number}.jpg", tmp_path / name)
    file = write_captions(tmp_path / "captions.json", list(enumerate(names)))
    options = {"annotations": str(file), "output": str(tmp_path / "out")}
    with website(tmp_path) as address:
        manifest = ingest(IngestConfig(images=address, **options))
    assert manifest.quarantined == {} and {row["file_name"] for row in rows(manifest)} == set(names)


# ---- Karpathy's splits ---------------------------------------------------------------------------


def karpathy(scenes: Path, file: Path, splits: list[str], names: bool = True) -> Path:
    """Write Karpathy's list of the training scenes, with these splits by turns."""
    images, captions = read_captions(str(scenes / "annotations" / "captions_train2017.json"))
    listed = []
    for number, (image_id, name) in enumerate(images):
        sentences = [
            {"raw": text, "imgid": number, "tokens": text.split()} for text in captions[image_id]
        ]
        image = {
            "filepath": "train2017",
            "filename": name if names else f"COCO_train2014_{name}",
            "imgid": number,
        }
        split = splits[number % len(splits)]
        listed.append({**image, "cocoid": image_id, "split": split, "sentences": sentences})
    file.write_text(json.dumps({"images": listed, "dataset": "coco"}))
    return file


@pytest.mark.parametrize("layout", ["dataset", "images"])
def test_karpathys_splits_and_restval_counts_as_train(
    scenes: Path, tmp_path: Path, layout: str
) -> None:
    listed = karpathy(
        scenes,
        tmp_path / "dataset_coco.json",
        ["train", "restval", "val", "test"],
        layout == "images",
    )
    if layout == "dataset":  # of scenes alone that have ids of their own
        lists = tmp_path / "set" / "annotations" / "captions_val2017.json"
        shutil.copytree(scenes, tmp_path / "set")
        lists.write_text('{"images": [], "annotations": []}')
    sources = {layout: str(tmp_path / "set" if layout == "dataset" else scenes)}
    manifest = ingest(IngestConfig(karpathy=str(listed), output=str(tmp_path / "out"), **sources))
    assert manifest.counts == {"test": 16, "train": 32, "val": 16} and manifest.quarantined == {}
    theirs = {row["cocoid"]: row for row in json.loads(listed.read_text())["images"]}
    for row in rows(manifest):
        assert row["captions"] == [
            sentence["raw"] for sentence in theirs[row["image_id"]]["sentences"]
        ]
        assert row["split"] == {"restval": "train"}.get(
            split := theirs[row["image_id"]]["split"], split
        )


def test_a_list_that_leaks_its_test_images_is_refused(scenes: Path, tmp_path: Path) -> None:
    listed = karpathy(scenes, tmp_path / "dataset_coco.json", ["train", "test"])
    document = json.loads(listed.read_text())
    document["images"].append({**document["images"][1], "split": "restval"})
    listed.write_text(json.dumps(document))
    with pytest.raises(UserError, match="leaks: image 2 is in both test and train"):
        ingest(IngestConfig(karpathy=str(listed), images=str(scenes), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_training_on_train2017_and_evaluating_on_karpathys_test_is_a_leak(
    scenes: Path, unpacked: Manifest, tmp_path: Path
) -> None:
    listed = karpathy(scenes, tmp_path / "dataset_coco.json", ["train", "train", "test", "val"])
    manifest = ingest(
        IngestConfig(karpathy=str(listed), images=str(scenes), output=str(tmp_path / "k"))
    )
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


def test_names_that_leave_the_folder_are_refused_in_cocos_lists_under_karpathys_too(
    scenes: Path, tmp_path: Path
) -> None:
    dataset = tmp_path / "coco"
    shutil.copytree(scenes, dataset)
    coco = dataset / "annotations" / "captions_train2017.json"
    document = json.loads(coco.read_text())
    document["images"][0]["file_name"] = str(
        scenes / "train2017" / document["images"][0]["file_name"]
    )
    coco.write_text(json.dumps(document))
    coco.with_name("captions_val2017.json").write_text(
        '{"images": [], "annotations": []}'
    )  # its ids are the same
    listed = karpathy(scenes, tmp_path / "dataset_coco.json", ["train", "test"])
    with pytest.raises(UserError, match=r"captions_train2017\.json and .* leaves the image folder"):
        ingest(
            IngestConfig(dataset=str(dataset), karpathy=str(listed), output=str(tmp_path / "out"))
        )


def test_own_images_are_not_taken_for_cocos_of_the_same_ids(scenes: Path, tmp_path: Path) -> None:
    listed = karpathy(scenes, tmp_path / "dataset_coco.json", ["train", "train", "test", "val"])
    split = ingest(
        IngestConfig(karpathy=str(listed), images=str(scenes), output=str(tmp_path / "k"))
    )
    document = json.loads((scenes / "annotations" / "captions_val2017.json").read_text())
    for image in document["images"]:
        name = f"mine-{image['id']}.jpg"
        (tmp_path / name).write_bytes((scenes / "val2017" / image["file_name"]).read_bytes())
        image["file_name"] = name
    own = tmp_path / "own.json"
    own.write_text(json.dumps(document))
    options = {
        "annotations": str(own),
        "images": str(tmp_path),
        "split": "val",
        "output": str(tmp_path / "own"),
    }
    require_apart(
        read_manifest(split.uri), read_manifest(ingest(IngestConfig(**options)).uri), "val"
    )


def test_karpathys_list_given_as_annotations_is_named(scenes: Path, tmp_path: Path) -> None:
    listed = karpathy(scenes, tmp_path / "dataset_coco.json", ["train", "test"])
    with pytest.raises(UserError, match="give it as --karpathy"):
        ingest(
            IngestConfig(annotations=str(listed), images=str(scenes), output=str(tmp_path / "out"))
        )
    lists = scenes / "annotations" / "captions_val2017.json"
    with pytest.raises(UserError, match="is not Karpathy's splits"):
        ingest(IngestConfig(karpathy=str(lists), images=str(scenes), output=str(tmp_path / "out")))


# ---- tables --------------------------------------------------------------------------------------


def write_table(file: Path, table: list[tuple[str, str]]) -> None:
    if file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8-sig") as opened:
            csv.writer(opened).writerows([("file", "caption"), *table])
    elif file.suffix == ".jsonl":
        file.write_text(
            "\n".join(json.dumps({"file": name, "caption": text}) for name, text in table)
        )
    else:
        pq.write_table(
            pa.table({"file": [name for name, _ in table], "caption": [text for _, text in table]}),
            file,
        )


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_rows_of_one_file_are_its_captions(scenes: Path, tmp_path: Path, ending: str) -> None:
    names = [f"00000000000{n}.jpg" for n in range(1, 6)]
    table = [(name, f'caption {n}, "quoted"\nof two lines') for n in range(3) for name in names]
    write_table(file := tmp_path / f"captions.{ending}", table)
    ingested = {}
    for count in (5, 4):  # the order of rows, and other rows, do not matter to an image
        kept = [row for row in table if row[0] in names[:count]]
        write_table(file, kept)
        images, output = str(scenes / "train2017"), str(tmp_path / str(count))
        manifest = ingest(IngestConfig(annotations=str(file), images=images, output=output))
        ingested[count] = {row["file_name"]: {**row, "split": ""} for row in rows(manifest)}
        assert manifest.counts == {"train": count - 1, "val": 1}, (
            "of few images one is for validation"
        )
        assert min(row["image_id"] for row in ingested[count].values()) > 0
    assert ingested[5][names[0]]["captions"] == [
        f'caption {n}, "quoted" of two lines' for n in range(3)
    ]
    assert all(ingested[4][name] == ingested[5][name] for name in names[:4])


def test_a_file_under_two_names_is_not_in_two_splits(scenes: Path, tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(61)]
    for name in names:
        shutil.copy(
            scenes / "train2017" / f"00000000000{2 if name == '60.jpg' else 1}.jpg", tmp_path / name
        )
    write_table(file := tmp_path / "captions.csv", [(name, "a scene") for name in names])
    for _ in range(2):  # also from the journal of one that was there
        manifest = ingest(
            IngestConfig(annotations=str(file), images=str(tmp_path), output=str(tmp_path / "out"))
        )
        assert manifest.quarantined["duplicate_of_train"] > 0 and sum(manifest.counts.values()) < 61
        require_apart(read_manifest(manifest.uri), read_manifest(manifest.uri), "val")


def test_official_splits_are_whole_whatever_is_in_them_twice(scenes: Path, tmp_path: Path) -> None:
    """Scores on them are compared with published ones."""
    shutil.copytree(scenes, tmp_path / "coco")
    shutil.copy(
        scenes / "train2017" / "000000000001.jpg",
        tmp_path / "coco" / "val2017" / "000000000001.jpg",
    )
    manifest = ingest(IngestConfig(dataset=str(tmp_path / "coco"), output=str(tmp_path / "out")))
    assert manifest.counts == {"train": 64, "val": 12} and manifest.quarantined == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "name,caption\na.jpg,x\n", "has no column file"),
        ("a.csv", "", "has no column file"),
        ("a.csv", b"file,caption\na.jpg,\xff\n", "is not a table"),
        ("a.jsonl", '{"file": "a.jpg"}\n', "file and caption \\('caption'\\)"),
        ("a.jsonl", '{"file": "a.jpg", "caption": 7}\n', "row 1: caption 7 is not text"),
        ("a.jsonl", '{"file": "", "caption": "x"}\n', "row 1: file '' is not a file's name"),
        ("a.jsonl", "[]\n", "row 1 is not an object"),
        ("a.jsonl", "{\n", "is not a table"),
        ("a.parquet", "no parquet", "is not a table"),
        ("a.csv", "file,caption\n../a.jpg,x\n", "leaves the image folder"),
    ],
)
def test_a_table_of_another_form_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as refused:
        ingest(
            IngestConfig(
                annotations=str(tmp_path / name), images=str(tmp_path), output=str(tmp_path / "out")
            )
        )
    assert "\n" not in str(refused.value) and name in str(refused.value)


# ---- unusable captions ---------------------------------------------------------------------------


def test_unusable_captions_are_counted_and_quarantined(scenes: Path, tmp_path: Path) -> None:
    shutil.copy(scenes / "train2017" / "000000000001.jpg", tmp_path / "a.jpg")
    names = {1: "a.jpg", 2: "a.jpg", 3: "a.jpg", 4: "a\x00.jpg", 5: "a.jpg"}
    texts = [(1, "a\x00 b\tc"), (1, " \n\x07"), (1, "x" * (LONGEST_CAPTION + 1)), (1, "plain")]
    texts += [(3, "\u200e\x1f"), (4, "named"), (5, "ok " * 333), (9, "no image"), (9, "no image")]
    write_captions(tmp_path / "captions.json", [(1, "a.jpg"), *names.items()], texts)
    config = IngestConfig(
        annotations=str(tmp_path / "captions.json"),
        images=str(tmp_path),
        output=str(tmp_path / "out"),
        split="train",
    )
    manifest = ingest(config)
    captions = {row["image_id"]: row["captions"] for row in rows(manifest)}
    assert captions.keys() == {1, 3, 5} and captions[1] == ["a b c", "plain"]
    assert manifest.quarantined == {
        "duplicate_id": 1,
        "caption_empty": 1,
        "caption_too_long": 1,
        "no_captions": 1,
        "bad_name": 1,
        "caption_without_image": 1,
    }
    assert manifest.cleaned_captions == 1 and len(quarantine(manifest)) == 6
    assert read_manifest(manifest.uri).cleaned_captions == 1
