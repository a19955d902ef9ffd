"""Pages from templates. Values from people's data are escaped: they show as text."""

import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

TEMPLATES = Path(__file__).parent / "templates"
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
"""Control characters and their visible symbols; browsers hide them or refuse the page."""
THUMBNAIL = 240
"""Longest side of a thumbnail in pixels."""


def render_page(template: str, **values: Any) -> str:
    """Return an HTML page from a template in `templates`; all values are escaped."""
    options = {"autoescape": True, "finalize": _visible, "trim_blocks": True, "lstrip_blocks": True}
    return _render(template, values, options)


def render_markdown(template: str, **values: Any) -> str:
    """Return a Markdown text from a template in `templates`."""
    return _render(template, values, {"keep_trailing_newline": True})


def _render(template: str, values: dict[str, Any], options: dict[str, Any]) -> str:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), **options)
    return environment.get_template(template).render(**values)


def thumbnail(image: Image.Image, side: int = THUMBNAIL) -> bytes:
    """Return a small JPEG of an RGB image, `side` pixels on its longer side; it is made small
    itself."""
    image.thumbnail((side, side))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80)
    return encoded.getvalue()


def _visible(value: Any) -> Any:
    # Subclasses of str hold markup.
    return value.translate(CONTROLS) if type(value) is str else value
