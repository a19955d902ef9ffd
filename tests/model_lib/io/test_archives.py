"""Zip and tar archives that are read in place: what is in them, and what of a damaged one is."""

import io
import os
import random
import subprocess
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from model_lib.errors import UserError
from model_lib.io import archives
from model_lib.io.archives import archive_kind, open_archive, read_image
from model_lib.io.images import ImageError

RNG = random.Random(0)
FILES = {f"a/{number}.jpg": RNG.randbytes(700 * number) for number in range(20)}


def write_zip(path: Path, files: dict[str, bytes] = FILES) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.mkdir("a")
        for name, content in files.items():
            zipped.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes] = FILES, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


WRITERS = pytest.mark.parametrize("write", [write_zip, write_tar])


@WRITERS
@pytest.mark.parametrize("store", ["", "memory://archives/"])
def test_members_are_read_by_name_by_several_threads(
    write: object, store: str, tmp_path: Path
) -> None:
    """The ending says nothing, and so does the store."""
    path = write(tmp_path / "images.bin")  # type: ignore[operator]
    uri = f"{store}images.bin" if store else str(path)
    if store:
        fsspec.filesystem("memory").pipe_file("/archives/images.bin", path.read_bytes())
    archive = open_archive(uri)
    assert archive.kind == ("zip" if write is write_zip else "tar") and not archive.damage
    assert archive.sizes == {name: len(content) for name, content in FILES.items()}
    assert list(archive.sizes) == list(FILES)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(archive.read, FILES)) == list(FILES.values())
    address = archive.uri("a/7.jpg")
    assert address == f"{archive.kind}://a/7.jpg::{uri}"
    assert read_image(address) == FILES["a/7.jpg"]
    with fsspec.open(address) as file:
        assert file.read() == FILES["a/7.jpg"]
    for name in ("a/99.jpg", "a", "a/"):
        with pytest.raises(UserError, match=f"has no {name}"):
            archive.read(name)


@WRITERS
def test_an_archive_is_opened_once_for_all_its_members_and_again_when_it_has_changed(
    write: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.zip")  # type: ignore[operator]
    opened = []
    original = archives.open_archive
    monkeypatch.setattr(archives, "open_archive", lambda uri: opened.append(uri) or original(uri))
    uris = [original(str(path)).uri(name) for name in FILES]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read_image, uris)) == list(FILES.values())
    assert not opened
    write(path, {"a/1.jpg": b"new"})  # type: ignore[operator]
    os.utime(path, (1, 1))
    assert read_image(uris[1]) == b"new" and opened == [str(path)]
    with pytest.raises(UserError, match=r"has no a/2\.jpg"):
        read_image(uris[2])
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        read_image(uris[1])


def test_a_zip_members_own_header_may_be_longer_than_the_directorys(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        info = zipfile.ZipInfo("a.jpg")
        info.extra = b"\xfe\xca" + (3000).to_bytes(2, "little") + bytes(3000)
        zipped.writestr(info, b"image")
        info.extra = b""
    assert open_archive(str(tmp_path / "x.zip")).read("a.jpg") == b"image"


def test_the_last_of_several_members_with_a_name_counts(tmp_path: Path) -> None:
    """As for `unzip` and `tar -x`: programs that update an archive add to it."""
    write_tar(tmp_path / "x.tar")
    write_tar(tmp_path / "x.tar", {"a/1.jpg": b"new"}, "a")
    assert open_archive(str(tmp_path / "x.tar")).read("a/1.jpg") == b"new"
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped, pytest.warns(UserWarning):
        zipped.writestr("a.jpg", b"old")
        zipped.writestr("a.jpg", b"new")
    archive = open_archive(str(tmp_path / "x.zip"))
    assert archive.sizes == {"a.jpg": 3} and archive.read("a.jpg") == b"new"


def test_a_tars_links_are_the_files_that_they_lead_to(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "sub"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"image")
    (folder / "hard.jpg").hardlink_to(folder / "a.jpg")
    (folder / "soft.jpg").symlink_to("a.jpg")
    (tmp_path / "in" / "up.jpg").symlink_to("sub/a.jpg")
    (folder / "passwd").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe")
    subprocess.run(["tar", "cf", "../x.tar", "."], cwd=tmp_path / "in", check=True)
    archive = open_archive(str(tmp_path / "x.tar"))
    names = {"./up.jpg", "./sub/a.jpg", "./sub/hard.jpg", "./sub/soft.jpg"}
    assert {name: archive.read(name) for name in archive.sizes} == dict.fromkeys(names, b"image")
    assert archive.damage == "1 links that lead to no file in it"


def test_names_are_of_any_length_and_any_bytes(tmp_path: Path) -> None:
    names = [b"d" * 90 + b"/" + b"n" * 150, "größe".encode("latin-1"), "größe".encode(), b"a::b"]
    for name in names:
        path = os.path.join(os.fsencode(tmp_path), b"in", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(name)
    for form in ("gnu", "pax"):
        path = tmp_path / f"{form}.tar"
        subprocess.run(["tar", f"--format={form}", "-cf", path, "-C", tmp_path / "in", "."])
        archive = open_archive(str(path))
        uris = [archive.uri(name) for name in archive.sizes]
        assert sorted(map(read_image, uris)) == sorted(names)
        "".join(uris).encode()


def test_a_zips_names_are_those_that_its_maker_meant(tmp_path: Path) -> None:
    """Of macOS, UTF-8 without the flag that says so; of old Windows, code page 437."""
    names = {"größe.jpg": "utf-8", "写真.jpg": "utf-8", "gr\u00fcn.jpg": "cp437", "a.jpg": "ascii"}
    placeholders = {f"{number:0{len(name.encode(code))}}": name.encode(code)
                    for number, (name, code) in enumerate(names.items())}  # fmt: skip
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        for placeholder, name in placeholders.items():
            zipped.writestr(placeholder, name)
    content = (tmp_path / "x.zip").read_bytes()
    for placeholder, name in placeholders.items():
        content = content.replace(placeholder.encode(), name)
    (tmp_path / "x.zip").write_bytes(content)
    archive = open_archive(str(tmp_path / "x.zip"))
    assert {name: read_image(archive.uri(name)) for name in archive.sizes} == {
        name: name.encode(code) for name, code in names.items()
    }


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_an_archive_damaged_anywhere_is_refused_or_read_in_one_line(
    write: object, tmp_path: Path
) -> None:
    files = {f"a/{number}.jpg": RNG.randbytes(300) for number in range(4)}
    path = write(tmp_path / "x", files)  # type: ignore[operator]
    whole = path.read_bytes()
    for position in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[position] ^= 0x81
        for content in (bytes(damaged), whole[:position]):
            path.write_bytes(content)
            try:
                archive = open_archive(str(path))
            except UserError as error:
                assert "\n" not in str(error)
                continue
            for name in archive.sizes:
                try:
                    archive.read(name)
                except ImageError as error:
                    assert "\n" not in str(error)


@pytest.mark.parametrize("cut", [700 * 120 + 300, 60_000, 2000])
def test_a_tar_that_breaks_off_is_read_up_to_there(cut: int, tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:cut])
    archive = open_archive(str(tmp_path / "x.tar"))
    assert "which is damaged or cut off" in archive.damage and 0 < len(archive.sizes) < len(FILES)
    *before, last = archive.sizes
    assert [archive.read(name) for name in before] == [FILES[name] for name in before]
    try:
        assert archive.read(last) == FILES[last]
    except ImageError as error:
        assert str(error) == "truncated: the archive ends in it"


def test_a_tar_that_is_damaged_or_goes_on_says_where(tmp_path: Path) -> None:
    content = bytearray(write_tar(tmp_path / "x.tar").read_bytes())
    start = open_archive(str(tmp_path / "x.tar"))._members["a/9.jpg"].start - 512  # type: ignore[union-attr]
    content[start : start + 512] = b"x" * 512
    (tmp_path / "x.tar").write_bytes(content)
    archive = open_archive(str(tmp_path / "x.tar"))
    assert list(archive.sizes) == list(FILES)[:9] and f"its byte {start:,}," in archive.damage
    one = write_tar(tmp_path / "y.tar", {"a.jpg": b"image"}).read_bytes()
    (tmp_path / "y.tar").write_bytes(2 * one)
    assert open_archive(str(tmp_path / "y.tar")).damage


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.tar.gz", "is compressed by gzip, and cannot be read in place; unpack it first"),
        ("x.tar.bz2", "is compressed by bzip2"),
        ("x.tar.xz", "is compressed by xz"),
        ("half.zip", "is not a whole zip archive .*; fetch it anew"),
        ("text.zip", "is neither a zip nor a tar archive"),
        ("empty.tar", "is neither a zip nor a tar archive"),
        ("gone.zip", "no such file"),
        (".", "is not a file"),
    ],
)
def test_what_is_no_archive_or_cannot_be_read_in_place_is_refused(
    name: str, message: str, tmp_path: Path
) -> None:
    for mode in ("gz", "bz2", "xz"):
        write_tar(tmp_path / f"x.tar.{mode}", mode=f"w:{mode}")
    (tmp_path / "half.zip").write_bytes(write_zip(tmp_path / "x.zip").read_bytes()[:5000])
    (tmp_path / "text.zip").write_text("no archive\n" * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(UserError, match=message) as caught:
        open_archive(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_archives_have_no_kind(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file,caption\n" + "a.jpg,a cat\n" * 100)
    for path in (tmp_path / "list.csv", min((scenes / "val2017").iterdir())):
        assert archive_kind(str(path)) is None
    (tmp_path / "empty.tar").write_bytes(bytes(10_240))  # as tar writes one without members
    assert open_archive(str(tmp_path / "empty.tar")).sizes == {}


def test_an_address_without_an_archive_is_refused() -> None:
    with pytest.raises(UserError, match=r"names no archive; write it as zip://name::archive"):
        read_image("zip://a.jpg")
