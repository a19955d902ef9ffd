"""`captioner submit` and `captioner schedule`: a compiled pipeline's runs on a Kubeflow Pipelines
server.

The YAML in `compiled/` becomes a version of the server's pipeline of that name, called after its
content, unless the server has it already; then a run of that version is started, or one is
scheduled.
"""

import contextlib
import hashlib
import json
import logging
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from model_lib import __version__
from model_lib.cli import Output
from model_lib.errors import UserError, WorkError
from model_lib.options import StageConfig, option
from pipelines.following import follow
from pipelines.local import say

log = logging.getLogger(__name__)
COMPILED = Path(__file__).parent / "compiled"
WHO = "; --auth says how to prove who you are"


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
    """Experiment of the server, made if need be."""
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
        if self.auth == "iap" and self.client_id is None:
            raise UserError(
                "auth iap: needs --client_id, the OAuth client of the Identity-Aware Proxy"
            )
        if self.auth == "token" and not os.environ.get("KFP_TOKEN"):
            raise UserError("auth token: set KFP_TOKEN in the environment")
        if not self.host.startswith(("http://", "https://")):
            raise UserError(f"host {self.host}: does not begin with http:// or https://")
        self.arguments()

    def arguments(self) -> dict[str, Any]:
        """Return the run's parameters as their types ask; `UserError` for a wrong, unknown or
        missing one."""
        inputs = pipeline_inputs(self.pipeline)
        values: dict[str, Any] = {}
        for text in self.param:
            name, equals, value = text.partition("=")
            if not equals:
                raise UserError(f"param {text}: is not NAME=VALUE")
            if name not in inputs:
                raise UserError(
                    f"param {name}: {self.pipeline} has no such parameter; it has "
                    f"{', '.join(inputs)}"
                )
            values[name] = _parameter(name, value, inputs[name]["parameterType"])
        if (
            values.get("secret_name") == ""
        ):  # the drivers of all steps fail over it, the exit handler's too
            raise UserError(
                "param secret_name: is empty; name a Kubernetes secret, which need not exist"
            )
        missing = [
            name
            for name, about in inputs.items()
            if not about.get("isOptional") and name not in values
        ]
        if missing:
            raise UserError(
                f"{self.pipeline}: needs {', '.join(f'--param {name}=…' for name in missing)}"
            )
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
    """When: five fields, or six with the seconds first, in the server's time zone: "0 3 * * *" …"""
    every: int | None = option(None, minimum=60)
    """… or seconds between two runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.cron is None) == (self.every is None):
            raise UserError("give either --cron or --every")
        if self.cron is not None and len(self.cron.split()) not in (5, 6):
            raise UserError(
                f"cron {self.cron!r}: expected five fields, or six with the seconds first"
            )

    @property
    def cron_expression(self) -> str | None:
        """The six fields that the server takes."""
        return f"0 {self.cron}" if self.cron and len(self.cron.split()) == 5 else self.cron


def pipeline_inputs(pipeline: str) -> dict[str, dict[str, Any]]:
    """Return the compiled pipeline's parameters, each with its type and whether it is optional."""
    return dict(_spec(pipeline)["root"]["inputDefinitions"]["parameters"])


def _spec(pipeline: str) -> dict[str, Any]:
    import yaml

    return dict(next(yaml.safe_load_all((COMPILED / f"{pipeline}.yaml").read_text())))


def step_names(pipeline: str) -> dict[str, str]:
    """Return the compiled pipeline's steps: each task that runs a container, with its display
    name."""
    spec = _spec(pipeline)
    dags = [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]
    tasks = {name: task for dag in dags for name, task in dag["tasks"].items()}
    return {
        name: task["taskInfo"]["name"]
        for name, task in tasks.items()
        if "executorLabel" in spec["components"][task["componentRef"]["name"]]
    }


def _warn_of_local_images(pipeline: str) -> None:
    images = {
        executor["container"]["image"]
        for executor in _spec(pipeline)["deploymentSpec"]["executors"].values()
    }
    local = sorted(image for image in images if "@sha256:" not in image)
    if local:
        log.warning(
            "%s names images of this machine, %s for one; make push first", pipeline, local[0]
        )


def _parameter(name: str, text: str, kind: str) -> Any:
    if kind == "STRING":
        return text
    wanted: dict[str, tuple[type, ...]] = {
        "NUMBER_INTEGER": (int,),
        "NUMBER_DOUBLE": (int, float),
        "BOOLEAN": (bool,),
        "LIST": (list,),
        "STRUCT": (dict,),
    }
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, wanted[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        raise UserError(
            f"param {name}: {text} is not {kind.lower().replace('_', ' ')}" + _hint(kind)
        )
    return value


def _hint(kind: str) -> str:
    return {"LIST": ', as in [{"name": "a"}]', "STRUCT": ', as in {"key": "value"}'}.get(kind, "")


def submit(config: SubmitConfig) -> Output:
    """Upload the pipeline if need be and start a run."""
    with _server(config) as client:
        experiment, pipeline_id, version_id, version = _prepare(client, config)
        name = config.run_name or f"{config.pipeline} {datetime.now():%Y-%m-%d %H:%M:%S}"
        run = client.run_pipeline(
            experiment,
            name,
            params=config.arguments(),
            pipeline_id=pipeline_id,
            version_id=version_id,
        )
    link = f"{config.host.rstrip('/')}/#/runs/details/{run.run_id}"
    document = {"run_id": run.run_id, "name": name, "version": version, "link": link}
    if not config.wait:
        return Output(document, [f"{name}, {config.pipeline} {version}: {link}"])
    say(f"{name}, {config.pipeline} {version}: {link}")
    with _server(config) as client:
        state, reason = follow(client, run.run_id, step_names(config.pipeline))
    document.update(state=state, error=reason)
    lines = [f"{state.lower()}: {link}" + (f": {reason}" if reason else "")]
    return Output(document, lines, exit_code=0 if state == "SUCCEEDED" else 1)


def schedule(config: ScheduleConfig) -> Output:
    """Upload the pipeline if need be and make a recurring run."""
    with _server(config) as client:
        experiment, pipeline_id, version_id, version = _prepare(client, config)
        wanted = {
            "predicates": [
                {"operation": "EQUALS", "key": "display_name", "stringValue": config.name}
            ]
        }
        there = client.list_recurring_runs(
            experiment_id=experiment, filter=json.dumps(wanted)
        ).recurring_runs
        if there:
            raise UserError(
                f"{config.name}: is already scheduled in {config.experiment}; delete it there or "
                "rename"
            )
        recurring = client.create_recurring_run(
            experiment,
            config.name,
            cron_expression=config.cron_expression,
            interval_second=config.every,
            no_catchup=True,  # captioning what is new needs no run for each night that was missed
            params=config.arguments(),
            pipeline_id=pipeline_id,
            version_id=version_id,
        )
    link = f"{config.host.rstrip('/')}/#/recurringrun/details/{recurring.recurring_run_id}"
    document = {
        "recurring_run_id": recurring.recurring_run_id,
        "name": config.name,
        "version": version,
        "link": link,
    }
    return Output(document, [f"{config.name}, {config.pipeline} {version}: {link}"])


@contextlib.contextmanager
def _server(config: _ServerConfig) -> Iterator[Any]:
    """Yield kfp's client; what goes wrong with the server comes out as one line.

    Raises:
        UserError: the server does not let us in, or refuses what we ask.
        WorkError: the server does not answer, or fails.
    """
    import kfp_server_api
    import urllib3
    from kfp import client

    token = os.environ.get("KFP_TOKEN") if config.auth in ("auto", "token") else None
    _require_answer(config.host, token, strangers=config.auth in ("iap", "cluster"))
    credentials = (
        client.ServiceAccountTokenVolumeCredentials() if config.auth == "cluster" else None
    )
    try:
        # kfp prints links of its own; --json promises a document and nothing else.
        with contextlib.redirect_stdout(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield client.Client(
                host=config.host,
                client_id=config.client_id if config.auth == "iap" else None,
                namespace=config.namespace,
                existing_token=token,
                credentials=credentials,
            )
    except kfp_server_api.ApiException as error:
        said = f"{config.host}: {_answer(error)}"
        if error.status in (401, 403):
            raise UserError(said + WHO) from error
        raise (UserError if error.status == 400 else WorkError)(said) from error
    except urllib3.exceptions.HTTPError as error:
        raise WorkError(f"{config.host}: the connection failed: {type(error).__name__}") from error


def _require_answer(host: str, token: str | None, strangers: bool) -> None:
    """Ask the server how it is, before kfp's client does, which would try for half a minute.

    Raises:
        UserError: it does not let us in (unless we are `strangers` to it here, and kfp will say who
            we are).
        WorkError: nothing answers.
    """
    try:
        request = urllib.request.Request(f"{host.rstrip('/')}/apis/v2beta1/healthz")
        if token:  # for this server only: a proxy may lead to another, where people sign in
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        urllib.request.urlopen(request, timeout=15).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403) and not strangers:
            raise UserError(f"{host}: {error.code}: {error.reason}{WHO}") from error
    except (OSError, ValueError) as error:
        raise WorkError(f"{host}: no Kubeflow Pipelines server answers there: {error}") from error


def _answer(error: Any) -> str:
    """Return what the server said, its status if nothing."""
    try:
        document = json.loads(error.body)
        return f"{error.status}: {document.get('message') or document.get('error')}"
    except (TypeError, ValueError, AttributeError):
        return f"{error.status}: {error.reason}"


def _prepare(client: Any, config: _ServerConfig) -> tuple[str, str, str, str]:
    """Return the ids of the experiment, the pipeline and its version, and the version's name; make
    what is missing."""
    import kfp_server_api

    file = COMPILED / f"{config.pipeline}.yaml"
    name = config.pipeline.replace("_", "-")
    version = f"{__version__}-{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    experiment = client.create_experiment(config.experiment)
    pipeline_id = client.get_pipeline_id(name)
    if pipeline_id is None:
        pipeline = kfp_server_api.V2beta1Pipeline(display_name=name, name=name)
        pipeline_id = client.pipelines.pipeline_service_create_pipeline(pipeline).pipeline_id
    wanted = {
        "predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": version}]
    }
    there = client.list_pipeline_versions(pipeline_id, filter=json.dumps(wanted)).pipeline_versions
    _warn_of_local_images(config.pipeline)
    made = (
        there[0]
        if there
        else client.upload_pipeline_version(str(file), version, pipeline_id=pipeline_id)
    )
    return experiment.experiment_id, pipeline_id, made.pipeline_version_id, version
