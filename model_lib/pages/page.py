"""From a template to a page; what it says of people's data is text, whatever that holds."""

import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

TEMPLATES = Path(__file__).parent / "templates"
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
"""Control characters, to the images that stand for them: a browser shows nothing or refuses the
page."""
THUMBNAIL = 240
"""Longest side of a shown image in pixels."""


def render_page(template: str, **values: Any) -> str:
    """Return a page made of a template in `templates`; all values stand in it as text."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, finalize=_visible, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)


def render_markdown(template: str, **values: Any) -> str:
    """Return a Markdown text made of a template in `templates`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), keep_trailing_newline=True
    )
    return environment.get_template(template).render(**values)


def thumbnail(image: Image.Image) -> bytes:
    """Return a small JPEG of an RGB image."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80)
    return encoded.getvalue()


def _visible(value: Any) -> Any:
    return (
        value.translate(CONTROLS) if type(value) is str else value
    )  # other kinds hold markup or no text
