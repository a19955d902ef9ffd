"""Archives of a server on loopback that breaks off, or sends something else."""

import contextlib
import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import fsspec
import numpy as np
import pytest

from model_lib import cli
from model_lib.errors import UserError, WorkError
from model_lib.evaluate.config import ScoreConfig
from model_lib.evaluate.scoring import score
from model_lib.ingest.download import ARCHIVES, DownloadConfig, download, fetch
from model_lib.io import storage
from model_lib.scores.spice import MODELS, spice_scores
from tests.helpers.http_server import serving
from tests.helpers.ingests import ingested


class Server:
    """The files of a server, and its faults."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.breaks: list[int] = []
        """Bytes after which each of the next answers breaks off."""
        self.ranges = True
        self.requests: list[tuple[str, int]] = []
        """The name and first byte of each request."""
        self.sent = 0
        self.address = ""


@pytest.fixture()
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, send: bool) -> None:
            name = self.path.lstrip("/")
            if name not in state.files:
                self.send_error(404)
                return
            content = state.files[name]
            requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(requested[1]) if requested and state.ranges else 0
            self.send_response(206 if requested and state.ranges else 200)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", hashlib.md5(content).hexdigest())
            self.end_headers()
            if send:
                state.requests.append((name, start))
                end = start + state.breaks.pop(0) if state.breaks else len(content)
                state.sent += len(content[start:end])
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(content[start:end])
                if end < len(content):
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.close()

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError, ValueError):  # closed on purpose
                super().handle_one_request()

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as state.address:
        yield state


@pytest.fixture()
def archive(server: Server, tmp_path: Path) -> bytes:
    """A zip archive of noise, which the server has as a.zip."""
    file = tmp_path / "made.zip"
    with zipfile.ZipFile(file, "w") as archive_file:
        archive_file.writestr("noise", np.random.default_rng(3).bytes(3_000_000))
    server.files["a.zip"] = file.read_bytes()
    return server.files["a.zip"]


def test_cocos_archives_are_fetched_and_ingested(
    server: Server, archives: Path, tmp_path: Path
) -> None:
    names = {url: url.rpartition("/")[2] for url in ARCHIVES["coco2017"]}
    server.files = {url: (archives / name).read_bytes() for url, name in names.items()}
    server.breaks = [1000, 5000, 2000]
    output = tmp_path / "coco"
    config = DownloadConfig(dataset="coco2017", output=str(output), base=server.address)
    fetched = download(config)
    assert [archive.files for archive in fetched] == [2, 12, 64]
    assert {file.name for file in output.glob("[!.]*")} == set(names.values())
    assert ingested(tmp_path / "data", dataset=output).counts["train"] == 64
    requests = len(server.requests)
    assert download(config) == fetched
    assert len(server.requests) == requests, "an archive that is there is not fetched again"


@pytest.mark.usefixtures("java")
def test_the_models_of_spice_are_fetched_only_when_asked_for(
    server: Server, scenes: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results.json"
    annotations = scenes / "annotations" / "captions_val2017.json"
    results.write_text(json.dumps([{"image_id": n, "caption": "a circle"} for n in range(1, 13)]))
    output = tmp_path / "spice"
    config = ScoreConfig(results=str(results), annotations=str(annotations), spice=str(output))
    with pytest.raises(UserError, match="fetch it: captioner download spice"):
        score(config)
    (path,) = ARCHIVES["spice"]
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive_file:
        for name in MODELS:
            archive_file.writestr(f"stanford-corenlp-full-2015-12-09/{name}", "no Java")
    server.files[path] = (tmp_path / "made.zip").read_bytes()
    cli.download(DownloadConfig(dataset="spice", output=str(output), base=server.address))
    assert all((output / name).read_bytes() == b"no Java" for name in MODELS)
    # Everything but these models is there.
    with pytest.raises(WorkError, match=r"Java ended with exit code 1: .*NoClassDefFound"):
        spice_scores({1: "a circle"}, {1: ["a circle"]}, str(output))


def test_what_breaks_off_is_resumed_to_the_byte(
    server: Server, archive: bytes, tmp_path: Path
) -> None:
    server.breaks = [1_200_000, 7, 900_000]
    (tmp_path / "a.zip.other.part").write_bytes(b"of another version")
    target = tmp_path / "a.zip"
    fetch(f"{server.address}/a.zip", str(target), hashlib.md5(archive).hexdigest())
    assert target.read_bytes() == archive and server.sent == len(archive)
    starts = [start for _, start in server.requests]
    assert starts[:2] == [0, 1_200_000] and len(starts) == 4
    assert not list(tmp_path.glob("*.part*"))


def test_a_server_may_know_no_ranges_and_the_output_be_a_bucket(
    server: Server, archive: bytes
) -> None:
    server.ranges, server.breaks = False, [2_000_000]
    assert fetch(f"{server.address}/a.zip", "memory://fetched/a.zip", None).files == 1
    assert fsspec.open("memory://fetched/a.zip").open().read() == archive


def test_another_process_goes_on_with_the_part(
    server: Server, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTIONER_RETRY_SECONDS", "0")
    url, target = f"{server.address}/a.zip", tmp_path / "a.zip"
    server.breaks = [1_000_000, 0]
    with pytest.raises(WorkError, match=r"a\.zip: cannot be read: .*the server sent nothing more"):
        fetch(url, str(target), None)
    (part,) = tmp_path.glob("a.zip.*.part")
    assert not target.exists() and part.stat().st_size == 1_000_000
    assert fetch(url, str(target), None).files == 1
    assert server.requests[-1] == ("a.zip", 1_000_000) and target.read_bytes() == archive


def test_damage_is_found_and_nothing_of_it_kept(
    server: Server, archive: bytes, tmp_path: Path
) -> None:
    url, target = f"{server.address}/a.zip", tmp_path / "a.zip"
    with pytest.raises(WorkError, match=r"a\.zip: came damaged, its MD5 is"):
        fetch(url, str(target), "0" * 32)
    server.files["a.zip"] = archive[:-40]
    for uri in (str(target), "memory://damaged/a.zip"):
        with pytest.raises(WorkError, match="is not a whole zip archive"):
            fetch(url, uri, None)
        assert not storage.exists(uri)
    assert not list(tmp_path.glob("a.zip*"))


def test_an_archive_that_the_server_lacks_is_one_line(server: Server, tmp_path: Path) -> None:
    message = r"annotations_trainval2017\.zip: the server answers 404 Not Found; is --base"
    with pytest.raises(UserError, match=message):
        download(DownloadConfig(dataset="coco2017", output=str(tmp_path), base=server.address))
    with pytest.raises(UserError, match="is not an http"):
        DownloadConfig(dataset="coco2017", output=str(tmp_path), base="ftp://x")
