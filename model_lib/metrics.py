"""Caption scores as the official COCO evaluation computes them: BLEU-1..4, METEOR, ROUGE-L and CIDEr.

The scorers and the Penn Treebank tokeniser are pycocoevalcap's. METEOR and the tokeniser are Java programs; without
Java the captions are split by a plain expression, METEOR is missing, and the result says so.
"""

import contextlib
import importlib.util
import io
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_lib.cider import words
from model_lib.errors import UserError, WorkError

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
        lines = iter(_penn_treebank([text for texts in captions.values() for text in texts]))
        return {i: [next(lines) for _ in texts] for i, texts in captions.items()}
    return {i: [" ".join(words(text)) for text in texts] for i, texts in captions.items()}


def _penn_treebank(texts: Sequence[str]) -> list[str]:
    """Split texts as pycocoevalcap's PTBTokenizer does, by its jar and its list of punctuation.

    That class itself writes a file beside the jar, which is forbidden where packages belong to another user.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = "\n".join(" ".join(text.split()) for text in texts)
    done = subprocess.run(command, input=lines.encode(), stdout=subprocess.PIPE, check=False)
    tokenized = done.stdout.decode().split("\n")
    if done.returncode or len(tokenized) < len(texts):
        raise WorkError(f"Java's tokeniser failed with exit code {done.returncode} on {len(texts)} captions: {jar}")
    punctuation = set(ptbtokenizer.PUNCTUATIONS)
    kept = (" ".join(word for word in line.rstrip().split(" ") if word not in punctuation) for line in tokenized)
    return list(itertools.islice(kept, len(texts)))


def require_scorers() -> None:
    """Raise `UserError` if pycocoevalcap is not installed."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise UserError("the caption scores need pycocoevalcap, which is not installed: pip install pycocoevalcap")


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
