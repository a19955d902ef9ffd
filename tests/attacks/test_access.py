"""Paths and addresses that others chose: neither files of this machine nor servers inside are
opened for them."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import fsspec
import pytest

from model_lib.batch.batching import batch
from model_lib.batch.config import BatchConfig
from model_lib.io import storage
from model_lib.io.url_policy import (
    VARIABLE,
    UrlNotAllowed,
    _require_reachable,
    require_allowed,
    require_listed,
)
from tests.services import free_port

INSIDE = [
    "169.254.169.254",
    "[fe80::1]",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::169.254.169.254]",
    "[2002:a9fe:a9fe::]",
]
INSIDE += [
    "[2001::5601:5601]",
    "[fd00:ec2::254]",
    "[fd20:ce::254]",
    "100.100.100.200",
    "168.63.129.16",
]
CLIMBING = [
    f"images/{up}secret" for up in ("%2e%2e/", ".%2E/", "%252e%252e/", "..%2f", "%5c..%5c", ".\t./")
]
METADATA = "http://169.254.169.254/computeMetadata/v1/"


def opens(uri: str) -> bool:
    try:
        require_allowed(uri)
    except UrlNotAllowed as error:
        assert "\n" not in str(error) and VARIABLE in str(error)
        return False
    return True


@pytest.fixture()
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is MLflow's server, as far as it can tell; what it has of the web's file system
    is new."""
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
HOSTILE += [
    METADATA,
    "http://localhost/",
    "http://10.0.0.1/a.jpg",
    "memory://a",
    "github://o:r@/a",
    "ftp://h/a",
    "",
]
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
    assert (
        opens("gs://bucket/a.jpg")
        and opens("s3://bucket/a.jpg")
        and opens("https://example.org/a.jpg")
    )


def test_what_the_operator_names_is_opened_and_what_only_looks_like_it_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    (tmp_path / "secret").write_text("")
    (ours / "link").symlink_to(tmp_path / "secret")
    monkeypatch.setenv(VARIABLE, f"{ours}/, http://10.0.0.7:8000/images, memory://kept")
    assert opens(f"{ours}/a.jpg") and opens(f"file://{ours}/a.jpg") and opens(f"{ours}/x/../a.jpg")
    assert opens("http://10.0.0.7:8000/images/a.jpg") and opens("memory://kept/a.jpg")
    for uri in (
        f"{ours}/../secret",
        f"{ours}/link",
        f"{ours}-evil/a.jpg",
        f"{ours}/::file:///etc/passwd",
    ):
        assert not opens(uri)
    for host in ("10.0.0.7:8001", "10.0.0.7:8000@evil", "10.0.0.71:8000", "10.0.0.7"):
        assert not opens(f"http://{host}/images/a.jpg")
    for path in ("images-evil/a.jpg", "images/../a.jpg", "", *CLIMBING):
        assert not opens(f"http://10.0.0.7:8000/{path}")
    assert not opens("http://[10.0.0.7/") and not opens("http://10.0.0.7:eight/images/a.jpg")


@pytest.fixture()
def asked() -> list[str]:
    """The paths that the server on loopback was asked for."""
    return []


@pytest.fixture()
def web(scenes: Path, asked: list[str]) -> Iterator[str]:
    """A server on loopback that has an image, and leads elsewhere to who asks for that, with
    `?to=…`."""
    image = (scenes / "val2017" / "000000000001.jpg").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def do_GET(self) -> None:
            asked.append(self.path)
            _, leads, place = self.path.partition("?to=")
            self.send_response(302 if leads else 200)
            self.send_header("Content-Length", str(len(image)))
            if leads:
                self.send_header("Location", unquote(place))
            self.end_headers()
            self.wfile.write(image)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_nobody_reaches_a_clouds_metadata_not_by_a_redirect_either(web: str) -> None:
    assert storage.read_bytes(f"{web}/a.jpg")
    for uri in (METADATA, *(f"{web}/?to={quote(f'http://{inside}/a')}" for inside in INSIDE)):
        with pytest.raises(UrlNotAllowed, match="an address inside"):
            storage.read_bytes(uri)


@pytest.mark.usefixtures("serving")
def test_a_served_model_connects_to_no_address_inside(
    web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = web.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "10.255.255.1", "192.168.255.1"):
        with pytest.raises(UrlNotAllowed, match="an address inside"):
            storage.read_bytes(f"http://{host}:{port}/a.jpg")
    monkeypatch.setenv(VARIABLE, "gs://127.0.0.1/")  # a bucket of that name is no server
    with pytest.raises(UrlNotAllowed, match="an address inside"):
        storage.read_bytes(f"{web}/a.jpg")
    monkeypatch.setenv(VARIABLE, web)
    assert storage.read_bytes(f"{web}/a.jpg")


@pytest.mark.usefixtures("serving")
def test_what_is_named_is_open_and_nothing_beside_it(
    web: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = web.rpartition(":")[2]
    other = f"http://127.0.0.1:{free_port()}"
    for server in (web, f"http://localhost:{port}"):
        monkeypatch.setenv(VARIABLE, f"{server}/images/")
        assert storage.read_bytes(f"{server}/images/a%20b.jpg") and storage.read_bytes(
            f"{server}/images/a b.jpg"
        )
        assert storage.read_bytes(f"{server}/images/?to={server}/images/c.jpg")
        hostile = [
            f"{server}/secret",
            f"{server}/images/?to={server}/secret",
            f"{server}/images/?to={other}/",
        ]
        for uri in (*hostile, *(f"{server}/{path}" for path in CLIMBING)):
            with pytest.raises(UrlNotAllowed, match="an address inside"):
                storage.read_bytes(uri)
    assert len(asked) == 12 and all(path.startswith("/images/") for path in asked)


@pytest.mark.usefixtures("serving")
def test_an_address_that_stands_for_a_public_one_is_public() -> None:
    """Where there is IPv6 alone, names of IPv4 are translated."""
    _require_reachable("example.org", "64:ff9b::93.184.215.14")
    for inside in (
        "64:ff9b::10.0.0.7",
        "64:ff9b:1::10.0.0.7",
        "2002:a00:7::1",
        "::10.0.0.7",
        "::1",
    ):
        with pytest.raises(UrlNotAllowed, match="an address inside"):
            _require_reachable("example.org", inside)


def test_a_list_from_elsewhere_names_images_of_its_own_store_only() -> None:
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
        with pytest.raises(UrlNotAllowed, match="its own store only"):
            require_listed(uri, "gs://b/lists/today.csv")


def test_an_image_that_a_list_may_not_name_has_a_row_all_the_same(
    saved_model: Path, scenes: Path, tmp_path: Path
) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/store/in.jpg", (scenes / "val2017" / "000000000001.jpg").read_bytes())
    fs.pipe_file(
        "/store/list.txt", f"in.jpg\n{scenes}/val2017/000000000002.jpg\n{METADATA}\n".encode()
    )
    made = batch(
        BatchConfig(images="memory://store/list.txt", output=str(tmp_path), model=str(saved_model))
    )
    assert made.images == 3 and made.ok == 1 and made.errors == {"not_allowed": 2}
