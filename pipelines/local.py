"""Running a pipeline on this machine through `kfp.local`: its steps as processes, or each in its
container image.

What the steps print goes to `pipeline.log` in the working directory; the terminal shows the steps
and their progress.
"""

import builtins
import contextlib
import io
import os
import re
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from model_lib.errors import UserError, WorkError

PASSED: tuple[str, ...] = ("AWS_", "CAPTIONER_", "GCSFS_", "GOOGLE_", "HF_", "KFP_RUN_ID")
PASSED += ("MLFLOW_", "OMP_NUM_THREADS", "STORAGE_EMULATOR_HOST", "WEBHOOK_URL")
"""Prefixes of the environment variables that containers see; on a cluster most come from the
secret."""
RUN_LABEL = "captioner.run"
"""Label of each step's container."""
OUTPUTS = ("candidates", "captions", "data", "mlartifacts", "mlflow.db", "pipeline")
"""What steps write in the working directory."""
REASON = re.compile(r"^\s*captioner: (error|failed): (.*)$", re.MULTILINE)
"""The line in which a step says why it ends."""
FAILED = re.compile(r"Task '([\w-]+)' finished with status FAILURE")
EXCEPTION = re.compile(r"^\s*((?:\w+\.)*\w*(?:Error|Exception): .*)$", re.MULTILINE)
"""The last line of a traceback."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
REACHED = {"register": 0.93, "caption": 0.96, "merge": 0.98}
"""Share of the time of a run on generated scenes, by default, at which a step begins."""
TRAINING = 0.05, 0.85
"""The same for the first step of training, and the last one."""
TRAINED = re.compile(r"train ([\w.-]+): ([\d,]+)/([\d,]+) steps")
PROGRESS = re.compile(r"(ingest|train [\w.-]+|evaluate on \w+|caption): [\d,]+/|captioner:")


def run_locally(
    pipeline: Any,
    arguments: dict[str, Any],
    work: Path,
    runner: str,
    reached: Mapping[str, float] | None = None,
) -> Path:
    """Run a pipeline; return the folder in which it left each step's outputs.

    Args:
        pipeline: the function that kfp decorated.
        arguments: its parameters.
        work: folder for the outputs and the log.
        runner: "subprocess" or "docker".
        reached: see `REACHED`; None: how long is left is unknown.

    Raises:
        UserError: a step refused its input; the message is the step's.
        WorkError: a step failed; the message is the step's, or the end of its traceback.
    """
    from kfp import local

    root, log_file = work / "pipeline", work / "pipeline.log"
    root.mkdir(exist_ok=True)
    before = set(root.iterdir())
    processes = contextlib.nullcontext(local.SubprocessRunner(use_venv=False))
    steps = processes if runner == "subprocess" else _containers(arguments, work)
    plain_print = builtins.print  # which kfp exchanges, and of steps side by side not back
    with warnings.catch_warnings(), log_file.open("w") as log, steps as chosen:
        warnings.simplefilter("ignore")
        local.init(chosen, pipeline_root=str(root), raise_on_error=True)
        try:
            with contextlib.redirect_stdout(_Log(log, reached or {})):
                _without_retries(pipeline)(**arguments)
        except Exception as error:
            lines = COLOUR.sub("", log_file.read_text())
            if reasons := REASON.findall(lines):
                kind, reason = reasons[0]  # not that of a step after it, which may fail too
                raise (UserError if kind == "error" else WorkError)(reason) from error
            step = "".join(f"step {name} " for name in FAILED.findall(f"{lines}\n{error}")[:1])
            reason = (EXCEPTION.findall(lines) or ["it was killed, or says nothing"])[-1]
            message = f"{step}failed: {reason}; {log_file} has all that the steps printed"
            raise WorkError(message) from error
        finally:
            builtins.print = plain_print
    (outputs,) = set(root.iterdir()) - before
    return outputs


def _without_retries(pipeline: Any) -> Any:
    """Return the pipeline without retries: here waiting rarely helps, and a person waits."""
    spec = pipeline.pipeline_spec
    for dag in (spec.root.dag, *(component.dag for component in spec.components.values())):
        for task in dag.tasks.values():
            task.ClearField("retry_policy")
    return pipeline


@contextlib.contextmanager
def _containers(arguments: dict[str, Any], work: Path) -> Iterator[Any]:
    """Yield the runner that starts each step in its image: with a read-only root, with all GPUs,
    and never as root.

    The working directory and the paths among the arguments and variables are mounted under their
    own names. Where this process is root, steps run as the working directory's owner, who becomes
    the owner of earlier outputs. Containers that still run after the body are stopped.
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
        message = f"runner docker: image {image} is not on this machine; build it with make images"
        raise UserError(message) from error
    except docker.errors.DockerException as error:
        raise UserError(f"runner docker: no Docker engine answers: {error}") from error
    environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    paths = {**host_paths(arguments, environment, work), str(work): False}
    mounts = [
        docker.types.Mount(path, path, type="bind", read_only=read_only)
        for path, read_only in paths.items()
    ]
    mounts.append(docker.types.Mount("/tmp", None, type="volume"))  # a new one for each step
    user, group = os.getuid(), os.getgid() or USER
    if user == 0:
        owner = work.stat()
        user, group = owner.st_uid or USER, owner.st_gid or USER
        outputs = [output for output in map(work.joinpath, OUTPUTS) if output.exists()]
        for path in (work, *outputs, *(p for output in outputs for p in output.rglob("*"))):
            os.chown(path, user, group, follow_symlinks=False)
    gpus = [docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])]
    run_id = uuid.uuid4().hex
    try:
        yield local.DockerRunner(
            mounts=mounts,
            environment=environment,
            network_mode="host",  # a tracking server on this machine has the same address inside
            user=f"{user}:{group}",
            read_only=True,
            shm_size="1g",
            labels={RUN_LABEL: run_id},
            device_requests=gpus if "nvidia" in client.info().get("Runtimes", {}) else [],
        )
    finally:
        for container in client.containers.list(filters={"label": f"{RUN_LABEL}={run_id}"}):
            with contextlib.suppress(docker.errors.APIError):  # it has just ended
                container.stop()


def host_paths(
    arguments: dict[str, Any], environment: Mapping[str, str], work: Path
) -> dict[str, bool]:
    """Return the paths outside the working directory that steps need, and whether each is only
    read.

    The hub's cache is written, and the folder of an MLflow store outside.
    """
    store = environment.get("MLFLOW_TRACKING_URI", "")
    written = [environment.get(name, "") for name in ("HF_HOME", "HF_HUB_CACHE")]
    if store.startswith("sqlite:///"):
        written.append(str(Path(store.removeprefix("sqlite:///")).parent))
    paths = dict.fromkeys((*_strings(arguments), *environment.values()), True)
    paths |= dict.fromkeys(written, False)
    return {
        path: read_only
        for path, read_only in sorted(paths.items())
        if path.startswith("/") and Path(path).exists() and not Path(path).is_relative_to(work)
    }


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


class _Log(io.TextIOBase):
    """Writes everything to a log, and the steps, their progress and how long is left to stderr."""

    def __init__(self, log: TextIO, reached: Mapping[str, float]) -> None:
        self.reached, self.started = reached, time.monotonic()
        self.trained: dict[str, float] = {}
        """Share of its steps that each candidate has taken."""
        self.log, self.line, self.lock = log, "", threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self.lock:
            self.log.write(text)
            self.log.flush()
            *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            line = COLOUR.sub("", line).strip()
            if step := re.search(r"Executing task '([\w-]+)'", line):
                say(f"step {step[1]}{self._left(self.reached.get(step[1]))}")
            elif PROGRESS.match(line):
                left = ""
                if self.reached and (steps := TRAINED.match(line)):
                    done, count = (int(number.replace(",", "")) for number in steps.groups()[1:])
                    self.trained[steps[1]] = done / count
                    begin, end = TRAINING
                    left = self._left(begin + (end - begin) * min(self.trained.values()))
                say(f"  {line.removeprefix('captioner: ')}{left}")
        return len(text)

    def _left(self, share: float | None) -> str:
        """Return how long the run takes from now on, of which a share is done."""
        if share is None:
            return ""
        passed = time.monotonic() - self.started
        return f"; the whole run: about {passed * (1 - share) / share:.0f} s left"


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)
