"""Coverage-guided fuzzing of the readers of files and options: make fuzz FUZZ_SECONDS=60.

Each reader gets inputs that atheris makes from a small corpus, for so many seconds, in a process of
its own. It may return or raise `UserError`. Inputs of other ends are kept in a folder and named at
the end; each becomes a case of test_files.py.
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

STRANGE: list[Any] = [None, True, -1, 2**63, 10**400, 1.5, float("nan"), [], [[]], {}, {"": 0}]
STRANGE += ["", "x", "../x", "/etc/x", "a\0b", "\ud800", "http://x/y", "x" * 5000]
SLOW = 30
"""Seconds after which an input counts as one that hangs."""
MEMORY_MB = 3000
"""Memory above which an input counts as a bomb."""


# ---- inputs --------------------------------------------------------------------------------------


def changed(document: Any, rng: random.Random) -> Any:
    """Return a JSON document with one of its values another one, gone, or there twice."""
    if isinstance(document, dict | list) and document and rng.random() < 0.9:
        copy: Any = document.copy()
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        act = rng.random()
        if act < 0.1:
            del copy[key]
        elif act < 0.2 and isinstance(copy, list):
            copy.append(copy[key])
        elif act < 0.3 and isinstance(copy, dict):
            copy[str(rng.choice(STRANGE))] = copy.pop(key)
        else:
            copy[key] = changed(copy[key], rng)
        return copy
    return rng.choice(STRANGE)


def changed_table(content: bytes, rng: random.Random) -> bytes:
    """Return a Parquet file with one of its columns gone, doubled, empty, or of another type."""
    table = pq.ParquetFile(io.BytesIO(content)).read()
    index = rng.randrange(table.num_columns)
    name = table.column_names[index]
    act = rng.randrange(4)
    if act == 0:
        table = table.drop_columns([name])
    elif act == 1:
        table = table.append_column(rng.choice([name, "more"]), table[name])
    elif act == 2:
        empty = pa.nulls(table.num_rows, table.schema.field(name).type)
        table = table.set_column(index, name, empty)
    else:
        value = rng.choice([1, float("nan"), "../x", b"\xff", ["x", None], None])
        table = table.set_column(index, name, pa.array([value] * table.num_rows))
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def mutator(name: str) -> Callable[[bytes, int, int], bytes]:
    """Return a function from one input to another: half of the time of the same form, else any
    bytes."""

    def mutate(content: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            with contextlib.suppress(Exception):  # no document or table any more
                if name.endswith(".json"):
                    mutated = json.dumps(changed(json.loads(content), rng)).encode()
                elif name.endswith(".parquet"):
                    mutated = changed_table(content, rng)
                else:
                    raise ValueError
                if len(mutated) <= size:
                    return mutated
        return atheris.Mutate(content, size)

    return mutate


def fuzz(reader: str, seconds: int, kept: Path) -> None:
    """Fuzz one reader in this process, and end it."""
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

        arguments = f"-max_total_time={seconds} -timeout={SLOW} -rss_limit_mb={MEMORY_MB}".split()
        arguments += ["-max_len=20000", f"-artifact_prefix={kept}/{reader}-"]
        arguments += ["-print_final_stats=1", str(corpus)]
        atheris.Setup([sys.argv[0], *arguments], once, custom_mutator=mutator(name))
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--seconds", type=int, default=60, help="for each reader")
    option("--kept", type=Path, default=Path("fuzz-findings"), help="folder of what broke a reader")
    option("--alone", choices=READERS, help=argparse.SUPPRESS)
    option("readers", nargs="*", help=f"some of {', '.join(READERS)}; all by default")
    options = parser.parse_args()
    options.kept.mkdir(exist_ok=True)
    if options.alone:
        fuzz(options.alone, options.seconds, options.kept)
    broken = []
    for reader in options.readers or READERS:
        command = [sys.executable, "-m", "tests.attacks.fuzz", "--alone", reader]
        command += ["--seconds", str(options.seconds), "--kept", str(options.kept)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        runs = done.stderr.rpartition("stat::number_of_executed_units:")[2].split()[:1]
        outcome = "broken" if done.returncode else "nothing"
        print(f"{reader}: {' '.join(runs) or 'unknown'} inputs, {outcome}", flush=True)
        if done.returncode:
            broken.append(reader)
            print(done.stdout[-3000:] + done.stderr[-1500:], flush=True)
    findings = sorted(str(file) for file in options.kept.iterdir())
    if findings:
        print("findings:", *findings, sep="\n  ")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
