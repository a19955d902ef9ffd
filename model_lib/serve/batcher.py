"""Captioning the images of concurrent requests in common batches."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from PIL import Image

from model_lib.errors import UserError, WorkError, first_line
from model_lib.model.captioning import Caption, ImageCaptioner
from model_lib.model.config import DecodeConfig

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Waiting:
    """An image that waits for its caption."""

    pixels: np.ndarray
    config: DecodeConfig
    group: Any
    """What the images of a batch have in common."""
    caption: Future[Caption] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """A thread that captions the images that wait, as many together as it may.

    A batch has the oldest image and those with the same options, in the order of their arrival. It
    begins when it is full, or when its oldest image has waited long enough; while the model works,
    the next one gathers. Entering captions a first, white image, and raises what the model raises;
    leaving captions what waits.

    Args:
        model: the captioner.
        batch_size: most images of a batch.
        wait: longest time in seconds that an image waits while the model is idle.
        on_batch: called after each batch with its images and seconds.
        on_failure: called if the model, after a failure, fails even with a white image.
    """

    def __init__(
        self,
        model: ImageCaptioner,
        batch_size: int,
        wait: float,
        on_batch: Callable[[int, float], object],
        on_failure: Callable[[WorkError], object],
    ) -> None:
        self.model, self.batch_size, self.wait = model, batch_size, wait
        self.on_batch, self.on_failure = on_batch, on_failure
        self._white = model.preprocess(Image.new("RGB", (64, 64), "white"))
        self._first: Future[Any] = Future()
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._ends = False
        self._thread = threading.Thread(target=self._work, name="captions")

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._first.result()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ends = True
            self._changed.notify()
        self._thread.join()

    def submit(self, images: Sequence[np.ndarray], config: DecodeConfig) -> list[Future[Caption]]:
        """Return the captions-to-be of a request's images.

        Args:
            images: as `ImageCaptioner.caption_pixels` takes them.
            config: how to decode; `num_captions` is 1.

        Raises, by the futures:
            UserError: the model cannot decode so.
            WorkError: the model failed.
        """
        # Draws depend on the batch, so that those of a seed are repeated only without other images.
        group = object() if config.do_sample else config
        waiting = [_Waiting(pixels, config, group) for pixels in images]
        for image in waiting:
            image.caption.set_running_or_notify_cancel()  # so that nobody can cancel it
        with self._changed:
            self._waiting.extend(waiting)
            self._changed.notify()
        return [image.caption for image in waiting]

    def _work(self) -> None:
        try:
            self._first.set_result(self.model.caption_pixels([self._white], DecodeConfig()))
        except Exception as error:
            self._first.set_exception(error)
            return
        while batch := self._next_batch():
            try:
                self._caption(batch)
            except Exception as error:
                self._fail(batch, error)

    def _next_batch(self) -> list[_Waiting]:
        """Wait for a batch, and take it; it is empty at the end."""
        with self._changed:
            while True:
                left = None
                if self._waiting:
                    oldest = self._waiting[0]
                    batch = [image for image in self._waiting if image.group == oldest.group]
                    left = oldest.since + self.wait - time.monotonic()
                    if len(batch) >= self.batch_size or left <= 0 or self._ends:
                        taken = set(batch[: self.batch_size])
                        self._waiting = deque(i for i in self._waiting if i not in taken)
                        return batch[: self.batch_size]
                elif self._ends:
                    return []
                self._changed.wait(left)

    def _caption(self, batch: list[_Waiting]) -> None:
        began = time.monotonic()
        captions = self.model.caption_pixels([image.pixels for image in batch], batch[0].config)
        self.on_batch(len(batch), time.monotonic() - began)
        for image, (caption,) in zip(batch, captions, strict=True):
            image.caption.set_result(caption)

    def _fail(self, batch: list[_Waiting], error: Exception) -> None:
        """Let a batch fail, and try the model again: after some errors, CUDA fails for good."""
        problem: Exception = error
        if not isinstance(error, UserError):
            log.error("a batch of %d images failed", len(batch), exc_info=error)
            problem = WorkError(f"the model failed: {first_line(error)}")
            try:
                self.model.caption_pixels([self._white], DecodeConfig())
            except Exception:
                self.on_failure(problem)
        for image in batch:
            image.caption.set_exception(problem)
