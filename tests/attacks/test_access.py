"""Paths and addresses that others chose: they open neither files of this machine nor servers inside
its network."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from model_lib import Captioner
from model_lib.batch.batching import batch
from model_lib.io.archives import read_image
from model_lib.io.images import ImageError
from model_lib.io.url_policy import VARIABLE, UrlNotAllowed, require_allowed, store_of
from model_lib.model.captioning import caption_each
from model_lib.model.config import DecodeConfig
from tests.helpers.batches import batch_config
from tests.helpers.http_server import Handler, serving

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


HOSTILE = ["/etc/passwd", "a.jpg", "../a.jpg", "~/.ssh/id_rsa", "", METADATA, "http://localhost/"]
HOSTILE += ["file:///etc/passwd", "FILE:///etc/passwd", "local:///etc/passwd", "memory://a"]
HOSTILE += ["http://10.0.0.1/a.jpg", "github://o:r@/a", "ftp://h/a", "gs://bucket/a.jpg"]
HOSTILE += ["zip://a.jpg::file:///etc/passwd", "simplecache::/etc/passwd", "gs://a::s3://b"]
HOSTILE += ["https://a/b::file:///etc/passwd", "https://example.org/a.jpg"]


@pytest.mark.parametrize("uri", HOSTILE)
def test_nothing_is_opened_unless_the_operator_names_it(uri: str) -> None:
    assert not opens(uri)


def test_only_what_is_below_a_prefix_of_the_operator_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    (tmp_path / "secret").write_text("")
    (ours / "link").symlink_to(tmp_path / "secret")
    monkeypatch.setenv(VARIABLE, f"{ours}/, http://10.0.0.7:8000/images, memory://kept")
    assert opens(f"{ours}/a.jpg") and opens(f"file://{ours}/a.jpg") and opens(f"{ours}/x/../a.jpg")
    assert opens("http://10.0.0.7:8000/images/a.jpg") and opens("memory://kept/a.jpg")
    for ending in ("/../secret", "/link", "-evil/a.jpg", "/::file:///etc/passwd"):
        assert not opens(f"{ours}{ending}")
    for host in ("10.0.0.7:8001", "10.0.0.7:8000@evil", "10.0.0.71:8000", "10.0.0.7"):
        assert not opens(f"http://{host}/images/a.jpg")
    for path in ("images-evil/a.jpg", "images/../a.jpg", "", *CLIMBING):
        assert not opens(f"http://10.0.0.7:8000/{path}")
    assert not opens("http://[10.0.0.7/") and not opens("http://10.0.0.7:eight/images/a.jpg")


@pytest.fixture()
def requests() -> list[str]:
    """The paths that were requested from the server on loopback."""
    return []


@pytest.fixture()
def web(scenes: Path, requests: list[str]) -> Iterator[str]:
    """A server on loopback that has an image, and redirects for a path with `?to=…`."""
    image = (scenes / "val2017" / "000000000001.jpg").read_bytes()

    class Redirecting(Handler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def do_GET(self) -> None:
            requests.append(self.path)
            target = self.path.partition("?to=")[2]
            if target:
                self.reply(302, headers=[("Location", target)])
            else:
                self.reply(200, image)

    with serving(Redirecting) as address:
        yield address


def test_redirects_are_followed_only_where_the_user_chose_the_address(
    web: str, requests: list[str], saved_model: Path
) -> None:
    path = f"/a?to={web}/b.jpg"
    assert read_image(web + path) and requests == [path, "/b.jpg"]
    model = Captioner.from_pretrained(str(saved_model), device="cpu")
    (error,) = caption_each(model, [web + path], DecodeConfig(), redirects=False)
    assert isinstance(error, ImageError) and requests[2:] == [path]


def test_a_list_in_a_bucket_names_images_of_its_own_bucket_only() -> None:
    own = store_of("gs://b/lists/today.csv")
    require_allowed("gs://b/x/a.jpg", own)
    local, other = ["/etc/passwd", "file:///etc/passwd"], ["gs://other/a.jpg", "gs://b-evil/a.jpg"]
    for uri in (*local, *other, METADATA, "zip://a::gs://b/c"):
        with pytest.raises(UrlNotAllowed):
            require_allowed(uri, own)


def test_an_image_that_a_list_may_not_name_has_a_row_all_the_same(
    saved_model: Path, scenes: Path, tmp_path: Path
) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/store/in.jpg", (scenes / "val2017" / "000000000001.jpg").read_bytes())
    names = ["in.jpg", f"{scenes}/val2017/000000000002.jpg", METADATA]
    fs.pipe_file("/store/list.txt", "\n".join(names).encode())
    summary = batch(batch_config("memory://store/list.txt", tmp_path, saved_model))
    assert (summary.images, summary.ok, summary.errors) == (3, 1, {"not_allowed": 2})
