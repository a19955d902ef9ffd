"""The full-size model on one device: does the whole way through work there, and what do its two main ideas gain?

    python -m benchmarks.full_size [--device cuda] [--pictures 64] [--rounds 7]

First it trains `clip-l-gpt2-medium` from random weights on generated scenes, through the real data path, in each
16-bit format that the device trains in, and checks that the loss falls. Then it times, alternating in one process:

- a training step with a picture's five captions sharing one pass of the vision tower and one set of cross-attention
  keys and values, against one row a picture-caption pair (the same modules, precision and captions);
- greedy captions with key/value caches, against feeding the whole prefix again for each token (the picture encoded
  once in both).

It prints a table and ends with one line of JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionModel, GPT2Model

from benchmarks.timing import median_seconds, peak_gb
from model_lib import Captioner, DecodeConfig
from model_lib.config import IngestConfig, ScenesConfig, TrainConfig
from model_lib.decoding import decode
from model_lib.ingest import ingest
from model_lib.loss import caption_loss
from model_lib.precision import autocast, autocast_dtype
from model_lib.presets import PRESETS
from model_lib.scenes import make_scenes
from model_lib.shards import SplitReader, read_manifest
from model_lib.tokens import IGNORED, train_tokenizer
from model_lib.training import train

PRESET = "clip-l-gpt2-medium"
CAPTIONS, CAPTION_TOKENS, NEW_TOKENS = 5, 13, 20


def random_parts(folder: Path, captions: list[str]) -> dict[str, str]:
    """Save vision tower, GPT-2 and tokenizer of the full shapes and random weights; return their places."""
    torch.manual_seed(0)
    config = PRESETS[PRESET].config()
    CLIPVisionModel(config.vision_config).save_pretrained(folder / "vision")
    GPT2Model(config.decoder_config).save_pretrained(folder / "decoder")
    train_tokenizer(captions, 512).save_pretrained(folder / "tokenizer")
    return {name: str(folder / name) for name in ("vision", "decoder", "tokenizer")}


def train_for_real(parts: dict[str, str], data: str, work: Path, device: str, precision: str, batch: int) -> None:
    """Train three epochs through the product's own `train`, and say what came of it."""
    started = time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    config = TrainConfig(
        data=data, output=str(work / precision), epochs=3, batch_size=batch, precision=precision, device=device, **parts
    )
    trained = train(config)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    seconds = time.perf_counter() - started
    print(
        f"trained in {precision}: validation loss {trained.validation_loss:.3f} after {trained.steps} steps, "
        f"{seconds:.0f} s with saving, peak {peak or 0:.1f} GB"
    )
    assert trained.validation_loss < 4, "a loss near ln 50257 = 10.8 means that nothing was learned"


def step_cases(model: Captioner, batch: int, device: torch.device) -> list[Callable[[], None]]:
    """Return a training step (forward and backward) with shared pictures, and with one row a pair."""
    size, vocabulary = model.image_size, model.config.decoder_config.vocab_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8).to(device)
    tokens = torch.randint(0, vocabulary, (batch, CAPTIONS, CAPTION_TOKENS), generator=generator).to(device)
    targets = tokens.roll(-1, -1)
    targets[..., -1] = IGNORED
    dtype = autocast_dtype("auto", device)

    def step(pixels: Tensor, tokens: Tensor, targets: Tensor) -> None:
        with autocast(dtype, device):
            total, count = caption_loss(model, pixels, tokens, targets)
        (total / count).backward()
        model.zero_grad(set_to_none=True)

    pairs = pixels.repeat_interleave(CAPTIONS, 0), *(x.flatten(0, 1).unsqueeze(1) for x in (tokens, targets))
    return [lambda: step(pixels, tokens, targets), lambda: step(*pairs)]


def decode_cases(model: Captioner, batch: int, device: torch.device) -> list[Callable[[], None]]:
    """Return greedy captions of `NEW_TOKENS` tokens with caches, and with the whole prefix again for each."""
    size = model.image_size
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(device)
    dtype = autocast_dtype("auto", device)
    end = model.tokenizer.eos_token_id
    model.head.weight.data[end] = -model.head.weight.data.abs().max()  # no caption ends early: equal work for both

    def cached() -> None:
        with torch.inference_mode(), autocast(dtype, device):
            decode(model, model.encode(pixels), DecodeConfig(max_new_tokens=NEW_TOKENS))

    def plain() -> None:
        with torch.inference_mode(), autocast(dtype, device):
            features = model.encode(pixels)
            tokens = torch.full((batch, 1, 1), end, device=device)
            for _ in range(NEW_TOKENS):
                hidden = model.hidden(tokens, model.cross_cache(features))
                tokens = torch.cat([tokens, model.head(hidden[:, :, -1]).argmax(-1, keepdim=True)], -1)

    return [cached, plain]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pictures", type=int, default=64, help="pictures a batch")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each case")
    parser.add_argument("--skip_training", action="store_true", help="time only (full training takes long on a CPU)")
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_scenes(ScenesConfig(output=str(work / "scenes"), train=512, val=32, size=224))
        ingest(IngestConfig(dataset=str(work / "scenes"), output=str(work / "data")))
        captions = SplitReader(read_manifest(str(work / "data")), "train", batch_size=1, size=1).captions()
        parts = random_parts(work, list(captions))
        for precision in ["bfloat16", "float16"] if device.type == "cuda" and not options.skip_training else []:
            train_for_real(parts, str(work / "data"), work, device.type, precision, options.pictures)
        model = Captioner.from_parts(**parts).to(device)
        for case, unit, cases, amount in (
            ("training step, 5 captions a picture", "captions/s", step_cases, options.pictures * CAPTIONS),
            (f"greedy, {NEW_TOKENS} tokens", "pictures/s", decode_cases, options.pictures),
        ):
            functions = cases(model, options.pictures, device)
            ours, theirs = (amount / t for t in median_seconds(functions, options.rounds, device))
            baseline = "one row a pair" if case.startswith("training") else "whole prefix a token"
            results.append(
                {
                    "case": f"{case}, batch {options.pictures}",
                    "baseline": baseline,
                    "unit": unit,
                    "ours": round(ours, 2),
                    "theirs": round(theirs, 2),
                    "ratio": round(ours / theirs, 2),
                    "peak_memory_gb": peak_gb(functions[0], device),
                }
            )
    print(f"\n{name}, torch {torch.__version__}\n")
    print(f"{'case':<48} {'baseline':<22} {'ours':>9} {'theirs':>9} {'ratio':>6}  unit        peak GB")
    for row in results:
        print(
            f"{row['case']:<48} {row['baseline']:<22} {row['ours']:>9.1f} {row['theirs']:>9.1f} {row['ratio']:>6.2f}  "
            f"{row['unit']:<11} {row['peak_memory_gb']:>6.1f}"
        )
    print(json.dumps({"benchmark": "full_size", "device": name, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
