"""What is to be ingested: images with their captions, and rows of the quarantine."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from model_lib.data.captions import CONTROL, captions_in, usable_caption
from model_lib.ingest.image_source import ImageSource

ABSOLUTE = re.compile(r"/|[A-Za-z]:/|[A-Za-z][\w+.-]*://")
"""The start of a path, on Windows too, or of an address."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An image to ingest, with its captions."""

    image_id: int
    file_name: str
    split: str
    source: ImageSource
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Rejected:
    """A row of the quarantine."""

    file_name: str
    reason: str
    detail: str


@dataclass
class Listing:
    """All that is to be ingested."""

    uris: list[str] = field(default_factory=list)
    """Where it was read."""
    entries: list[Entry] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    cleaned: int = 0
    """Captions that lost control characters."""
    is_published: bool = False
    """Whether the splits are COCO's or Karpathy's: they stay whole, for scores to be compared."""
    has_auto_split: bool = False
    """Whether images were split here, by their ids."""

    def reject(self, name: str, reason: str, detail: str) -> None:
        self.rejected.append(Rejected(CONTROL.sub("?", name), reason, CONTROL.sub("?", detail)))

    def reject_duplicate(self, name: str, image_id: int) -> None:
        detail = f"image id {image_id} occurs more than once in {self.uris[-1]}"
        self.reject(name, "duplicate_id", detail)

    def add(
        self, image_id: int, name: str, split: str, source: ImageSource, captions: Sequence[str]
    ) -> None:
        """Add an image with captions that are `usable`, or reject it; of split "auto", about a
        tenth of all ids are for validation."""
        if split == "auto":
            self.has_auto_split = True
            is_val = hashlib.sha256(str(image_id).encode()).digest()[0] < 26
            split = "val" if is_val else "train"
        if not name:
            self.reject("", "bad_row", f"image id {image_id} has no file name")
        elif CONTROL.search(name):
            detail = f"image id {image_id}: its file name has control characters: {name!a}"
            self.reject(name, "bad_name", detail)
        elif not source.takes_any_name and _leaves(name):
            remedy = "make it relative to --images, or leave out --images if the list is right"
            self.reject(name, "outside", f"leaves {source.root}; {remedy}")
        elif captions:
            self.entries.append(Entry(image_id, name, split, source, tuple(captions)))
        else:
            detail = f"{self.uris[-1]} has no caption for image id {image_id}"
            self.reject(name, "no_captions", detail)

    def usable(self, name: str, values: Any, where: str) -> list[str]:
        """Return the captions that can be used, of one or a list; reject the others."""
        captions = []
        for value in captions_in(values):
            caption = usable_caption(value)
            self.cleaned += caption.is_cleaned
            if caption.reason:
                self.reject(name, caption.reason, f"{where}: {caption.detail}")
            else:
                captions.append(caption.text)
        return captions

    def digest(self) -> str:
        """Return the SHA-256 of all entries in their order."""
        digest = hashlib.sha256()
        for entry in self.entries:
            row = (entry.image_id, entry.file_name, entry.split, entry.source.root, entry.captions)
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def _leaves(name: str) -> bool:
    """Return whether a name leads out of the image folder."""
    path = name.replace("\\", "/")
    parts = PurePosixPath(path).parts
    return ABSOLUTE.match(path) is not None or ".." in parts or not parts
