"""Captioning many batches on a GPU: the next ones are copied and encoded while one is decoded."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_lib.io.prefetch import prefetch_map
from model_lib.model.captioning import Caption
from model_lib.model.config import DecodeConfig
from model_lib.model.decoding import decode

Pixels = Sequence[np.ndarray]
"""Of a batch's images, uint8 [3, image_size, image_size] each; there may be none."""


def caption_ahead(
    model: Any, batches: Iterable[Pixels], config: DecodeConfig
) -> Iterator[list[list[Caption]]]:
    """Yield each batch's captions, in order, as `Captioner.caption_pixels` returns them.

    Two batches are under way beside the one that is decoded: a thread lays the pixels of one side
    by side, and the other is encoded, on a stream of its own. So the device has work while texts
    are made of tokens, and while the caller uses them.
    """
    device = model.device
    stream = _side_stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # it may still copy the weights

    def buffers() -> Iterator[tuple[Pixels, Tensor]]:
        # Here, not on the thread: CUDA's calls there could break a graph's capture. Pinned memory
        # is kept by torch, and used again once the copy from it is done.
        for batch in batches:
            shape = (len(batch), *batch[0].shape) if batch else (0,)
            yield batch, torch.empty(shape, dtype=torch.uint8, pin_memory=stream is not None)

    with closing(prefetch_map(_stack, buffers(), workers=1, depth=1)) as stacked:
        encoded = (_encode(model, pixels, stream) for pixels in stacked)
        ahead = deque(islice(encoded, 2))
        while ahead:
            features, done = ahead.popleft()
            if done is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(done)
                features.record_stream(current)
            decoded = decode(model, features, config) if len(features) else []
            ahead.extend(islice(encoded, 1))  # before the texts
            yield model.captions(decoded)


@cache
def _side_stream(device: torch.device) -> Any:
    """Return the one stream for encoding: each has memory of its own, which torch keeps."""
    return torch.cuda.Stream(device)


def _stack(batch: tuple[Pixels, Tensor]) -> Tensor:
    images, pixels = batch
    if images:
        np.stack(images, out=pixels.numpy())
    return pixels


@torch.inference_mode()
def _encode(model: Any, pixels: Tensor, stream: Any) -> tuple[Tensor, Any]:
    """Return visual tokens [B, S, E], and the event after which they are there; None: at once."""
    if stream is None or not len(pixels):
        return model.encode(pixels) if len(pixels) else pixels, None
    with torch.cuda.stream(stream):
        return model.encode(pixels.to(model.device, non_blocking=True)), stream.record_event()
