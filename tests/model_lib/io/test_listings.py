"""Files of folders and buckets, listed page by page: each once, whatever the pages and levels."""

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from model_lib.errors import UserError
from model_lib.io import listings
from model_lib.io.listings import find_files, list_files
from tests.helpers.services import STORES, Faults, faulty_bucket, store

NAMES = [f"{top}/{below}/{n}.jpg" for top in "abc" for below in range(4) for n in range(3)]
NAMES += [f"{n}.jpg" for n in range(9)] + ["a/x.jpg", "a.jpg", "ä b/ü?.jpg", "d/e/f/g/h.jpg"]


def fill(fs: fsspec.AbstractFileSystem, names: list[str]) -> None:
    for name in [*names, "elsewhere.jpg"]:
        fs.pipe_file(f"bucket/{name}", name.encode())


@pytest.fixture(params=STORES)
def bucket(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A bucket with images below `in`; S3's gives pages of seven."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"s3_additional_kwargs": {"MaxKeys": 7}})
    with store(request.param, "bucket", tmp_path) as fs:
        fill(fs, [f"in/{name}" for name in NAMES])
        yield f"{request.param}://bucket/in"


def test_each_object_is_listed_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for widest, requests in ((1, 2), (1, 16), (32, 2), (32, 16)):
        monkeypatch.setattr(listings, "WIDEST", widest)
        monkeypatch.setattr(listings, "REQUESTS", requests)
        listed = sorted(list_files(bucket), key=lambda file: file[0])
        assert [path for path, _ in listed] == sorted(f"bucket/in/{name}" for name in NAMES)
        assert all(info["size"] == len(path.encode()) - len("bucket/") for path, info in listed)
    top = sorted(f"bucket/in/{name}" for name in NAMES if "/" not in name)
    assert list(find_files(bucket, recursive=False)) == top
    assert len(find_files(bucket.removesuffix("/in"))) == len(NAMES) + 1
    assert not find_files(f"{bucket}/nothing")
    with pytest.raises(UserError, match="://elsewhere/in: "):
        find_files(bucket.replace("bucket", "elsewhere"))


def test_each_page_is_retried_on_its_own(tmp_path: Path) -> None:
    faults = Faults(0.0, seed=0)
    with faulty_bucket("bucket", tmp_path, faults) as fs:
        fill(fs, [f"in/{name}" for name in NAMES])
        faults.share = 0.3
        assert sorted(find_files("gs://bucket/in")) == sorted(f"bucket/in/{name}" for name in NAMES)
        assert faults.failed > 0


def test_a_local_folder_is_listed_as_a_bucket_is(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "round").symlink_to(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "b")
    os.mkfifo(tmp_path / "pipe")
    files = find_files(str(tmp_path))
    linked = [name.replace("b/", "a/again/") if name[0] == "b" else name for name in NAMES]
    assert list(files) == sorted(f"{tmp_path}/{name}" for name in [*linked, "pipe"])
    assert files[f"{tmp_path}/a.jpg"]["size"] == 5
    assert len(find_files(str(tmp_path), recursive=False)) == 11
