"""Caption scores as the official COCO evaluation computes them: BLEU-1..4, METEOR, ROUGE-L and
CIDEr.

The scorers and the Penn Treebank tokeniser are pycocoevalcap's. METEOR and the tokeniser are Java
programs; without Java, or where it fails, the captions are split by a plain expression, METEOR is
missing, and the result says so.
"""

import importlib.util
import logging
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_lib.errors import UserError, WorkError
from model_lib.scores.cider import words
from model_lib.scores.java import FRUGAL, run_java
from model_lib.scores.significance import BLEU, METEOR
from model_lib.scores.spice import require_spice, spice_scores

log = logging.getLogger(__name__)
JAVA_MEMORY = "1 GB"
NO_JAVA = "needs Java (apt-get install default-jre-headless)"


@dataclass(frozen=True)
class Scores:
    """The scores of captions, image by image in the order of their ids."""

    statistics: dict[str, np.ndarray]
    """For each score its counts, float64 [images, counts]; see `significance`."""
    shuffled_cider: float
    """CIDEr with each caption scored against another image's references: what a model that ignores
    the image would get."""
    tokenizer: str
    """"PTB" for the official one, "plain" where Java is missing or failed."""
    missing: dict[str, str]
    """Scores that could not be computed, and why."""


def score_captions(
    captions: Mapping[int, str], references: Mapping[int, Sequence[str]], spice: str | None = None
) -> Scores:
    """Score one caption an image against its references.

    Args:
        captions: by image id.
        references: by image id, at least those of `captions`.
        spice: a folder with SPICE's models; None: no SPICE.

    Returns:
        BLEU (Papineni et al. 2002), METEOR (Denkowski and Lavie 2014), ROUGE-L (Lin 2004) and CIDEr
        (Vedantam et al. 2015, document frequencies from the references given), each on its scale in
        the official toolkit, and SPICE (Anderson et al. 2016) where its models are.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    ids = sorted(captions)
    java = shutil.which("java") is not None
    missing = {} if java else {"METEOR": NO_JAVA}
    plain = {i: " ".join(captions[i].split()) for i in ids}
    texts = [{i: [plain[i]] for i in ids}, {i: list(references[i]) for i in ids}]
    (res, gts), tokenizer = _tokenize(texts, java)
    with ThreadPoolExecutor(1) as pool:  # METEOR's Java runs while Python computes the others
        meteor = pool.submit(_meteor, gts, res) if java else None
        statistics = {BLEU: _bleu_counts(gts, res)}
        rouge = Rouge().compute_score(gts, res)[1]
        cider = Cider().compute_score(gts, res)[1]
        order = np.random.default_rng(0).permutation(len(ids))  # rolled, no caption keeps its image
        shuffled = {ids[a]: res[ids[b]] for a, b in zip(order, np.roll(order, 1), strict=True)}
        shuffled_cider, _ = Cider().compute_score(gts, shuffled)
        if meteor is not None:
            try:
                statistics[METEOR] = meteor.result()
            except WorkError as error:
                missing["METEOR"] = str(error)
    statistics |= {"ROUGE_L": np.asarray(rouge)[:, None], "CIDEr": np.asarray(cider)[:, None]}
    if spice is not None:
        try:
            statistics["SPICE"] = spice_scores(plain, references, spice)[:, None]
        except WorkError as error:
            missing["SPICE"] = str(error)
    return Scores(statistics, float(shuffled_cider), tokenizer, missing)


def _bleu_counts(gts: dict, res: dict) -> np.ndarray:
    """Return `BLEU_COUNTS`, float64 [images, 10]; the reference's length is that of the nearest
    one."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for i, (caption,) in res.items():
        scorer += (caption, gts[i])
    nearest = [min((abs(n - row["testlen"]), n) for n in row["reflen"])[1] for row in scorer.ctest]
    rows = [
        [row["testlen"], length, *row["guess"], *row["correct"]]
        for row, length in zip(scorer.ctest, nearest, strict=True)
    ]
    return np.asarray(rows, np.float64)


def _meteor(gts: dict, res: dict) -> np.ndarray:
    """Return METEOR's counts, float64 [images, 23], by pycocoevalcap's jar.

    That package's class asks for one caption at a time and waits for the answer; here Java has all
    captions at once.
    """
    from pycocoevalcap.meteor import meteor

    jar = Path(meteor.__file__).parent / meteor.METEOR_JAR
    lines = []
    for i, (caption,) in res.items():
        texts = (*gts[i], caption.replace("|||", "").replace("  ", " "))
        lines.append(" ||| ".join(("SCORE", *texts)))
    answers = _java(["-jar", str(jar), *["-", "-", "-stdio", "-l", "en", "-norm"]], lines)
    counts = np.asarray([[float(count) for count in line.split()] for line in answers])
    # METEOR does not count the chunk of a caption that matches a whole reference, also not in sums
    # of captions.
    matched = counts[:, 4:20].reshape(-1, 4, 2, 2).sum((1, 2))
    counts[(matched == counts[:, :2]).all(1) & (counts[:, 20] == 1), 20] = 0
    return counts


def _tokenize(
    sets: Sequence[Mapping[int, Sequence[str]]], java: bool
) -> tuple[list[dict[int, list[str]]], str]:
    """Return the sets of captions by image, split into words with spaces between, and the
    tokeniser's name."""
    every = [text for captions in sets for texts in captions.values() for text in texts]
    tokenizer, lines = "plain", [" ".join(words(text)) for text in every]
    if java:
        try:
            tokenizer, lines = "PTB", _penn_treebank(every)
        except WorkError as error:
            log.warning("the official tokeniser failed: %s", error)
    split = iter(lines)
    split_sets = [
        {i: [next(split) for _ in texts] for i, texts in captions.items()} for captions in sets
    ]
    return split_sets, tokenizer


def _penn_treebank(texts: Sequence[str]) -> list[str]:
    """Split texts as pycocoevalcap's PTBTokenizer does, by its jar and its list of punctuation.

    That class itself writes a file beside the jar, which is forbidden where packages belong to
    another user.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    program = "edu.stanford.nlp.process.PTBTokenizer"
    command = ["-cp", str(jar), program, "-preserveLines", "-lowerCase"]
    tokenized = _java(command, [" ".join(text.split()) for text in texts])
    punctuation = set(ptbtokenizer.PUNCTUATIONS)
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in punctuation)
        for line in tokenized
    ]


def _java(arguments: Sequence[str], lines: Sequence[str]) -> list[str]:
    """Return a Java program's output line for each of `lines`; `WorkError` if it fails."""
    text = "\n".join(lines).encode() + b"\n"
    answers = run_java([*FRUGAL, *arguments], JAVA_MEMORY, text).decode().split("\n")[:-1]
    if len(answers) != len(lines):  # Java itself may print warnings between them
        raise WorkError(f"Java printed {len(answers)} lines for {len(lines)} captions")
    return answers


def require_scorers(spice: str | None) -> None:
    """Raise `UserError` if pycocoevalcap is not installed, or SPICE's models are not in `spice`."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        remedy = "pip install pycocoevalcap"
        raise UserError(f"the caption scores need pycocoevalcap, which is not installed: {remedy}")
    if spice is not None:
        require_spice(spice)
