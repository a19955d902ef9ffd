"""The cluster that the environment names, and the runs that the tests share.

`make test-cluster KFP=…` sets the variables. Each run is started by `captioner submit`, whose lines
show where it is.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from model_lib.ingest.config import ScenesConfig
from model_lib.ingest.scenes import make_scenes
from model_lib.io import storage

T = TypeVar("T")
MINUTES = 20.0
"""In which a run must end, unless CAPTIONER_CLUSTER_MINUTES says otherwise."""
NO_GPU = {"gpu_count": "0", "gpu_node_selector": {}, "gpu_tolerations": []}
TRAIN_IMAGES, VAL_IMAGES = 96, 24


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def variable(name: str, option: str) -> str:
    """Return an environment variable of the tests; without it the test is skipped."""
    value = os.environ.get(f"CAPTIONER_CLUSTER_{name}", "")
    if not value:
        pytest.skip(f"needs make test-cluster {option}")
    return value.rstrip("/")


def wait_until(what: str, look: Callable[[], T | None]) -> T:
    """Return what `look` returns as soon as it is not None; fail after `MINUTES`."""
    minutes = float(os.environ.get("CAPTIONER_CLUSTER_MINUTES", MINUTES))
    deadline = time.monotonic() + 60 * minutes
    say(f"waiting until {what}")
    while (value := look()) is None:
        assert time.monotonic() < deadline, f"not within {minutes:g} minutes: {what}"
        time.sleep(2)
    return value


@dataclass(frozen=True)
class Cluster:
    """A Kubeflow Pipelines server, and a name that is this session's own."""

    host: str
    session: str
    client: Any
    """kfp's."""

    def submit(self, pipeline: str, *options: str, **parameters: Any) -> dict[str, Any]:
        """Start a run; return what `captioner submit --json` printed."""
        return self._captioner("submit", pipeline, options, parameters)

    def schedule(self, pipeline: str, *options: str, **parameters: Any) -> dict[str, Any]:
        return self._captioner("schedule", pipeline, options, parameters)

    def _captioner(
        self, command: str, pipeline: str, options: tuple[str, ...], parameters: dict[str, Any]
    ) -> dict[str, Any]:
        texts = [
            f"--param={name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in {**parameters, **NO_GPU}.items()
        ]
        server = ("--host", self.host, "--pipeline", pipeline, "--experiment", self.session)
        words = [sys.executable, "-m", "model_lib", command, *server, *options, *texts, "--json"]
        process = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout, f"captioner {command} ended with {process.returncode}; see above"
        return dict(json.loads(process.stdout))

    def tasks(self, run_id: str) -> list[Any]:
        details = self.client.get_run(run_id).run_details
        return list((details.task_details if details else None) or [])


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    import kfp

    host = variable("KFP", "KFP=http://…")
    session = f"captioner-test-{uuid.uuid4().hex[:8]}"
    say(f"\n{host}: experiment {session}")
    client = kfp.Client(host, existing_token=os.environ.get("KFP_TOKEN"))
    return Cluster(host, session, client)


@pytest.fixture(scope="session")
def folder(cluster: Cluster) -> Iterator[str]:
    """A folder of this session in the bucket, with generated scenes; it is removed at the end."""
    folder = storage.join(variable("BUCKET", "KFP=… BUCKET=…"), cluster.session)
    with tempfile.TemporaryDirectory() as scratch:
        make_scenes(ScenesConfig(output=scratch, train=TRAIN_IMAGES, val=VAL_IMAGES, size=64))
        storage.upload_folder(scratch, storage.join(folder, "scenes"))
    yield folder
    filesystem, path = storage.filesystem(folder)
    filesystem.rm(path, recursive=True)


@pytest.fixture(scope="session")
def mlflow_runs() -> Callable[[str], dict[str, Any]]:
    """A function that returns the MLflow runs of a pipeline run, by name; its own is ""."""
    import mlflow

    client = mlflow.MlflowClient(variable("MLFLOW", "KFP=… MLFLOW=http://…"))

    def runs_of(run_id: str) -> dict[str, Any]:
        experiments = [row.experiment_id for row in client.search_experiments()]
        runs = client.search_runs(experiments, f"tags.`kfp.pipeline_run_id` = '{run_id}'")
        nested = "mlflow.parentRunId"
        return {run.info.run_name if nested in run.data.tags else "": run for run in runs}

    return runs_of


@pytest.fixture(scope="session")
def training(folder: str) -> dict[str, Any]:
    """The parameters of a small training."""
    return {
        "data": storage.join(folder, "scenes"),
        "output": storage.join(folder, "work"),
        "preset": "tiny",
        "candidates": [{"name": "small"}],
        "train_options": {"epochs": 1},
        "eval_options": {"num_beams": 1},
        "register_options": {"min_gain": 1e6},  # a champion of the user's own stays
    }


@pytest.fixture(scope="session")
def trained(cluster: Cluster, training: dict[str, Any]) -> dict[str, Any]:
    say("train_captioner, one candidate")
    return cluster.submit("train_captioner", "--wait", **training)


@pytest.fixture(scope="session")
def compiled() -> Path:
    return Path(__file__).parents[2] / "pipelines" / "compiled"
