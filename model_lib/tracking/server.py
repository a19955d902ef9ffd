"""Runs in MLflow: one for each pipeline run, and nested under it one for each candidate.

mlflow is imported only when a tracking server is named. The embedded default is SQLite beside the
artifacts.

A pipeline run has one parent run, found by the tag `kfp.pipeline_run_id`, and under it a nested run
for each candidate. A Kubeflow Pipelines server (2.17) with its MLflow plugin makes both, and tells
a step its own run as MLFLOW_RUN_ID; otherwise the pipeline's first step makes the parent and each
training its own.
"""

import functools
import importlib.util
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_lib.errors import UserError, printable
from model_lib.io import storage
from model_lib.tracking.errors import FAIL_FAST, find, mlflow_errors
from model_lib.tracking.mlflow_run import MlflowRun
from model_lib.tracking.models import LONGEST_DIGEST, NOTE_TAG, ensure_model, log_data
from model_lib.tracking.revision import VERSION_TAG, code_version
from model_lib.tracking.runs import NO_TRACKING, Run, RunData, Tags, Tracking, Values

log = logging.getLogger(__name__)
EXPERIMENT = "captioner"
PIPELINE_RUN_TAG = "kfp.pipeline_run_id"
RUN_URL_TAG = "kfp.pipeline_run_url"
PARENT_TAG = "mlflow.parentRunId"
RUN_TAG = "captioner.run"
"""Tag by which a training run is found again."""
NOTIFIED_TAG = "captioner.notified"
"""Tag of a pipeline's run: the outcome that its webhook has accepted."""
ENDED = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELED": "KILLED"}
"""The states in which a pipeline run is over, each with the status of its MLflow run."""
RunState = Callable[[str], str | None]
"""Returns the state of a pipeline run, given its id in Kubeflow, or None if Kubeflow does not know
it. Raises OSError if Kubeflow does not answer."""
MOST_RUNS = 50_000
"""Runs that a server lists at once."""
ABANDONED = 30
"""Days after which a pipeline's run that is still open is ended; a training takes 21 with all its
retries."""
UNFIT = "?#%'\""
"""Characters with a meaning in an SQLite address, or in the SQL that MLflow makes of it."""
FROM_SECRET = "CAPTIONER_"
"""Prefix of MLflow's variables from a step's secret: a Kubeflow Pipelines server with its MLflow
plugin sets some of the plain names itself, and Kubernetes refuses a pod that has one twice."""


@dataclass(frozen=True)
class MlflowTracking(Tracking):
    """Runs on a tracking server; those of a pipeline's steps are nested under the pipeline's.

    Args:
        uri: of the tracking server.
        given_experiment_id: of new runs, if the environment names it.
        experiment_name: of new runs otherwise.
        pipeline_run_id: Kubeflow's id of the pipeline run, or None outside of one.
        own_run_id: the MLflow run that was made for this step, or None.
    """

    uri: str
    given_experiment_id: str | None = None
    pipeline_run_id: str | None = None
    own_run_id: str | None = None
    experiment_name: str = EXPERIMENT

    @functools.cached_property
    def experiment_id(self) -> str:
        """The experiment of new runs: created at first use, which only the first of several
        processes makes."""
        if self.given_experiment_id is None:
            experiment = _ensure_experiment(self.uri, self.experiment_name)
        else:
            experiment = self.client.get_experiment(self.given_experiment_id)
        if experiment.lifecycle_stage == "deleted":
            remedy = "mlflow experiments restore --experiment-id"
            raise UserError(
                f"MLflow at {printable(self.uri)}: experiment {experiment.name} is deleted; "
                f"{remedy} {experiment.experiment_id} restores it, MLFLOW_EXPERIMENT_NAME names "
                "another"
            )
        return str(experiment.experiment_id)

    @property
    def client(self) -> Any:
        import mlflow

        return mlflow.MlflowClient(self.uri)

    def _search(self, condition: str) -> Any:
        """Return the runs that meet a condition, oldest first."""
        return self.client.search_runs(
            [self.experiment_id],
            condition,
            max_results=MOST_RUNS,
            order_by=["attributes.start_time"],
        )

    def require_answer(self) -> None:
        with mlflow_errors(self.uri):
            self.client.get_experiment(self.experiment_id)

    def start(
        self,
        name: str,
        key: str | None,
        params: Values,
        tags: Tags,
        folder: str,
        step: int = 0,
        data: RunData | None = None,
        model: str | None = None,
    ) -> Run:
        with mlflow_errors(self.uri):
            key_tag = {RUN_TAG: key} if key else {}
            pipeline_tags = self._pipeline_tags()
            tags = {**code_version("train"), **tags, **pipeline_tags, **key_tag}
            if key and (runs := self._search(f"tags.`{RUN_TAG}` = '{key}'")):
                run = runs[0]
                if run.data.params:  # else it was killed before they were logged
                    params = {}
                run_id, finished = run.info.run_id, run.info.status == "FINISHED"
            else:
                run_id = self.own_run_id or self._create_run(name, {**pipeline_tags, **key_tag})
                finished = False
                self.client.update_run(run_id, name=name)
            own = (run_id, params, tags, folder, step, finished, data, model)
            return MlflowRun(self.client, *own)

    def finished_run(self, name: str, key: str | None = None) -> str:
        if key and (runs := self._search(f"tags.`{RUN_TAG}` = '{key}'")):
            return str(runs[0].info.run_id)
        key_tag = {RUN_TAG: key} if key else {}
        tags = {**code_version("evaluate"), **self._pipeline_tags(), **key_tag}
        run_id = self._create_run(name, tags)
        self.client.set_terminated(run_id)
        return run_id

    def _create_run(self, name: str, tags: Tags) -> str:
        run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        return str(run.info.run_id)

    def _log(
        self, run_id: str, metrics: Mapping[str, float], tags: Tags, **measured: str | None
    ) -> None:
        """Log final metrics, and the tags that are not empty.

        Args:
            measured: model and data set of the metrics, as `Metric` takes them.
        """
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        points = [Metric(name, float(value), now, 0, **measured) for name, value in metrics.items()]
        run_tags = [RunTag(name, value) for name, value in tags.items() if value]
        self.client.log_batch(run_id, metrics=points, tags=run_tags)

    def knows(self, run_id: str) -> bool:
        """Return whether the server has the run and it was not deleted."""
        run = find(lambda: self.client.get_run(run_id))
        return run is not None and run.info.lifecycle_stage == "active"

    def add(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        tags: Tags,
        pages: Tags,
        data: RunData | None = None,
        model: str | None = None,
    ) -> None:
        if not self.knows(run_id):
            message = "MLflow run %s is not at %s; its scores are not logged there"
            log.warning(message, run_id, printable(self.uri))
            return
        measured: dict[str, str | None] = {}
        if data is not None:
            log_data(self.client, run_id, data)
            digest = data.digest[:LONGEST_DIGEST]
            measured = {"dataset_name": data.name, "dataset_digest": digest}
        if model is not None:
            measured["model_id"] = ensure_model(self.client, run_id, model)
        self._log(run_id, metrics, tags, **measured)
        for path, page in pages.items():
            self.client.log_text(run_id, page, path)

    def run_url(self, run_id: str) -> str | None:
        """Return the address at which people see a run; None of an embedded store."""
        base = os.environ.get("MLFLOW_UI_URL") or self.uri
        if not base.startswith("http"):
            return None
        base = re.sub("//[^/]*@", "//", base)  # a link is for everyone, and a password is not
        return f"{base.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"

    def pipeline_run(self) -> Any:
        """Return the pipeline run's own MLflow run, the oldest with its tag and no parent, or
        None."""
        if self.pipeline_run_id is None:
            return None
        runs = self._search(f"tags.`{PIPELINE_RUN_TAG}` = '{self.pipeline_run_id}'")
        return next((run for run in runs if PARENT_TAG not in run.data.tags), None)

    def _pipeline_tags(self) -> dict[str, str]:
        """Return the tags that a step's run has from the pipeline run's own."""
        run = self.pipeline_run()
        if run is None:
            return {}
        tags = {name: value for name, value in run.data.tags.items() if name.startswith("kfp.")}
        return {**tags, PARENT_TAG: str(run.info.run_id)}

    def open_pipeline(self, name: str, run_state: RunState | None = None) -> None:
        """Create the pipeline run's own run, unless it is there, and end those of pipeline runs
        that are over."""
        if self.pipeline_run_id is None:
            return
        run, version = self.pipeline_run(), code_version("pipeline")
        if run is None:
            self._create_run(name, {PIPELINE_RUN_TAG: self.pipeline_run_id, **version})
        else:
            link = {} if NOTE_TAG in run.data.tags else {NOTE_TAG: _link(run)}
            self._log(run.info.run_id, {}, {**version, **link})
        self._end_abandoned(run_state)

    def _end_abandoned(self, run_state: RunState | None) -> None:
        """End the MLflow runs of pipeline runs that are over: KFP's *Retry* runs no exit handler a
        second time.

        Where the state of a pipeline run is unknown, its runs are ended after `ABANDONED` days. If
        it is running all the same, its steps still end their runs as they would have.
        """
        oldest = int(time.time() * 1000) - ABANDONED * 24 * 3600 * 1000
        others = [
            run
            for run in self._search("attributes.status = 'RUNNING'")
            if run.data.tags.get(PIPELINE_RUN_TAG) not in (None, self.pipeline_run_id)
            and VERSION_TAG in run.data.tags
        ]
        states: dict[str, str | None] = {}
        if run_state is not None:
            with suppress(OSError):  # it does not answer: ask no more
                for pipeline in {run.data.tags[PIPELINE_RUN_TAG] for run in others}:
                    states[pipeline] = run_state(pipeline)
        for run in others:
            state = states.get(run.data.tags[PIPELINE_RUN_TAG])
            if state is None and run.info.start_time < oldest:
                state = "FAILED"
            if state not in ENDED:
                continue
            if PARENT_TAG in run.data.tags:
                self.client.set_terminated(run.info.run_id, "FAILED")
            else:
                self._close(run.info.run_id, ENDED[state])

    def conclude(
        self, metrics: Mapping[str, float], tags: Tags, note: str, winner: str | None = None
    ) -> None:
        """Add the outcome to the pipeline run's own run.

        Args:
            note: Markdown.
            winner: id of the run whose metrics they are; its data sets are the pipeline run's, too.
        """
        run = self.pipeline_run()
        if run is None:
            return
        self._log(run.info.run_id, metrics, {**tags, NOTE_TAG: _link(run) + note})
        if winner is not None and self.knows(winner):
            inputs = self.client.get_run(winner).inputs.dataset_inputs
            self.client.log_inputs(run.info.run_id, datasets=inputs)

    def close_pipeline(self, succeeded: bool) -> Any:
        """End the pipeline run's own run, and as failed those that its steps left open.

        Returns:
            Its MLflow run as it was before, or None if there is none.
        """
        run = self.pipeline_run()
        if run is not None:
            self._close(run.info.run_id, "FINISHED" if succeeded else "FAILED")
        return run

    def _close(self, parent: str, status: str) -> None:
        condition = f"tags.`{PARENT_TAG}` = '{parent}' and attributes.status = 'RUNNING'"
        for run in self._search(condition):
            if run.info.run_id != self.own_run_id:
                self.client.set_terminated(run.info.run_id, "FAILED")
        self.client.set_terminated(parent, status)


def _link(run: Any) -> str:
    """Return a Markdown link to a pipeline's run in Kubeflow Pipelines, if its address is known."""
    address = run.data.tags.get(RUN_URL_TAG)
    return f"[This run in Kubeflow Pipelines]({address})\n\n" if address else ""


def require_mlflow(tracking: Tracking) -> MlflowTracking:
    """Return `tracking` if there is a server behind it; `UserError` if mlflow is not installed."""
    if not isinstance(tracking, MlflowTracking):
        raise UserError(
            "the model registry needs mlflow, which is not installed: pip install mlflow"
        )
    return tracking


def embedded_uri(workdir: str) -> str:
    """Return the tracking URI of the SQLite store in `workdir`; `UserError` if MLflow cannot open
    one there."""
    folder = storage.absolute(workdir)
    if unfit := sorted(set(folder) & set(UNFIT)):
        raise UserError(
            f"{folder}: MLflow keeps no store under a path with {' '.join(unfit)}; set "
            "MLFLOW_TRACKING_URI"
        )
    return f"sqlite:///{folder}/mlflow.db"


def do_not_wait_long() -> None:
    """Let this process's calls to MLflow and to stores fail within half a minute: for steps that
    only check or notify."""
    os.environ.update(FAIL_FAST, CAPTIONER_RETRY_SECONDS="10")


def adopt_secret(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give MLflow's variables from a step's secret their plain names, unless the server set
    those."""
    for name, value in list(environment.items()):
        if name.startswith(f"{FROM_SECRET}MLFLOW_"):
            environment.setdefault(name.removeprefix(FROM_SECRET), value)


def tracking_from_environment(workdir: str = "runs") -> Tracking:
    """Return the tracking that the environment names, or the embedded one in `workdir`; none
    without mlflow.

    For the process edge. MLFLOW_TRACKING_URI names the server; MLFLOW_EXPERIMENT_ID and
    MLFLOW_RUN_ID, which a Kubeflow Pipelines server can inject, name the experiment and the step's
    own run; MLFLOW_EXPERIMENT_NAME names an experiment otherwise; KFP_RUN_ID is the pipeline run's
    id. The choice is left in the environment, so that `models:/…` sources are looked up in the same
    place.
    """
    if importlib.util.find_spec("mlflow") is None:
        return NO_TRACKING
    import mlflow  # noqa: F401  (sets its log's level, which is then set again)

    adopt_secret()
    for name in ("alembic", "mlflow"):  # notes on each table of a new store, on each new version
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns of each attempt; the last error is raised.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    # stdout is the command's own
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri(workdir)
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///")).absolute()  # a step's process may be elsewhere
        uri = f"sqlite:///{file}"
        if not file.exists():
            _make_store(file)
    require_scheme(uri)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    return MlflowTracking(
        uri,
        given_experiment_id=os.environ.get("MLFLOW_EXPERIMENT_ID") or None,
        pipeline_run_id=os.environ.get("KFP_RUN_ID") or None,
        own_run_id=os.environ.get("MLFLOW_RUN_ID") or None,
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT,
    )


def require_scheme(uri: str) -> None:
    """Raise `UserError` for a tracking URI without a scheme, which MLflow takes for a folder."""
    if "://" not in uri and not uri.startswith("databricks"):
        raise UserError(
            f"MLFLOW_TRACKING_URI {printable(uri)}: has no scheme; a server is http://HOST:PORT, a "
            "database in a file sqlite:///FILE"
        )


def _make_store(file: Path) -> None:
    """Create an embedded store, whole or not at all: one without all of its tables is unusable."""
    from mlflow import MlflowClient

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=file.parent) as scratch:
        MlflowClient(f"sqlite:///{scratch}/mlflow.db").search_experiments(max_results=1)
        with suppress(FileExistsError):  # another process was first
            os.link(f"{scratch}/mlflow.db", file)


def _ensure_experiment(uri: str, name: str) -> Any:
    """Return the experiment of this name, created if need be; an embedded store keeps its artifacts
    beside the database."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(uri)
    if (experiment := client.get_experiment_by_name(name)) is not None:
        return experiment
    artifacts = None
    if uri.startswith("sqlite:///"):
        artifacts = f"{Path(uri.removeprefix('sqlite:///')).parent}/mlartifacts"
    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _ensure_experiment(uri, name)  # another process was first
