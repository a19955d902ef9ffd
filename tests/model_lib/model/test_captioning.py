"""Calling the model with images in every form, and finding them under every name."""

import functools
import io
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from model_lib import Caption, Captioner, UserError, generate_caption
from model_lib.errors import WorkError
from model_lib.io.images import ImageError
from model_lib.model.captioning import caption_each, find_images, load_image
from model_lib.model.config import DecodeConfig


@pytest.fixture()
def web(scenes: Path) -> Iterator[str]:
    """The scenes' address on a web server."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/fails.jpg":
                self.send_error(500)
            else:
                super().do_GET()

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(scenes)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_image_in_every_form_gets_the_same_caption(
    model: Captioner, scenes: Path, web: str
) -> None:
    file = scenes / "val2017" / "000000000001.jpg"
    fsspec.filesystem("memory").pipe_file("/images/a.jpg", file.read_bytes())
    image = Image.open(file).convert("RGB")
    array = np.asarray(image)
    forms = [
        file,
        str(file),
        file.as_uri(),
        "memory://images/a.jpg",
        f"{web}/val2017/000000000001.jpg",
    ]
    forms += [
        file.read_bytes(),
        image,
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array.copy()),
    ]
    captions = model.caption(forms, max_new_tokens=8)
    assert len({(caption.text, tuple(caption.tokens)) for caption in captions}) == 1
    assert isinstance(captions[0], Caption) and captions[0].score < 0
    assert generate_caption(model, image, max_new_tokens=8) == captions[0].text


def test_grey_arrays_are_grey_images(model: Captioner) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
    assert model.caption([grey]) == model.caption([np.stack([grey] * 3, -1)])


def test_a_pillow_image_has_the_pixels_of_its_file(odd_images: Path) -> None:
    readable = 0
    for file in sorted(odd_images.iterdir()):
        try:
            by_path = load_image(file)
        except ImageError as error:
            with pytest.raises(
                (ImageError, UnidentifiedImageError, Image.DecompressionBombError)
            ) as refused:
                load_image(Image.open(file))
            assert getattr(refused.value, "reason", error.reason) == error.reason, file
        else:
            with Image.open(file) as image:
                assert np.array_equal(load_image(image), by_path), file
            readable += 1
    assert readable == 20


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_lib.io.images.MAX_PIXELS", 100)
    with Image.open(scenes / "val2017" / "000000000001.jpg") as image:
        with pytest.raises(ImageError, match="too_large"):
            load_image(image)
        assert image.tile, "which is empty once it is decoded"


def test_one_path_is_one_image_and_other_types_are_refused(model: Captioner, scenes: Path) -> None:
    file = scenes / "val2017" / "000000000001.jpg"
    assert model.caption(str(file)) == model.caption(file) == model.caption([file])
    with pytest.raises(UserError, match="image given as NoneType: expected a path"):
        model.caption([None])


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)]
)
def test_an_array_that_is_no_image_is_refused(model: Captioner, array: np.ndarray) -> None:
    with pytest.raises(UserError, match="expected uint8"):
        model.caption([array])


def test_several_captions_of_an_image_lie_side_by_side(model: Captioner, scenes: Path) -> None:
    files = sorted((scenes / "val2017").iterdir())[:3]
    options = {"top_p": 0.9, "temperature": 1.2, "max_new_tokens": 6, "seed": 5}
    captions = model.caption(files, num_captions=2, **options)
    assert len(captions) == 6 and captions == model.caption(files, num_captions=2, **options)
    beams = model.caption(files, num_beams=4, num_captions=4, max_new_tokens=6)
    assert [beams[0], beams[4], beams[8]] == model.caption(files, num_beams=4, max_new_tokens=6)


def test_captions_come_as_they_are_ready(model: Captioner, scenes: Path) -> None:
    """A list without an end: only what is needed is taken from it."""
    taken = []

    def names() -> Iterator[str]:
        while True:
            taken.append(str(scenes / "val2017" / "000000000001.jpg"))
            yield taken[-1]

    ready = caption_each(model, names(), DecodeConfig(max_new_tokens=2), batch_size=2)
    assert isinstance(next(ready), list) and len(taken) <= 6


def test_names_are_expanded_to_images(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jpg", "b.PNG", "notes.txt", "sub/c.webp", "odd[1].jpg"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    monkeypatch.chdir(tmp_path)
    fsspec.filesystem("memory").pipe_file("/folder/a.jpg", b"")
    (tmp_path / "sub").mkdir()

    def images(*names: str, lines: str = "") -> list[str]:
        return list(map(str, find_images(names, io.StringIO(lines))))

    assert images("set") == ["set/a.jpg", "set/b.PNG", "set/odd[1].jpg", "set/sub/c.webp"]
    assert images(f"{tmp_path}/set/*.jpg")[0] == f"{tmp_path}/set/a.jpg"
    assert images("set/*/*") == ["set/sub/c.webp"]
    assert images("gone.jpg", "set/odd[1].jpg") == ["gone.jpg", "set/odd[1].jpg"]
    address, lines = "http://a/b?c=*", "x.jpg\n\ngs://b/y.jpg\n"
    expected = [address, "x.jpg", "gs://b/y.jpg", "z.jpg"]
    assert images(address, "-", "z.jpg", lines=lines) == expected
    assert images("memory://folder") == ["memory:///folder/a.jpg"]
    results = images("set/*.gif", "a.jpg", "sub", "nowhere://x", "b.jpg")
    assert results[:3] == ["set/*.gif: matches nothing", "a.jpg", "sub: has no images in it"]
    assert results[3].startswith("nowhere://x: ") and results[4] == "b.jpg"


def test_images_that_fail_do_not_affect_the_others(
    model: Captioner, scenes: Path, web: str
) -> None:
    good = f"{web}/val2017/000000000001.jpg"
    names = [
        good,
        f"{web}/gone.jpg",
        f"{web}/fails.jpg",
        "http://127.0.0.1:9/a.jpg",
        "nowhere://x",
        good,
    ]
    results = list(caption_each(model, find_images(names, []), DecodeConfig(max_new_tokens=2)))
    assert isinstance(results[0], list) and results[0] == results[5]
    kinds = [UserError, WorkError, WorkError, UserError]
    for name, result, kind in zip(names[1:5], results[1:5], kinds, strict=True):
        assert type(result) is kind and str(result).startswith(f"{name}: "), result
