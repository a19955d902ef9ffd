"""MLflow as training and evaluation see it: a run that takes curves, parameters and tags, or nothing at all.

mlflow is imported only when a tracking server is named. The embedded default is SQLite beside the artifacts.

A pipeline run has one parent run, found by the tag `kfp.pipeline_run_id`, and under it a nested run for each candidate.
A Kubeflow Pipelines server (2.17) with its MLflow plugin makes both, and tells a step its own run as MLFLOW_RUN_ID;
otherwise the pipeline's first step makes the parent and each training its own.
"""

import importlib.util
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from model_lib import __version__, storage
from model_lib.errors import UserError

log = logging.getLogger(__name__)
EXPERIMENT = "captioner"
PIPELINE_RUN_TAG = "kfp.pipeline_run_id"
RUN_TAG = "captioner.run"
"""Tag by which a training run is found again."""
DONE_TAG = "captioner.done."
FROM_SECRET = "CAPTIONER_"
"""Before the names of MLflow's variables that a step's secret gives: a Kubeflow Pipelines server with its MLflow plugin
sets some of the plain names itself, and Kubernetes refuses a pod that has one twice."""


class Run:
    """A run being tracked; this one tracks nothing."""

    run_id: str | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a point to each metric's curve, at the latest when `flush` is called."""

    def flush(self) -> None:
        """Send all points, so that a kill from now on loses none of them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Close the run: finished, killed if the body was stopped, or failed if it raised."""


class Tracking:
    """Where runs are tracked; this one is nowhere."""

    def start(self, name: str, key: str | None, params: Mapping[str, Any], tags: Mapping[str, str]) -> Run:
        """Start the run `name`, or go on with the one that was started with the same `key`, if there is a key."""
        return Run()

    def add(self, run_id: str, metrics: Mapping[str, float], files: Mapping[str, bytes]) -> None:
        """Add final metrics and files (content by path) to a run that has ended."""

    def open_pipeline(self, name: str) -> None:
        """Make the pipeline run's own run, unless it is there."""

    def close_pipeline(self, succeeded: bool) -> str | None:
        """End the pipeline run's own run, and as failed those that its steps left open; return where to see it."""
        return None

    def parent(self) -> str | None:
        """Return the pipeline run's own run, or None if there is none."""
        return None

    def mark(self, step: str) -> None:
        """Leave a mark in the pipeline run's own run that the step is done."""

    def marks(self) -> set[str]:
        """Return the steps that are marked as done."""
        return set()

    def run_url(self, run_id: str) -> str | None:
        """Return the address at which people see a run, or None if there is none."""
        return None


NO_TRACKING = Tracking()


class _MlflowRun(Run):
    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self.waiting: list = []
        self.sent = time.monotonic()
        self.monitor: Any = None

    def __enter__(self) -> Self:
        if importlib.util.find_spec("psutil") is None:
            log.warning("the machine's load is not logged: pip install psutil")
            return self
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # else it warns that there is no GPU
        self.monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.client.tracking_uri)
        self.monitor.start()
        return self

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.waiting += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        if time.monotonic() - self.sent > 5:
            self.flush()

    def flush(self) -> None:
        for start in range(0, len(self.waiting), 500):  # a server takes at most 1,000 a call
            self.client.log_batch(self.run_id, metrics=self.waiting[start : start + 500])
        self.waiting, self.sent = [], time.monotonic()

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.flush()
        finally:
            if self.monitor is not None:
                self.monitor.finish()
        stopped = kind is not None and not issubclass(kind, Exception)
        self.client.set_terminated(self.run_id, "KILLED" if stopped else "FAILED" if kind else "FINISHED")


@dataclass(frozen=True)
class MlflowTracking(Tracking):
    """Runs on a tracking server; those of a pipeline's steps are nested under the pipeline's.

    Args:
        uri: of the tracking server.
        given_experiment_id: where new runs go, if a server said so.
        pipeline_run_id: Kubeflow's id of the pipeline run, or None outside of one.
        own_run_id: the MLflow run that was made for this step, or None.
    """

    uri: str
    given_experiment_id: str | None = None
    pipeline_run_id: str | None = None
    own_run_id: str | None = None

    @cached_property
    def experiment_id(self) -> str:
        """Where new runs go: asked for at first use, as of several processes only the one that logs may make it."""
        return self.given_experiment_id or _ensure_experiment(self.uri)

    def start(self, name: str, key: str | None, params: Mapping[str, Any], tags: Mapping[str, str]) -> Run:
        import mlflow

        client = mlflow.MlflowClient(self.uri)
        wanted = f"tags.`{RUN_TAG}` = '{key}'"
        found = client.search_runs([self.experiment_id], wanted, max_results=1) if key else []
        if found:
            run_id = str(found[0].info.run_id)
            client.update_run(run_id, status="RUNNING")
            if found[0].data.params:
                params = {}  # else it was killed before they were there
            self._describe(client, run_id, params, tags)
            return _MlflowRun(client, run_id)
        known = {RUN_TAG: key} if key else {}
        if self.own_run_id is not None:
            run_id = self.own_run_id
            client.update_run(run_id, name=name)
        else:
            parent = self.parent()
            nested = {"mlflow.parentRunId": parent} if parent else {}
            run_id = client.create_run(self.experiment_id, run_name=name, tags={**nested, **known}).info.run_id
        self._describe(client, run_id, params, {**known, **tags})
        return _MlflowRun(client, run_id)

    def _describe(self, client: Any, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        client.log_batch(
            run_id,
            params=[Param(name, str(value)[:6000]) for name, value in params.items()],
            tags=[RunTag(name, value) for name, value in {**code_version(), **tags}.items()],
        )

    def mark(self, step: str) -> None:
        import mlflow

        parent = self.parent()
        if parent is not None:
            mlflow.MlflowClient(self.uri).set_tag(parent, DONE_TAG + step, "true")

    def marks(self) -> set[str]:
        import mlflow

        parent = self.parent()
        tags = mlflow.MlflowClient(self.uri).get_run(parent).data.tags if parent else {}
        return {name.removeprefix(DONE_TAG) for name in tags if name.startswith(DONE_TAG)}

    def parent(self) -> str | None:
        import mlflow

        if self.pipeline_run_id is None:
            return None
        found = mlflow.MlflowClient(self.uri).search_runs(
            [self.experiment_id], f"tags.`{PIPELINE_RUN_TAG}` = '{self.pipeline_run_id}'", max_results=1
        )
        return str(found[0].info.run_id) if found else None

    def open_pipeline(self, name: str) -> None:
        import mlflow

        if self.pipeline_run_id is not None and self.parent() is None:
            tags = {PIPELINE_RUN_TAG: self.pipeline_run_id}
            mlflow.MlflowClient(self.uri).create_run(self.experiment_id, run_name=name, tags=tags)

    def close_pipeline(self, succeeded: bool) -> str | None:
        import mlflow

        parent = self.parent()
        if parent is None:
            return None
        client = mlflow.MlflowClient(self.uri)
        nested = client.search_runs([self.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
        for run in nested:
            if run.info.status == "RUNNING" and run.info.run_id != self.own_run_id:
                client.set_terminated(run.info.run_id, "FAILED")
        client.set_terminated(parent, "FINISHED" if succeeded else "FAILED")
        return self.run_url(parent)

    def run_url(self, run_id: str) -> str | None:
        base = os.environ.get("MLFLOW_UI_URL") or self.uri
        if not base.startswith("http"):
            return None
        return f"{base.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"

    def knows(self, run_id: str) -> bool:
        """Whether the server has the run and it was not deleted."""
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            return bool(mlflow.MlflowClient(self.uri).get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def add(self, run_id: str, metrics: Mapping[str, float], files: Mapping[str, bytes]) -> None:
        import mlflow

        client = mlflow.MlflowClient(self.uri)
        if not self.knows(run_id):
            log.warning("MLflow run %s is not at %s; its scores are not logged there", run_id, self.uri)
            return
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[mlflow.entities.Metric(k, float(v), now, 0) for k, v in metrics.items()])
        with tempfile.TemporaryDirectory() as scratch:
            for path, content in files.items():
                file = Path(scratch, Path(path).name)
                file.write_bytes(content)
                client.log_artifact(run_id, str(file), str(Path(path).parent))


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def code_version() -> dict[str, str]:
    """Return the tags that say which code runs: captioner's version, and its git commit where that is known.

    An image knows the commit that it was built from, a working copy its own, marked if files were changed.
    """
    tags = {"captioner.version": __version__}
    package = Path(__file__).parent
    if (package / "REVISION").exists():
        revision = (package / "REVISION").read_text().strip()
    else:
        try:
            _git(package, "ls-files", "--error-unmatch", "__init__.py")  # else the repository around is another's
            revision = _git(package, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
        except (OSError, subprocess.SubprocessError):
            revision = ""
    return tags | ({"mlflow.source.git.commit": revision} if revision else {})


def require_mlflow(tracking: Tracking) -> MlflowTracking:
    """Return `tracking` if there is a server behind it; `UserError` if mlflow is not installed."""
    if not isinstance(tracking, MlflowTracking):
        raise UserError("the model registry needs mlflow, which is not installed: pip install mlflow")
    return tracking


def embedded_uri(workdir: str) -> str:
    """Return the tracking URI of the SQLite store in `workdir`."""
    return f"sqlite:///{storage.absolute(workdir)}/mlflow.db"


def do_not_wait_long() -> None:
    """Let this process's calls to MLflow and to stores fail within half a minute. For steps that only ask or tell."""
    os.environ.update(MLFLOW_HTTP_REQUEST_TIMEOUT="10", MLFLOW_HTTP_REQUEST_MAX_RETRIES="2", CAPTIONER_PATIENCE="10")


def adopt_secret(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give MLflow's variables from a step's secret their plain names, unless the server set those."""
    for name, value in list(environment.items()):
        if name.startswith(f"{FROM_SECRET}MLFLOW_"):
            environment.setdefault(name.removeprefix(FROM_SECRET), value)


def tracking_from_environment(workdir: str = "runs") -> Tracking:
    """Return the tracking that the environment names, or the embedded one in `workdir`; none without mlflow.

    For the process edge. MLFLOW_TRACKING_URI says where; MLFLOW_EXPERIMENT_ID and MLFLOW_RUN_ID, which a Kubeflow
    Pipelines server can inject, name the experiment and the step's own run; KFP_RUN_ID is the pipeline run's id. The
    choice is left in the environment, so that `models:/…` sources are looked up in the same place.
    """
    if importlib.util.find_spec("mlflow") is None:
        return NO_TRACKING
    import mlflow  # noqa: F401  (sets its log's level, which is then set again)

    adopt_secret()
    for chatty in ("alembic", "mlflow"):  # notes on each table of a new store, on each new version
        logging.getLogger(chatty).setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is the command's own
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    uri = os.environ.setdefault("MLFLOW_TRACKING_URI", embedded_uri(workdir))
    if uri.startswith("sqlite:///") and not (file := Path(uri.removeprefix("sqlite:///"))).exists():
        _make_store(file)
    names = ("MLFLOW_EXPERIMENT_ID", "KFP_RUN_ID", "MLFLOW_RUN_ID")
    return MlflowTracking(uri, *(os.environ.get(name) or None for name in names))


def _make_store(file: Path) -> None:
    """Make an embedded store, whole or not at all: a kill among its tables' creation would leave it unusable."""
    from mlflow import MlflowClient

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=file.parent) as scratch:
        MlflowClient(f"sqlite:///{scratch}/mlflow.db").search_experiments(max_results=1)
        with suppress(FileExistsError):  # another process was first
            os.link(f"{scratch}/mlflow.db", file)


def _ensure_experiment(uri: str) -> str:
    """Return the id of the experiment `captioner`; an embedded store keeps its artifacts beside the database."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        return str(experiment.experiment_id)
    embedded = uri.startswith("sqlite:///")
    beside = f"{uri.removeprefix('sqlite:///').rpartition('/')[0]}/mlartifacts" if embedded else None
    try:
        return str(client.create_experiment(EXPERIMENT, artifact_location=beside))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        made = client.get_experiment_by_name(EXPERIMENT)  # another process was first
        assert made is not None
        return str(made.experiment_id)
