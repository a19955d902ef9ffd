"""Each reader of files, options and images that others made, as a function of one file that returns
or raises `UserError`."""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from model_lib import cli
from model_lib.batch import listing, planning, rows
from model_lib.batch.config import BatchConfig
from model_lib.data import coco, shards
from model_lib.errors import UserError
from model_lib.evaluate import result, scoring
from model_lib.ingest import datasets
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.journal import Journal
from model_lib.io.archives import open_archive
from model_lib.io.images import ImageError, decode_image
from model_lib.io.pixels import Preprocessing
from model_lib.train import checkpoint
from tests.helpers import samples


def manifest(file: Path) -> None:
    shards.read_manifest(str(file)).to_dict()


def captions_of_coco(file: Path) -> None:
    coco.read_captions(str(file))
    listed(file, "annotations")


def karpathy(file: Path) -> None:
    listed(file, "karpathy")


def table(file: Path) -> None:
    listed(file, "annotations")


def listed(file: Path, option: str) -> None:
    options = {option: str(file), "images": str(file.parent), "output": "unused"}
    listing = datasets.read_listing(IngestConfig(**options))
    listing.digest()
    if not listing.entries:  # as ingest
        raise UserError(f"{file}: no usable image")


def results(file: Path) -> None:
    scoring.read_results(str(file))


def scores(file: Path) -> None:
    result.Evaluation.read(str(file.parent)).figures()


def plan(file: Path) -> None:
    plan = planning.read_plan(str(file.parent))
    plan.missing()
    assert not [shard for shard in plan.shards if "/" in shard.file or shard.file == ".."]


def listing_of_plan(file: Path) -> None:
    document = {**samples.PLAN, "shards": [planning.Shard("part-0.parquet", samples.ROWS)]}
    planning.Plan(**{**document, "listing": file.name}, folder=str(file.parent)).images(0)


def journal(file: Path) -> None:
    records = Journal(str(file.parent), "key")
    records.records = str(file.parent)
    records.read("train-00000.parquet")


def state(file: Path) -> None:
    """A checkpoint's position in its run, as its manifest would hold for it."""
    save_file({"model.x": torch.zeros(1)}, file.parent / "state.safetensors")
    _, position = checkpoint.load(str(file.parent))
    assert min(position.step, position.validated, position.stale) >= 0


def image(file: Path) -> None:
    with contextlib.suppress(ImageError):
        Preprocessing(8)(decode_image(file.read_bytes()))


def options(file: Path) -> None:
    document = None
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(file.read_bytes())
    if isinstance(document, dict):
        for kind in map(cli.config_class, cli.COMMANDS.values()):
            options = document.get(kind.__name__)
            if isinstance(options, dict):
                kind.from_options(**options).key()


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
    reader = shards.SplitReader(split, "train", Preprocessing(8), workers=1, limit=20)
    reader.captions()
    for _ in reader.batches(reader.in_order(4)):
        pass


def images(file: Path) -> None:
    result.read_predictions(str(file))


def captions(file: Path) -> None:
    rows.read_shard(str(file))


def list_of_images(file: Path) -> None:
    config = BatchConfig(images=str(file), output="unused", model="unused")
    list(listing.list_images(config, Counter()))


def archive(file: Path) -> None:
    source = open_archive(str(file))
    for name in list(source.sizes)[:20]:
        with contextlib.suppress(ImageError):
            source.read(name)
        options = {"annotations": f"zip://{name}::{file}", "images": str(file), "output": "unused"}
        with contextlib.suppress(UserError):
            datasets.read_listing(IngestConfig(**options))


READERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "manifest": (manifest, "manifest.json"),
    "coco": (captions_of_coco, "captions.json"),
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
