"""`captioner serve`: many clients at once, against one request after another.

    python -m benchmarks.serve [--preset clip-l-gpt2-medium] [--device cpu] [--clients 64]
    [--images 256] [--rounds 3]

Random weights; generated scenes as JPEG at 640 pixels, one a request, over loopback. Clients ask
again as soon as they have an answer. Theirs is one client and a server that neither waits nor
batches (`--batch_size 1`), with an eighth of the images. The cases alternate; rates are medians
over the rounds. Every answer must be a caption. It ends with one line of JSON.
"""

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from model_lib import Captioner, CaptionerConfig
from model_lib.ingest.config import ScenesConfig
from model_lib.ingest.scenes import make_scenes
from model_lib.model.tokens import train_tokenizer
from model_lib.presets import PRESETS
from tests.helpers.inference import encode, images, metrics
from tests.helpers.services import free_port, running

DRAWN = 64
"""Images that differ; more are these again."""


def save_model(preset: str, folder: Path) -> None:
    """Save a captioner of random weights."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = Captioner(CaptionerConfig.from_preset(PRESETS[preset], **ends)).eval()
    model.tokenizer = train_tokenizer(["a small red circle on a white background"] * 3, 512)
    model.save_pretrained(folder)


@contextmanager
def server(model: Path, device: str, *options: str) -> Iterator[int]:
    """Yield the port of a server."""
    port = free_port()
    command = [sys.executable, "-m", "model_lib", "serve", "--model", str(model)]
    command += ["--device", device, "--port", str(port), *options]
    with running(command, f"http://127.0.0.1:{port}/v2", model / f"serve-{port}.log"):
        yield port


def ask(port: int, bodies: list[bytes], clients: int, count: int) -> tuple[float, list[float]]:
    """Return images per second and each request's seconds, of `count` requests of one image."""
    numbers = iter(range(count))

    def client(_: int) -> list[float]:
        connection, times = http.client.HTTPConnection("127.0.0.1", port), []
        for number in numbers:
            began = time.perf_counter()
            connection.request("POST", "/v2/models/captioner/infer", bodies[number % len(bodies)])
            answer = connection.getresponse()
            document = json.loads(answer.read())
            assert answer.status == 200 and document["outputs"][0]["data"], document
            times.append(time.perf_counter() - began)
        connection.close()
        return times

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = [seconds for part in pool.map(client, range(clients)) for seconds in part]
    assert len(times) == count
    return count / (time.perf_counter() - began), times


def run(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, and return the document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="clip-l-gpt2-medium", choices=list(PRESETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    on_gpu = options.device.startswith("cuda")
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores"
    few = max(1, options.images // 8)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        work, model = Path(scratch), Path(scratch, "model")
        make_scenes(ScenesConfig(output=str(work / "scenes"), train=DRAWN, val=2, size=640))
        files = sorted((work / "scenes" / "train2017").iterdir())
        bodies = [json.dumps(images([encode(file)])).encode() for file in files]
        save_model(options.preset, model)
        alone = stack.enter_context(server(model, options.device, "--batch_size", "1"))
        together = stack.enter_context(server(model, options.device))
        cases = {
            "one by one": (alone, 1, few),
            "1 client": (together, 1, few),
            f"{options.clients} clients": (together, options.clients, options.images),
        }
        rates: dict[str, list[float]] = {case: [] for case in cases}
        times: dict[str, list[float]] = {case: [] for case in cases}
        for number in range(options.rounds + 1):
            for case, (port, clients, count) in cases.items():
                rate, seconds = ask(port, bodies, clients, count)
                if number:  # the first warms up
                    rates[case].append(rate)
                    times[case] += seconds
        memory = {
            case: metrics(f"http://127.0.0.1:{port}")["process_resident_memory_bytes"] / 1e9
            for case, (port, *_) in cases.items()
        }
    print(f"\n{name}, torch {torch.__version__}; {options.preset}, random weights\n")
    columns = ("images/s", "ratio", "median s", "longest s", "GB")
    print(f"{'case':<14}" + "".join(f"{column:>11}" for column in columns))
    results, theirs = [], statistics.median(rates["one by one"])
    for case in cases:
        ours, seconds = statistics.median(rates[case]), sorted(times[case])
        ratio, middle = ours / theirs, statistics.median(seconds)
        print(
            f"{case:<14}{ours:>11.2f}{ratio:>11.2f}{middle:>11.3f}{seconds[-1]:>11.3f}"
            f"{memory[case]:>11.2f}"
        )
        row = {"case": case, "baseline": "one by one", "unit": "images/s"}
        row |= {"ours": round(ours, 2), "theirs": round(theirs, 2), "ratio": round(ratio, 3)}
        row |= {"median_s": round(middle, 3), "peak_memory_gb": round(memory[case], 2)}
        results.append(row)
    document = {"benchmark": "serve", "device": name, "torch": torch.__version__}
    return {**document, "results": results[1:]}


def main() -> None:
    print(json.dumps(run()))


if __name__ == "__main__":
    main()
