"""Archives of a server on loopback that breaks off, or sends something else."""

import contextlib
import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest

from model_lib import cli
from model_lib.data.shards import read_manifest
from model_lib.errors import UserError, WorkError
from model_lib.evaluate.config import ScoreConfig
from model_lib.evaluate.scoring import score
from model_lib.ingest.config import DownloadConfig, IngestConfig
from model_lib.ingest.download import ARCHIVES, download, fetch
from model_lib.ingest.ingesting import ingest
from model_lib.scores.spice import MODELS, spice_scores
from tests.helpers.http_server import serving


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


def archive(folder: Path, size: int = 3_000_000) -> bytes:
    """Return a zip archive of noise."""
    file = folder / "made.zip"
    with zipfile.ZipFile(file, "w") as archive_file:
        archive_file.writestr("noise", np.random.default_rng(3).bytes(size))
    return file.read_bytes()


def test_cocos_archives_are_fetched_and_ingested(
    server: Server, scenes: Path, tmp_path: Path
) -> None:
    for url in ARCHIVES["coco2017"]:
        name = url.rpartition("/")[2]
        folder = "annotations" if name.startswith("annotations") else name.removesuffix(".zip")
        with zipfile.ZipFile(tmp_path / name, "w") as archive_file:
            for file in sorted((scenes / folder).iterdir()):
                archive_file.write(file, f"{folder}/{file.name}")
        server.files[url] = (tmp_path / name).read_bytes()
    server.breaks = [1000, 5000, 2000]
    config = DownloadConfig(dataset="coco2017", output=str(tmp_path / "coco"), base=server.address)
    fetched = download(config)
    assert [archive.files for archive in fetched] == [2, 12, 64]
    assert sorted(file.name for file in (tmp_path / "coco").glob("[!.]*")) == sorted(
        url.rpartition("/")[2] for url in ARCHIVES["coco2017"]
    )
    assert (
        ingest(IngestConfig(dataset=str(tmp_path / "coco"), output=str(tmp_path / "data"))).counts[
            "train"
        ]
        == 64
    )
    requests = len(server.requests)
    assert download(config) == fetched and len(server.requests) == requests, (
        "an archive that is there is not fetched again"
    )


@pytest.mark.usefixtures("java")
def test_the_models_of_spice_are_fetched_only_when_asked_for(
    server: Server, scenes: Path, tmp_path: Path
) -> None:
    results, annotations = (
        tmp_path / "results.json",
        scenes / "annotations" / "captions_val2017.json",
    )
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
    with pytest.raises(
        WorkError, match=r"SPICE: Java ended with exit code 1: .*NoClassDefFoundError"
    ):
        spice_scores(
            {1: "a circle"}, {1: ["a circle"]}, str(output)
        )  # everything but these models is there


def test_what_breaks_off_is_resumed_to_the_byte(server: Server, tmp_path: Path) -> None:
    server.files["a.zip"] = archive(tmp_path)
    server.breaks = [1_200_000, 7, 900_000]
    fetch(
        f"{server.address}/a.zip",
        str(tmp_path / "a.zip"),
        hashlib.md5(server.files["a.zip"]).hexdigest(),
    )
    assert (tmp_path / "a.zip").read_bytes() == server.files["a.zip"]
    assert [start for _, start in server.requests][:2] == [0, 1_200_000] and len(
        server.requests
    ) == 4
    assert server.sent == len(server.files["a.zip"])
    assert not list(tmp_path.glob("*.part*"))


def test_another_process_goes_on_with_the_part(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTIONER_RETRY_SECONDS", "0")
    server.files["a.zip"] = archive(tmp_path)
    url, target = f"{server.address}/a.zip", tmp_path / "a.zip"
    server.breaks = [1_000_000, 0]
    with pytest.raises(WorkError, match=r"a\.zip: cannot be read: .*the server sent nothing more"):
        fetch(url, str(target), None)
    (part,) = tmp_path.glob("a.zip.*.part")
    assert not target.exists() and part.stat().st_size == 1_000_000
    assert fetch(url, str(target), None).files == 1
    assert (
        server.requests[-1] == ("a.zip", 1_000_000) and target.read_bytes() == server.files["a.zip"]
    )


def test_a_part_of_another_version_is_not_used(server: Server, tmp_path: Path) -> None:
    server.files["a.zip"] = archive(tmp_path)
    (tmp_path / "a.zip.other.part").write_bytes(b"of another version")
    fetch(f"{server.address}/a.zip", str(tmp_path / "a.zip"), None)
    assert (tmp_path / "a.zip").read_bytes() == server.files["a.zip"]
    assert not list(tmp_path.glob("*.part"))


def test_a_server_without_ranges_is_read_from_the_start(server: Server, tmp_path: Path) -> None:
    server.files["a.zip"], server.ranges, server.breaks = archive(tmp_path), False, [2_000_000]
    fetch(f"{server.address}/a.zip", str(tmp_path / "a.zip"), None)
    assert (tmp_path / "a.zip").read_bytes() == server.files["a.zip"]


def test_damage_is_found_and_nothing_of_it_kept(server: Server, tmp_path: Path) -> None:
    server.files["a.zip"] = archive(tmp_path)
    with pytest.raises(WorkError, match=r"a\.zip: came damaged, its MD5 is"):
        fetch(f"{server.address}/a.zip", str(tmp_path / "a.zip"), "0" * 32)
    server.files["a.zip"] = server.files["a.zip"][:-40]
    for target in (str(tmp_path / "a.zip"), "memory://damaged/a.zip"):
        with pytest.raises(WorkError, match=r"is not a whole zip archive"):
            fetch(f"{server.address}/a.zip", target, None)
        with pytest.raises(UserError, match="no such"):
            read_manifest(target)
    assert not list(tmp_path.glob("a.zip*"))


def test_the_output_may_be_a_bucket(server: Server, tmp_path: Path) -> None:
    import fsspec

    server.files["a.zip"], server.breaks = archive(tmp_path), [1_000_000]
    assert fetch(f"{server.address}/a.zip", "memory://fetched/a.zip", None).files == 1
    assert fsspec.open("memory://fetched/a.zip").open().read() == server.files["a.zip"]


def test_what_cannot_be_fetched_is_one_line(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"annotations_trainval2017\.zip: the server answers 404 Not Found; is --base",
    ):
        download(DownloadConfig(dataset="coco2017", output=str(tmp_path), base=server.address))
    with pytest.raises(UserError, match="is not an http"):
        DownloadConfig(dataset="coco2017", output=str(tmp_path), base="ftp://x")
