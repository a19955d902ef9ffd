"""What reads files, options and images that others made, each as a function of one file: it
returns, or refuses."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from model_lib import cli
from model_lib.batch import listing, planning, rows
from model_lib.batch.config import BatchConfig
from model_lib.data import shards
from model_lib.errors import UserError
from model_lib.evaluate import evaluation, result
from model_lib.ingest import annotations, image_source
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.journal import Journal
from model_lib.io.images import ImageError, decode_image, to_pixels
from model_lib.train import checkpoint
from tests.helpers import samples


def manifest(file: Path) -> None:
    found = shards.read_manifest(str(file))
    found.to_dict()


def coco(file: Path) -> None:
    annotations.read_captions(str(file))
    listed(file, "annotations")


def karpathy(file: Path) -> None:
    listed(file, "karpathy")


def table(file: Path) -> None:
    listed(file, "annotations")


def listed(file: Path, option: str) -> None:
    options = {option: str(file), "images": str(file.parent), "output": "unused"}
    annotations.read_listing(IngestConfig(**options)).digest()


def results(file: Path) -> None:
    evaluation.read_results(str(file))


def scores(file: Path) -> None:
    result.Evaluation.read(str(file.parent)).figures()


def plan(file: Path) -> None:
    made = planning.read_plan(str(file.parent))
    made.missing()
    assert all("/" not in shard.file and shard.file != ".." for shard in made.shards)


def listing_of_plan(file: Path) -> None:
    listed = [planning.Shard("part-0.parquet", samples.ROWS)]
    planning.Plan(str(file.parent), samples.PLAN["configuration"], file.name, listed).images(0)


def journal(file: Path) -> None:
    read = Journal(str(file.parent), "key")
    read.records = str(file.parent)
    for finished in read.read("train", 100):
        assert finished.shard.uri == "train-00000.parquet"


def state(file: Path) -> None:
    """A checkpoint's position in its run, as its manifest would hold for it."""
    save_file({"model.x": torch.zeros(1)}, file.parent / "state.safetensors")
    _, found = checkpoint.load(str(file.parent))
    assert min(found.step, found.validated, found.stale) >= 0


def image(file: Path) -> None:
    with contextlib.suppress(ImageError):
        to_pixels(decode_image(file.read_bytes()), 8)


def options(file: Path) -> None:
    document = None
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(file.read_bytes())
    if isinstance(document, dict):
        for kind in map(cli.config_class, cli.COMMANDS.values()):
            given = document.get(kind.__name__)
            if isinstance(given, dict):
                kind.from_options(**given).key()


def command_line(file: Path) -> None:
    tokens = file.read_bytes().decode(errors="surrogateescape").split("\n")
    if tokens[0] in cli.COMMANDS:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                cli.parse(cli.COMMANDS[tokens[0]], tokens[0], tokens[1:])
        except SystemExit as stop:
            assert not stop.code, "only --help ends so, and mistakes are refused"


def shard(file: Path) -> None:
    count = samples.ROWS
    with contextlib.suppress(pa.ArrowException, ValueError, OSError):
        count = pq.ParquetFile(file).metadata.num_rows  # as a manifest would that lies with it
    about = shards.Shard(str(file), "train", count, file.stat().st_size, "")
    split = shards.Manifest(1, [about], {"train": about.rows}, {}, "", {}, str(file.parent))
    reader = shards.SplitReader(split, "train", size=8, workers=1, limit=20)
    reader.captions()
    for _ in reader.batches(reader.in_order(4)):
        pass


def images(file: Path) -> None:
    result._read_predictions(str(file))


def captions(file: Path) -> None:
    rows.read_shard(str(file))


def list_of_images(file: Path) -> None:
    listing.list_images(BatchConfig(images=str(file), output="unused", model="unused"))


def archive(file: Path) -> None:
    opened = image_source.open_image_source(str(file))
    for name in list(opened.zip.namelist())[:20]:
        with contextlib.suppress(ImageError):
            opened.read(name)
        with contextlib.suppress(UserError), image_source.opened(f"zip://{name}::{file}") as member:
            member.read()


READERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "manifest": (manifest, "manifest.json"),
    "coco": (coco, "captions.json"),
    "karpathy": (karpathy, "karpathy.json"),
    "results": (results, "results.json"),
    "scores": (scores, "scores.json"),
    "plan": (plan, "plan.json"),
    "plan-listing": (listing_of_plan, "listing-0.parquet"),
    "journal": (journal, "train-00000.parquet.json"),
    "checkpoint": (state, "state.json"),
    "image": (image, "a.jpg"),
    "options": (options, "options.json"),
    "command-line": (command_line, "arguments"),
    "shard": (shard, "train-00000.parquet"),
    "images": (images, "predictions.parquet"),
    "captions": (captions, "part-0.parquet"),
    "table-csv": (table, "table.csv"),
    "table-jsonl": (table, "table.jsonl"),
    "table-parquet": (table, "table.parquet"),
    "list-csv": (list_of_images, "list.csv"),
    "list-parquet": (list_of_images, "list.parquet"),
    "archive": (archive, "archive.zip"),
}
"""Each reader, and the name of the file that it reads."""
