"""Caption scores as the official COCO evaluation computes them: BLEU-1..4, METEOR, ROUGE-L and CIDEr.

The scorers and the Penn Treebank tokeniser are pycocoevalcap's. METEOR and the tokeniser are Java programs; without
Java the captions are split by a plain expression, METEOR is missing, and the result says so.
"""

import contextlib
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")


@dataclass(frozen=True)
class Scores:
    """Scores of a set of captions."""

    scores: dict[str, float]
    """By name, those of `METRICS` that could be computed."""
    shuffled_cider: float
    """CIDEr with the pictures shuffled among the captions' owners: what a model that never looks would get."""
    per_picture: dict[int, float]
    """CIDEr of each image id."""
    tokenizer: str
    """"PTB" for the official one, "plain" without Java."""
    missing: dict[str, str]
    """Scores that could not be computed, and why."""


def score_captions(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> Scores:
    """Score one caption a picture against its references.

    Args:
        captions: by image id.
        references: by image id, at least those of `captions`.

    Returns:
        BLEU (Papineni et al. 2002), METEOR (Denkowski and Lavie 2014), ROUGE-L (Lin 2004) and CIDEr (Vedantam et
        al. 2015, document frequencies from the references given), each on its scale in the official toolkit.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    ids = sorted(captions)
    java = shutil.which("java") is not None
    with _quiet():
        res = _tokenize({i: [captions[i]] for i in ids}, java)
        gts = _tokenize({i: list(references[i]) for i in ids}, java)
        bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
        rouge, _ = Rouge().compute_score(gts, res)
        cider, each = Cider().compute_score(gts, res)
        owners = np.random.default_rng(0).permutation(len(ids))
        shuffled = {ids[a]: res[ids[b]] for a, b in zip(owners, np.roll(owners, 1), strict=True)}  # none keeps its own
        shuffled_cider, _ = Cider().compute_score(gts, shuffled)
        scores = dict(zip(METRICS, [*bleu, float("nan"), rouge, cider], strict=True))
        missing = {}
        if java:
            scores["METEOR"] = _meteor(gts, res)
        else:
            del scores["METEOR"]
            missing["METEOR"] = "needs Java (apt-get install default-jre-headless)"
    return Scores(
        scores={name: float(value) for name, value in scores.items()},
        shuffled_cider=float(shuffled_cider),
        per_picture={i: float(value) for i, value in zip(gts, each, strict=True)},
        tokenizer="PTB" if java else "plain",
        missing=missing,
    )


def _meteor(gts: dict, res: dict) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    score, _ = Meteor().compute_score(gts, res)
    return score


def _tokenize(captions: dict[int, list[str]], java: bool) -> dict[int, list[str]]:
    if java:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        return PTBTokenizer().tokenize({i: [{"caption": text} for text in texts] for i, texts in captions.items()})
    return {
        i: [" ".join(re.findall(r"[a-z0-9]+(?:[-'][a-z0-9]+)*", text.lower())) for text in texts]
        for i, texts in captions.items()
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the scorers print, their Java programs included."""
    with contextlib.redirect_stdout(io.StringIO()), Path(os.devnull).open("w") as nowhere:
        kept = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
