"""Five hundred files that were made to break picture loaders, through every stage that reads pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.attacks.mutations import corpus, encoded, picture

SEED = 20_261_123
LIMIT = 600
"""Seconds after which a stage counts as hung."""
ALLOWED_MB = 1000
"""Memory that the corpus may cost more than harmless pictures."""
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(f"PEAK {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024}", file=sys.stderr)
sys.exit(code)
"""


def run(*arguments: object) -> tuple[subprocess.CompletedProcess, int]:
    """Run the command line; return what came of it, and its peak memory in MB."""
    command = [sys.executable, "-c", MEASURED, sys.executable, "-m", "model_lib", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=os.environ)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done, int(done.stderr.rsplit("PEAK ", 1)[1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The corpus, and as many harmless pictures."""
    root, rng = tmp_path_factory.mktemp("attack"), np.random.default_rng(SEED)
    hostile, harmless = root / "hostile", root / "harmless"
    hostile.mkdir()
    harmless.mkdir()
    for name, content in corpus(SEED):
        (hostile / name).write_bytes(content)
    for number in range(30):
        (harmless / f"{number}.jpg").write_bytes(encoded(picture(rng), "jpg"))
    return hostile, harmless


def annotations(folder: Path) -> Path:
    names = sorted(file.name for file in folder.iterdir())
    document = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [{"id": n, "image_id": n, "caption": "something"} for n in range(len(names))],
    }
    file = folder.parent / f"{folder.name}.json"
    file.write_text(json.dumps(document))
    return file


def test_ingest_keeps_or_quarantines_each(folders: tuple[Path, Path], tmp_path: Path) -> None:
    peaks = {}
    for folder in folders:
        given = ("--annotations", annotations(folder), "--images", folder, "--split", "train")
        done, peaks[folder.name] = run("ingest", *given, "--output", tmp_path / folder.name)
        assert done.returncode == 0, done.stderr
    kept = [
        name for file in (tmp_path / "hostile").glob("train-*") for name in pq.read_table(file)["file_name"].to_pylist()
    ]
    left_out = pq.read_table(tmp_path / "hostile" / "quarantine.parquet")["file_name"].to_pylist()
    assert sorted([*kept, *left_out]) == sorted(file.name for file in folders[0].iterdir())
    assert len(kept) > 100 and len(left_out) > 200
    assert peaks["hostile"] < peaks["harmless"] + ALLOWED_MB, peaks


def test_batch_has_a_row_for_each(folders: tuple[Path, Path], saved_model: Path, tmp_path: Path) -> None:
    peaks = {}
    for folder in folders:
        given = ("--images", folder, "--model", saved_model, "--output", tmp_path / folder.name)
        done, peaks[folder.name] = run("batch", *given, "--max_new_tokens", 5)
        assert done.returncode == 0, done.stderr
    tables = [pq.read_table(file).to_pylist() for file in (tmp_path / "hostile").glob("*/captions/*.parquet")]
    rows = [row for table in tables for row in table]
    assert sorted(Path(row["uri"]).name for row in rows) == sorted(file.name for file in folders[0].iterdir())
    assert all((row["status"] == "ok") == (row["caption"] is not None) == (row["error"] is None) for row in rows)
    assert sum(row["status"] == "ok" for row in rows) > 100
    assert peaks["hostile"] < peaks["harmless"] + ALLOWED_MB, peaks


def test_caption_says_something_of_each(folders: tuple[Path, Path], saved_model: Path) -> None:
    given = ("--model", saved_model, "--max_new_tokens", 5, "--json")
    (_, harmless), (done, hostile) = (run("caption", "-f", folder, *given) for folder in reversed(folders))
    assert done.returncode == 1 and hostile < harmless + ALLOWED_MB
    rows = json.loads(done.stdout)
    assert sorted(Path(row["uri"]).name for row in rows) == sorted(file.name for file in folders[0].iterdir())
    assert all(("error" in row) != ("caption" in row) for row in rows)
