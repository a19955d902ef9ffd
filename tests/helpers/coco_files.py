"""COCO captions files of a few images."""

import json
from collections.abc import Sequence
from pathlib import Path


def write_captions(
    file: Path,
    images: Sequence[tuple[int, str]],
    captions: Sequence[tuple[int, str]] | None = None,
) -> Path:
    """Write a captions file of images (id, file name) and captions (image id, text), by default one
    an image; return it."""
    if captions is None:
        captions = [(image_id, f"image {image_id}") for image_id, _ in images]
    document = {
        "images": [{"id": image_id, "file_name": name} for image_id, name in images],
        "annotations": [
            {"id": number, "image_id": image_id, "caption": text}
            for number, (image_id, text) in enumerate(captions)
        ],
    }
    file.write_text(json.dumps(document))
    return file
