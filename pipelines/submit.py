"""`captioner submit` and `captioner schedule`: runs of a compiled pipeline on a Kubeflow Pipelines
server.

The YAML in `compiled/` becomes a version of the server's pipeline of that name, named after its
content, unless the server has that version. Then a run of it is started or scheduled.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from model_lib import __version__
from model_lib.cli import Output
from model_lib.errors import UserError, WorkError, first_line
from model_lib.io.errors import is_transient
from model_lib.io.validation import parse
from model_lib.options import StageConfig, option, require
from pipelines.checks import check
from pipelines.following import follow
from pipelines.local import say

log = logging.getLogger(__name__)
COMPILED = Path(__file__).parent / "compiled"
READERS: dict[str, Callable[[str], Any]] = {
    "STRING": str,
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": float,
    "BOOLEAN": partial(parse, bool),
    "LIST": partial(parse, list),
    "STRUCT": partial(parse, dict),
}
"""From the text of a parameter to its value; `ValueError` if it has another type."""
TIMEOUT = 15
"""Seconds in which a server must answer that it is there."""


@dataclass(frozen=True, kw_only=True)
class _ServerConfig(StageConfig):
    host: str = option()
    """The server's address: https://kfp.example.com, or http://localhost:8080 through kubectl
    port-forward."""
    pipeline: Literal["train_captioner", "caption_bucket"] = option()
    """Which pipeline."""
    param: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A parameter of the pipeline as NAME=VALUE; lists and objects as JSON. Once for each
    parameter."""
    experiment: str = "captioner"
    """Experiment of the server; created if it does not exist."""
    auth: Literal["auto", "token", "iap", "cluster"] = "auto"
    """auto: KFP_TOKEN if it is set, else what kfp is configured for; token: KFP_TOKEN; iap:
    Google's Identity-Aware Proxy, with --client_id; cluster: the service account of the pod that
    this runs in."""
    client_id: str | None = None
    """OAuth client of the Identity-Aware Proxy."""
    namespace: str = "kubeflow"
    """Namespace of the server, or the user's own where each has one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.auth == "iap":
            require(self.client_id is not None, "auth iap: needs --client_id, an OAuth client")
        if self.auth == "token":
            has_token = bool(os.environ.get("KFP_TOKEN"))
            require(has_token, "auth token: set KFP_TOKEN in the environment")
        is_address = self.host.startswith(("http://", "https://"))
        require(is_address, f"host {self.host}: does not begin with http:// or https://")
        self.arguments()

    def arguments(self) -> dict[str, Any]:
        """Return the run's typed parameters; `UserError` for a wrong, unknown or missing one."""
        inputs = pipeline_inputs(self.pipeline)
        values: dict[str, Any] = {}
        for text in self.param:
            name, equals, value = text.partition("=")
            require(equals == "=", f"param {text}: is not NAME=VALUE")
            known = f"{self.pipeline} has {', '.join(inputs)}"
            require(name in inputs, f"param {name}: unknown; {known}")
            kind = inputs[name]["parameterType"]
            try:
                values[name] = READERS[kind](value)
            except ValueError:
                form = kind.lower().replace("_", " ")
                message = f"param {name}: {value} is not a value of type {form}"
                raise UserError(message) from None
        # Every step's driver would fail, without a reason.
        remedy = "is empty; name a Kubernetes secret, which need not exist"
        require(values.get("secret_name") != "", f"param secret_name: {remedy}")
        required = [name for name, about in inputs.items() if not about.get("isOptional")]
        missing = [f"--param {name}=…" for name in required if name not in values]
        require(not missing, f"{self.pipeline}: needs {', '.join(missing)}")
        defaults = {name: about.get("defaultValue") for name, about in inputs.items()}
        check(self.pipeline, defaults | values)
        return values


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(_ServerConfig):
    """Start a run of a pipeline on a Kubeflow Pipelines server, uploading the pipeline if its
    content is new."""

    run_name: str | None = None
    """Name of the run; by default the pipeline's and the time."""
    wait: bool = False
    """Follow the run to its end; exit code 1 if it fails."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(_ServerConfig):
    """Let a Kubeflow Pipelines server start runs of a pipeline again and again."""

    name: str = option()
    """Name of the recurring run."""
    cron: str | None = None
    """When: five fields, or six with the seconds first, in UTC: "0 3 * * *" …"""
    every: int | None = option(None, minimum=60)
    """… or seconds between two runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require((self.cron is None) != (self.every is None), "give either --cron or --every")
        message = f"cron {self.cron!r}: expected five fields, or six, seconds first"
        require(self.cron is None or len(self.cron.split()) in (5, 6), message)


@functools.cache
def _spec(file: Path) -> dict[str, Any]:
    import yaml

    return dict(next(yaml.safe_load_all(file.read_text())))


def pipeline_inputs(pipeline: str) -> dict[str, dict[str, Any]]:
    """Return the compiled pipeline's parameters, each with its type and whether it is optional."""
    spec = _spec(COMPILED / f"{pipeline}.yaml")
    return dict(spec["root"]["inputDefinitions"]["parameters"])


def _step_names(pipeline: str) -> dict[str, str]:
    """Return the display name of each task that runs a container."""
    spec = _spec(COMPILED / f"{pipeline}.yaml")
    components = spec["components"]
    dags = [spec["root"]["dag"], *(c["dag"] for c in components.values() if "dag" in c)]
    return {
        name: task["taskInfo"]["name"]
        for dag in dags
        for name, task in dag["tasks"].items()
        if "executorLabel" in components[task["componentRef"]["name"]]
    }


def submit(config: SubmitConfig) -> Output:
    """Upload the pipeline if its content is new, and start a run."""
    name = config.run_name or f"{config.pipeline} {datetime.now():%Y-%m-%d %H:%M:%S}"
    with _server(config) as client:
        version, options = _prepare(client, config)
        run_id = client.run_pipeline(job_name=name, **options).run_id
        link = f"{config.host.rstrip('/')}/#/runs/details/{run_id}"
        document = {"run_id": run_id, "name": name, "version": version, "link": link}
        line = f"{name}, {config.pipeline} {version}: {link}"
        if not config.wait:
            return Output(document, [line])
        say(line)
        state, reason = follow(client, run_id, _step_names(config.pipeline))
    line = f"{state.lower()}: {link}" + (f": {reason}" if reason else "")
    code = 0 if state == "SUCCEEDED" else 1
    return Output({**document, "state": state, "error": reason}, [line], code)


def schedule(config: ScheduleConfig) -> Output:
    """Upload the pipeline if its content is new, and create a recurring run."""
    name, cron = config.name, config.cron
    if cron is not None and len(cron.split()) == 5:
        cron = f"0 {cron}"  # the server wants six fields
    with _server(config) as client:
        version, options = _prepare(client, config)
        experiment = options["experiment_id"]
        if client.list_recurring_runs(experiment_id=experiment, filter=_named(name)).recurring_runs:
            where = config.experiment
            raise UserError(f"{name}: is already scheduled in {where}; delete it there or rename")
        recurring = client.create_recurring_run(
            job_name=name,
            cron_expression=cron,
            interval_second=config.every,
            no_catchup=True,  # captioning what is new needs no run for each night that was missed
            **options,
        )
    run_id = recurring.recurring_run_id
    link = f"{config.host.rstrip('/')}/#/recurringrun/details/{run_id}"
    document = {"recurring_run_id": run_id, "name": name, "version": version, "link": link}
    return Output(document, [f"{name}, {config.pipeline} {version}: {link}"])


@contextlib.contextmanager
def _server(config: _ServerConfig) -> Iterator[Any]:
    """Yield kfp's client; the server's errors come out as one line.

    Raises:
        UserError: the server does not let us in, or refuses a request.
        WorkError: the server does not answer, or fails.
    """
    import kfp_server_api
    import urllib3
    from kfp import client

    class Client(client.Client):
        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
            """Ask once, where kfp asks five times and logs tracebacks."""
            return self._healthz_api.healthz_service_get_healthz(_request_timeout=TIMEOUT)

    token = os.environ.get("KFP_TOKEN") if config.auth in ("auto", "token") else None
    in_cluster = config.auth == "cluster"
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it logs its retries
    try:
        # kfp prints links of its own; --json promises a document and nothing else.
        with contextlib.redirect_stdout(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield Client(
                host=config.host,
                client_id=config.client_id if config.auth == "iap" else None,
                namespace=config.namespace,
                existing_token=token,
                credentials=client.ServiceAccountTokenVolumeCredentials() if in_cluster else None,
            )
    except kfp_server_api.ApiException as error:
        message = f"{config.host}: {error.status}: {_answer(error)}"
        if error.status in (401, 403):
            raise UserError(f"{message}; --auth names the ways to sign in") from error
        raise (WorkError if is_transient(error) else UserError)(message) from error
    except urllib3.exceptions.HTTPError as error:
        raise WorkError(f"{config.host}: no server answers there: {first_line(error)}") from error


def _answer(error: Any) -> str:
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        document = json.loads(error.body)
        return str(document.get("message") or document.get("error"))
    return str(error.reason)


def _named(name: str) -> str:
    """Return the server's filter for a display name."""
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})


def _prepare(client: Any, config: _ServerConfig) -> tuple[str, dict[str, Any]]:
    """Return the version's name, and the arguments of kfp's client that name it.

    Experiment, pipeline and version are created if they are missing."""
    import kfp_server_api

    file = COMPILED / f"{config.pipeline}.yaml"
    executors = _spec(file)["deploymentSpec"]["executors"].values()
    images = sorted({executor["container"]["image"] for executor in executors})
    if local := [image for image in images if "@sha256:" not in image]:
        log.warning("%s uses local images, as %s; make push first", config.pipeline, local[0])
    experiment = client.create_experiment(config.experiment)
    name = config.pipeline.replace("_", "-")
    pipeline_id = client.get_pipeline_id(name)
    if pipeline_id is None:
        pipeline = kfp_server_api.V2beta1Pipeline(display_name=name, name=name)
        pipeline_id = client.pipelines.pipeline_service_create_pipeline(pipeline).pipeline_id
    version = f"{__version__}-{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    versions = client.list_pipeline_versions(pipeline_id, filter=_named(version)).pipeline_versions
    if not versions:
        versions = [client.upload_pipeline_version(str(file), version, pipeline_id=pipeline_id)]
    return version, {
        "experiment_id": experiment.experiment_id,
        "pipeline_id": pipeline_id,
        "version_id": versions[0].pipeline_version_id,
        "params": config.arguments(),
    }
