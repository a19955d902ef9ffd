"""What to run first on a GPU: is everything right there, and how fast is it?

    python -m benchmarks.gpu [--minutes 8] [--parts parity decode …] [--preset clip-l-gpt2-medium]
    [--device cuda]

In one process, in this order, as far as the minutes go:

    device      its name, versions, what is missing, matrix products and copies a second
    tests       those marked gpu
    parity      captions in float32 equal those of the CPU; they end at different lengths
    profile     the 15 kernels that take longest, of five training steps and of a decoded batch
    switches    each of them on and off
    decode      benchmarks.decode: one image, 32 and 256, against transformers
    train       benchmarks.train: a step of 64 images, against transformers
    memory      a step of 64 images with everything on; and it goes on when memory runs out
    parquet     training from Parquet, as a user does it
    jpeg        benchmarks.batch: captioning 2,048 JPEG files, from listing to report
    resume      training that is stopped goes on

Each part prints as it goes. One for which too little time is left is skipped, one that fails says
so in a line, with a traceback on stderr, and the next ones go on. The last line is JSON, also after
SIGTERM and when time is up.

Beside torch, transformers and what these bring, it needs pyarrow, pillow and tenacity; pydantic
with pydantic-core, annotated-types and typing-inspection; ijson; and the tests need pytest,
simplejpeg and cykooz-resizer. Their wheels can be brought along.
"""

import argparse
import gc
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType

from benchmarks import batch, decode, train
from benchmarks.timing import median_seconds, peak_gb
from model_lib import Captioner, CaptionerConfig, DecodeConfig
from model_lib.errors import UserError, first_line
from model_lib.exits import catch_signals, exit_in_one_line
from model_lib.ingest.config import IngestConfig, ScenesConfig
from model_lib.ingest.ingesting import ingest
from model_lib.ingest.scenes import make_scenes
from model_lib.model import decoding
from model_lib.model.batches import caption_ahead
from model_lib.model.captioning import caption_each_batch
from model_lib.model.precision import autocast_dtype, choose_device, inference_dtype
from model_lib.model.tokens import train_tokenizer
from model_lib.presets import DEFAULT_PRESET, PRESETS
from model_lib.train.config import TrainConfig
from model_lib.train.step import should_compile
from model_lib.train.training import train as train_candidate

ROOT = Path(__file__).parents[1]
PACKAGES = ("transformers", "triton", "numpy", "pyarrow", "pillow")
MODULES = ("tenacity", "pydantic", "ijson", "pytest", "simplejpeg", "cykooz_resizer")
"""Those that such a machine may lack."""
ENDS = 0.03
"""Share of the tokens after which captions of random weights are made to end."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is measured."""

    preset: str
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_small(self) -> bool:
        """Whether it is a try of the script itself."""
        return self.preset == "tiny"

    @property
    def images(self) -> int:
        """Of a training step."""
        return 8 if self.is_small else 64

    @property
    def batch(self) -> int:
        """Images of a batch that is captioned."""
        return 8 if self.is_small else 256

    @property
    def arguments(self) -> list[str]:
        return ["--preset", self.preset, "--device", self.device.type]


def row(case: str, baseline: str, unit: str, ours: float, theirs: float | None, **more: Any) -> Row:
    """Return a result; above 1, `ratio` is in our favour where more of `unit` is better."""
    ratio = None if not theirs else round(ours / theirs, 3)
    theirs = None if theirs is None else round(theirs, 3)
    result = {"case": case, "baseline": baseline, "unit": unit, "ours": round(ours, 3)}
    result |= {"theirs": theirs, "ratio": ratio, **more}
    against = "" if theirs is None else f"{baseline} {theirs:,}, ratio {ratio}"
    print(f"{case}: {result['ours']:,} {unit}; {against} {more or ''}".rstrip("; "), flush=True)
    return result


# ---- what is here --------------------------------------------------------------------------------


def device(options: Options) -> list[Row]:
    print(
        f"{device_name(options.device)}, {os.cpu_count()} cores, Python", platform.python_version()
    )
    versions = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} missing")
    print(", ".join(versions))
    missing = [name for name in MODULES if find_spec(name) is None]
    compiler = "a compiler" if shutil.which("gcc") else "no compiler"
    print(f"missing packages: {', '.join(missing) or 'none'}; {compiler}", flush=True)
    if options.on_gpu:
        about = torch.cuda.get_device_properties(options.device)
        print(f"{about.total_memory / 1e9:.1f} GB, {about.multi_processor_count} multiprocessors")
        print(f"cuDNN {torch.backends.cudnn.version()}, attention by it:", end=" ")
        print("on" if torch.backends.cuda.cudnn_sdp_enabled() else "off")
        if shutil.which("nvidia-smi"):
            fields = "--query-gpu=driver_version,clocks.max.sm,power.limit,mig.mode.current"
            subprocess.run(["nvidia-smi", fields, "--format=csv"], check=False)
    speed = train.matrix_speed(options.device, autocast_dtype("auto", options.device))
    source = torch.empty(2**28 if options.on_gpu else 2**24, device=options.device)
    target = torch.empty_like(source)
    (seconds,) = median_seconds([lambda: target.copy_(source)], 5, options.device)
    moved = 2 * source.numel() * source.element_size()
    return [
        row("matrix product", "", "TFLOP/s", speed / 1e12, None),
        row("copy, read and written", "", "GB/s", moved / seconds / 1e9, None),
    ]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def tests(_: Options) -> list[Row]:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [str(file) for file in files if "pytest.mark.gpu" in file.read_text()]
    command = [sys.executable, "-u", "-m", "pytest", "-vv", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "--tb=short", *marked]
    run = subprocess.Popen(command, cwd=ROOT, stdout=PIPE, stderr=STDOUT, text=True)
    assert run.stdout is not None
    line = ""
    try:
        for line in run.stdout:  # the last one counts
            print(line, end="", flush=True)
    finally:
        run.kill()
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", line)}
    passed = counts.pop("passed", 0)
    return [row("tests", "", "failures", sum(counts.values()), None, passed=passed)]


# ---- models of random weights --------------------------------------------------------------------


def captioner(options: Options, dtype: torch.dtype, on: torch.device | None = None) -> Captioner:
    """Return a captioner whose captions depend on the image and end at different lengths."""
    model = decode.captioner(options.preset, torch.device("cpu") if on else options.device)
    model.tokenizer = train_tokenizer(["a small red circle on a white background"] * 3, 512)
    let_captions_end(model)
    return model.for_inference(on or options.device, dtype)


@torch.no_grad()
def let_captions_end(model: Captioner) -> None:
    """Raise the logit of the end, which random weights never reach."""
    pixels = decode.random_pixels(model, 8)
    longest = DecodeConfig(min_new_tokens=20, max_new_tokens=20)
    decoded = decoding.decode(model, model.encode(pixels), longest)
    tokens = [[[model.start_token, *row.tokens[:-1]] for row in rows] for rows in decoded]
    logits = model(pixels, torch.tensor(tokens, device=model.device)).float()
    end = logits[..., model.end_token].clone()
    logits[..., model.end_token] = -torch.inf
    missing = (logits.amax(-1) - end).flatten().quantile(ENDS)
    # What a norm returns sums to zero, and with its shift to a tenth of its width.
    model.decoder.ln_f.bias += 0.1
    model.head.weight[model.end_token] += 10 * missing / model.config.decoder_config.n_embd


def lengths(rows: list[list[decoding.Decoded]]) -> str:
    counts = [len(row.tokens) for captions in rows for row in captions]
    return f"{min(counts)} to {max(counts)}, mean {np.mean(counts):.1f}"


# ---- right? --------------------------------------------------------------------------------------


def parity(options: Options) -> list[Row]:
    cpu = captioner(options, torch.float32, torch.device("cpu"))
    pixels = decode.random_pixels(cpu, 8)
    configs = {"greedy": DecodeConfig(), "beam 5": DecodeConfig(num_beams=5)}
    with torch.inference_mode():
        expected = {
            name: decoding.decode(cpu, cpu.encode(pixels), c) for name, c in configs.items()
        }
    model = cpu.for_inference(options.device, torch.float32)
    torch.backends.cudnn.allow_tf32 = False
    results = []
    try:
        for name, config in configs.items():
            for attempt in ("first batch", "second, recorded", "third, replayed"):
                with torch.inference_mode():
                    features = model.encode(pixels.to(options.device))
                decoded = decoding.decode(model, features, config)
                pairs = [
                    pair
                    for rows in zip(decoded, expected[name], strict=True)
                    for pair in zip(*rows, strict=True)
                ]
                equal = sum(ours.tokens == theirs.tokens for ours, theirs in pairs)
                error = max(abs(ours.score - theirs.score) for ours, theirs in pairs)
                more = {"lengths": lengths(decoded), "largest_score_error": round(error, 6)}
                case = f"{name}, float32, {attempt}"
                results.append(row(case, "CPU", "equal captions", equal, len(pairs), **more))
    finally:
        torch.backends.cudnn.allow_tf32 = True
    return results


def memory(options: Options) -> list[Row]:
    work, step = training(options, ema=0.999, dropout=0.1, label_smoothing=0.1)
    peak = peak_gb(work, options.device)
    (seconds,) = median_seconds([work], 3, options.device)
    case = f"step of {options.images} images; averages, dropout, label smoothing"
    results = [row(case, "", "images/s", options.images / seconds, None, peak_memory_gb=peak)]
    if not options.on_gpu:
        print("too little memory: only on a GPU")
        return results
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(options.device).total_memory
    torch.cuda.set_per_process_memory_fraction(0.75 * peak * 1e9 / total)
    try:
        work()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    case = f"{0.75 * peak:.1f} GB instead of {peak}"
    return [*results, row(case, "", "images at once", step.micro_batch_size, options.images)]


def resume(options: Options) -> list[Row]:
    class Stopping(train.Rates):
        """Asks this process to stop when training logs for the first time."""

        def log(self, metrics: Mapping[str, float], step: int) -> None:
            if not self.rates:
                self.rates.append(0.0)
                os.kill(os.getpid(), signal.SIGTERM)

    with tempfile.TemporaryDirectory() as scratch:
        scenes, data = f"{scratch}/scenes", f"{scratch}/data"
        make_scenes(ScenesConfig(output=scenes, train=64, val=8, size=64))
        ingest(IngestConfig(dataset=scenes, output=data, store="original"))
        config = TrainConfig(
            data=data,
            output=f"{scratch}/out",
            preset="tiny",
            batch_size=16,
            epochs=2,
            log_steps=1,
            compile=False,
            device=options.device.type,
        )
        try:
            train_candidate(config, Stopping())
        except SystemExit as stop:
            print(f"stopped, exit code {stop.code}")
        trained = train_candidate(config)
    return [row("stopped and resumed", "", "steps", trained.steps, 8)]


# ---- fast? ---------------------------------------------------------------------------------------


def training(options: Options, **more: Any) -> tuple[Callable[[], object], Any]:
    """Return a whole step of the product over random pixels, and its `TrainStep`; `more` are
    options of `TrainConfig`."""
    torch.manual_seed(0)
    more = {"compile": should_compile(None, options.device), **more}
    config = CaptionerConfig.from_preset(PRESETS[options.preset])
    config.train_everything = False
    with options.device:
        model = Captioner(config).train()
    step = train.make_step(model, options.preset, **more)
    work = train.Work(model, options.images, autocast_dtype("auto", options.device))
    return work.ours(step), step


def captioning(options: Options) -> tuple[Captioner, list[list[np.ndarray]]]:
    """Return a captioner as it captions, and batches of pixels."""
    dtype = inference_dtype("auto", options.device, PRESETS[options.preset].decoder_shape["n_embd"])
    model = captioner(options, dtype)
    images = list(decode.random_pixels(model, options.batch).cpu().numpy())
    return model, [images] * (2 if options.is_small else 6)


def profile(options: Options) -> list[Row]:
    work, _ = training(options)
    top_kernels(options, "five training steps", work, 5)
    model, batches = captioning(options)
    one = partial(model.caption_pixels, batches[0], DecodeConfig())
    one()  # a CUDA graph is recorded in the second batch
    top_kernels(options, f"{options.batch} images captioned", one, 1)
    return []


def top_kernels(options: Options, title: str, work: Callable[[], object], times: int) -> None:
    """Print the kernels that take longest, or the operations of a CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    work()
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(times):
            work()
        if options.on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    kind = DeviceType.CUDA if options.on_gpu else DeviceType.CPU
    spent = "self_device_time_total" if options.on_gpu else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    events.sort(key=lambda event: -getattr(event, spent))
    total = sum(getattr(event, spent) for event in events) / 1000
    print(f"\n{title}: {1000 * seconds:.1f} ms, {total:.1f} of them in kernels")
    for event in events[:15]:
        own = getattr(event, spent) / 1000
        print(f"{own:10.2f} ms {own / total:6.1%} {event.count:6} x {event.key[:90]}", flush=True)


def switches(options: Options) -> list[Row]:
    return [*decoding_switches(options), *training_switches(options)]


def decoding_switches(options: Options) -> list[Row]:
    model, batches = captioning(options)
    pixels = torch.from_numpy(np.stack(batches[0])).to(options.device)
    count, config = sum(map(len, batches)), DecodeConfig()

    @torch.inference_mode()
    def one(static: bool | None = None) -> None:
        decoding.decode(model, model.encode(pixels), config, static)

    def every(method: Callable[..., Any]) -> None:
        list(method(model, batches, config))

    by_steps, with_cudnn = partial(one, static=False), partial(by_cudnn, one)
    ahead, in_turn = partial(every, caption_ahead), partial(every, caption_each_batch)
    results = [
        switch(options, "decoding without cuDNN's attention", "with", len(pixels), one, with_cudnn),
        switch(options, "decoding as CUDA graphs", "by steps", len(pixels), one, by_steps),
        switch(options, "batches encoded ahead", "in turn", count, ahead, in_turn),
    ]
    expected = model.caption_pixels(batches[0], config)
    in_16_bits = torch.inference_mode()(partial(captioning(options)[0].encode, pixels))
    try:
        model.for_inference(options.device, torch.bfloat16, float8=True)
    except UserError as error:
        print(error)
        return results
    in_8_bits, case = torch.inference_mode()(partial(model.encode, pixels)), "tower in float8"
    results.append(switch(options, case, "as usual", len(pixels), in_8_bits, in_16_bits))
    pairs = zip(model.caption_pixels(batches[0], config), expected, strict=True)
    equal = sum(ours.tokens == usual.tokens for (ours,), (usual,) in pairs)
    more = [equal, len(expected)]
    return [*results, row("… and its captions", "as usual", "equal captions", *more)]


def training_switches(options: Options) -> list[Row]:
    eager, _ = training(options, compile=False)
    case, with_cudnn = "training without cuDNN's attention", partial(by_cudnn, eager)
    results = [switch(options, case, "with", options.images, eager, with_cudnn)]
    if should_compile(None, options.device):
        compiled, _ = training(options, compile=True)
        results.append(
            switch(options, "training compiled", "eager", options.images, compiled, eager)
        )
    return results


def by_cudnn(work: Callable[[], object]) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        work()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def switch(
    options: Options,
    case: str,
    baseline: str,
    images: int,
    on: Callable[[], object],
    off: Callable[[], object],
) -> Row:
    """Compare images per second; and say how long the first call of each took, in which kernels
    are compiled and plans made."""
    first = []
    for work in (on, off):
        began = time.perf_counter()
        work()
        first.append(round(time.perf_counter() - began, 2))
    ours, theirs = median_seconds([on, off], 1 if options.is_small else 5, options.device)
    return row(case, baseline, "images/s", images / ours, images / theirs, first_seconds=first)


def decode_table(options: Options) -> list[Row]:
    sizes = ["1", "4"] if options.is_small else ["1", "32", "256"]
    more = ["--batches", *sizes, "--rounds", "2", "--skip_plain"]
    return decode.run([*options.arguments, *more])["results"]


def train_table(options: Options) -> list[Row]:
    more = ["--images", str(options.images), "--rounds", "3"]
    return train.run([*options.arguments, *more])["results"]


def parquet(options: Options) -> list[Row]:
    images = 32 if options.is_small else 2048
    more = {"device": options.device.type, "batch_size": options.images}
    rate = train.train_from_parquet(options.preset, images, **more)
    return [row("training from Parquet", "", "images/s", rate, None)]


def jpeg(options: Options) -> list[Row]:
    images = 16 if options.is_small else 2048
    more = ["--images", str(images), "--batch_size", str(options.batch)]
    return batch.run([*options.arguments, *more])["results"]


# ---- all of it -----------------------------------------------------------------------------------

Part = Callable[[Options], list[Row]]
PARTS: dict[str, tuple[Part, int]] = {
    "device": (device, 5),
    "tests": (tests, 60),
    "parity": (parity, 30),
    "profile": (profile, 45),
    "switches": (switches, 60),
    "decode": (decode_table, 90),
    "train": (train_table, 45),
    "memory": (memory, 20),
    "parquet": (parquet, 60),
    "jpeg": (jpeg, 40),
    "resume": (resume, 10),
}
"""Each part with the seconds that an H100 may need for it; one that takes three times as long, and
a minute, is cut off."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=list(PRESETS))
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    options = Options(given.preset, choose_device(given.device))
    results: list[Row] = []
    document: dict[str, Any] = {"benchmark": "gpu", "device": device_name(options.device)}
    document |= {"torch": torch.__version__, "results": results, "parts": {}}
    # For a part that never comes back from the device.
    watch = threading.Timer(
        60 * given.minutes + 20, lambda: (print_document(document), os._exit(1))
    )
    watch.daemon = True
    watch.start()
    try:
        with catch_signals(signal.SIGTERM, signal.SIGALRM):
            for name in given.parts:
                left = 60 * given.minutes - (time.monotonic() - began)
                print(f"\n==== {name}, {left:.0f} s left", flush=True)
                document["parts"][name] = run_part(name, options, left, results)
                print(f"---- {name}: {document['parts'][name]}", flush=True)
    finally:
        watch.cancel()
        print_document(document)


def run_part(name: str, options: Options, left: float, results: list[Row]) -> str:
    """Run a part, add its results, and return how it went."""
    part, seconds = PARTS[name]
    if left < (1 if options.is_small else seconds):
        return "skipped: too little time is left"
    began = time.monotonic()
    signal.alarm(max(1, int(min(left, max(60, 3 * seconds)))))
    try:
        results += [{"part": name, **result} for result in part(options)]
        return f"done in {time.monotonic() - began:.1f} s"
    except SystemExit as stop:
        if stop.code != 128 + signal.SIGALRM:
            raise
        return f"cut off after {time.monotonic() - began:.1f} s"
    except Exception as error:
        traceback.print_exc(limit=-6)
        return f"failed: {type(error).__name__}: {first_line(error)}"
    finally:
        signal.alarm(0)
        gc.collect()
        if options.on_gpu:
            torch.cuda.empty_cache()


def print_document(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    with exit_in_one_line():
        main()
