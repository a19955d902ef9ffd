"""Captions a second in training, a whole step from pixels to new weights, against transformers'
modules used plainly.

    python -m benchmarks.train [--preset clip-l-gpt2-medium] [--device cpu] [--images 64] [--rounds
    5] [--no-compile]

Five captions per image, of lengths like COCO's, random weights and pixels; the same weights are
trained on both sides, in the same number format, by AdamW in one kernel. In one process, taking
turns:

- ours: the product's own step, its captions packed beforehand, as its loader does; no moving
  average, no dropout and no label smoothing, as in theirs.
- a pair a row: transformers' vision tower and `GPT2LMHeadModel(add_cross_attention=True)`,
  whose own loss it is, under autocast; each image-caption pair is a row with its own pass of the
  vision tower, padded to the longest caption. Frozen weights take no gradients, and the tower runs
  without recording any.
- shared encoder: the same, but the tower runs once per image and its result is repeated for the
  captions.

FLOPs are the useful ones, by the formula in `model_lib/train/flops.py`, which is printed for COCO's
mean lengths. Shares are of the speed that a large matrix product reaches in the same run, and of
the data sheet's where that is known. It prints a table with our peak memory, a projected epoch of
COCO 2017, and ends with one line of JSON.

With `--from_parquet N` it then draws N scenes, ingests them, and trains two epochs on them by the
product's own `train`, augmentation, moving average and all: the rate at which images come from
Parquet and are learned.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from benchmarks.timing import median_seconds, peak_gb
from model_lib import Captioner, CaptionerConfig
from model_lib.data.shards import SplitReader, read_manifest
from model_lib.ingest.config import IngestConfig, ScenesConfig
from model_lib.ingest.ingesting import ingest
from model_lib.ingest.scenes import make_scenes
from model_lib.model.precision import autocast, autocast_dtype
from model_lib.model.tokens import IGNORED, pack_captions, train_tokenizer
from model_lib.model.vision import plain_tower
from model_lib.presets import PRESETS
from model_lib.tracking.server import Run, Tracking
from model_lib.train.config import TrainConfig, Trained, resolve
from model_lib.train.distributed import World
from model_lib.train.flops import COCO_TOKENS, peak_flops, useful_flops
from model_lib.train.loss import CrossEntropyObjective
from model_lib.train.step import TrainStep, should_compile
from model_lib.train.training import train

CAPTIONS = 5
COCO_IMAGES = 118_287
"""Of train2017."""


def coco_like_captions(images: int, vocabulary: int) -> list[list[list[int]]]:
    """Return random ids in the lengths of COCO's captions: mean 13, 9 at least, hardly any above
    23, end included.

    Images are sorted by length, as the product's batches are from windows of thousands.
    """
    rng = np.random.default_rng(0)
    lengths = (9 + rng.gamma(1.7, 2.4, (50 * images, CAPTIONS))).astype(int)
    window = lengths[np.argsort(lengths.sum(1), kind="stable")]
    batch = window[25 * images : 26 * images]
    return [[rng.integers(1, vocabulary, n).tolist() for n in image] for image in batch]


class Plain(nn.Module):
    """The same architecture from transformers' modules."""

    def __init__(self, model: Captioner) -> None:
        super().__init__()
        config = GPT2Config(
            **{**model.config.decoder_config.to_dict(), "add_cross_attention": True}
        )
        config.tie_word_embeddings = False
        for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
            setattr(config, name, 0.0)
        self.decoder = GPT2LMHeadModel(config)
        self.decoder.requires_grad_(False)
        trained: list[nn.Module] = [self.decoder.lm_head, self.decoder.transformer.ln_f]
        for block in self.decoder.transformer.h:
            trained += [block.ln_cross_attn, block.crossattention, block.ln_2, block.mlp]
        for module in trained:
            module.requires_grad_(True)

    def loss(self, features: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy; `labels` are the targets, moved here as transformers
        expects them."""
        logits = self.decoder(ids, encoder_hidden_states=features, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED
        )


def matrix_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product here."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = min(median_seconds([lambda: a @ b], 5, device))
    return 2 * size**3 / seconds


class Work:
    """A batch on the device, and training steps over it by both sides."""

    def __init__(self, model: Captioner, count: int, dtype: torch.dtype) -> None:
        self.model, self.count, self.dtype = model, count, dtype
        size, self.end = model.image_size, model.config.decoder_config.eos_token_id
        self.pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8).to(
            model.device
        )
        self.captions = coco_like_captions(count, model.config.decoder_config.vocab_size)
        pairs = [[ids] for image in self.captions for ids in image]
        self.pairs = pack_captions(pairs, self.end, multiple=1).to(model.device)

    def ours(self, step: TrainStep) -> Callable[[], object]:
        """Return a whole step of the product."""
        objective = CrossEntropyObjective(self.captions, self.end)
        rows, batch = objective.pack(range(self.count)), np.arange(self.count)
        if self.pixels.is_cuda:
            rows = rows.pin_memory()

        def run() -> None:
            step.loss.objective = step.objective = objective
            step.run(batch, self.pixels, 0, rows)

        return run

    def plain(self, tower: nn.Module, plain: Plain, passes: int) -> Tensor:
        """Run the tower `passes` times an image, the decoder once a pair."""
        with autocast(self.dtype, self.model.device):
            with torch.no_grad():
                seen = self.pixels.repeat_interleave(passes, 0).float() / 127.5 - 1
                features = tower(seen).last_hidden_state.repeat_interleave(CAPTIONS // passes, 0)
            return plain.loss(features, self.pairs.tokens, self.pairs.targets)


def make_step(model: Captioner, preset: str, **options: Any) -> TrainStep:
    """Return the product's step without what the other side has not: moving average, dropout and
    label smoothing; `options` are those of `TrainConfig`."""
    plain = {"ema": 0.0, "dropout": 0.0, "label_smoothing": 0.0, "learning_rate": 1e-6}
    config = resolve(TrainConfig(data="-", output="-", preset=preset, **{**plain, **options}))
    objective = CrossEntropyObjective([], model.start_token)
    return TrainStep(model, objective, config, World(model.device), steps=10_000)


def stepping(module: nn.Module, *losses: Callable[[], Tensor]) -> list[Callable[[], None]]:
    """Return for each loss a training step of `module`."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step(loss: Callable[[], Tensor]) -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return [partial(step, loss) for loss in losses]


class Rates(Tracking, Run):
    """Notes how fast training says it is."""

    def __init__(self) -> None:
        Run.__init__(self)
        self.rates: list[float] = []

    def start(self, *_: Any, **__: Any) -> Run:
        return self

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if "images_per_second" in metrics:
            self.rates.append(metrics["images_per_second"])


def train_from_parquet(preset: str, images: int, **options: Any) -> float:
    """Train on generated scenes as a user does; print and return images per second between the
    validations."""
    shapes = PRESETS[preset]
    device = torch.device(options["device"])
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_scenes(ScenesConfig(output=str(work / "scenes"), train=images, val=32, size=256))
        ingest(
            IngestConfig(dataset=str(work / "scenes"), output=str(work / "data"), store="original")
        )
        if shapes.vision is not None:
            config = CaptionerConfig.from_preset(shapes)
            parts = {name: str(work / name) for name in ("vision", "decoder", "tokenizer")}
            plain_tower(config.vision_config).save_pretrained(parts["vision"])
            GPT2Model(config.decoder_config).save_pretrained(parts["decoder"])
            captions = SplitReader(read_manifest(str(work / "data")), "train").captions()
            train_tokenizer((text for texts in captions for text in texts), 512).save_pretrained(
                parts["tokenizer"]
            )
            options |= parts
        rates = Rates()
        run = TrainConfig(
            data=str(work / "data"), output=str(work / "out"), preset=preset, epochs=2, **options
        )
        trained: list[Trained] = []
        memory = peak_gb(lambda: trained.append(train(run, rates)), device)
    rate, loss = harmonic_mean(rates.rates), trained[0].validation_loss
    batch_size = resolve(run).batch_size
    print(
        f"\nfrom Parquet, {batch_size} images a step: {rate:.1f} images/s, an epoch of COCO in "
        f"{COCO_IMAGES / rate / 60:,.1f} minutes, {memory} GB at most; validation loss {loss:.2f}"
    )
    return rate


def run(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, and return the document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="clip-l-gpt2-medium", choices=list(PRESETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, nargs="+", default=[64], help="images a step")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each case")
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "bfloat16", "float16", "float32"]
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="with torch.compile, on both sides; by default as train does",
    )
    parser.add_argument(
        "--from_parquet", type=int, default=0, help="also train on so many generated scenes"
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    dtype = autocast_dtype(options.precision, device)
    torch.manual_seed(0)
    config = CaptionerConfig.from_preset(PRESETS[options.preset])
    config.train_everything = False  # a tower from scratch is trained too, here none is
    model = Captioner(config).to(device).train()
    compiled = should_compile(options.compile, device)
    chosen = {"precision": options.precision, "compile": compiled}
    train_step = make_step(model, options.preset, **chosen)
    speed, peak = matrix_speed(device, dtype), peak_flops(device, dtype)

    works = [Work(model, count, dtype) for count in options.images]
    mine = [work.ours(train_step) for work in works]
    memory = [peak_gb(step, device) for step in mine]  # before the other side is there
    tower = plain_tower(config.vision_config).to(device)
    plain = Plain(model).to(device)
    for block in plain.decoder.transformer.h if compiled else []:
        block.compile(dynamic=True)

    results, coco = [], useful_flops(config, 1, COCO_TOKENS)
    print(f"\n{name}, torch {torch.__version__}, {dtype}; captions a second\n")
    print(
        f"{'case':<16}{'baseline':<16}{'ours':>9}{'theirs':>9}{'ratio':>7}{'GB':>7}"
        f"{'of matmul':>11}{'of peak':>9}"
    )
    for count, work, my_step, gigabytes in zip(options.images, works, mine, memory, strict=True):
        losses = [partial(work.plain, tower, plain, passes) for passes in (CAPTIONS, 1)]
        ours, *theirs = median_seconds([my_step, *stepping(plain, *losses)], options.rounds, device)
        useful = useful_flops(config, count, work.pairs.count)
        for label, seconds in zip(("a pair a row", "shared encoder"), theirs, strict=True):
            row: dict[str, Any] = {
                "case": f"{count} images",
                "baseline": label,
                "unit": "captions/s",
            }
            row |= {
                "ours": round(CAPTIONS * count / ours, 2),
                "theirs": round(CAPTIONS * count / seconds, 2),
            }
            row |= {"ratio": round(seconds / ours, 2), "peak_memory_gb": gigabytes}
            row |= {"share_of_matmul": round(useful / ours / speed, 3)}
            row |= {"share_of_peak": None if peak is None else round(useful / ours / peak, 3)}
            results.append(row)
            of_peak = "" if peak is None else f"{row['share_of_peak']:.1%}"
            print(
                f"{row['case']:<16}{label:<16}{row['ours']:>9.2f}{row['theirs']:>9.2f}{row['ratio']:>7.2f}"
                f"{gigabytes:>7.1f}{row['share_of_matmul']:>11.1%}{of_peak:>9}",
                flush=True,
            )
        print(
            f"{useful / count / 1e9:.0f} GFLOP an image, {coco / 1e9:.0f} at COCO's mean lengths; "
            f"{speed / 1e12:.1f} TFLOP/s in a matrix product; an epoch of COCO, reading apart: "
            f"{COCO_IMAGES / count * ours:,.0f} s"
        )
    document = {
        "benchmark": "train",
        "device": name,
        "torch": torch.__version__,
        "results": results,
    }
    if options.from_parquet:
        del model, train_step, tower, plain, works, mine, losses, work, my_step
        common = {"batch_size": options.images[-1], **chosen}
        document["from_parquet_images_per_second"] = train_from_parquet(
            options.preset, options.from_parquet, device=options.device, **common
        )
    return document


def main() -> None:
    print(json.dumps(run()))


if __name__ == "__main__":
    main()
