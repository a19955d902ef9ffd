"""Runs in MLflow: one for each pipeline run, and nested under it one for each candidate.

mlflow is imported only when a tracking server is named. The embedded default is SQLite beside the
artifacts.

A pipeline run has one parent run, found by the tag `kfp.pipeline_run_id`, and under it a nested run
for each candidate. A Kubeflow Pipelines server (2.17) with its MLflow plugin makes both, and tells
a step its own run as MLFLOW_RUN_ID; otherwise the pipeline's first step makes the parent and each
training its own.
"""

import importlib.util
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from model_lib.errors import UserError, first_line, printable
from model_lib.io import storage
from model_lib.tracking.mlflow_run import MlflowRun, asked, failing_fast
from model_lib.tracking.revision import VERSION_TAG, code_version
from model_lib.tracking.runs import NO_TRACKING, Run, RunState, Tracking, unknown_state

log = logging.getLogger(__name__)
EXPERIMENT = "captioner"
PIPELINE_RUN_TAG = "kfp.pipeline_run_id"
RUN_URL_TAG = "kfp.pipeline_run_url"
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
"""What MLflow shows as a run's description."""
RUN_TAG = "captioner.run"
"""Tag by which a training run is found again."""
NOTIFIED_TAG = "captioner.notified"
"""Tag of a pipeline's run: the outcome that its webhook has taken."""
CURVES = ("train_loss", "val_loss", "train_slice_CIDEr", "val_slice_CIDEr", "learning_rate")
"""Metrics of training that a report draws."""
ENDED = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELED": "KILLED"}
"""The states in which a pipeline run is over, each with the status of its MLflow run."""
PAGE = 1000
"""Runs asked for at once; a server gives no more than 50,000."""
ABANDONED = 30
"""Days after which a pipeline's run that is still open is taken for dead; a training takes 21 with
all its retries."""
UNFIT = "?#%'\""
"""Characters that mean something else in an SQLite address, or in the SQL that MLflow makes of
it."""
FROM_SECRET = "CAPTIONER_"
"""Before the names of MLflow's variables that a step's secret gives: a Kubeflow Pipelines server
with its MLflow plugin sets some of the plain names itself, and Kubernetes refuses a pod that has
one twice."""


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
        """Where new runs go: asked for at first use, as of several processes only the one that logs
        may make it."""
        return self.given_experiment_id or _ensure_experiment(self.uri)

    @property
    def client(self) -> Any:
        import mlflow

        return mlflow.MlflowClient(self.uri)

    def _search(self, wanted: str) -> Iterator[Any]:
        """Yield the runs that a filter finds, oldest first, however many."""
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id],
                wanted,
                max_results=PAGE,
                order_by=["attributes.start_time"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def require_answer(self) -> None:
        asked(self.uri, lambda: self.client.get_experiment(self.experiment_id))

    def start(
        self,
        name: str,
        key: str | None,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        folder: str | None = None,
        step: int = 0,
    ) -> Run:
        return asked(self.uri, lambda: self._start(name, key, params, tags))

    def _start(
        self, name: str, key: str | None, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> Run:
        client, above = self.client, self._above()
        place = {} if above is None else _kfp_tags(above)
        known = {RUN_TAG: key} if key else {}
        described = {**code_version(), **tags, **place, **known}
        nested = {} if above is None else {PARENT_TAG: str(above.info.run_id)}
        found = next(self._search(f"tags.`{RUN_TAG}` = '{key}'"), None) if key else None
        if found is not None:
            if found.data.params:
                params = {}  # else it was killed before they were there
            finished = found.info.status == "FINISHED"
            return MlflowRun(
                client, str(found.info.run_id), params, {**described, **nested}, finished
            )
        if self.own_run_id is not None:
            run_id = self.own_run_id
            client.update_run(run_id, name=name)
        else:
            created = client.create_run(
                self.experiment_id, run_name=name, tags={**nested, **place, **known}
            )
            run_id = str(created.info.run_id)
        return MlflowRun(client, run_id, params, described)

    def succeeded(self) -> bool:
        above = self._above()
        return above is not None and above.info.status == "FINISHED"

    def notified(self) -> str | None:
        above = self._above()
        return None if above is None else above.data.tags.get(NOTIFIED_TAG)

    def set_notified(self, state: str) -> None:
        parent = self.parent()
        if parent is not None:
            self.client.set_tag(parent, NOTIFIED_TAG, state)

    def _above(self) -> Any:
        """Return the pipeline run's own run, which is the oldest with its tag and no parent, or
        None."""
        if self.pipeline_run_id is None:
            return None
        found = self._search(f"tags.`{PIPELINE_RUN_TAG}` = '{self.pipeline_run_id}'")
        return next((run for run in found if PARENT_TAG not in run.data.tags), None)

    def parent(self) -> str | None:
        above = self._above()
        return None if above is None else str(above.info.run_id)

    def open_pipeline(self, name: str, run_state: RunState = unknown_state) -> None:
        if self.pipeline_run_id is None:
            return
        above = self._above()
        if above is None:
            tags = {PIPELINE_RUN_TAG: self.pipeline_run_id, **code_version()}
            self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        else:
            link = {} if NOTE_TAG in above.data.tags else {NOTE_TAG: _link(above)}
            self._tag(above, {**code_version(), **link})
        self._end_abandoned(run_state)

    def _end_abandoned(self, run_state: RunState) -> None:
        """End the MLflow runs of pipeline runs that are over: KFP's *Retry* runs no exit handler a
        second time.

        Where the state of a pipeline run is unknown, its runs are ended after a time that none
        lives. That does no harm to one that lives all the same: its steps end their runs as they
        would have.
        """
        before = int(time.time() * 1000) - ABANDONED * 24 * 3600 * 1000
        for run in list(self._search("attributes.status = 'RUNNING'")):
            tags, run_id = run.data.tags, str(run.info.run_id)
            if (
                not {PIPELINE_RUN_TAG, VERSION_TAG} <= tags.keys()
                or tags[PIPELINE_RUN_TAG] == self.pipeline_run_id
            ):
                continue
            state = run_state(tags[PIPELINE_RUN_TAG])
            if state not in ENDED and (state is not None or run.info.start_time >= before):
                continue
            if PARENT_TAG in tags:
                self.client.set_terminated(run_id, "FAILED")
            else:
                self._close(run_id, ENDED.get(str(state), "FAILED"))

    def conclude(self, metrics: Mapping[str, float], tags: Mapping[str, str], note: str) -> None:
        above = self._above()
        if above is not None:
            self._tag(above, {**tags, NOTE_TAG: _link(above) + note})
            self._log_final(str(above.info.run_id), metrics)

    def _tag(self, run: Any, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(
            run.info.run_id, tags=[RunTag(k, v[:5000]) for k, v in tags.items() if v]
        )

    def _log_final(self, run_id: str, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(
            run_id, metrics=[Metric(name, float(v), now, 0) for name, v in metrics.items()]
        )

    def close_pipeline(self, succeeded: bool) -> str | None:
        parent = self.parent()
        if parent is None:
            return None
        self._close(parent, "FINISHED" if succeeded else "FAILED")
        return self.run_url(parent)

    def _close(self, parent: str, status: str) -> None:
        # A list: pages are counted from the first run that is still open.
        left_open = list(
            self._search(f"tags.`{PARENT_TAG}` = '{parent}' and attributes.status = 'RUNNING'")
        )
        for run in left_open:
            if run.info.run_id != self.own_run_id:
                self.client.set_terminated(run.info.run_id, "FAILED")
        self.client.set_terminated(parent, status)

    def run_url(self, run_id: str) -> str | None:
        base = os.environ.get("MLFLOW_UI_URL") or self.uri
        if not base.startswith("http"):
            return None
        base = re.sub("//[^/]*@", "//", base)  # a link is for everyone, and a password is not
        return f"{base.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"

    def knows(self, run_id: str) -> bool:
        """Whether the server has the run and it was not deleted."""
        return self._known(run_id) is not None

    def _known(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def add(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        files: Mapping[str, bytes],
    ) -> None:
        run = self._known(run_id)
        if run is None:
            log.warning(
                "MLflow run %s is not at %s; its scores are not logged there",
                run_id,
                printable(self.uri),
            )
            return
        self._log_final(run_id, metrics)
        self._tag(run, tags)
        with tempfile.TemporaryDirectory() as scratch:
            for path, content in files.items():
                file = Path(scratch, Path(path).name)
                file.write_bytes(content)
                self.client.log_artifact(run_id, str(file), str(Path(path).parent))

    def curves(self, run_id: str) -> dict[str, list[tuple[int, float]]]:
        from mlflow.exceptions import MlflowException

        try:
            with failing_fast():
                if not self.knows(run_id):
                    return {}
                known = self.client.get_run(run_id).data.metrics
                found = {
                    name: self.client.get_metric_history(run_id, name)
                    for name in CURVES
                    if name in known
                }
        except (
            MlflowException
        ) as error:  # the curves are an extra: nothing is evaluated again for want of them
            where, why = printable(self.uri), printable(first_line(error))
            log.warning(
                "the curves of MLflow run %s cannot be read from %s: %s", run_id, where, why
            )
            return {}
        # A resumed training logs some steps again: the last word counts.
        latest = {
            name: sorted(points, key=lambda point: point.timestamp)
            for name, points in found.items()
        }
        return {
            name: sorted({one.step: one.value for one in points}.items())
            for name, points in latest.items()
        }


def _kfp_tags(run: Any) -> dict[str, str]:
    """Return the tags that say which pipeline run this is; nested runs carry them as well."""
    return {name: value for name, value in run.data.tags.items() if name.startswith("kfp.")}


def _link(run: Any) -> str:
    """Return Markdown that leads from a pipeline's run in MLflow to the one in Kubeflow Pipelines,
    if that is known."""
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
    """Let this process's calls to MLflow and to stores fail within half a minute. For steps that
    only ask or tell."""
    os.environ.update(
        MLFLOW_HTTP_REQUEST_TIMEOUT="10",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="2",
        CAPTIONER_RETRY_SECONDS="10",
    )


def adopt_secret(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give MLflow's variables from a step's secret their plain names, unless the server set
    those."""
    for name, value in list(environment.items()):
        if name.startswith(f"{FROM_SECRET}MLFLOW_"):
            environment.setdefault(name.removeprefix(FROM_SECRET), value)


def tracking_from_environment(workdir: str = "runs") -> Tracking:
    """Return the tracking that the environment names, or the embedded one in `workdir`; none
    without mlflow.

    For the process edge. MLFLOW_TRACKING_URI says where; MLFLOW_EXPERIMENT_ID and MLFLOW_RUN_ID,
    which a Kubeflow Pipelines server can inject, name the experiment and the step's own run;
    KFP_RUN_ID is the pipeline run's id. The choice is left in the environment, so that `models:/…`
    sources are looked up in the same place.
    """
    if importlib.util.find_spec("mlflow") is None:
        return NO_TRACKING
    import mlflow  # noqa: F401  (sets its log's level, which is then set again)

    adopt_secret()
    for chatty in ("alembic", "mlflow"):  # notes on each table of a new store, on each new version
        logging.getLogger(chatty).setLevel(logging.WARNING)
    os.environ.setdefault(
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"
    )  # stdout is the command's own
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri(workdir)
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///")).absolute()  # a step's process may be elsewhere
        uri = f"sqlite:///{file}"
        if not file.exists():
            _make_store(file)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    names = ("MLFLOW_EXPERIMENT_ID", "KFP_RUN_ID", "MLFLOW_RUN_ID")
    return MlflowTracking(uri, *(os.environ.get(name) or None for name in names))


def _make_store(file: Path) -> None:
    """Make an embedded store, whole or not at all: a kill among its tables' creation would leave it
    unusable."""
    from mlflow import MlflowClient

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=file.parent) as scratch:
        MlflowClient(f"sqlite:///{scratch}/mlflow.db").search_experiments(max_results=1)
        with suppress(FileExistsError):  # another process was first
            os.link(f"{scratch}/mlflow.db", file)


def _ensure_experiment(uri: str) -> str:
    """Return the id of the experiment `captioner`; an embedded store keeps its artifacts beside the
    database."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(uri)
    if (experiment := client.get_experiment_by_name(EXPERIMENT)) is not None:
        return str(experiment.experiment_id)
    embedded = uri.startswith("sqlite:///")
    beside = (
        f"{uri.removeprefix('sqlite:///').rpartition('/')[0]}/mlartifacts" if embedded else None
    )
    try:
        return str(client.create_experiment(EXPERIMENT, artifact_location=beside))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _ensure_experiment(uri)  # another process was first
