"""The vision tower's results on disk: computed once, for training several epochs on one view of
each image."""

import contextlib
import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model_lib.data.shards import SplitReader
from model_lib.io import storage
from model_lib.model.captioner import Captioner
from model_lib.progress import Progress

log = logging.getLogger(__name__)


class FeatureCache:
    """The visual tokens of a split, one file a vision tower, data set and number format.

    Args:
        folder: a local folder.
        model: whose vision tower it is, in the number format to keep.
        reader: of the split.
        fingerprint: of the data set.
        batch_size: images that go through the tower at once.

    Raises:
        UserError: the disk has no room.
    """

    def __init__(
        self, folder: str, model: Captioner, reader: SplitReader, fingerprint: str, batch_size: int
    ) -> None:
        vision = model.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2 + 1
        like = next(model.vision.parameters())
        self.dtype = like.dtype
        self.shape = (reader.rows, tokens, vision.hidden_size)
        key = hashlib.sha256(f"{fingerprint} {self.dtype} {self.shape}".encode())
        for name, weight in sorted(model.vision.state_dict().items()):
            key.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
        self.file = Path(folder, f"features-{key.hexdigest()[:16]}.bin")
        self.done = self.file.with_suffix(".json")
        need = int(np.prod(self.shape)) * like.element_size()
        Path(folder).mkdir(parents=True, exist_ok=True)
        with self._alone():
            if not self._ready():
                self._require_room(need)
                self._fill(model.encode, reader, batch_size, like.device)
        self.values = self._open("r")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for a run that fills the same file: a second one would empty it, and need the same
        time and room."""
        with self.file.with_suffix(".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("feature cache: another run fills %s; waiting for it", self.file)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _require_room(self, need: int) -> None:
        there = self.file.stat().st_blocks * 512 if self.file.exists() else 0
        log.warning("feature cache: %s takes %.1f GB", self.file, need / 1e9)
        storage.require_room(str(self.file.parent), need - there, "the feature cache")

    def _ready(self) -> bool:
        return self.done.exists() and self.file.exists()

    def _open(self, mode: str) -> np.memmap:
        # Bytes rather than numbers: numpy knows no bfloat16.
        width = self.shape[-1] * self.dtype.itemsize
        return np.memmap(self.file, np.uint8, mode, shape=(*self.shape[:-1], width))  # type: ignore[call-overload]

    def _fill(
        self,
        encode: Callable[[Tensor], Tensor],
        reader: SplitReader,
        batch_size: int,
        device: torch.device,
    ) -> None:
        values = self._open("w+")
        with Progress("encode images", reader.rows, "images") as progress, torch.no_grad():
            for batch in reader.batches(reader.in_order(batch_size)):
                features = encode(torch.from_numpy(batch.pixels).to(device)).cpu().contiguous()
                values[batch.numbers] = features.view(torch.uint8).numpy()
                progress.advance(len(batch.numbers))
        values.flush()
        self.done.write_text(
            json.dumps({"images": reader.rows, "shape": self.shape, "dtype": str(self.dtype)})
        )

    def read(self, numbers: np.ndarray) -> Tensor:
        """Return the visual tokens of some images, [B, S, E], on the CPU."""
        return torch.from_numpy(self.values[numbers]).view(self.dtype)
