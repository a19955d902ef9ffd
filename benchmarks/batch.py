"""Captioning a folder and a bucket end to end, against the model alone on decoded images.

    python -m benchmarks.batch [--preset clip-l-gpt2-medium] [--device cpu] [--images 96]
    [--batch_size 32]

Random weights; generated scenes as JPEG at 640 pixels, in a folder here and, where gcsfs and
gcp-storage-emulator are installed, in a bucket that the emulator serves. `captioner batch`'s own
plan, shards and merge run over each, model loaded before; theirs is what the same model does with
the same images already decoded, in batches of the same size. So the ratio is the share of the
model's own speed that is left when images are listed, fetched, decoded and captions written: 1 is
all of it. It also prints images per second of decoding alone, with all threads, which tells what
binds. It ends with one line of JSON.
"""

import argparse
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import peak_gb
from model_lib import Captioner, CaptionerConfig
from model_lib.batch.captions import caption_shards
from model_lib.batch.config import BatchConfig
from model_lib.batch.merging import merge
from model_lib.batch.planning import output_folder, write_plan
from model_lib.ingest.config import ScenesConfig
from model_lib.ingest.scenes import make_scenes
from model_lib.model.captioning import load_image
from model_lib.model.precision import choose_device, inference_dtype
from model_lib.model.tokens import train_tokenizer
from model_lib.presets import PRESETS

DRAWN = 256
"""Images that differ; more are these again."""


def build(preset: str, device: str) -> Captioner:
    """Return a captioner of random weights as it would be loaded."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a small red circle on a white background"] * 3, 512)
    model = Captioner(CaptionerConfig.from_preset(PRESETS[preset])).eval()
    model.tokenizer = tokenizer
    target = choose_device(device)
    dtype = inference_dtype("auto", target, model.config.decoder_config.n_embd)
    return model.for_inference(target, dtype)


@contextmanager
def bucket(folder: Path) -> Iterator[str | None]:
    """Yield a bucket's URI with the folder's images in it, or None without the packages."""
    if not all(importlib.util.find_spec(name) for name in ("gcsfs", "gcp_storage_emulator")):
        yield None
        return
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read when gcsfs is imported
    from tests.helpers.services import gcs_emulator

    with (
        tempfile.TemporaryDirectory() as scratch,
        gcs_emulator("images", Path(scratch)) as environment,
    ):
        os.environ.update(environment)
        import fsspec

        fsspec.filesystem("gs").put(f"{folder}/", "images/in/", recursive=True, batch_size=4)
        yield "gs://images/in"


def end_to_end(config: BatchConfig, model: Captioner) -> float:
    """Return images per second of plan, captions and merge."""
    began = time.perf_counter()
    plan = write_plan(config, output_folder(config))
    caption_shards(plan, plan.missing(), model)
    summary = merge(plan)
    assert summary.ok == summary.images
    return summary.images / (time.perf_counter() - began)


def run(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, and return the document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="clip-l-gpt2-medium", choices=list(PRESETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--cores", type=int, default=0, help="threads that read and decode")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    model = build(options.preset, options.device)
    common: dict[str, Any] = {"model": "random", "batch_size": options.batch_size}
    common["workers"] = options.cores
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        drawn = min(options.images, DRAWN)
        make_scenes(ScenesConfig(output=str(work / "scenes"), train=drawn, val=2, size=640))
        folder = work / "scenes" / "train2017"
        files = sorted(map(str, folder.iterdir()))
        for number in range(drawn, options.images):
            files.append(f"{folder}/again-{number:06}.jpg")
            os.link(files[number % drawn], files[-1])
        with ThreadPoolExecutor(options.cores or 2 * (os.cpu_count() or 1)) as pool:
            began, core = time.perf_counter(), time.process_time()
            pixels = list(pool.map(lambda file: model.preprocess(load_image(file)), files))
            decoding = len(files) / (time.perf_counter() - began)
            milliseconds = 1000 * (time.process_time() - core) / len(files)
        config = BatchConfig(images="-", output="-", **common)
        size = options.batch_size
        batches = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        list(model.caption_batches(batches[:2], config.decode))  # warm
        began = time.perf_counter()
        list(model.caption_batches(batches, config.decode))
        alone = len(files) / (time.perf_counter() - began)
        about = f"{len(files)} images, batches of {size}"
        print(f"\n{name}, torch {torch.__version__}; {about}\n")
        cost = f"{decoding:,.1f} images/s, {milliseconds:.2f} ms of a core each"
        print(f"decoding alone {cost}; the model alone {alone:,.2f} images/s\n")
        print(f"{'from':<10}{'images/s':>12}{'of the model':>14}{'GB':>7}")
        with bucket(folder) as uri:
            for case, images in (("folder", str(folder)), ("bucket", uri)):
                if images is None:
                    continue
                config = BatchConfig(images=images, output=str(work / case), **common)
                rates: list[float] = []
                measure = partial(end_to_end, config, model)
                memory = peak_gb(lambda m=measure, r=rates: r.append(m()), device)
                (rate,) = rates
                print(f"{case:<10}{rate:>12.2f}{rate / alone:>14.1%}{memory:>7.1f}", flush=True)
                row = {"case": case, "baseline": "decoded tensors", "unit": "images/s"}
                row |= {"ours": round(rate, 2), "theirs": round(alone, 2)}
                row |= {"ratio": round(rate / alone, 3), "peak_memory_gb": memory}
                results.append(row)
    document = {"benchmark": "batch", "device": name, "torch": torch.__version__}
    return {**document, "results": results}


def main() -> None:
    print(json.dumps(run()))


if __name__ == "__main__":
    main()
