"""Real servers on loopback for the tests: MLflow, an emulator of Google Cloud Storage, faults
before it, a webhook."""

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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

TIMEOUT = 120.0
"""Seconds in which a server must answer."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], address: str, log: Path) -> Iterator[None]:
    """Run a server until the body ends; its output is in `log`."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MLFLOW_", "STORAGE_"))
    }
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = (
        "false"  # eight more processes, as deploy/mlflow.yaml says
    )
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            deadline = time.monotonic() + TIMEOUT
            while not _answers(address):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
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


@contextlib.contextmanager
def mlflow_server(
    folder: Path, store: str | None = None, port: int = 0, artifacts: str | None = None
) -> Iterator[str]:
    """Yield the address of an MLflow server, its store and its artifacts by default in `folder`."""
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        store or f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        artifacts or str(folder / "art"),
    ]
    with running(command, f"http://127.0.0.1:{port}/health", folder / "mlflow.log"):
        yield f"http://127.0.0.1:{port}"


def postgres_programs() -> Path | None:
    """Return the folder with PostgreSQL's programs, or None."""
    initdb = shutil.which("initdb")
    folders = [
        *([Path(initdb).resolve().parent] if initdb else []),
        *sorted(Path("/usr/lib/postgresql").glob("*/bin")),
    ]
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
            subprocess.run(
                command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, timeout=120
            )

        run("initdb", "--auth=trust", "--username=mlflow", "--encoding=UTF8", "--locale=C")
        run("pg_ctl", "--wait", f"--options={options}", f"--log={folder}/log", "start")
        try:
            yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "--wait", "--mode=immediate", "stop")


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
        self.failed = self.stop_request = self.broken_off = self.outdated = 0
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
        self.stop_request += 1
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

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits for 40 ms

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = faults.next()
            if faults.authorization not in (None, self.headers.get("Authorization")):
                fault = 401
            if fault == 0:
                self.close_connection = True
                self.connection.close()
                return
            if fault is not None:
                self.answer(fault, [], b"out of order")
                return
            is_listing = self.command == "GET" and self.path.partition("?")[0].endswith("/o")
            self.answer(
                *faults.listed(self.path, lambda: self.ask(body)) if is_listing else self.ask(body)
            )

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
                (name, value.replace(target, address)) for name, value in answer.getheaders()
            ]
            return answer.status, headers, content.replace(target.encode(), address.encode())

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = forward

        def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in (
                    "content-length",
                    "transfer-encoding",
                    "connection",
                    "date",
                    "server",
                ):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            breaks = self.command == "GET" and len(content) > 1 and faults.breaks_off()
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(content[: len(content) // 2] if breaks else content)
            if breaks:
                self.close_connection = True

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, ValueError):  # closed on purpose, here or there
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Proxy(ThreadingHTTPServer):
        request_queue_size = 128  # of five, others are lost, and tried again after a second

    proxy = Proxy(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{proxy.server_port}"
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield address
    finally:
        proxy.shutdown()
        proxy.server_close()


@contextlib.contextmanager
def gcs_emulator(
    bucket: str, folder: Path, faults: Faults | None = None
) -> Iterator[dict[str, str]]:
    """Yield the environment in which gs://`bucket` is one that an emulator on loopback holds in
    memory."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    program = str(Path(sys.executable).parent / "gcp-storage-emulator")
    command = [
        program,
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--in-memory",
        "--default-bucket",
        bucket,
    ]
    emulator = f"http://127.0.0.1:{port}"
    with (
        running(command, emulator, folder / "gcs.log"),
        faulty_proxy(
            emulator, faults or Faults(0.0, seed=0)
        ) as address,  # without one, it loses requests
    ):
        # Without the second, gcsfs asks for a kind of bucket that emulators lack, and waits 30
        # seconds for an answer.
        yield {"STORAGE_EMULATOR_HOST": address, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


@contextlib.contextmanager
def s3_server(bucket: str, folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment in which s3://`bucket` is one that a server on loopback holds in
    memory."""
    address = f"http://127.0.0.1:{free_port()}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "moto.server",
        "-H",
        "127.0.0.1",
        "-p",
        address.rpartition(":")[2],
    ]
    # The three that a cluster's secret holds, and no region.
    environment = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    with running(command, f"{address}/moto-api/", folder / "s3.log"):
        urllib.request.urlopen(urllib.request.Request(f"{address}/{bucket}", method="PUT")).close()
        yield environment


STORES = {"gs": gcs_emulator, "s3": s3_server}
"""The stores that captioner is tested on, by the scheme of their URIs."""


@contextlib.contextmanager
def store(scheme: str, bucket: str, folder: Path) -> Iterator[fsspec.AbstractFileSystem]:
    """Yield the file system of an emulated bucket, for this process and those that it starts."""
    with STORES[scheme](bucket, folder) as environment, pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        fsspec.get_filesystem_class(scheme).clear_instance_cache()
        yield fsspec.filesystem(scheme, use_listings_cache=False)
    fsspec.get_filesystem_class(scheme).clear_instance_cache()


@contextlib.contextmanager
def faulty_bucket(name: str, folder: Path, faults: Faults) -> Iterator[fsspec.AbstractFileSystem]:
    """Yield the file system of an emulated bucket, its content in `folder`, that fails as told."""
    import gcsfs

    with gcs_emulator(name, folder, faults) as environment, pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield fsspec.filesystem("gs")
        faults.share = 0.0
    gcsfs.GCSFileSystem.clear_instance_cache()


@contextlib.contextmanager
def refusing(status: int = 403, content: bytes = b"") -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a server that answers everything with a status, and the proofs of those
    who asked."""
    proofs: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            proofs.append(self.headers.get("Authorization", ""))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else content)

        do_GET = do_HEAD = do_POST = refuse

        def log_message(self, *_: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}", proofs
    finally:
        listener.shutdown()
        listener.server_close()


@contextlib.contextmanager
def webhook() -> Iterator[tuple[str, list[dict]]]:
    """Yield the address of a webhook, and what it has been told."""
    told: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}/s3cret", told
    finally:
        listener.shutdown()
        listener.server_close()
