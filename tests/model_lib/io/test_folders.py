"""What counts as an image in a folder, bucket or archive, and what is left out, with counts."""

import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from model_lib.errors import UserError
from model_lib.io.folders import HIDDEN, NO_ENDING, ImageList, left_out_line, list_images
from model_lib.io.images import EXTENSIONS

FORMATS = {"jp2": "JPEG2000", "ppm": "PPM", "dib": "DIB", "bmp": "BMP", "avif": "AVIF"}
FORMATS |= {"tif": "TIFF", "webp": "WEBP", "gif": "GIF", "png": "PNG", "jpg": "JPEG", "mpo": "MPO"}


def image(kind: str) -> bytes:
    file = io.BytesIO()
    options = {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]}
    Image.new("RGB", (40, 30), "red").save(file, kind, **options if kind == "MPO" else {})
    return file.getvalue()


IMAGES = {
    **{f"formats/{name}": image(kind) for name, kind in FORMATS.items()},  # without an ending
    "a.JPG": image("JPEG"),
    "avif named.heif": image("AVIF"),
    "t.jpg_large": image("JPEG"),
    "scrape.jpg?w=200": image("WEBP"),
    "photo.bin": image("PNG"),
    "IMG.2024.01.05": image("JPEG"),
    "old.ico": image("PNG"),
    "broken.jpg": b"no image",
    "empty.jpg": b"",
    "phone": b"\0\0\0\x24ftypheic\0\0\0\0mif1heic",
}
OTHERS = {
    "notes.txt": b"GIF89a, they say",
    "table.csv": b"a,b",
    "drawing.svg": b"<svg/>",
    "data.parquet": b"PAR1",
    "README": b"P2P networks\n" * 9,
    "cars": b"BMW X3; 2004\n" * 9,
    "zero": b"",
    "strange.a b": b"text",
}
JUNK = {
    "._a.jpg": b"\0\5\x16\7",
    "__MACOSX/._a.jpg": b"",
    "sub/.DS_Store": b"",
    "Thumbs.db": b"",
    "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg": image("JPEG"),
    ".thumbnails/large/a.png": image("PNG"),
    "$RECYCLE.BIN/b.jpg": image("JPEG"),
}
LEFT_OUT = {".txt": 1, ".csv": 1, ".svg": 1, ".parquet": 1, NO_ENDING: 4, HIDDEN: 7}
FILES = {**IMAGES, **OTHERS, **JUNK}


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    return tmp_path / "in"


def names(images: ImageList) -> list[str]:
    return [file.name for file in images.files]


def test_the_content_decides_what_is_an_image_and_not_the_ending(folder: Path) -> None:
    images = list_images(str(folder))
    assert names(images) == sorted(IMAGES) and images.left_out == LEFT_OUT
    for file in images.files:
        assert file.uri == f"{folder}/{file.name}" and file.bytes == len(IMAGES[file.name])
        assert file.version


def test_a_bucket_and_archives_have_the_same_images(folder: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name, content in FILES.items():
        fs.pipe_file(f"/listed/{name}", content)
    images = list_images("memory://listed")
    assert (names(images), images.left_out) == (sorted(IMAGES), LEFT_OUT)
    assert images.files[0].uri == f"memory:///listed/{images.files[0].name}"
    for kind in ("zip", "tar"):
        archive = shutil.make_archive(str(tmp_path / "x"), kind, folder)
        images = list_images(archive)
        found = [name.removeprefix("./") for name in names(images)]
        assert (found, images.left_out) == (sorted(IMAGES), LEFT_OUT)
        assert images.files[0].uri.startswith(f"{kind}://") and images.files[0].version


def test_a_choice_and_the_depth_are_the_users_and_not_counted(folder: Path) -> None:
    images = list_images(str(folder), False, lambda name: name.startswith(("a", "n", "sub")))
    assert names(images) == ["a.JPG", "avif named.heif"] and images.left_out == {".txt": 1}
    shutil.make_archive(str(folder.parent / "x"), "zip", folder)
    images = list_images(str(folder.parent / "x.zip"), recursive=False)
    assert names(images) == sorted(name for name in IMAGES if "/" not in name)


def test_a_folder_that_is_hidden_itself_is_searched(folder: Path) -> None:
    hidden = folder.rename(folder.parent / ".cache")
    assert names(list_images(str(hidden))) == sorted(IMAGES)


def test_what_is_no_file_is_passed_over(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "dangling.jpg").symlink_to("nowhere")  # for its row to say
    assert names(list_images(str(folder))) == sorted([*IMAGES, "dangling.jpg"])


def test_known_endings_are_never_opened(tmp_path: Path) -> None:
    for ending in (*EXTENSIONS, ".txt", ".json", ".mp4", ".py"):
        os.mkfifo(tmp_path / f"x{ending}")  # to open it would be an error
    images = list_images(str(tmp_path))
    assert len(images.files) == len(EXTENSIONS)
    assert images.left_out == {".txt": 1, ".json": 1, ".mp4": 1, ".py": 1}


def test_an_archive_of_windows_may_have_backslashes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        for name in ("photos\\a.jpg", "photos\\phone", "__MACOSX\\._a.jpg", "sub\\Thumbs.db"):
            zipped.writestr(name, image("JPEG"))
    images = list_images(str(tmp_path / "x.zip"))
    assert names(images) == ["photos\\a.jpg", "photos\\phone"] and images.left_out == {HIDDEN: 2}


def test_an_archive_that_breaks_off_is_counted(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(folder, "in")
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: len(whole) // 2])
    line = left_out_line(list_images(str(tmp_path / "x.tar")).left_out)
    assert "parts of an archive that cannot be listed: 1" in line


def test_the_line_of_what_is_left_out() -> None:
    assert left_out_line({}) == ""
    assert left_out_line({HIDDEN: 4}) == "left out, hidden or system files: 4"
    counts = {".svg": 3, HIDDEN: 4, ".txt": 1200, NO_ENDING: 1}
    expected = "as no images: .txt 1,200, .svg 3, without an ending 1; hidden or system files: 4"
    assert left_out_line(counts) == f"left out, {expected}"
    many = {f".{number}": 100 - number for number in range(20)}
    assert left_out_line(many).endswith(".7 93, others 1,038")


def test_what_is_neither_folder_nor_archive_is_refused(folder: Path) -> None:
    for name, message in (("gone", "no such file"), ("README", "is neither a zip nor a tar")):
        with pytest.raises(UserError, match=message):
            list_images(str(folder / name))
