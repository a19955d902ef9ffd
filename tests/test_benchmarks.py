"""Every benchmark runs on tiny input, and ends with a line of JSON that has ratios."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = ["--preset", "tiny", "--device", "cpu", "--rounds", "1"]
Benchmark = Callable[..., None]


@pytest.fixture()
def benchmark(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    """Return a function that runs a benchmark by its name, with options."""

    def run(name: str, *options: str) -> None:
        monkeypatch.setattr("sys.argv", [f"benchmarks.{name}", *options])
        importlib.import_module(f"benchmarks.{name}").main()
        last_line = capsys.readouterr().out.splitlines()[-1]
        assert json.loads(last_line)
        assert "ratio" in last_line

    return run


@pytest.mark.soak
def test_decode(benchmark: Benchmark) -> None:
    benchmark("decode", *SMALL, "--batches", "1")


def test_train(benchmark: Benchmark) -> None:
    benchmark("train", *SMALL, "--images", "2")


def test_batch(benchmark: Benchmark) -> None:
    benchmark("batch", "--preset", "tiny", "--device", "cpu", "--images", "4", "--batch_size", "2")


@pytest.mark.soak
def test_distributed(benchmark: Benchmark) -> None:
    benchmark("distributed", *SMALL, "--images", "2")


def test_ingest(benchmark: Benchmark, scenes: Path) -> None:
    folder = str(scenes / "train2017")
    benchmark("ingest", "--images_from", folder, "--images", "8", "--rounds", "1")


@pytest.mark.soak
def test_plan(benchmark: Benchmark) -> None:
    benchmark("plan", "--objects", "45000", "--theirs", "3000", "--milliseconds", "0")


@pytest.mark.usefixtures("java")
@pytest.mark.soak
def test_scores(benchmark: Benchmark, coco_eval: Path) -> None:
    names = json.loads((coco_eval / "expected_scores.json").read_text())
    files = [f"--{name}={coco_eval / names[name]}" for name in ("results", "annotations")]
    benchmark("scores", *files, "--repeat", "1", "--rounds", "1")
