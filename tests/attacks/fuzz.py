"""Coverage-guided fuzzing of what reads files and options: make fuzz FUZZ_SECONDS=60.

Each target gets inputs that atheris makes up from a small corpus, for so many seconds, in a process of its own. Only a
`UserError` or a `WorkError` may come out. What let anything else come out is kept in a folder and named at the end; it
is mended, and becomes a case of test_files.py.
"""

import argparse
import contextlib
import io
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["model_lib"]):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from model_lib import cli
    from model_lib.batch import listing, planning, rows
    from model_lib.batch.config import BatchConfig
    from model_lib.data import shards
    from model_lib.errors import UserError, WorkError
    from model_lib.evaluate import evaluation, judgement
    from model_lib.ingest import annotations, places
    from model_lib.ingest.config import IngestConfig
    from model_lib.pictures import PictureError

from tests.attacks import samples

STRANGE: list[Any] = [None, True, -1, 2**63, 10**400, 1.5, float("nan"), "", "x", "../x", "/etc/x", "a\0b", "\ud800"]
STRANGE += ["http://x/y", "x" * 5000, [], [[]], {}, {"": 0}]
SLOW = 30
"""Seconds after which an input counts as one that hangs."""
MEMORY_MB = 3000
"""Memory above which an input counts as a bomb."""


# ---- targets: each takes the file that was made up -------------------------------------------------------------------


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
    judgement.Evaluation.read(str(file.parent)).figures()


def plan(file: Path) -> None:
    planning.read_plan(str(file.parent)).missing()


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
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):  # --help
            cli.parse(cli.COMMANDS[tokens[0]], tokens[0], tokens[1:])


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


def pictures(file: Path) -> None:
    judgement._read_pictures(str(file))


def captions(file: Path) -> None:
    rows.read_shard(str(file))


def list_of_pictures(file: Path) -> None:
    listing.list_pictures(BatchConfig(images=str(file), output="unused", model="unused"))


def archive(file: Path) -> None:
    opened = places.pictures_at(str(file))
    for name in list(opened.zip.namelist())[:20]:
        with contextlib.suppress(PictureError):
            opened.read(name)
        with contextlib.suppress(UserError), places.opened(f"zip://{name}::{file}") as member:
            member.read()


TARGETS: dict[str, tuple[Callable[[Path], None], str]] = {
    "manifest": (manifest, "manifest.json"),
    "coco": (coco, "captions.json"),
    "karpathy": (karpathy, "karpathy.json"),
    "results": (results, "results.json"),
    "scores": (scores, "scores.json"),
    "plan": (plan, "plan.json"),
    "options": (options, "options.json"),
    "command-line": (command_line, "arguments"),
    "shard": (shard, "train-00000.parquet"),
    "pictures": (pictures, "pictures.parquet"),
    "captions": (captions, "part-0.parquet"),
    "table-csv": (table, "table.csv"),
    "table-jsonl": (table, "table.jsonl"),
    "table-parquet": (table, "table.parquet"),
    "list-csv": (list_of_pictures, "list.csv"),
    "list-parquet": (list_of_pictures, "list.parquet"),
    "archive": (archive, "archive.zip"),
}


# ---- inputs ----------------------------------------------------------------------------------------------------------


def changed(document: Any, rng: random.Random) -> Any:
    """Return a JSON document with one of its values another one, gone, or there twice."""
    if isinstance(document, dict | list) and document and rng.random() < 0.9:
        copy: Any = document.copy()
        place = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        act = rng.random()
        if act < 0.1:
            del copy[place]
        elif act < 0.2 and isinstance(copy, list):
            copy.append(copy[place])
        elif act < 0.3 and isinstance(copy, dict):
            copy[str(rng.choice(STRANGE))] = copy.pop(place)
        else:
            copy[place] = changed(copy[place], rng)
        return copy
    return rng.choice(STRANGE)


def changed_table(content: bytes, rng: random.Random) -> bytes:
    """Return a Parquet file with one of its columns gone, renamed, empty, or of another type."""
    found = pq.ParquetFile(io.BytesIO(content)).read()
    place = rng.randrange(found.num_columns)
    name = found.column_names[place]
    act = rng.randrange(4)
    if act == 0:
        found = found.drop_columns([name])
    elif act == 1:
        found = found.append_column(rng.choice([name, "more"]), found[name])
    elif act == 2:
        found = found.set_column(place, name, pa.nulls(found.num_rows, found.schema.field(name).type))
    else:
        kind = rng.choice([pa.int8(), pa.float64(), pa.string(), pa.binary(), pa.list_(pa.string()), pa.null()])
        values = {"int8": 1, "double": float("nan"), "string": "../x", "binary": b"\xff", "null": None}
        column = [values.get(str(kind), ["x", None])] * found.num_rows
        found = found.set_column(place, name, pa.array(column, kind))
    file = io.BytesIO()
    pq.write_table(found, file)
    return file.getvalue()


def mutator(name: str) -> Callable[[bytes, int, int], bytes]:
    """Return what makes an input from another: half of the time one of the same form, else any bytes."""

    def mutate(content: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            with contextlib.suppress(Exception):  # what is no document or table any more is mutated as bytes
                if name.endswith(".json"):
                    made = json.dumps(changed(json.loads(content), rng)).encode()
                elif name.endswith(".parquet"):
                    made = changed_table(content, rng)
                else:
                    raise ValueError
                if len(made) <= size:
                    return made
        return atheris.Mutate(content, size)

    return mutate


def fuzz(target: str, seconds: int, kept: Path) -> None:
    """Run one target, in this process, which it ends."""
    function, name = TARGETS[target]
    with tempfile.TemporaryDirectory() as scratch:
        corpus, folder = Path(scratch) / "corpus", Path(scratch) / "input"
        corpus.mkdir()
        folder.mkdir()
        for number, content in enumerate(samples.of(name)):
            (corpus / str(number)).write_bytes(content)

        def once(content: bytes) -> None:
            (folder / name).write_bytes(content)
            with contextlib.suppress(UserError, WorkError):
                function(folder / name)

        arguments = [f"-max_total_time={seconds}", f"-timeout={SLOW}", f"-rss_limit_mb={MEMORY_MB}", "-max_len=20000"]
        arguments += [f"-artifact_prefix={kept}/{target}-", "-print_final_stats=1", str(corpus)]
        atheris.Setup([sys.argv[0], *arguments], once, custom_mutator=mutator(name))
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--kept", type=Path, default=Path("fuzz-findings"), help="folder of what broke something")
    parser.add_argument("--alone", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"some of {', '.join(TARGETS)}; all by default")
    asked = parser.parse_args()
    asked.kept.mkdir(exist_ok=True)
    if asked.alone:
        fuzz(asked.alone, asked.seconds, asked.kept)
    broken = []
    for target in asked.targets or TARGETS:
        command = [sys.executable, "-m", "tests.attacks.fuzz", "--alone", target]
        command += ["--seconds", str(asked.seconds), "--kept", str(asked.kept)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        runs = done.stderr.rpartition("stat::number_of_executed_units:")[2].split()[:1]
        print(
            f"{target}: {' '.join(runs) or 'unknown'} inputs, {'broken' if done.returncode else 'nothing'}", flush=True
        )
        if done.returncode:
            broken.append(target)
            print(done.stdout[-3000:] + done.stderr[-1500:], flush=True)
    found = sorted(str(file) for file in asked.kept.iterdir())
    if found:
        print("findings:", *found, sep="\n  ")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
