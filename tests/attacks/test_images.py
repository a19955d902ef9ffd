"""Hostile image files through every stage that reads images: 100, and 500 in make soak."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.batches import read_output
from tests.helpers.hostile_images import corpus, encoded, image
from tests.helpers.warm_python import warm_python

SEED = 20_261_123
LIMIT = 600
"""Seconds after which a stage counts as hung."""
ALLOWED_MB = 1000
"""Memory that hostile images may cost more than harmless ones."""
STAGES = """
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
    """Run a stage on harmless images, then in the same process on hostile ones; return its output
    about these."""
    words = [[str(word) for word in arguments] for arguments in (harmless, hostile)]
    command = [warm_python(), "-c", STAGES, json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=os.environ)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if re.fullmatch(r"\[\d+, \d+\]", line)]
    (first_code, normal), (second_code, peak) = map(json.loads, lines)
    failed = 1 if hostile[0] == "caption" else 0
    assert (first_code, second_code) == (0, failed), done.stderr[-3000:]
    assert peak < normal + ALLOWED_MB
    return done.stdout.split("\0")[1]


@pytest.fixture(scope="module", params=[100, pytest.param(500, marks=pytest.mark.soak)])
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Hostile images, and harmless ones."""
    root, rng = tmp_path_factory.mktemp("attack"), np.random.default_rng(SEED)
    hostile, harmless = root / "hostile", root / "harmless"
    hostile.mkdir()
    harmless.mkdir()
    for name, content in corpus(SEED, request.param):
        (hostile / name).write_bytes(content)
    for number in range(30):
        (harmless / f"{number}.jpg").write_bytes(encoded(image(rng), "jpg"))
    return hostile, harmless


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_ingest_keeps_or_quarantines_each(folders: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = []
    for folder in folders:
        table = tmp_path / f"{folder.name}.jsonl"
        rows = [{"file": name, "caption": "something"} for name in names(folder)]
        table.write_text("\n".join(map(json.dumps, rows)))
        options = ["--annotations", table, "--images", folder, "--split", "train"]
        arguments.append(["ingest", *options, "--output", tmp_path / folder.name])
    run(arguments[1], arguments[0])
    shards = (tmp_path / "hostile").glob("train-*")
    kept = [name for file in shards for name in pq.read_table(file)["file_name"].to_pylist()]
    left_out = pq.read_table(tmp_path / "hostile" / "quarantine.parquet")["file_name"].to_pylist()
    assert sorted([*kept, *left_out]) == names(folders[0])
    assert min(len(kept), len(left_out)) > 20


def test_batch_has_a_row_for_each(
    folders: tuple[Path, Path], saved_model: Path, tmp_path: Path
) -> None:
    options = ["--model", saved_model, "--max_new_tokens", 5]
    hostile, harmless = (
        ["batch", "--images", folder, "--output", tmp_path / folder.name, *options]
        for folder in folders
    )
    run(harmless, hostile)
    rows = read_output(f"{tmp_path}/hostile")
    assert sorted(Path(row["uri"]).name for row in rows) == names(folders[0])
    for row in rows:
        assert (row["status"] == "ok") == (row["caption"] is not None) == (row["error"] is None)
    assert sum(row["status"] == "ok" for row in rows) > 20


def test_caption_has_an_answer_for_each(folders: tuple[Path, Path], saved_model: Path) -> None:
    hostile, harmless = folders
    files = sorted(hostile.iterdir())
    options = ["--model", saved_model, "--max_new_tokens", 5, "--json"]
    output = run(["caption", "-f", harmless, *options], ["caption", "-f", *files, *options])
    rows = json.loads(output)
    assert sorted(Path(row["uri"]).name for row in rows) == names(hostile)
    assert not [row for row in rows if ("error" in row) == ("caption" in row)]
