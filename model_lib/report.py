"""Self-contained HTML pages: an evaluation with its scores, and what captioning a bucket came to."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image

if TYPE_CHECKING:
    from model_lib.judgement import Judgement, View
    from model_lib.merging import Summary
    from model_lib.promotion import Decision

THUMBNAIL = 200
"""Longest side of a shown picture in pixels."""


def render_report(
    judgement: "Judgement",
    *,
    others: Sequence["Judgement"] = (),
    champion: "Judgement | None" = None,
    decision: "Decision | None" = None,
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]] | None = None,
) -> str:
    """Return the page; captions stand in it as text, whatever they hold.

    Args:
        judgement: of the model that the page is about.
        others: of the other candidates, on the same pictures.
        champion: of the present champion, on the same pictures.
        decision: whether the model takes the champion's place, and why.
        curves: for each model's name its metrics in training, each a list of step and value.
    """
    pictures = judgement.pictures
    rows = zip(
        pictures.image_ids, pictures.file_names, pictures.captions, pictures.references, pictures.main(), strict=True
    )
    cards = [
        {"name": name, "thumbnail": _base64(pictures.views.get(i)), "caption": caption, "references": texts, "cider": c}
        for i, name, caption, texts, c in sorted(rows, key=lambda row: (row[4], row[0]))
        if i in pictures.views or not pictures.views
    ]
    return _render("report.html", evaluation=judgement.evaluation, cards=cards[:120], decision=decision)


def _base64(view: "View | None") -> str | None:
    return base64.b64encode(view.thumbnail).decode() if view else None


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


def thumbnail(image: Image.Image) -> bytes:
    """Return a small JPEG of an RGB picture."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80)
    return encoded.getvalue()
