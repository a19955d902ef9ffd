"""Running a pipeline on this machine through `kfp.local`: its steps as processes, or each in its
container image.

What the steps print goes to `pipeline.log` in the working directory; the terminal shows each step
and its progress.
"""

import contextlib
import io
import os
import re
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from model_lib.errors import UserError, WorkError

PASSED = (
    "AWS_",
    "CAPTIONER_",
    "GCSFS_",
    "GOOGLE_",
    "HF_",
    "KFP_RUN_ID",
    "MLFLOW_",
    "STORAGE_EMULATOR_HOST",
    "WEBHOOK_URL",
)
"""Beginnings of the environment variables that containers see; on a cluster most come from the
secret."""
RUN_LABEL = "captioner.run"
"""Label of each step's container."""
MADE = ("candidates", "captions", "data", "mlartifacts", "mlflow.db", "pipeline")
"""What steps write in the working directory."""


def run_locally(pipeline: Any, arguments: dict[str, Any], work: Path, runner: str) -> Path:
    """Run a pipeline; return the folder in which it left each step's outputs.

    Args:
        pipeline: the function that kfp decorated.
        arguments: its parameters.
        work: folder for the outputs and the log.
        runner: "subprocess" or "docker".

    Raises:
        UserError: a step refused its input; the message is the step's.
        WorkError: a step failed; the message is the step's, or says where the log is.
    """
    from kfp import local

    root, log_file = work / "pipeline", work / "pipeline.log"
    root.mkdir(exist_ok=True)
    steps = _processes() if runner == "subprocess" else _containers(arguments, work)
    with warnings.catch_warnings(), log_file.open("w") as log, steps as how, _followed(log):
        warnings.simplefilter("ignore")
        local.init(how, pipeline_root=str(root), raise_on_error=True)
        before = set(root.glob("*"))
        try:
            _without_retries(pipeline)(**arguments)
        except Exception as error:
            ends = re.findall(
                r"^\s*captioner: (error|failed): (.*)$", log_file.read_text(), re.MULTILINE
            )
            if ends:
                kind, line = ends[-1]
                raise (UserError if kind == "error" else WorkError)(line) from error
            raise WorkError(
                f"the pipeline stopped ({error}); {log_file} has all that its steps printed"
            ) from error
    (made,) = set(root.glob("*")) - before
    return made


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    for inner in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from _texts(inner)


def _without_retries(pipeline: Any) -> Any:
    """Return the pipeline without its retries: here the cause does not go away by waiting, and
    somebody is waiting."""
    spec = pipeline.pipeline_spec
    for dag in (spec.root.dag, *(component.dag for component in spec.components.values())):
        for task in dag.tasks.values():
            task.ClearField("retry_policy")
    return pipeline


@contextlib.contextmanager
def _processes() -> Iterator[Any]:
    """Yield the runner that starts each step as a process."""
    from kfp import local

    yield local.SubprocessRunner(use_venv=False)


@contextlib.contextmanager
def _containers(arguments: dict[str, Any], work: Path) -> Iterator[Any]:
    """Yield the runner that starts each step in its image: with a read-only root, with all GPUs,
    and never as root.

    The working directory and what the arguments and variables name are mounted in their own places:
    paths mean the same inside. As root, steps run as the working directory's owner, who gets what
    captioner has made there. What is at work after the body is stopped, as kfp leaves a step's
    container alone.
    """
    import docker
    from kfp import local

    from components import CORE, EVALUATE, MODEL
    from pipelines.placement import USER

    try:
        client = docker.from_env()
        for image in (CORE, MODEL, EVALUATE):
            client.images.get(image)
    except docker.errors.ImageNotFound as error:
        raise UserError(
            f"runner docker: image {image} is not on this machine; build it with make images"
        ) from error
    except docker.errors.DockerException as error:
        raise UserError(f"runner docker: no Docker engine answers: {error}") from error
    environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    mounts = [
        docker.types.Mount(place, place, type="bind", read_only=read_only)
        for place, read_only in outside(arguments, environment, work).items()
    ]
    mounts.append(docker.types.Mount(str(work), str(work), type="bind"))
    mounts.append(docker.types.Mount("/tmp", None, type="volume"))  # a fresh one a step
    user, group = os.getuid(), os.getgid()
    if user == 0:
        owner = work.stat()
        user, group = owner.st_uid or USER, owner.st_gid or USER
        made = [
            place
            for name in MADE
            for place in (work / name, *(work / name).rglob("*"))
            if place.exists()
        ]
        for place in (work, *made):
            os.chown(place, user, group, follow_symlinks=False)
    gpus = [docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])]
    run = uuid.uuid4().hex
    try:
        yield local.DockerRunner(
            mounts=mounts,
            environment=environment,
            network_mode="host",  # a tracking server on this machine is at the same address inside
            user=f"{user}:{group or USER}",
            read_only=True,
            shm_size="1g",
            labels={RUN_LABEL: run},
            device_requests=gpus if "nvidia" in client.info().get("Runtimes", {}) else [],
        )
    finally:
        for container in client.containers.list(filters={"label": f"{RUN_LABEL}={run}"}):
            with contextlib.suppress(docker.errors.APIError):  # it has just ended
                container.stop()


def outside(
    arguments: dict[str, Any], environment: Mapping[str, str], work: Path
) -> dict[str, bool]:
    """Return what steps need outside the working directory, each place with whether it is only
    read.

    Written are the hub's cache, and the folder of an MLflow store of its own.
    """
    store = environment.get("MLFLOW_TRACKING_URI", "")
    written = [environment.get(name, "") for name in ("HF_HOME", "HF_HUB_CACHE")]
    written += (
        [str(Path(store.removeprefix("sqlite:///")).parent)]
        if store.startswith("sqlite:///")
        else []
    )
    places = dict.fromkeys((*_texts(arguments), *environment.values()), True) | dict.fromkeys(
        written, False
    )
    return {
        place: read_only
        for place, read_only in sorted(places.items())
        if place.startswith("/") and Path(place).exists() and not Path(place).is_relative_to(work)
    }


@contextlib.contextmanager
def _followed(log: TextIO) -> Iterator[None]:
    """Send all that the pipeline prints to `log`, and show its steps and their progress as it
    goes."""
    terminal = sys.stdout
    with contextlib.redirect_stdout(_Follower(log)):
        try:
            yield
        finally:
            terminal.flush()


class _Follower(io.TextIOBase):
    """Writes everything to a log, and says on stderr what a person wants to see."""

    def __init__(self, log: TextIO) -> None:
        self.log, self.line = log, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.log.write(text)
        self.log.flush()
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self._show(re.sub(r"\x1b\[[0-9;]*m", "", line).strip())
        return len(text)

    def _show(self, line: str) -> None:
        step = re.search(r"Executing task '([\w-]+)'", line)
        if step:
            say(f"step {step[1]}")
        elif re.match(
            r"(ingest|train [\w.-]+|evaluate on \w+|caption): [\d,]+/", line
        ) or line.startswith("captioner:"):
            say(f"  {line.removeprefix('captioner: ')}")


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)
