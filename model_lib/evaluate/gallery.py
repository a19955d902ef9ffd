"""The images in a report: their selection, captions, and attention maps."""

import base64
import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from model_lib.evaluate.result import Predictions

SHOWN = 120
"""Images in a report: at about 20 kB each, with their attention maps, the page stays below 3 MB."""
WORST = 60
"""Of these, those with the lowest CIDEr; the others are spread over the rest."""
DARKEST = 0.25
"""Brightness that is left where there is no attention."""


@dataclass(frozen=True)
class ChampionCaption:
    """The champion's caption of the image."""

    caption: str
    cider: float
    gain: float
    """The candidate's CIDEr less the champion's."""


@dataclass(kw_only=True)
class Card:
    """An image, or its captions alone."""

    name: str
    caption: str
    references: list[str]
    cider: float
    champion: ChampionCaption | None = None
    thumbnail: str | None = None
    """JPEG in base64."""
    aspect: float = 1.0
    """Width by height."""
    words: list[tuple[str, str]] = field(default_factory=list)
    """The caption's words, and for each the brightness that is left of what the model sees, a PNG
    in base64."""
    seen: tuple[float, float] = (100.0, 100.0)
    """The part of the width and height about the centre that it sees, in percent."""

    @property
    def words_are_caption(self) -> bool:
        """Whether the words make up the whole caption; then the page shows them in its place."""
        return bool(self.words) and [word for word, _ in self.words] == self.caption.split()


def select_images(cider: np.ndarray) -> list[int]:
    """Return the indices of the images for a report: the worst, and some spread evenly over the
    others."""
    worst_first = np.argsort(cider, kind="stable")
    rest = worst_first[WORST:]
    spread = np.linspace(0, len(rest) - 1, min(SHOWN - WORST, len(rest))).round().astype(int)
    return [*worst_first[:WORST].tolist(), *rest[spread].tolist()]


def make_cards(predictions: Predictions, champion: Predictions | None) -> list[Card]:
    """Return the cards of the images that have a view, or of some if none has; the worst first."""
    champions: dict[int, tuple[str, float]] = {}
    if champion is not None:
        scored = zip(champion.captions, champion.cider().tolist(), strict=True)
        champions = dict(zip(champion.image_ids, scored, strict=True))
    ids, cider = predictions.image_ids, predictions.cider().tolist()
    with_view = [n for n, image_id in enumerate(ids) if image_id in predictions.views]
    selected = with_view or select_images(predictions.cider())
    cards = []
    for n in sorted(selected, key=lambda n: (cider[n], n)):
        card = Card(
            name=predictions.file_names[n],
            caption=predictions.captions[n],
            references=predictions.references[n],
            cider=cider[n],
        )
        if ids[n] in champions:
            caption, score = champions[ids[n]]
            card.champion = ChampionCaption(caption, score, cider[n] - score)
        if view := predictions.views.get(ids[n]):
            with Image.open(io.BytesIO(view.thumbnail)) as image:
                card.aspect = image.width / image.height
            card.thumbnail = base64.b64encode(view.thumbnail).decode()
            card.words = [(word, _brightness(weights)) for word, weights in view.words]
            card.seen = view.seen
        cards.append(card)
    return cards


def _brightness(weights: np.ndarray) -> str:
    """Return weights, uint8 [P, P], as a grey PNG in base64 by which the image is multiplied."""
    brightness = DARKEST + (1 - DARKEST) * weights.astype(np.float32) / 255
    encoded = io.BytesIO()
    greys = (brightness * 31).round() * (255 / 31)  # 32 greys take half the bytes of 256
    Image.fromarray(greys.round().astype(np.uint8)).save(encoded, "PNG", optimize=True)
    return base64.b64encode(encoded.getvalue()).decode()
