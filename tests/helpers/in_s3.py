"""Compiled pipelines as scheduled runs: without a name, everything in S3, MLflow's files too."""

import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import mlflow
import pytest
from kfp import components

from pipelines.local import run_locally
from pipelines.submit import COMPILED
from tests.helpers.kfp_server import take_output
from tests.helpers.services import mlflow_server, put_folder, store, webhook
from tests.helpers.warm_python import warm_python

NAME = "'{{$.pipeline_job_name}}'"
WORKFLOW = "nightly-x7k2p-1-3056141721"


@dataclass
class Cloud:
    """A bucket of S3 with the scenes in it, an MLflow server, and a webhook."""

    fs: fsspec.AbstractFileSystem
    mlflow: str
    notifications: list[dict]
    """What the webhook got."""
    work: Path

    def run(self, name: str, arguments: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Run a compiled pipeline; return its folder, and each step's output as Kubeflow Pipelines
        takes it."""
        text = (COMPILED / f"{name}.yaml").read_text()
        assert f"constant: {NAME}" in text
        pipeline = components.load_component_from_text(text.replace(NAME, "''"))
        root = run_locally(pipeline, arguments, self.work, "subprocess")
        files = root.rglob("executor_output.json")
        return root, {file.parent.name: take_output(file.read_text(), str(root)) for file in files}

    def runs(self) -> dict[str, str]:
        """Return the status of each run in MLflow."""
        client = mlflow.MlflowClient(self.mlflow)
        runs = client.search_runs([client.get_experiment_by_name("captioner").experiment_id])
        return {str(run.info.run_name): str(run.info.status) for run in runs}


@contextmanager
def cloud(scenes: Path, work: Path) -> Iterator[Cloud]:
    """Yield the services of a run, with their addresses in the environment."""
    with (
        store("s3", "bucket", work / "s3") as fs,
        mlflow_server(work / "mlflow", artifacts="s3://bucket/mlflow") as server,
        webhook() as (address, notifications),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "executable", warm_python())  # with which kfp starts steps
        variables = {"CAPTIONER_MLFLOW_TRACKING_URI": server, "WEBHOOK_URL": address}
        variables |= {"KFP_RUN_ID": str(uuid.uuid4()), "KFP_WORKFLOW": WORKFLOW}
        variables["XDG_CACHE_HOME"] = str(work / "cache")
        for name, value in variables.items():
            patch.setenv(name, value)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            patch.delenv(name, raising=False)
        put_folder(fs, scenes, "bucket/scenes")
        yield Cloud(fs, server, notifications, work)
