"""Images per second and memory of `captioner ingest`, against the loops that one would write
instead.

    python -m benchmarks.ingest --images_from coco/val2017 [--images 2000] [--rounds 3]

Photographs of a folder, repeated, are ingested whole: read, decoded, reduced to 256 pixels,
encoded, hashed and written to Parquet with their captions. Two baselines decode, resize (bicubic)
and save the same images with Pillow, in the same quality, one file each, without any checks:

- loop: one process.
- pool: a process a core.

Cases take turns, each in a fresh process, timed without its imports. It prints a table and ends
with one line of JSON.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

SIDE, QUALITY = 256, 95


def save_reduced(output: Path, file: Path) -> None:
    """Decode, resize and save an image, as one would write it."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    scale = SIDE / min(image.size)
    size = (int(image.width * scale), int(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC) if scale < 1 else image
    image.save(output / file.name, quality=QUALITY, subsampling=0)


def ours(folder: Path, output: Path) -> Callable[[], object]:
    import pyarrow as pa

    from model_lib.ingest.config import IngestConfig
    from model_lib.ingest.ingesting import SCHEMA, ingest
    from model_lib.io.images import is_image

    pa.Table.from_pylist([], SCHEMA)  # imports pandas
    is_image(b"")  # imports Pillow's readers
    sources = {"annotations": str(folder / "captions.json"), "images": str(folder / "images")}
    return lambda: ingest(IngestConfig(**sources, output=str(output), split="train"))


def loop(folder: Path, output: Path) -> Callable[[], object]:
    from PIL import Image

    Image.init()
    return lambda: [save_reduced(output, file) for file in sorted((folder / "images").iterdir())]


def pool(folder: Path, output: Path) -> Callable[[], object]:
    from PIL import Image

    Image.init()

    def run() -> None:
        files = sorted((folder / "images").iterdir())
        with ProcessPoolExecutor(os.cpu_count()) as processes:
            list(processes.map(functools.partial(save_reduced, output), files, chunksize=16))

    return run


CASES = {"ours": ours, "loop": loop, "pool": pool}


def measure(case: str, folder: Path) -> None:
    """Run a case in this process; print its seconds and the peak memory of all its processes."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        run = CASES[case](folder, Path(output))
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory += resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (os.cpu_count() or 1)
    print(json.dumps([seconds, memory * 1024 / 1e9]))


def prepare(source: Path, count: int, folder: Path) -> None:
    """Make `count` images of those in `source`, as links, and their captions."""
    files = sorted(source.glob("**/*.jpg"))
    (folder / "images").mkdir()
    images, annotations = [], []
    for number in range(count):
        name = f"{number:012d}.jpg"
        (folder / "images" / name).symlink_to(files[number % len(files)].absolute())
        images.append({"id": number, "file_name": name})
        for n in range(5):
            note = {"id": 5 * number + n, "image_id": number, "caption": f"caption {n}"}
            annotations.append(note)
    document = {"images": images, "annotations": annotations}
    (folder / "captions.json").write_text(json.dumps(document))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--images_from", type=Path, required=True, help="folder of photographs, COCO's for example"
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.images_from)
        return
    rounds: dict[str, list[list[float]]] = {case: [] for case in options.cases}
    with tempfile.TemporaryDirectory() as scratch:
        prepare(options.images_from, options.images, Path(scratch))
        for _ in range(options.rounds):
            for case in options.cases:
                command = [sys.executable, "-m", "benchmarks.ingest", "--measure", case]
                command += ["--images_from", scratch]
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
                rounds[case].append(json.loads(subprocess.run(command, check=True, **pipes).stdout))
    rates = {
        case: options.images / statistics.median(seconds for seconds, _ in figures)
        for case, figures in rounds.items()
    }
    memory = {case: round(max(peak for _, peak in figures), 3) for case, figures in rounds.items()}
    device = f"CPU, {os.cpu_count()} cores"
    print(f"\n{device}, {options.images:,} images, median of {options.rounds} rounds; images/s\n")
    print(f"{'case':<12}{'baseline':<12}{'ours':>9}{'theirs':>9}{'ratio':>7}{'GB':>7}{'theirs':>8}")
    results = []
    for case in [case for case in options.cases if case != "ours"]:
        mine, theirs = rates["ours"], rates[case]
        results.append(
            {
                "case": f"{options.images} images",
                "baseline": case,
                "unit": "images/s",
                "ours": round(mine, 1),
                "theirs": round(theirs, 1),
                "ratio": round(mine / theirs, 2),
                "peak_memory_gb": memory["ours"],
                "their_peak_memory_gb": memory[case],
            }
        )
        speeds = f"{mine:>9.1f}{theirs:>9.1f}{mine / theirs:>7.2f}"
        print(f"{'ingest':<12}{case:<12}{speeds}{memory['ours']:>7.3f}{memory[case]:>8.3f}")
    if options.cases == ["ours"]:
        print(f"{'ingest':<24}{rates['ours']:>9.1f}{'':>16}{memory['ours']:>7.3f}")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "pillow")}
    print(json.dumps({"benchmark": "ingest", "device": device, **versions, "results": results}))


if __name__ == "__main__":
    main()
