"""Concurrent requests share batches, and lose nothing by it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from model_lib import Captioner
from model_lib.errors import UserError, WorkError
from model_lib.model import captioner
from model_lib.model.config import DecodeConfig
from model_lib.serve.batcher import Batcher
from tests.helpers.small import pixels

GREEDY = DecodeConfig(max_new_tokens=8)


@pytest.fixture()
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The images of each batch that is decoded."""
    counts: list[int] = []
    decode = captioner.decode

    def counted(model: Any, features: Any, config: DecodeConfig) -> Any:
        counts.append(len(features))
        return decode(model, features, config)

    monkeypatch.setattr(captioner, "decode", counted)
    return counts


class Started:
    """Starts batchers, and ends them with the test."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack, self.batches = stack, []
        self.failures: list[WorkError] = []

    def __call__(self, model: Captioner, batch_size: int = 32, wait: float = 60.0) -> Batcher:
        batches, failures = self.batches, self.failures
        record = lambda images, _: batches.append(images)  # noqa: E731
        return self.stack.enter_context(Batcher(model, batch_size, wait, record, failures.append))


@pytest.fixture()
def start() -> Iterator[Started]:
    with ExitStack() as stack:
        yield Started(stack)


def rows(model: Captioner, count: int) -> list[np.ndarray]:
    return list(pixels(model, count).numpy())


def alone(model: Captioner, images: list[np.ndarray], config: DecodeConfig = GREEDY) -> list[str]:
    return [model.caption_pixels([image], config)[0][0].text for image in images]


def test_32_concurrent_requests_of_one_image_are_one_batch(
    model: Captioner, sizes: list[int], start: Started
) -> None:
    images = rows(model, 32)
    expected = alone(model, images)
    batcher = start(model)
    sizes.clear()
    at_once = threading.Barrier(32)

    def ask(image: np.ndarray) -> str:
        at_once.wait()
        (caption,) = batcher.submit([image], GREEDY)
        return caption.result().text

    with ThreadPoolExecutor(32) as clients:
        assert list(clients.map(ask, images)) == expected and len(set(expected)) > 1
    assert sizes == [32]
    assert start.batches == [32]


def test_a_batch_has_at_most_its_size_and_one_set_of_options(
    model: Captioner, start: Started
) -> None:
    batcher = start(model, batch_size=4)
    images = rows(model, 9)
    beams = DecodeConfig(max_new_tokens=8, num_beams=2)
    requests = [(image, beams if n in (1, 3, 4, 6) else GREEDY) for n, image in enumerate(images)]
    futures = [batcher.submit([image], config)[0] for image, config in requests]
    ninth = futures.pop()  # which waits
    assert [future.result().text for future in futures] == [
        alone(model, [image], config)[0] for image, config in requests[:-1]
    ]
    assert start.batches == [4, 4] and not ninth.done()
    start.stack.close()
    assert ninth.result().text == alone(model, images[-1:])[0], "captioned before the end"


def test_an_image_waits_for_others_no_longer_than_it_may(model: Captioner, start: Started) -> None:
    batcher = start(model, wait=0.01)
    assert batcher.submit(rows(model, 1), GREEDY)[0].result(60).text


def test_a_seed_draws_the_same_captions_beside_other_requests(
    model: Captioner, start: Started
) -> None:
    config = DecodeConfig(max_new_tokens=8, temperature=2.0, seed=3)
    images = rows(model, 3)
    expected = [row[0].text for row in model.caption_pixels(images, config)]
    batcher = start(model, wait=0.0)
    for _ in range(2):
        batcher.submit(rows(model, 2), config)
        batcher.submit(rows(model, 2), GREEDY)
        assert [f.result().text for f in batcher.submit(images, config)] == expected


def test_options_that_the_model_cannot_decode_with_are_the_askers_mistake(
    model: Captioner, start: Started
) -> None:
    batcher = start(model, wait=0.0)
    futures = batcher.submit(rows(model, 2), DecodeConfig(max_new_tokens=199))
    for future in futures:
        with pytest.raises(UserError, match="is more than the model's 47 positions"):
            future.result()
    assert not start.failures


def test_a_batch_fails_alone_unless_the_model_fails_with_anything(
    model: Captioner, start: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = start(model, wait=0.0)
    caption_pixels = model.caption_pixels
    broken = [True, False]

    def fail(images: Any, config: DecodeConfig) -> Any:
        if broken.pop(0) if broken else False:
            raise RuntimeError("CUDA error: an illegal memory access\nand more")
        return caption_pixels(images, config)

    monkeypatch.setattr(model, "caption_pixels", fail)
    image = rows(model, 1)
    with pytest.raises(WorkError, match="the model failed: CUDA error: an illegal memory"):
        batcher.submit(image, GREEDY)[0].result()
    assert batcher.submit(image, GREEDY)[0].result().text and not start.failures
    broken += [True, True]
    with pytest.raises(WorkError, match="the model failed"):
        batcher.submit(image, GREEDY)[0].result()
    assert [str(failure) for failure in start.failures] == [
        "the model failed: CUDA error: an illegal memory access"
    ]


def test_a_model_that_fails_at_first_is_not_served(
    model: Captioner, monkeypatch: pytest.MonkeyPatch, start: Started
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(model, "caption_pixels", fail)
    with pytest.raises(RuntimeError, match="no kernel image is available"):
        start(model)
