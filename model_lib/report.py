"""Self-contained HTML pages: an evaluation with its scores, and what captioning a bucket came to."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image

if TYPE_CHECKING:
    from model_lib.evaluation import Evaluation
    from model_lib.merging import Summary

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
            "thumbnail": _shown(pictures[image_id]["jpeg"]) if image_id in pictures else None,
            "caption": captions[image_id],
            "references": references[image_id],
            "cider": per_picture[image_id],
        }
        for image_id in chosen
    ]
    return _render("report.html", evaluation=evaluation, cards=cards)


def render_batch(
    summary: "Summary",
    configuration: Mapping[str, Any],
    gallery: Sequence[Mapping[str, Any]],
    worst: Sequence[Mapping[str, Any]],
    failed: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """Return the page of a batch; what stands in it is text, whatever it holds.

    Args:
        summary: the counts.
        configuration: with which it can be made again.
        gallery: rows of captioned pictures, each with a `thumbnail` or None.
        worst: those with the lowest scores, the same way.
        failed: rows without a caption, a reason.
    """
    names = {"gallery": gallery, "worst": worst, "failed": failed}
    return _render(
        "batch.html", summary=summary, images=configuration["images"], configuration=configuration, **names
    )  # fmt: skip


def _render(template: str, **values: Any) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=loader, autoescape=True).get_template(template).render(**values)


def _shown(jpeg: bytes) -> str:
    return thumbnail(Image.open(io.BytesIO(jpeg)))


def thumbnail(image: Image.Image) -> str:
    """Return a small JPEG of an RGB picture in base64."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80)
    return base64.b64encode(encoded.getvalue()).decode()
