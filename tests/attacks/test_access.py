"""Paths and addresses that others chose: neither files of this machine nor servers inside are opened for them."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from model_lib import storage
from model_lib.allowing import VARIABLE, NotAllowed, require_allowed, require_listed
from model_lib.batch.batching import batch
from model_lib.batch.config import BatchConfig

INSIDE = ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]"]
METADATA = "http://169.254.169.254/computeMetadata/v1/"


def opens(uri: str) -> bool:
    try:
        require_allowed(uri)
    except NotAllowed as error:
        assert "\n" not in str(error) and VARIABLE in str(error)
        return False
    return True


@pytest.fixture()
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is MLflow's server, as far as it can tell; what it has of the web's file system is new."""
    monkeypatch.setenv("__pyfunc_model_path__", "/model")
    fsspec.filesystem("http").clear_instance_cache()
    yield
    fsspec.filesystem("http").clear_instance_cache()


HOSTILE = [
    "/etc/passwd",
    "a.jpg",
    "../a.jpg",
    "~/.ssh/id_rsa",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "local:///etc/passwd",
]
HOSTILE += [METADATA, "http://localhost/", "http://10.0.0.1/a.jpg", "memory://a", "github://o:r@/a", "ftp://h/a", ""]
HOSTILE += [
    "zip://a.jpg::file:///etc/passwd",
    "simplecache::/etc/passwd",
    "https://a/b::file:///etc/passwd",
    "gs://a::s3://b",
]


@pytest.mark.parametrize("uri", HOSTILE)
def test_a_served_model_opens_no_files_and_no_schemes_but_a_few(uri: str) -> None:
    assert not opens(uri)


def test_buckets_and_secure_addresses_are_opened() -> None:
    assert opens("gs://bucket/a.jpg") and opens("s3://bucket/a.jpg") and opens("https://example.org/a.jpg")


def test_what_the_operator_names_is_opened_and_what_only_looks_like_it_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    (tmp_path / "secret").write_text("")
    (ours / "link").symlink_to(tmp_path / "secret")
    monkeypatch.setenv(VARIABLE, f"{ours}/, http://10.0.0.7:8000/pictures, memory://kept")
    assert opens(f"{ours}/a.jpg") and opens(f"file://{ours}/a.jpg") and opens(f"{ours}/x/../a.jpg")
    assert opens("http://10.0.0.7:8000/pictures/a.jpg") and opens("memory://kept/a.jpg")
    for uri in (f"{ours}/../secret", f"{ours}/link", f"{ours}-evil/a.jpg", f"{ours}/::file:///etc/passwd"):
        assert not opens(uri)
    for host in ("10.0.0.7:8001", "10.0.0.7:8000@evil", "10.0.0.71:8000", "10.0.0.7"):
        assert not opens(f"http://{host}/pictures/a.jpg")
    for path in ("pictures-evil/a.jpg", "pictures/../a.jpg", ""):
        assert not opens(f"http://10.0.0.7:8000/{path}")


@pytest.fixture()
def web(scenes: Path) -> Iterator[str]:
    """A server on loopback that has a picture, and leads elsewhere to who asks for that."""
    picture = (scenes / "val2017" / "000000000001.jpg").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path.startswith("/to/") else 200)
            if self.path.startswith("/to/"):
                self.send_header("Location", f"http://{INSIDE[int(self.path[4:])]}/a")
            self.end_headers()
            self.wfile.write(picture)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_nobody_reaches_a_clouds_metadata_not_by_a_redirect_either(web: str) -> None:
    assert storage.read_bytes(f"{web}/a.jpg")
    for uri in (METADATA, *(f"{web}/to/{number}" for number in range(len(INSIDE)))):
        with pytest.raises(NotAllowed, match="an address inside"):
            storage.read_bytes(uri)


@pytest.mark.usefixtures("serving")
def test_a_served_model_connects_to_no_address_inside(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = web.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "10.255.255.1", "192.168.255.1"):
        with pytest.raises(NotAllowed, match="an address inside"):
            storage.read_bytes(f"http://{host}:{port}/a.jpg")
    monkeypatch.setenv(VARIABLE, "gs://127.0.0.1/")  # a bucket of that name is no server
    with pytest.raises(NotAllowed, match="an address inside"):
        storage.read_bytes(f"{web}/a.jpg")
    monkeypatch.setenv(VARIABLE, web)
    assert storage.read_bytes(f"{web}/a.jpg")


def test_a_list_from_elsewhere_names_pictures_of_its_own_store_only() -> None:
    require_listed("/any/path.jpg", "/my/own/list.csv")
    require_listed("gs://b/x/a.jpg", "gs://b/lists/today.csv")
    for uri in (
        "/etc/passwd",
        "file:///etc/passwd",
        "gs://other/a.jpg",
        "gs://b-evil/a.jpg",
        METADATA,
        "zip://a::gs://b/c",
    ):
        with pytest.raises(NotAllowed, match="its own store only"):
            require_listed(uri, "gs://b/lists/today.csv")


def test_a_picture_that_a_list_may_not_name_has_a_row_all_the_same(
    saved_model: Path, scenes: Path, tmp_path: Path
) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/store/in.jpg", (scenes / "val2017" / "000000000001.jpg").read_bytes())
    fs.pipe_file("/store/list.txt", f"in.jpg\n{scenes}/val2017/000000000002.jpg\n{METADATA}\n".encode())
    made = batch(BatchConfig(images="memory://store/list.txt", output=str(tmp_path), model=str(saved_model)))
    assert made.pictures == 3 and made.ok == 1 and made.errors == {"not_allowed": 2}
