"""Every benchmark runs on tiny input, and ends with a line of JSON that has ratios."""

import importlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu

SMALL = ["--preset", "tiny", "--device", "cpu", "--rounds", "1"]
Benchmark = Callable[..., dict[str, Any]]


@pytest.fixture()
def benchmark(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    """Return a function that runs a benchmark by its name, with options."""

    def run(name: str, *options: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", [f"benchmarks.{name}", *options])
        importlib.import_module(f"benchmarks.{name}").main()
        last_line = capsys.readouterr().out.splitlines()[-1]
        assert "ratio" in last_line
        return json.loads(last_line)

    return run


@pytest.mark.soak
def test_distributed(benchmark: Benchmark) -> None:
    benchmark("distributed", *SMALL, "--images", "2")


def test_ingest(benchmark: Benchmark, scenes: Path) -> None:
    folder = str(scenes / "train2017")
    benchmark("ingest", "--images_from", folder, "--images", "8", "--rounds", "1")


@pytest.mark.soak
def test_serve(benchmark: Benchmark) -> None:
    benchmark("serve", *SMALL, "--images", "16", "--clients", "8")


@pytest.mark.soak
def test_plan(benchmark: Benchmark) -> None:
    benchmark("plan", "--objects", "45000", "--theirs", "3000", "--milliseconds", "0")


@pytest.mark.soak
def test_recipe(benchmark: Benchmark) -> None:
    numbers = {"seeds": 2, "pretrain": 32, "train": 32, "val": 8, "test": 8, "epochs": 1}
    benchmark("recipe", *(f"--{name}={number}" for name, number in numbers.items()))


@pytest.mark.usefixtures("java")
@pytest.mark.soak
def test_scores(benchmark: Benchmark, coco_eval: Path) -> None:
    names = json.loads((coco_eval / "expected_scores.json").read_text())
    files = [f"--{name}={coco_eval / names[name]}" for name in ("results", "annotations")]
    benchmark("scores", *files, "--repeat", "1", "--rounds", "1")


GPU = ["--preset", "tiny", "--device", "cpu"]


def test_every_part_for_a_gpu_is_tried_here(benchmark: Benchmark) -> None:
    """Those of decoding, training and batches among them."""
    others = [name for name in gpu.PARTS if name != "tests"]
    document = benchmark("gpu", *GPU, "--minutes", "9", "--parts", *others)
    assert list(document["parts"]) == others
    assert all(how.startswith("done") for how in document["parts"].values()), document["parts"]
    assert {row["part"] for row in document["results"]} == {*others} - {"profile"}


@pytest.mark.soak
def test_the_tests_for_a_gpu_are_skipped_here(benchmark: Benchmark) -> None:
    document = benchmark("gpu", *GPU, "--parts", "tests")
    assert document["results"][0]["ours"] == 0


def test_what_is_measured_is_printed_whatever_happens_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(_: gpu.Options) -> list[gpu.Row]:
        raise RuntimeError("no such kernel\nand more")

    def stop(_: gpu.Options) -> list[gpu.Row]:
        os.kill(os.getpid(), signal.SIGTERM)
        return []

    parts = {"fails": (fail, 1), "first": (lambda _: [gpu.row("a", "", "s", 1, 2)], 1)}
    parts |= {"late": (fail, 1000), "stops": (stop, 1), "last": (fail, 1)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--device", "cpu", "--minutes", "1"])
    assert stopped.value.code == 143
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["case"] for row in document["results"]] == ["a"]
    outcomes = document["parts"]
    assert outcomes.pop("first").startswith("done")
    assert outcomes == {
        "fails": "failed: RuntimeError: no such kernel",
        "late": "skipped: too little time is left",
    }
