"""Five hundred files that were made to break image loaders, through every stage that reads
images."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.mutations import corpus, encoded, image

SEED = 20_261_123
LIMIT = 600
"""Seconds after which a stage counts as hung."""
ALLOWED_MB = 1000
"""Memory that the corpus may cost more than harmless images."""
STAGE = """
import json, resource, sys
from model_lib.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as stop:
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps([stop.code, megabytes]), file=sys.stderr)
        print("\\0", end="")
"""


def run(harmless: list[object], hostile: list[object]) -> str:
    """Run a stage over harmless images, and in the same process over the corpus; return what it
    said of that."""
    words = [[str(word) for word in arguments] for arguments in (harmless, hostile)]
    command = [sys.executable, "-c", STAGE, json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=os.environ)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    ends = [
        json.loads(line) for line in done.stderr.splitlines() if re.fullmatch(r"\[\d+, \d+\]", line)
    ]
    (of_harmless, normal), (of_hostile, peak) = ends
    assert of_harmless == 0 and of_hostile == (1 if hostile[0] == "caption" else 0), done.stderr[
        -3000:
    ]
    assert peak < normal + ALLOWED_MB, ends
    return done.stdout.split("\0")[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The corpus, and as many harmless images."""
    root, rng = tmp_path_factory.mktemp("attack"), np.random.default_rng(SEED)
    hostile, harmless = root / "hostile", root / "harmless"
    hostile.mkdir()
    harmless.mkdir()
    for name, content in corpus(SEED):
        (hostile / name).write_bytes(content)
    for number in range(30):
        (harmless / f"{number}.jpg").write_bytes(encoded(image(rng), "jpg"))
    return hostile, harmless


def annotations(folder: Path) -> Path:
    names = sorted(file.name for file in folder.iterdir())
    document = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [
            {"id": n, "image_id": n, "caption": "something"} for n in range(len(names))
        ],
    }
    file = folder.parent / f"{folder.name}.json"
    file.write_text(json.dumps(document))
    return file


def test_ingest_keeps_or_quarantines_each(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def given(folder: Path) -> list[object]:
        words = [
            "ingest",
            "--annotations",
            annotations(folder),
            "--images",
            folder,
            "--split",
            "train",
        ]
        return [*words, "--output", tmp_path / folder.name]

    hostile, harmless = folders
    run(given(harmless), given(hostile))
    kept = [
        name
        for file in (tmp_path / "hostile").glob("train-*")
        for name in pq.read_table(file)["file_name"].to_pylist()
    ]
    left_out = pq.read_table(tmp_path / "hostile" / "quarantine.parquet")["file_name"].to_pylist()
    assert sorted([*kept, *left_out]) == sorted(file.name for file in hostile.iterdir())
    assert len(kept) > 100 and len(left_out) > 200


def test_batch_has_a_row_for_each(
    folders: tuple[Path, Path], saved_model: Path, tmp_path: Path
) -> None:
    def given(folder: Path) -> list[object]:
        words = ["batch", "--images", folder, "--model", saved_model, "--max_new_tokens", 5]
        return [*words, "--output", tmp_path / folder.name]

    hostile, harmless = folders
    run(given(harmless), given(hostile))
    tables = [
        pq.read_table(file).to_pylist()
        for file in (tmp_path / "hostile").glob("*/captions/*.parquet")
    ]
    rows = [row for table in tables for row in table]
    assert sorted(Path(row["uri"]).name for row in rows) == sorted(
        file.name for file in hostile.iterdir()
    )
    assert all(
        (row["status"] == "ok") == (row["caption"] is not None) == (row["error"] is None)
        for row in rows
    )
    assert sum(row["status"] == "ok" for row in rows) > 100


@pytest.mark.parametrize("share", [5, pytest.param(1, marks=pytest.mark.soak)])
def test_caption_says_something_of_each(
    folders: tuple[Path, Path], saved_model: Path, share: int
) -> None:
    """Of every fifth, as it reads images as batch does; of all, in make soak."""
    hostile, harmless = folders
    files = sorted(hostile.iterdir())[::share]
    given = ["--model", saved_model, "--max_new_tokens", 5, "--json"]
    rows = json.loads(run(["caption", "-f", harmless, *given], ["caption", "-f", *files, *given]))
    assert sorted(Path(row["uri"]).name for row in rows) == [file.name for file in files]
    assert all(("error" in row) != ("caption" in row) for row in rows)
