"""Seconds to score a results file, Java included, against pycocoevalcap's own evaluation.

    python -m benchmarks.scores --results results.json --annotations captions.json [--repeat 5]
    [--rounds 3]

Both score the same captions against the same references by BLEU, METEOR, ROUGE-L and CIDEr; ours
also makes the shuffled CIDEr and 95 % intervals. `--repeat` takes each image so many times, under
ids of their own. The two take turns. It prints a table, whether the scores agree, and ends with one
line of JSON.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping

from model_lib.data.coco import read_captions
from model_lib.evaluate.scoring import read_results
from model_lib.scores.metrics import score_captions
from model_lib.scores.significance import corpus_scores, intervals

Captions = Mapping[int, str]
References = Mapping[int, list[str]]


def ours(captions: Captions, references: References) -> dict[str, float]:
    statistics = score_captions(captions, references).statistics
    assert intervals(statistics)
    return corpus_scores(statistics)


def theirs(captions: Captions, references: References) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with contextlib.redirect_stdout(io.StringIO()):
        split = PTBTokenizer()
        gts = split.tokenize({i: [{"caption": text} for text in references[i]] for i in captions})
        res = split.tokenize({i: [{"caption": text}] for i, text in captions.items()})
        scores = {
            f"Bleu_{n + 1}": value
            for n, value in enumerate(Bleu(4).compute_score(gts, res, verbose=0)[0])
        }
        for name, scorer in (("METEOR", Meteor()), ("ROUGE_L", Rouge()), ("CIDEr", Cider())):
            scores[name] = float(scorer.compute_score(gts, res)[0])
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", required=True)
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    once, texts = read_results(options.results), read_captions(options.annotations)[1]
    captions = {
        i * options.repeat + n: text for i, text in once.items() for n in range(options.repeat)
    }
    references = {i: texts[i // options.repeat] for i in captions}
    cases: dict[str, Callable[[Captions, References], dict[str, float]]] = {
        "ours": ours,
        "theirs": theirs,
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    scores: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        for name, score in cases.items():
            began = time.perf_counter()
            scores[name] = score(captions, references)
            seconds[name].append(time.perf_counter() - began)
    mine, other = (statistics.median(seconds[name]) for name in ("ours", "theirs"))
    gap = max(abs(scores["ours"][name] - value) for name, value in scores["theirs"].items())
    device = f"CPU, {os.cpu_count()} cores"
    print(
        f"\n{device}; {len(captions):,} images, median of {options.rounds} rounds; largest "
        f"difference {gap:.1e}\n"
    )
    print(f"{'case':<10}{'baseline':<16}{'ours':>8}{'theirs':>9}{'ratio':>7}")
    print(f"{'scoring':<10}{'pycocoevalcap':<16}{mine:>7.1f}s{other:>8.1f}s{other / mine:>7.2f}")
    row = {"case": f"{len(captions)} images", "baseline": "pycocoevalcap", "unit": "s"}
    row |= {"ours": round(mine, 2), "theirs": round(other, 2), "ratio": round(other / mine, 2)}
    row["largest_difference"] = gap
    print(json.dumps({"benchmark": "scores", "device": device, "torch": None, "results": [row]}))


if __name__ == "__main__":
    main()
