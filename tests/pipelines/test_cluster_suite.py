"""The tests of `make test-cluster`, against a server on loopback: what they print and find."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.kfp_server import KfpServer
from tests.helpers.kfp_work import WorkingKfpServer
from tests.helpers.services import mlflow_server

ROOT = Path(__file__).parents[2]


def suite(*options: str, **variables: str) -> str:
    """Run the tests for a cluster with these variables; return what they print."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    own = {f"CAPTIONER_CLUSTER_{name}": value for name, value in variables.items()}
    words = ("-vv", "-s", "-r", "pfsE", "--no-fold-skipped", "-m", "cluster")
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *words,
            "-p",
            "no:cacheprovider",
            *options,
            "tests/cluster",
        ],
        cwd=ROOT,
        env={**kept, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ).stdout


def outcomes(printed: str) -> dict[str, list[str]]:
    """Return the tests with each outcome, from the summary."""
    names: dict[str, list[str]] = {}
    summary = r"^(PASSED|FAILED|SKIPPED|ERROR) (?:\[1\] )?tests/\S+::(test_\w+)"
    for outcome, name in re.findall(summary, printed, re.MULTILINE):
        names.setdefault(outcome, []).append(name)
    return names


def test_without_a_server_all_are_skipped_and_say_what_they_need() -> None:
    printed = suite()
    assert set(outcomes(printed)) == {"SKIPPED"}
    assert "needs make test-cluster KFP=http://…" in printed


def test_without_a_bucket_what_needs_none_is_tested() -> None:
    reason = "captioner: error: /there/is/no/such/folder: not there"
    with KfpServer(states=("RUNNING", "FAILED"), message=reason) as server:
        printed = suite(KFP=server.host)
    tests = outcomes(printed)
    assert tests.keys() == {"PASSED", "SKIPPED"}, printed
    assert set(tests["PASSED"]) == {
        "test_the_pipeline_is_uploaded_as_a_version_named_after_its_content",
        "test_a_run_without_its_images_fails_in_preflight_and_says_why",
        "test_a_recurring_run_fires",
    }
    assert "needs make test-cluster KFP=… BUCKET=…" in printed
    assert not server.recurring and "waiting until a recurring run fires" in printed


@pytest.mark.soak
def test_a_server_that_runs_what_it_should_refuse_is_named() -> None:
    with KfpServer() as server:
        printed = suite("-k", "preflight", KFP=server.host)
    assert set(outcomes(printed)) == {"FAILED"}
    assert "test_a_run_without_its_images_fails_in_preflight_and_says_why" in printed


@pytest.mark.soak
def test_whole_runs_are_started_read_terminated_and_cleaned_up(tmp_path: Path) -> None:
    """All but the cache and the second machine, which the server on loopback has not."""
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    (tmp_path / "runs").mkdir()
    with (
        mlflow_server(tmp_path / "mlflow") as address,
        WorkingKfpServer(tmp_path / "runs", address) as server,
    ):
        variables = {"KFP": server.host, "BUCKET": str(bucket), "MLFLOW": address}
        printed = suite("-k", "not cache", **variables)
    tests = outcomes(printed)
    assert tests.keys() == {"PASSED", "SKIPPED"}, printed
    assert tests["SKIPPED"] == ["test_two_machines_train_one_candidate"]
    assert not list(bucket.iterdir()), "the session's folder is gone"
