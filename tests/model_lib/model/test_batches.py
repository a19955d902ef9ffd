"""Captioning many batches, with the next ones under way: the same captions, errors and end."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from model_lib import Captioner
from model_lib.model.batches import caption_ahead
from model_lib.model.config import DecodeConfig
from tests.helpers.small import small_model

SIZES = (3, 0, 4, 1, 0)
"""Images of the batches."""


def batches(model: Captioner) -> Iterator[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    shape = (3, model.image_size, model.image_size)
    for size in SIZES:
        yield [rng.integers(0, 256, shape, np.uint8) for _ in range(size)]


@pytest.mark.parametrize(
    "config",
    [DecodeConfig(max_new_tokens=6, num_beams=3), DecodeConfig(max_new_tokens=6, top_p=0.9)],
)
def test_working_ahead_changes_no_caption(model: Captioner, config: DecodeConfig) -> None:
    expected = [model.caption_pixels(b, config) if b else [] for b in batches(model)]
    assert list(map(len, expected)) == list(SIZES)
    assert list(caption_ahead(model, batches(model), config)) == expected
    assert list(model.caption_batches(batches(model), config)) == expected
    assert list(caption_ahead(model, [], config)) == []


def test_an_error_in_a_batch_comes_out_and_no_thread_is_left(model: Captioner) -> None:
    before = threading.active_count()

    def broken() -> Iterator[list[np.ndarray]]:
        yield from batches(model)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(caption_ahead(model, broken(), DecodeConfig(max_new_tokens=2)))
    captions = caption_ahead(model, batches(model), DecodeConfig(max_new_tokens=2))
    next(captions)
    captions.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.gpu
def test_two_streams_make_the_captions_of_one() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    model = small_model().for_inference(torch.device("cuda"), torch.float32)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 32, 3, model.image_size, model.image_size), np.uint8)
    for config in (DecodeConfig(), DecodeConfig(num_beams=4), DecodeConfig(top_p=0.9)):
        expected = [model.caption_pixels(list(batch), config) for batch in images]
        captions = list(model.caption_batches(map(list, images), config))
        assert [[c.tokens for (c,) in batch] for batch in captions] == [
            [c.tokens for (c,) in batch] for batch in expected
        ]
