"""Draw docs/architecture.svg from the layers that import-linter checks: python docs/draw.py."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
DESCRIPTIONS = {
    "cli": "the command line",
    "steps": "what only a pipeline does",
    "registry": "promotion, the model in MLflow",
    "batch": "captions of a folder or bucket",
    "app": "a page to caption images",
    "serve": "captions over HTTP",
    "evaluate": "scores and report of a model",
    "train": "from data to the best model",
    "ingest": "captions and images to shards",
    "data": "shards, manifest, COCO lists",
    "scores": "metrics and their intervals",
    "model": "the network, its tokens, decoding",
    "tracking": "runs in MLflow",
    "pages": "HTML pages and charts",
    "exits": "exit codes, signals",
    "options": "configurations",
    "presets": "named model sizes",
    "progress": "bars and lines",
    "io": "storage, cache, images, locks, retries",
    "errors": "UserError (exit code 2), WorkError (exit code 1)",
}
LEFT, WIDTH, HEIGHT, GAP, SPACE = 20, 780, 46, 24, 16
COLOURS = ("#dbe9f6", "#e3f1e1", "#fdf0d5", "#f3e3f0")
STYLE = """text { font: 13px "DejaVu Sans", Verdana, sans-serif; fill: #222; text-anchor: middle }
.name { font-weight: bold; font-size: 14px }
.small { font-size: 11px }
rect { stroke: #555; rx: 5px }
path { stroke: #555; fill: none; marker-end: url(#head) }"""


def box(x: float, y: float, width: float, name: str, description: str, colour: str) -> str:
    small = ' class="small"' if width < 200 else ""
    return f"""<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{HEIGHT}" fill="{colour}"/>
<text class="name" x="{x + width / 2:g}" y="{y + 20:g}">{name}</text>
<text{small} x="{x + width / 2:g}" y="{y + 37:g}">{description}</text>"""


def row(y: float, boxes: list[tuple[str, str]], colour: str) -> str:
    """Return boxes side by side, and an arrow from each to the row below."""
    width = (WIDTH - SPACE * (len(boxes) - 1)) / len(boxes)
    lefts = [LEFT + n * (width + SPACE) for n in range(len(boxes))]
    drawn = [
        box(x, y, width, name, description, colour)
        for x, (name, description) in zip(lefts, boxes, strict=True)
    ]
    drawn += [f'<path d="M {x + width / 2:g} {y + HEIGHT:g} v {GAP - 7}"/>' for x in lefts]
    return "\n".join(drawn)


def drawing() -> str:
    """Return the drawing as SVG."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (c["layers"] for c in contracts["contracts"] if c["type"] == "layers")
    rows = [
        [("captioner COMMAND", "a person, a script"), ("pipelines, components", "KFP, kfp.local")]
    ]
    layers = [re.split(" [|:] ", layer) for layer in layers]
    command_line, steps = layers.pop(0), layers.pop(0)
    rows += [
        [(name, DESCRIPTIONS[name]) for name in names] for names in [command_line + steps, *layers]
    ]
    drawn = []
    for number, boxes in enumerate(rows):
        y = 20 + number * (HEIGHT + GAP)
        drawn.append(
            row(y, boxes, COLOURS[0 if number == 0 else 1 + (number - 1) * 3 // len(rows)])
        )
    drawn[-1] = drawn[-1].rpartition("\n")[0]  # nothing is below the last row
    height = 20 + len(rows) * (HEIGHT + GAP)
    size = f'width="{WIDTH + 2 * LEFT}" height="{height}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size}>
<style>{STYLE}</style>
<defs>
<marker id="head" viewBox="0 0 8 8" refX="2" refY="4" markerWidth="8" markerHeight="8"
orient="auto">
<path d="M 0 0 L 8 4 L 0 8 z" style="fill: #555; stroke: none; marker-end: none"/>
</marker>
</defs>
<rect width="100%" height="100%" style="fill: white; stroke: none"/>
{chr(10).join(drawn)}
</svg>
"""


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.svg").write_text(drawing())
