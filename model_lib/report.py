"""The evaluation as one self-contained HTML page: scores, and pictures with their references and captions."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image

if TYPE_CHECKING:
    from model_lib.evaluation import Evaluation

SHOWN = 120
"""Pictures in the gallery: at about 10 kB each the page stays near one MB."""
THUMBNAIL = 200
"""Longest side of a shown picture in pixels."""


def render_report(
    evaluation: "Evaluation",
    captions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    per_picture: Mapping[int, float],
    gallery: Sequence[Mapping[str, Any]],
) -> str:
    """Return the page; captions stand in it as text, whatever they hold.

    Args:
        evaluation: what was judged, and its scores.
        captions: by image id.
        references: by image id.
        per_picture: CIDEr by image id.
        gallery: `image_id`, `file_name` and `jpeg` of the pictures; empty where only a results file was judged.
    """
    pictures = {row["image_id"]: row for row in gallery}
    worst_first = sorted(captions, key=lambda image_id: (per_picture[image_id], image_id))
    step = max(1, len(worst_first) / SHOWN)
    chosen = [worst_first[int(n * step)] for n in range(min(SHOWN, len(worst_first)))]
    cards = [
        {
            "name": pictures[image_id]["file_name"] if image_id in pictures else str(image_id),
            "thumbnail": _thumbnail(pictures[image_id]["jpeg"]) if image_id in pictures else None,
            "caption": captions[image_id],
            "references": references[image_id],
            "cider": per_picture[image_id],
        }
        for image_id in chosen
    ]
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html")
    return template.render(evaluation=evaluation, cards=cards)


def _thumbnail(jpeg: bytes) -> str:
    image = Image.open(io.BytesIO(jpeg))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80)
    return base64.b64encode(encoded.getvalue()).decode()
