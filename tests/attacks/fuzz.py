"""Coverage-guided fuzzing of what reads files and options: make fuzz FUZZ_SECONDS=60.

Each reader gets inputs that atheris makes up from a small corpus, for so many seconds, in a process
of its own. Only a `UserError` may come out. What let anything else come out is kept in a folder and
named at the end; it is mended, and becomes a case of test_files.py.
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

    from model_lib.errors import UserError
    from tests.helpers import samples
    from tests.helpers.readers import READERS

STRANGE: list[Any] = [
    None,
    True,
    -1,
    2**63,
    10**400,
    1.5,
    float("nan"),
    "",
    "x",
    "../x",
    "/etc/x",
    "a\0b",
    "\ud800",
]
STRANGE += ["http://x/y", "x" * 5000, [], [[]], {}, {"": 0}]
SLOW = 30
"""Seconds after which an input counts as one that hangs."""
MEMORY_MB = 3000
"""Memory above which an input counts as a bomb."""


# ---- inputs --------------------------------------------------------------------------------------


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
        found = found.set_column(
            place, name, pa.nulls(found.num_rows, found.schema.field(name).type)
        )
    else:
        kind = rng.choice(
            [pa.int8(), pa.float64(), pa.string(), pa.binary(), pa.list_(pa.string()), pa.null()]
        )
        values = {
            "int8": 1,
            "double": float("nan"),
            "string": "../x",
            "binary": b"\xff",
            "null": None,
        }
        column = [values.get(str(kind), ["x", None])] * found.num_rows
        found = found.set_column(place, name, pa.array(column, kind))
    file = io.BytesIO()
    pq.write_table(found, file)
    return file.getvalue()


def mutator(name: str) -> Callable[[bytes, int, int], bytes]:
    """Return what makes an input from another: half of the time one of the same form, else any
    bytes."""

    def mutate(content: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            with contextlib.suppress(
                Exception
            ):  # what is no document or table any more is mutated as bytes
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


def fuzz(reader: str, seconds: int, kept: Path) -> None:
    """Give made-up files to one reader, in this process, which it ends."""
    function, name = READERS[reader]
    with tempfile.TemporaryDirectory() as scratch:
        corpus, folder = Path(scratch) / "corpus", Path(scratch) / "input"
        corpus.mkdir()
        folder.mkdir()
        for number, content in enumerate(samples.of(name)):
            (corpus / str(number)).write_bytes(content)

        def once(content: bytes) -> None:
            (folder / name).write_bytes(content)
            with contextlib.suppress(UserError):
                function(folder / name)

        arguments = [
            f"-max_total_time={seconds}",
            f"-timeout={SLOW}",
            f"-rss_limit_mb={MEMORY_MB}",
            "-max_len=20000",
        ]
        arguments += [f"-artifact_prefix={kept}/{reader}-", "-print_final_stats=1", str(corpus)]
        atheris.Setup([sys.argv[0], *arguments], once, custom_mutator=mutator(name))
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument(
        "--kept", type=Path, default=Path("fuzz-findings"), help="folder of what broke something"
    )
    parser.add_argument("--alone", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument(
        "readers", nargs="*", metavar="reader", help=f"some of {', '.join(READERS)}; all by default"
    )
    asked = parser.parse_args()
    asked.kept.mkdir(exist_ok=True)
    if asked.alone:
        fuzz(asked.alone, asked.seconds, asked.kept)
    broken = []
    for reader in asked.readers or READERS:
        command = [sys.executable, "-m", "tests.attacks.fuzz", "--alone", reader]
        command += ["--seconds", str(asked.seconds), "--kept", str(asked.kept)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        runs = done.stderr.rpartition("stat::number_of_executed_units:")[2].split()[:1]
        print(
            f"{reader}: {' '.join(runs) or 'unknown'} inputs, "
            f"{'broken' if done.returncode else 'nothing'}",
            flush=True,
        )
        if done.returncode:
            broken.append(reader)
            print(done.stdout[-3000:] + done.stderr[-1500:], flush=True)
    found = sorted(str(file) for file in asked.kept.iterdir())
    if found:
        print("findings:", *found, sep="\n  ")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
