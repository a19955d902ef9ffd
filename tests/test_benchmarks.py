"""Every benchmark runs on this code, on next to nothing, and ends with a line of JSON that has
ratios in it."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

SMALL = ["--preset", "tiny", "--device", "cpu", "--rounds", "1"]


def rows(document: object) -> Iterator[dict]:
    """Yield the objects in a document that compare something."""
    if isinstance(document, dict):
        if any("ratio" in key for key in document):
            yield document
        document = list(document.values())
    if isinstance(document, list):
        for one in document:
            yield from rows(one)


def ran(
    name: str, options: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [f"benchmarks.{name}", *options])
    importlib.import_module(f"benchmarks.{name}").main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(rows(document)), document


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("decode", [*SMALL, "--batches", "1"], marks=pytest.mark.soak),
        ("train", [*SMALL, "--images", "2"]),
        ("batch", [*SMALL[:4], "--images", "4", "--batch_size", "2"]),
        pytest.param("distributed", [*SMALL, "--images", "2"], marks=pytest.mark.soak),
    ],
    ids=["decode", "train", "batch", "distributed"],
)
def test_of_the_model(
    name: str, options: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran(name, options, capsys, monkeypatch)


def test_of_ingest(
    scenes: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--images_from", str(scenes / "train2017"), "--images", "8", "--rounds", "1"]
    ran("ingest", options, capsys, monkeypatch)


@pytest.mark.usefixtures("java")
@pytest.mark.soak
def test_of_scores(
    coco_eval: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = json.loads((coco_eval / "expected_scores.json").read_text())
    files = [f"--{name}={coco_eval / expected[name]}" for name in ("results", "annotations")]
    ran("scores", [*files, "--repeat", "1", "--rounds", "1"], capsys, monkeypatch)
