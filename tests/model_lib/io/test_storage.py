"""Files are written whole or not at all, locally and in a bucket; what a bucket refuses is not
asked again."""

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import requests
from botocore.exceptions import ClientError
from gcsfs.retry import HttpError
from s3fs.errors import translate_boto_error

from model_lib import UserError
from model_lib.errors import WorkError
from model_lib.io import storage
from model_lib.io.errors import is_transient
from model_lib.io.remote_cache import cached_folder
from tests.helpers.services import refusing


@pytest.mark.parametrize("place", ["{tmp}/file", "memory://store/file"])
def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path: Path, place: str) -> None:
    uri = place.format(tmp=tmp_path)
    storage.write_bytes(uri, b"old")
    with pytest.raises(RuntimeError), storage.atomic_file(uri) as part:
        Path(part).write_bytes(b"half")
        raise RuntimeError
    assert storage.read_bytes(uri) == b"old"
    assert [file.name for file in tmp_path.iterdir()] in (["file"], [])


def test_a_changed_remote_folder_is_fetched_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for content in (b"first", b"second!"):
        storage.write_bytes("memory://models/one/file", content)
        assert Path(cached_folder("memory://models/one"), "file").read_bytes() == content


def test_a_file_is_read_up_to_a_limit_whatever_its_size_says(tmp_path: Path) -> None:
    status = "/proc/self/status"  # says that it has no bytes
    assert Path(status).stat().st_size == 0
    assert storage.read_bytes(status, 10**6).startswith(b"Name:")
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    read = [storage.read_bytes(str(file), limit) for limit in (None, 10**9, 10, 9, 4)]
    assert read == [b"0123456789"] * 4 + [b"01234"]


@pytest.mark.parametrize("uri", ["nowhere://x/y", "gone", "{tmp}"])
def test_what_cannot_be_read_is_one_line(tmp_path: Path, uri: str) -> None:
    with pytest.raises(UserError) as refused:
        storage.read_bytes(uri.format(tmp=tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("bucket", ["s3://bucket", "s3://no such bucket!"])
def test_a_mistake_in_the_setup_of_a_bucket_is_refused_at_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(
        UserError, match=r": cannot be read: .*(Unable to locate|validation failed)"
    ):
        storage.read_bytes(f"{bucket}/x")


def s3_error(status: int, code: str) -> Exception:
    """Return the error that s3fs makes of an answer."""
    metadata = {"HTTPStatusCode": status}
    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": metadata}
    return translate_boto_error(ClientError(answer, "GetObject"))


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (s3_error(416, "InvalidRange"), False),
        (s3_error(400, "InvalidArgument"), False),
        (s3_error(403, "AccessDenied"), False),
        (s3_error(409, "BucketNotEmpty"), False),
        (s3_error(400, "RequestTimeout"), True),
        (s3_error(429, "TooManyRequests"), True),
        (s3_error(500, "InternalError"), True),
        (s3_error(503, "SlowDown"), True),
        (HttpError({"code": 400}), False),
        (FileExistsError("gcsfs makes this of 412"), False),
        (requests.HTTPError(response=SimpleNamespace(status_code=404)), False),
        (requests.HTTPError(response=SimpleNamespace(status_code=503)), True),
        (HttpError({"code": 408}), True),
        (HttpError({"code": 503}), True),
        (OSError(errno.EINVAL, "no"), False),
        (ConnectionResetError(), True),
    ],
    ids=lambda value: str(value),
)
def test_only_transient_errors_are_retried(error: Exception, passes: bool) -> None:
    assert is_transient(error) == passes
    failed = WorkError("x: cannot be read")
    failed.__cause__ = error
    assert is_transient(failed) == passes


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize("status", [400, 416])
def test_a_bucket_that_refuses_a_request_is_not_asked_again(
    scheme: str, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    content = b"<Error><Code>InvalidRange</Code><Message>not satisfiable</Message></Error>"
    message = f"{scheme}://bucket/a.jpg: cannot be read: "
    with refusing(status, content) as (address, paths):
        for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
            monkeypatch.setenv(name, address)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "x")
        fsspec.get_filesystem_class(scheme).clear_instance_cache()
        with pytest.raises((UserError, WorkError), match=message):
            storage.read_bytes(f"{scheme}://bucket/a.jpg", 100)
    fsspec.get_filesystem_class(scheme).clear_instance_cache()
    assert "next attempt" not in caplog.text and 1 <= len(paths) < 6
