"""Paths and addresses that others chose: neither files of this machine nor servers inside are
opened for them."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import fsspec
import pytest

from model_lib import Captioner
from model_lib.batch.batching import batch
from model_lib.batch.config import BatchConfig
from model_lib.io.images import ImageError, read_image
from model_lib.io.url_policy import VARIABLE, UrlNotAllowed, require_allowed, store_of
from model_lib.model.captioning import caption_each
from model_lib.model.config import DecodeConfig

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
    "gs://bucket/a.jpg",
    "https://example.org/a.jpg",
]


@pytest.mark.parametrize("uri", HOSTILE)
def test_nothing_is_opened_unless_the_operator_names_it(uri: str) -> None:
    assert not opens(uri)


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


def test_redirects_are_followed_only_where_the_user_chose_the_address(
    web: str, asked: list[str], saved_model: Path
) -> None:
    away = f"{web}/a?to={quote(f'{web}/b.jpg')}"
    assert read_image(away) and asked == [f"/a?to={quote(f'{web}/b.jpg')}", "/b.jpg"]
    model = Captioner.from_pretrained(str(saved_model), device="cpu")
    (refused,) = caption_each(model, [away], DecodeConfig(), redirects=False)
    assert isinstance(refused, ImageError) and asked[2:] == [asked[0]]


def test_a_list_in_a_bucket_names_images_of_its_own_bucket_only() -> None:
    own = store_of("gs://b/lists/today.csv")
    require_allowed("gs://b/x/a.jpg", own)
    for uri in (
        "/etc/passwd",
        "file:///etc/passwd",
        "gs://other/a.jpg",
        "gs://b-evil/a.jpg",
        METADATA,
        "zip://a::gs://b/c",
    ):
        with pytest.raises(UrlNotAllowed):
            require_allowed(uri, own)


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
