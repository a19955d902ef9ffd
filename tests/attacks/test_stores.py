"""Stores that are hostile, refuse or fail: nothing is written elsewhere, nothing good is lost."""

import contextlib
import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from model_lib import UserError
from model_lib.batch.batching import batch
from model_lib.errors import WorkError
from model_lib.io import images, storage
from model_lib.io.archives import read_image
from model_lib.io.images import ImageError
from model_lib.io.remote_cache import cached_folder, local_copy
from model_lib.train.checkpoint import Checkpoints
from tests.helpers.batches import batch_config
from tests.helpers.coco_files import write_captions
from tests.helpers.http_server import Handler, serving
from tests.helpers.ingests import ingested
from tests.helpers.services import Faults, faulty_proxy


class Website(Handler):
    """Serves a file for ever, one that inflates, one that is forbidden, and those of `folder`."""

    protocol_version = "HTTP/1.1"
    folder = Path()

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name == "forbidden.jpg":
            self.send_error(403)
        elif name == "endless.jpg":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            with contextlib.suppress(ConnectionError):
                while True:
                    self.wfile.write(bytes(2**16))
        elif name == "inflates.jpg":
            content = zlib.compress(bytes(50 * 2**20))
            self.reply(200, content, [("Content-Encoding", "deflate")])
        else:
            self.reply(200, (self.folder / name).read_bytes())


@pytest.fixture()
def website(scenes: Path) -> Iterator[str]:
    with serving(type("Served", (Website,), {"folder": scenes / "val2017"})) as address:
        yield address


def test_a_key_of_a_bucket_that_leaves_its_folder_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory").store
    whole = fsspec.filesystem("memory")
    whole.pipe_file("/foreign/m/config.json", b"{}")
    store["/foreign/m/../../../../escaped"] = store["/foreign/m/config.json"]
    try:
        with pytest.raises(UserError, match="escaped, which leaves the folder"):
            cached_folder("memory://foreign/m")
        with (
            pytest.raises(UserError, match="escaped, which leaves the folder"),
            local_copy("memory://foreign/m"),
        ):
            pass
    finally:
        store.clear()
    left = {file.name.partition("-")[0] for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {".lock"}
    assert not list((tmp_path / "cache" / "captioner").glob(".part-*")), "half-fetched"


@pytest.mark.parametrize("name", ["endless.jpg", "inflates.jpg"])
def test_an_answer_that_is_too_large_for_an_image_is_not_read_to_its_end(
    name: str, website: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "LARGEST_FILE", 2**20)
    with pytest.raises(ImageError, match="too_large"):
        read_image(f"{website}/{name}")


@pytest.mark.parametrize("path", ["/dev/zero", "{tmp}/pipe"])
def test_what_is_no_file_is_not_opened(path: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a file"):
        read_image(path.format(tmp=tmp_path))


def test_a_list_of_hostile_addresses_has_a_row_for_each(
    website: str, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "LARGEST_FILE", 2**20)
    names = ["000000000001.jpg", "endless.jpg", "forbidden.jpg", "000000000002.jpg"]
    addresses = [*(f"{website}/{name}" for name in names), "/dev/zero"]
    (tmp_path / "list.txt").write_text("\n".join(addresses))
    result = batch(batch_config(tmp_path / "list.txt", tmp_path / "out", saved_model))
    assert (result.images, result.ok) == (5, 2)
    assert result.errors == {"too_large": 1, "forbidden": 1, "missing": 1}


def test_an_image_that_its_server_refuses_costs_itself(website: str, tmp_path: Path) -> None:
    names = ["000000000001.jpg", "forbidden.jpg", "000000000002.jpg"]
    file = write_captions(tmp_path / "list.json", list(enumerate(names)))
    options = {"annotations": file, "images": website, "split": "train"}
    result = ingested(tmp_path / "data", **options)
    assert result.counts == {"train": 2} and result.quarantined == {"forbidden": 1}
    (row,) = pq.read_table(tmp_path / "data" / "quarantine.parquet").to_pylist()
    assert row["file_name"] == "forbidden.jpg" and "403" in row["detail"]


def test_a_store_that_fails_for_a_while_is_asked_again_by_whoever_reads(website: str) -> None:
    faults = Faults(0.0, seed=0)
    with faulty_proxy(website, faults) as address:
        faults.outage(0.5)
        assert storage.read_bytes(f"{address}/000000000001.jpg")[:2] == b"\xff\xd8"
    assert faults.failed >= 1


def test_checkpoints_that_cannot_be_read_are_not_passed_over(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To begin anew would be to lose them, and the best model with them."""
    shutil.copytree(finished, tmp_path / "run")
    checkpoints = Checkpoints(str(tmp_path / "run"))
    newest = checkpoints.newest()
    assert newest is not None

    def full(path: Path, *_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(WorkError, match=r"step-\d+-.*: cannot be read: the disk is full"):
            checkpoints.newest()
    assert checkpoints.newest() == newest
