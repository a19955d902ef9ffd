"""What each part of the recipe gains in CIDEr, on generated scenes, over several seeds.

    python -m benchmarks.recipe [--seeds 6] [--processes 2] [--output recipe.jsonl]

COCO and CLIP's weights stand behind a download; here small models stand for them. For the demo's
scenes and for hard ones, a vision tower and a decoder are trained together, on crops as CLIP is,
and on twice as many images and for longer on hard ones: they are the pretrained parts of all seeds.
Then each seed draws its own training, validation and
test images, and trains captioners over the frozen tower as the preset `clip-l-gpt2-medium` does.

- A recipe of training is compared with another of the same seed: each part alone, and all of them,
  with the old recipe; the second stage with all of them.
- A way of decoding is compared with a beam of 5 of the whole recipe's model in the same seed.
- A mean of models is compared with the mean CIDEr of the three models that it is made of.

CIDEr is that of plainly split captions of the test images, times 100. Which of a scene's five kinds
of sentence is the likeliest is chance and worth many points, so greedy captions have a large
spread; for recipes of training there is also the mean CIDEr of ten captions drawn from the model's
own distribution, in which all kinds occur.

There is a table for each set, with the mean and the standard deviation over the seeds, and the mean
gain with its standard error; a gain of more than two standard errors is marked by *. Each seed's
row is added to `--output`, and what is there already is not computed again. It ends with a line of
JSON.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2LMHeadModel

from model_lib import Captioner
from model_lib.data.shards import SplitReader, read_manifest
from model_lib.evaluate.config import TuneConfig
from model_lib.evaluate.tuning import NAMES, tune
from model_lib.ingest.config import IngestConfig, ScenesConfig
from model_lib.ingest.ingesting import ingest
from model_lib.ingest.scenes import make_scenes
from model_lib.model.config import DecodeConfig
from model_lib.model.decoding import decode
from model_lib.model.tokens import decode_tokens
from model_lib.scores.cider import consensus, corpus_cider
from model_lib.train.averaging import average
from model_lib.train.config import TrainConfig
from model_lib.train.training import train

SETS = ("scenes", "hard")
RATE = 2e-3
"""Learning rate of the plain recipe, for all weights; small models take a higher one than GPT-2."""
OLD = {
    "caption_style": "raw",
    "resize": "crop",
    "learning_rate": RATE,
    "pretrained_learning_rate": RATE,
    "epochs": 4,
    "patience": 0,
}
PARTS: dict[str, dict[str, Any]] = {
    "caption_style coco": {"caption_style": "coco"},
    "resize squash": {"resize": "squash"},
    # As 1.5e-4 and 2.5e-5 are to the preset's 1e-4.
    "two learning rates": {"learning_rate": 1.5 * RATE, "pretrained_learning_rate": RATE / 4},
    "twice the epochs, patience 2": {"epochs": 8, "patience": 2},
}
"""Tried one by one, and together."""
OPTIONS: dict[str, dict[str, Any]] = {
    "vision_layer -2": {"vision_layer": -2},
    "unfreeze_vision 1": {"unfreeze_vision": 1, "vision_learning_rate": RATE / 10},
}
"""Tried one by one."""
NEW = OLD | {name: value for part in PARTS.values() for name, value in part.items()}
SECOND_STAGE = {
    "objective": "self-critical",
    "learning_rate": 1.5 * RATE / 20,
    "pretrained_learning_rate": RATE / 4 / 20,
    "epochs": 2,
}
MORE = {"learning_rate": RATE / 4, "pretrained_learning_rate": RATE / 24, "epochs": 1}
"""With which three seeds go on from one model, to be averaged."""
BEAM = DecodeConfig(num_beams=5)
DRAWS = DecodeConfig(temperature=1.0, num_captions=10)
Scores = dict[str, float]
COMPARED = {
    **dict.fromkeys([*PARTS, *OPTIONS, "the four together"], "before"),
    "then self-critical": "the four together",
    "beam 5": "the four together",
    "tuned decoding": "beam 5",
    "consensus of 5 beams": "beam 5",
    "consensus of 20 draws": "beam 5",
    "mean of three models": "each of the three",
}
"""Rows of the table, and with which row each one is compared."""


class TestImages:
    """The test images of a seed, and a model's captions of them."""

    def __init__(self, data: str) -> None:
        self.manifest = read_manifest(data)
        self.references = dict(enumerate(SplitReader(self.manifest, "val").captions()))

    @torch.inference_mode()
    def captions(self, model: Captioner, options: DecodeConfig) -> list[list[str]]:
        """Return the captions of each image."""
        reader = SplitReader(self.manifest, "val", model.preprocess)
        texts = []
        for batch in reader.batches(reader.in_order(50)):
            features = model.encode(torch.from_numpy(np.stack(batch.pixels)))
            for image in decode(model, features, options):
                texts.append([decode_tokens(model.tokenizer, one.tokens) for one in image])
        return texts

    def cider(self, texts: Sequence[str]) -> float:
        return 100 * corpus_cider(dict(enumerate(texts)), self.references)

    def score_model(self, folder: str) -> Scores:
        """Score a model's greedy captions, and captions drawn from its distribution."""
        model = Captioner.from_pretrained(folder, device="cpu")
        drawn = zip(*self.captions(model, DRAWS), strict=True)
        return {
            **self.score(model, DecodeConfig()),
            "drawn": statistics.mean(self.cider(texts) for texts in drawn),
        }

    def score(self, model: Captioner, options: DecodeConfig) -> Scores:
        return {"best": self.cider([first for first, *_ in self.captions(model, options)])}

    def score_by_consensus(self, model: Captioner, options: DecodeConfig) -> Scores:
        texts = self.captions(model, options)
        merits = consensus(texts)
        best = [row[int(np.argmax(merit))] for row, merit in zip(texts, merits, strict=True)]
        return {"best": self.cider(best)}


def make_data(folder: Path, kind: str, seed: int, **images: int) -> str:
    """Draw scenes and ingest them."""
    is_hard, output = kind == "hard", str(folder / "scenes")
    scenes = ScenesConfig(output=output, hard=is_hard, seed=seed, size=64, **images)
    make_scenes(scenes)
    ingest(IngestConfig(dataset=scenes.output, output=str(folder / "data"), store="original"))
    return str(folder / "data")


def pretrain(folder: Path, kind: str, images: int, epochs: int) -> dict[str, str]:
    """Train a tower and a decoder together; return their folders, as options of training."""
    torch.set_num_threads(1)
    if kind == "hard":
        images, epochs = 2 * images, epochs * 3 // 2
    data = make_data(folder, kind, seed=10_000, train=images, val=50)
    out = str(folder / "out")
    config = TrainConfig(data=data, output=out, preset="tiny", epochs=epochs, augment=True)
    done = train(replace(config, device="cpu", workers=1))
    model = Captioner.from_pretrained(done.model, device="cpu")
    parts = {name: str(folder / name) for name in ("vision", "decoder")}
    model.vision.save_pretrained(parts["vision"])
    decoder = GPT2LMHeadModel(model.config.decoder_config)
    decoder.transformer.load_state_dict(model.decoder.state_dict(), strict=False)
    decoder.lm_head.load_state_dict(model.head.state_dict())
    decoder.save_pretrained(parts["decoder"])
    model.tokenizer.save_pretrained(parts["decoder"])
    return parts


def measure_seed(
    kind: str, seed: int, parts: dict[str, str], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the CIDEr of each recipe on the test images of one seed."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = make_data(folder / "a", kind, seed, train=options.train, val=options.val)
        # Other draws: of what training never shows too.
        test = TestImages(make_data(folder / "b", kind, seed + 1000, train=2, val=options.test))

        def trained(name: str, recipe: dict[str, Any], start: str | None = None) -> str:
            epochs = min(recipe["epochs"], options.epochs)
            source = parts if start is None else {"init_from": start}
            config = {"seed": seed, **recipe, "epochs": epochs, **source}
            config |= {"preset": "clip-l-gpt2-medium", "batch_size": 16, "precision": "float32"}
            config |= {"validation_images": 0, "workers": 1, "ema": 0.99, "augment": False}
            output = str(folder / name.replace(" ", "-"))
            return train(TrainConfig(data=data, output=output, device="cpu", **config)).model

        rows = {"before": test.score_model(trained("before", OLD))}
        for name, part in (PARTS | OPTIONS).items():
            rows[name] = test.score_model(trained(name, OLD | part))
        best = trained("new", NEW)
        rows["the four together"] = test.score_model(best)
        second = trained("second", NEW | SECOND_STAGE, best)
        rows["then self-critical"] = test.score_model(second)
        model = Captioner.from_pretrained(best, device="cpu")
        rows["beam 5"] = test.score(model, BEAM)
        tuned, *_ = tune(TuneConfig(model=best, data=data, limit=0, device="cpu"))
        rows["tuned decoding"] = test.score(
            model, DecodeConfig.from_options(**{name: tuned[name] for name in NAMES})
        )
        rows["consensus of 5 beams"] = test.score_by_consensus(
            model, DecodeConfig(num_beams=5, num_captions=5)
        )
        rows["consensus of 20 draws"] = test.score_by_consensus(
            model, DecodeConfig(top_p=0.9, num_captions=20)
        )
        going_on = [trained(f"more {n}", NEW | MORE | {"seed": 100 + n}, best) for n in range(3)]
        each = [test.score_model(folder) for folder in going_on]
        rows["each of the three"] = {
            name: statistics.mean(scores[name] for scores in each) for name in each[0]
        }
        average(going_on, str(folder / "mean"))
        rows["mean of three models"] = test.score_model(str(folder / "mean"))
    return {"set": kind, "seed": seed, "rows": rows}


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the tables' rows."""
    table = []
    for kind in SETS:
        seeds = [result["rows"] for result in results if result["set"] == kind]
        for name in seeds[0] if len(seeds) > 1 else ():
            case = {"set": kind, "case": name, "baseline": COMPARED.get(name)}
            row: dict[str, Any] = {**case, "unit": "CIDEr x 100"}
            for measure in seeds[0][name]:
                values = [rows[name][measure] for rows in seeds]
                row[measure] = {"ours": statistics.mean(values), "sd": statistics.stdev(values)}
                if name in COMPARED:
                    others = [rows[COMPARED[name]][measure] for rows in seeds]
                    gains = [a - b for a, b in zip(values, others, strict=True)]
                    row[measure] |= {
                        "theirs": statistics.mean(others),
                        "ratio": statistics.mean(values) / max(statistics.mean(others), 1e-9),
                        "gain": statistics.mean(gains),
                        "error": statistics.stdev(gains) / len(gains) ** 0.5,
                    }
            table.append(row)
    return table


def show(table: Sequence[dict[str, Any]]) -> None:
    """Print the tables as Markdown."""
    for kind in SETS:
        print(f"\n{kind}\n\n| recipe | compared with | CIDEr | gain | drawn | gain |")
        print("|---|---|---|---|---|---|")
        for row in table:
            if row["set"] != kind:
                continue
            cells = [row["case"], row["baseline"] or ""]
            for value in (row["best"], row.get("drawn", {})):
                cells.append(f"{value['ours']:.1f} ± {value['sd']:.1f}" if value else "")
                mark = "*" if abs(value.get("gain", 0)) > 2 * value.get("error", 0) else ""
                gain = "{gain:+.1f} ± {error:.1f}".format(**value) if "gain" in value else ""
                cells.append(gain + mark)
            print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--processes", type=int, default=2, help="seeds side by side")
    parser.add_argument("--pretrain", type=int, default=5000, help="images for the parts")
    parser.add_argument("--train", type=int, default=1000, help="training images of a seed")
    parser.add_argument("--val", type=int, default=100, help="validation images of a seed")
    parser.add_argument("--test", type=int, default=200, help="test images of a seed")
    parser.add_argument("--epochs", type=int, default=100, help="most epochs of a training")
    parser.add_argument("--output", help="file for each seed's row, to go on from")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # matrices are too small for two threads
    torch.set_num_threads(1)
    output = Path(options.output or os.devnull)
    lines = output.read_text().splitlines() if output.is_file() else []
    results = [json.loads(line) for line in lines]
    done = {(result["set"], result["seed"]) for result in results}
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(options.processes, mp_context=context) as pool,
    ):
        numbers = options.pretrain, min(10, options.epochs)
        missing = {
            kind: [seed for seed in range(options.seeds) if (kind, seed) not in done]
            for kind in SETS
        }
        parts = {
            kind: pool.submit(pretrain, Path(scratch, kind), kind, *numbers)
            for kind in SETS
            if missing[kind]
        }
        futures = [
            pool.submit(measure_seed, kind, seed, parts[kind].result(), options)
            for kind in parts
            for seed in missing[kind]
        ]
        for future in as_completed(futures):
            results.append(future.result())
            with output.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
    table = summarise(results)
    show(table)
    document = {"benchmark": "recipe", "device": "CPU, 1 thread", "torch": torch.__version__}
    print(json.dumps({**document, "seeds": options.seeds, "results": table}))


if __name__ == "__main__":
    main()
