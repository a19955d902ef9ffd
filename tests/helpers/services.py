"""Real servers on loopback for the tests: MLflow, an emulator of Google Cloud Storage, faults
before it, a webhook."""

import asyncio
import contextlib
import http.client
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from tests.helpers.http_server import Handler, serving
from tests.helpers.warm_python import warm_python

TIMEOUT = 120.0
"""Seconds in which a server must answer."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], address: str, log: Path) -> Iterator[None]:
    """Run a server until the body ends; its output is in `log`."""
    foreign = ("MLFLOW_", "STORAGE_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    # Without eight more processes, as deploy/mlflow.yaml says.
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            deadline = time.monotonic() + TIMEOUT
            while not _answers(address):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, 15)
            server.wait(20)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@cache
def _empty_database() -> bytes:
    """Return MLflow's tables in SQLite, whose making takes two seconds."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return Path(folder, "mlflow.db").read_bytes()


def empty_store(folder: Path) -> str:
    """Return the URI of a new MLflow store, FOLDER/mlflow.db."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mlflow.db").write_bytes(_empty_database())
    return f"sqlite:///{folder}/mlflow.db"


@contextlib.contextmanager
def mlflow_server(
    folder: Path, store: str | None = None, port: int = 0, artifacts: str | None = None
) -> Iterator[str]:
    """Yield the address of an MLflow server, its store and its artifacts by default in `folder`."""
    port = port or free_port()
    if store is None:
        exists = (folder / "mlflow.db").exists()
        store = f"sqlite:///{folder}/mlflow.db" if exists else empty_store(folder)
    command = f"{warm_python()} -m mlflow server --host 127.0.0.1 --port {port} --workers 1"
    stores = ["--backend-store-uri", store]
    stores += ["--artifacts-destination", artifacts or str(folder / "art")]
    address = f"http://127.0.0.1:{port}"
    with running([*command.split(), *stores], f"{address}/health", folder / "mlflow.log"):
        yield address


def postgres_programs() -> Path | None:
    """Return the folder with PostgreSQL's programs, or None."""
    initdb = shutil.which("initdb")
    folders = [Path(initdb).resolve().parent] if initdb else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


@contextlib.contextmanager
def postgres_server(programs: Path) -> Iterator[str]:
    """Yield the URI of an empty database of a new PostgreSQL server, which never runs as root."""
    port, user = free_port(), "postgres" if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        if user:
            shutil.chown(folder, user)
        data, options = f"{folder}/data", f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"

        def run(program: str, *arguments: str) -> None:
            command = [str(programs / program), "-D", data, *arguments]
            options = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL}
            subprocess.run(command, check=True, timeout=120, **options)

        run("initdb", "--auth=trust", "--username=mlflow", "--encoding=UTF8", "--locale=C")
        run("pg_ctl", "--wait", f"--options={options}", f"--log={folder}/log", "start")
        try:
            yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "--wait", "--mode=immediate", "stop")


OF_A_CONNECTION = {"content-length", "transfer-encoding", "connection", "date", "server"}
"""Headers that a proxy does not pass on."""
Answer = tuple[int, list[tuple[str, str]], bytes]
"""Status, headers and content."""


class Faults:
    """What a proxy does to requests on their way.

    Args:
        share: of them that fail at random: answered 429 or 503, or not at all.
        seed: of the chance.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.rng = share, random.Random(seed)
        self.down_until = self.cut = 0.0
        """Until when everything fails, and the share of answers that break off in their middle."""
        self.authorization: str | None = None
        """What a request must prove itself with; without it, it is answered 401."""
        self.failed = self.broken_off = self.outdated = 0
        self.stale = 0.0
        """Seconds for which a bucket's listing is answered as it was first asked for."""
        self._listings: dict[str, tuple[float, Answer]] = {}

    def outage(self, seconds: float) -> None:
        """Let everything fail with 503 for a while."""
        self.down_until = time.monotonic() + seconds

    def breaks_off(self) -> bool:
        """Return whether the next answer breaks off."""
        breaks = self.rng.random() < self.cut
        self.broken_off += breaks
        return breaks

    def listed(self, query: str, fetch: Callable[[], Answer]) -> Answer:
        """Return what a bucket answers to a query for a listing, or what it answered a while
        ago."""
        now = time.monotonic()
        listed_at, answer = self._listings.get(query, (-math.inf, (0, [], b"")))
        if now - listed_at < self.stale:
            self.outdated += 1
            return answer
        answer = fetch()
        if answer[0] == 200:
            self._listings[query] = now, answer
        return answer

    def next(self) -> int | None:
        """Return how the next request fails: a status, 0 for a broken connection, or None if it
        does not."""
        down = time.monotonic() < self.down_until
        if not down and self.rng.random() >= self.share:
            return None
        self.failed += 1
        return 503 if down else self.rng.choice([429, 503, 0])


@contextlib.contextmanager
def faulty_proxy(target: str, faults: Faults) -> Iterator[str]:
    """Yield the address of a proxy before the server at `target` that fails as `faults` say."""
    host, port = target.removeprefix("http://").split(":")
    one_by_one = threading.Lock()  # as the emulator serves: it loses what waits longer

    class Proxy(Handler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits for 40 ms

        def forward(self) -> None:
            body, fault = self.body(), faults.next()
            if faults.authorization not in (None, self.headers.get("Authorization")):
                fault = 401
            if fault == 0:
                self.close_connection = True
                self.connection.close()
            elif fault is not None:
                self.reply(fault, b"out of order")
            elif self.command == "GET" and self.path.partition("?")[0].endswith("/o"):
                self.answer(*faults.listed(self.path, lambda: self.ask(body)))
            else:
                self.answer(*self.ask(body))

        def ask(self, body: bytes) -> Answer:
            onward = http.client.HTTPConnection(host, int(port), timeout=60)
            try:
                with one_by_one:
                    onward.request(self.command, self.path, body, dict(self.headers))
                    answer = onward.getresponse()
                    content = answer.read()
            except OSError:
                return 503, [], b"away"
            finally:
                onward.close()
            headers = [
                (name, value.replace(target, address))
                for name, value in answer.getheaders()
                if name.lower() not in OF_A_CONNECTION
            ]
            return answer.status, headers, content.replace(target.encode(), address.encode())

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = forward

        def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            length = len(content)
            if self.command == "GET" and length > 1 and faults.breaks_off():
                self.close_connection = True
                content = content[: length // 2]
            self.reply(status, content, headers, length)

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, ValueError):  # closed on purpose, here or there
                self.close_connection = True

    with serving(Proxy) as address:
        yield address


@contextlib.contextmanager
def gcs_emulator(
    bucket: str, folder: Path, faults: Faults | None = None
) -> Iterator[dict[str, str]]:
    """Yield the environment in which gs://`bucket` is one that an emulator on loopback holds in
    memory."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    program = Path(sys.executable).parent / "gcp-storage-emulator"
    command = f"{program} start --host 127.0.0.1 --port {port} --in-memory --default-bucket"
    emulator = f"http://127.0.0.1:{port}"
    with (
        running([*command.split(), bucket], emulator, folder / "gcs.log"),
        # Without a proxy, the emulator loses requests.
        faulty_proxy(emulator, faults or Faults(0.0, seed=0)) as address,
    ):
        # Without the second, gcsfs asks for a kind of bucket that emulators lack, and waits 30
        # seconds for an answer.
        yield {"STORAGE_EMULATOR_HOST": address, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


@contextlib.contextmanager
def s3_server(bucket: str, folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment in which s3://`bucket` is one that a server on loopback holds in
    memory."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    folder.mkdir(parents=True, exist_ok=True)
    command = f"{warm_python()} -m moto.server -H 127.0.0.1 -p {port}".split()
    # What a cluster's secret holds, and no region.
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    with running(command, f"{address}/moto-api/", folder / "s3.log"):
        urllib.request.urlopen(urllib.request.Request(f"{address}/{bucket}", method="PUT")).close()
        yield {"AWS_ENDPOINT_URL": address, **keys}


STORES = {"gs": gcs_emulator, "s3": s3_server}
"""The stores that captioner is tested on, by the scheme of their URIs."""


@contextlib.contextmanager
def using(
    environment: contextlib.AbstractContextManager[dict[str, str]], scheme: str
) -> Iterator[None]:
    """Let this process, and those that it starts, use an emulated store."""
    with environment as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class(scheme).clear_instance_cache()
        yield
    fsspec.get_filesystem_class(scheme).clear_instance_cache()


@contextlib.contextmanager
def store(scheme: str, bucket: str, folder: Path) -> Iterator[fsspec.AbstractFileSystem]:
    """Yield the file system of an emulated bucket, for this process and those that it starts."""
    with using(STORES[scheme](bucket, folder), scheme):
        yield fsspec.filesystem(scheme, use_listings_cache=False)


@contextlib.contextmanager
def faulty_bucket(name: str, folder: Path, faults: Faults) -> Iterator[fsspec.AbstractFileSystem]:
    """Yield the file system of an emulated bucket that fails as `faults` say."""
    sleep = asyncio.sleep
    quickly = SimpleNamespace(sleep=lambda seconds: sleep(seconds / 50))
    with using(gcs_emulator(name, folder, faults), "gs"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("gcsfs.retry.asyncio", quickly)  # its six attempts would take half a minute
        yield fsspec.filesystem("gs")
        faults.share = 0.0


def put_folder(fs: fsspec.AbstractFileSystem, folder: Path, path: str) -> None:
    """Write a folder's files to `path` in a bucket."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            fs.pipe_file(f"{path}/{file.relative_to(folder)}", file.read_bytes())


@contextlib.contextmanager
def refusing(status: int = 403, content: bytes = b"") -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a server that answers everything with a status, and the `Authorization`
    of each request."""
    proofs: list[str] = []

    class Refusing(Handler):
        def refuse(self) -> None:
            proofs.append(self.headers.get("Authorization", ""))
            self.reply(status, content)

        do_GET = do_HEAD = do_POST = refuse

    with serving(Refusing) as address:
        yield address, proofs


@contextlib.contextmanager
def webhook() -> Iterator[tuple[str, list[dict]]]:
    """Yield the address of a webhook, and the documents that were posted to it."""
    posts: list[dict] = []

    class Webhook(Handler):
        def do_POST(self) -> None:
            posts.append(json.loads(self.body()))
            self.reply()

    with serving(Webhook) as address:
        yield f"{address}/s3cret", posts
