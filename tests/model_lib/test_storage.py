"""Files are written whole or not at all, locally and in a bucket."""

import os
from pathlib import Path

import pytest

from model_lib import UserError, storage
from model_lib.copies import local_folder


@pytest.mark.parametrize("place", ["{tmp}/file", "memory://store/file"])
def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path: Path, place: str) -> None:
    uri = place.format(tmp=tmp_path)
    storage.write_bytes(uri, b"old")
    with pytest.raises(RuntimeError), storage.whole_file(uri) as part:
        Path(part).write_bytes(b"half")
        raise RuntimeError
    assert storage.read_bytes(uri) == b"old"
    assert [file.name for file in tmp_path.iterdir()] in (["file"], [])


def test_a_changed_remote_folder_is_fetched_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for content in (b"first", b"second!"):
        storage.write_bytes("memory://models/one/file", content)
        assert Path(local_folder("memory://models/one"), "file").read_bytes() == content


@pytest.mark.parametrize("uri", ["nowhere://x/y", "gone", "{tmp}"])
def test_what_cannot_be_read_is_one_line(tmp_path: Path, uri: str) -> None:
    with pytest.raises(UserError) as refused:
        storage.read_bytes(uri.format(tmp=tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("bucket", ["s3://bucket", "s3://no such bucket!"])
def test_a_mistake_in_the_setup_of_a_bucket_is_told_at_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r": cannot be read: (Unable to locate|Parameter validation)"):
        storage.read_bytes(f"{bucket}/x")
