"""The images in a report: which ones, and for each what was said of it, by whom, and where the
model looked."""

import base64
import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from model_lib.evaluate.result import Predictions, View

SHOWN = 120
"""Images in a report: at about 20 kB each, with the maps of where the model looked, the page stays
below 3 MB."""
WORST = 60
"""Of these, those with the lowest CIDEr; the others are spread over the rest."""
FRAME = 4 / 3
"""Width by height of the frame that an image stands in."""
DARKEST = 0.25
"""Brightness that is left where the model did not look."""


@dataclass(frozen=True)
class Frame:
    """Where an image stands in its frame, or a square in its image: percents of the outer one's
    sides."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Rival:
    """What the champion said of the image."""

    caption: str
    cider: float
    gain: float
    """The candidate's CIDEr less the champion's."""


@dataclass(frozen=True)
class Card:
    """An image, or its captions alone."""

    name: str
    caption: str
    references: list[str]
    cider: float
    rival: Rival | None = None
    thumbnail: str | None = None
    """JPEG in base64."""
    place: Frame | None = None
    square: Frame | None = None
    """What the model saw of the image."""
    words: list[tuple[str, str]] = field(default_factory=list)
    """The caption's words, and for each the brightness that is left of the square, a PNG in
    base64."""

    @property
    def spoken(self) -> bool:
        """Whether the words make up the caption, so that they can stand for it."""
        return bool(self.words) and [word for word, _ in self.words] == self.caption.split()


def to_show(cider: np.ndarray) -> list[int]:
    """Return the places of the images for a report: the worst, and some spread evenly over the
    others."""
    worst_first = np.argsort(cider, kind="stable")
    rest = worst_first[WORST:]
    spread = np.linspace(0, len(rest) - 1, min(SHOWN - WORST, len(rest))).round().astype(int)
    return [*worst_first[:WORST].tolist(), *rest[spread].tolist()]


def cards(predictions: Predictions, champion: Predictions | None) -> list[Card]:
    """Return the cards, the worst image first: of the images that have a view, or of some if none
    has."""
    rivals = {}
    if champion is not None:
        rivals = dict(
            zip(
                champion.image_ids,
                zip(champion.captions, champion.main(), strict=True),
                strict=True,
            )
        )
    cider = predictions.main()
    with_view = [
        place
        for place, image_id in enumerate(predictions.image_ids)
        if image_id in predictions.views
    ]
    places = with_view or to_show(cider)
    made = []
    for place in sorted(places, key=lambda place: (cider[place], place)):
        image_id, score = predictions.image_ids[place], float(cider[place])
        rival = None
        if image_id in rivals:
            caption, theirs = rivals[image_id]
            rival = Rival(caption, float(theirs), score - float(theirs))
        told = (
            predictions.file_names[place],
            predictions.captions[place],
            predictions.references[place],
            score,
            rival,
        )
        view = predictions.views.get(image_id)
        made.append(_seen(view, *told) if view else Card(*told))
    return made


def _seen(
    view: View, name: str, caption: str, references: list[str], cider: float, rival: Rival | None
) -> Card:
    with Image.open(io.BytesIO(view.thumbnail)) as image:
        width, height = image.size
    side, aspect = min(width, height), width / height
    return Card(
        name,
        caption,
        references,
        cider,
        rival,
        base64.b64encode(view.thumbnail).decode(),
        _centred(min(1.0, aspect / FRAME), min(1.0, FRAME / aspect)),
        _centred(side / width, side / height),
        [(word, _brightness(weights)) for word, weights in view.words],
    )


def _centred(width: float, height: float) -> Frame:
    sides = (50 * (1 - width), 50 * (1 - height), 100 * width, 100 * height)
    return Frame(*(round(side, 2) for side in sides))


def _brightness(weights: np.ndarray) -> str:
    """Return a grey PNG in base64, a pixel a patch, by which the image is multiplied: uint8 [P, P]
    to text."""
    kept = DARKEST + (1 - DARKEST) * weights.astype(np.float32) / 255
    encoded = io.BytesIO()
    greys = (kept * 31).round() * (
        255 / 31
    )  # nobody misses the others, and these take half the bytes
    Image.fromarray(greys.round().astype(np.uint8)).save(encoded, "PNG", optimize=True)
    return base64.b64encode(encoded.getvalue()).decode()
