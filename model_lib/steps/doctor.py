"""`captioner doctor`: what is there of what captioner can use, and what to do about the rest."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from model_lib.errors import UserError, WorkError, first_line, printable
from model_lib.io import storage
from model_lib.io.cpus import LIMITS, cpu_count
from model_lib.io.errors import http_status
from model_lib.io.hub import REMEDY
from model_lib.options import StageConfig, require
from model_lib.tracking.errors import mlflow_errors
from model_lib.tracking.server import (
    do_not_wait_long,
    require_mlflow,
    tracking_from_environment,
)

TIMEOUT = 40.0
"""Seconds after which a check without an answer counts as failed."""
PROGRAM = 10.0
"""Seconds in which a program must say its version, and a web server answer."""
EXTRAS = {
    "model": "train, evaluate and caption",
    "evaluate": "the scores of COCO's own tokeniser, METEOR and SPICE",
    "tracking": "MLflow's runs and registry",
    "buckets": "gs:// and s3://",
    "pipelines": "run, compile, submit and schedule",
    "app": "the page",
    "serve": "serve",
}
"""The extras of the package that a user installs, and what they are for."""
NEEDED = ("model",)
"""Extras without which nearly nothing works."""
LEAST_DISK = 1.0
"""Gigabytes free below which little can be done."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(StageConfig):
    """Show what is there of what captioner can use, and what to do about the rest."""

    bucket: str | None = None
    """URI of a bucket or folder (gs://bucket/folder): whether files there can be listed, written,
    read and deleted."""
    tracking: str | None = None
    """MLflow's tracking URI; by default MLFLOW_TRACKING_URI. A run is written there, and
    deleted."""
    host: str | None = None
    """Address of a Kubeflow Pipelines server, as for submit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_address = self.host is None or self.host.startswith(("http://", "https://"))
        require(is_address, f"host {self.host}: does not begin with http:// or https://")


@dataclass(frozen=True)
class Finding:
    """The result of a check."""

    state: Literal["ok", "absent", "failed"]
    """absent: not there, and not needed by all; failed: needed or named, and not usable."""
    text: str
    """What is there."""
    remedy: str = ""
    """What to do about it."""


Check = Callable[[], Finding]
"""Raises an error if what it looks at cannot be used."""


def doctor(config: DoctorConfig) -> dict[str, Finding]:
    """Return the finding of each check, in the order of the table."""
    from model_lib.steps.preflight import run_checks

    do_not_wait_long()
    if config.tracking is not None:
        os.environ["MLFLOW_TRACKING_URI"] = config.tracking
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401  (here, as two checks use it)
    checks: dict[str, Check] = {"Python": _python, "packages": partial(_packages, "")}
    checks |= {f"packages: {extra}": partial(_packages, extra) for extra in EXTRAS}
    checks |= {"machine": _machine, "disk": _disk, "GPU": _gpu, "torch.compile": _compiler}
    checks |= {"Java": _java, "Docker": _docker, "hub": _hub, "MLflow": _mlflow}
    if config.bucket is not None:
        checks["bucket"] = partial(_bucket, config.bucket)
    if config.host is not None:
        checks["Kubeflow"] = partial(_kubeflow, config.host)
    return {
        name: Finding("failed", str(result)) if isinstance(result, Exception) else result
        for name, result in run_checks(checks, TIMEOUT).items()
    }


def table(findings: dict[str, Finding]) -> list[str]:
    """Return the findings as lines of text, one each."""
    width = max(map(len, findings))
    rows = []
    for name, finding in findings.items():
        remedy = f"; to do: {finding.remedy}" if finding.remedy else ""
        rows.append(f"{name:<{width}}  {finding.state:<6}  {finding.text}{remedy}")
    return rows


def _python() -> Finding:
    version = f"{platform.python_version()}, {platform.machine()}"
    is_new = tuple(map(int, platform.python_version_tuple()[:2])) >= (3, 11)
    return Finding("ok", version) if is_new else Finding("failed", version, "Python 3.11 or later")


def _packages(extra: str) -> Finding:
    """Look for the packages that captioner's metadata require, or an extra of it."""
    from packaging.requirements import Requirement

    use = EXTRAS.get(extra, "all commands")
    target = f"'captioner[{extra}]'" if extra else "captioner"
    present, problems = [], []
    for requirement in map(Requirement, importlib.metadata.requires("captioner") or []):
        is_asked = requirement.marker and requirement.marker.evaluate({"extra": extra})
        if not is_asked and (extra or requirement.marker):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"no {requirement.name}")
            continue
        present.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if not problems:
        return Finding("ok", ", ".join(present))
    state: Literal["absent", "failed"] = "absent" if extra not in ("", *NEEDED) else "failed"
    return Finding(state, f"{', '.join(problems)} ({use})", f"pip install {target}")


def _machine() -> Finding:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # not a container, or one without a limit
        memory = min(memory, int((LIMITS / "memory.max").read_text()))
    return Finding("ok", f"{cpu_count()} cores, {memory / 1e9:.1f} GB of memory")


def _disk() -> Finding:
    """Look at the working directory and at the one for temporary files, through which models go."""
    free = {}
    for folder in (str(Path.cwd()), tempfile.gettempdir()):
        storage.require_writable(folder)
        free[folder] = shutil.disk_usage(folder).free / 1e9
    text = ", ".join(f"{size:.1f} GB free in {folder}" for folder, size in free.items())
    if min(free.values()) >= LEAST_DISK:
        return Finding("ok", text)
    remedy = f"make room ({LEAST_DISK:.0f} GB), work in another folder, or set TMPDIR"
    return Finding("failed", text, remedy)


def _version(*command: str) -> str | None:
    """Return what a program says of its version, on either output; None if there is no program.

    Raises:
        WorkError: it fails, or does not answer.
    """
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorkError(f"{command[0]}: does not start: {first_line(error)}") from error
    text = done.stdout.strip() or done.stderr.strip()
    if done.returncode:
        raise WorkError(f"{' '.join(command)}: ends with {done.returncode}: {text:.300}")
    return text


def _gpu() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("absent", "unknown without torch")
    from model_lib.model import precision

    about = f"{_driver()}, torch {torch.__version__} for CUDA {torch.version.cuda or 'none'}"
    try:
        device = precision.choose_device("auto")
    except UserError as error:
        remedy = "install the torch build for this driver (pytorch.org), or a newer driver"
        return Finding("failed", f"{error}; {about}", remedy)
    if device.type == "cuda":
        names = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        gpus = ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in names)
        return Finding("ok", f"{gpus}; {about}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1") and any(precision.DEVICES.glob("nvidia[0-9]*")):
        remedy = "unset CUDA_VISIBLE_DEVICES to use it"
        return Finding("absent", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}; {about}", remedy)
    if device.type == "mps":
        return Finding("ok", "Apple's, by MPS")
    return Finding("absent", "none: captions on the CPU; training of more than tiny needs one")


def _driver() -> str:
    try:
        text = _version("nvidia-smi")
    except WorkError as error:  # as of a driver that was replaced while it runs
        return str(error)
    versions = re.search(r"Driver Version: (\S+)\s+CUDA Version: (\S+)", text or "")
    return f"driver {versions[1]} for CUDA {versions[2]}" if versions else "no nvidia-smi"


def _compiler() -> Finding:
    try:
        from model_lib.model.precision import compile_problem
    except ImportError:
        return Finding("absent", "unknown without torch")
    problems = list(filter(None, map(compile_problem, ("cpu", "cuda"))))
    if problems:
        return Finding("absent", "; ".join(problems), "none, or training on a GPU is slower")
    return Finding("ok", "gcc, g++ and Python.h")


def _java() -> Finding:
    text = _version("java", "-version")
    if text is not None:
        return Finding("ok", text.splitlines()[0])
    scores = "scores without METEOR, SPICE and COCO's own tokeniser"
    return Finding("absent", scores, "apt-get install default-jre-headless")


def _docker() -> Finding:
    use = "run --runner docker and the images need it"
    try:
        text = _version("docker", "version", "--format", "{{.Server.Version}}")
    except WorkError as error:
        remedy = "start its service, or join the group docker"
        return Finding("absent", f"{error}; {use}", remedy)
    if text is None:
        return Finding("absent", f"none; {use}", "apt-get install docker.io")
    return Finding("ok", f"server {text}")


def _hub() -> Finding:
    """Ask the Hugging Face hub who we are, or for a small answer, and look into its cache."""
    import httpx
    from huggingface_hub import HfApi, constants, errors, get_token

    folders = sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    cached = [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]
    cache = f"in its cache {constants.HF_HUB_CACHE}: {', '.join(cached) or 'nothing'}"
    if constants.HF_HUB_OFFLINE:
        return Finding("absent" if not cached else "ok", f"HF_HUB_OFFLINE is set; {cache}")
    token = get_token()
    try:
        if token is None:
            next(iter(HfApi().list_models(limit=1)), None)
            name = "without a token (HF_TOKEN): public models"
        else:
            name = f"as {HfApi().whoami()['name']}"
    except errors.HfHubHTTPError as error:
        remedy = "set HF_TOKEN to a token of https://huggingface.co/settings/tokens"
        text = f"{constants.ENDPOINT}: {first_line(error)}"
        return Finding("failed" if token else "absent", text, remedy if token else "")
    except (httpx.HTTPError, OSError) as error:
        text = f"{constants.ENDPOINT} cannot be reached ({first_line(error)}); {cache}"
        return Finding("absent", text, REMEDY)
    return Finding("ok", f"{constants.ENDPOINT}, {name}; {cache}")


def _mlflow() -> Finding:
    """Write a run to the tracking server, with a file, and delete it."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        text = "no server named: runs and registry go to an embedded store, runs/mlflow.db"
        return Finding("absent", text, "MLFLOW_TRACKING_URI names one that others share")
    tracking = require_mlflow(tracking_from_environment())
    import mlflow

    with mlflow_errors(tracking.uri, "see to the server or to MLFLOW_TRACKING_URI"):
        client = tracking.client
        run = client.create_run(tracking.experiment_id, run_name="captioner doctor")
        try:
            client.log_text(run.info.run_id, "", "probe.txt")
        finally:
            client.delete_run(run.info.run_id)
    version = _web(f"{uri.rstrip('/')}/version") if uri.startswith("http") else mlflow.__version__
    return Finding("ok", f"{printable(uri)}, version {version}: a run and a file can be written")


def _bucket(uri: str) -> Finding:
    probe = storage.join(uri, f"captioner-doctor-{os.getpid()}")
    steps: dict[str, Callable[[], object]] = {
        "written": lambda: storage.write_bytes(probe, b"probe"),
        "listed": lambda: storage.list_names(uri),
        "read": lambda: storage.read_bytes(probe),
        "deleted": lambda: storage.remove(probe),
    }
    done: list[str] = []
    problems: list[str] = []
    for name, step in steps.items():
        try:
            step()
            done.append(name)
        except (UserError, WorkError) as error:
            problems.append(str(error))
            if name == "written":
                break
    files = f"{uri}: files can be {', '.join(done)}"
    if not problems:
        return Finding("ok", files)
    text = "; ".join([*([files] if done else []), *problems])
    remedy = "let these credentials do so; on Google Cloud, by roles/storage.objectUser"
    return Finding("failed", text, "choose another folder" if storage.is_local(uri) else remedy)


def _kubeflow(host: str) -> Finding:
    sign_in = "set KFP_TOKEN; submit --auth names other ways to sign in"
    try:
        answer = _web(f"{host.rstrip('/')}/apis/v2beta1/healthz", os.environ.get("KFP_TOKEN"))
        several = json.loads(answer)["multi_user"]
    except WorkError as error:
        refused = http_status(error) in (401, 403)
        forward = "kubectl port-forward makes a server http://localhost:PORT"
        return Finding("failed", str(error), sign_in if refused else forward)
    except (ValueError, KeyError, TypeError):
        text = f"{host}: answers with something else than Kubeflow Pipelines, as a page to sign in"
        return Finding("failed", text, sign_in)
    users = "of several users" if several else "of one user"
    return Finding("ok", f"{host}: Kubeflow Pipelines {users}")


def _web(url: str, token: str | None = None) -> str:
    """Return the text at an address; `WorkError` if there is none."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PROGRAM) as response:
            return str(response.read(10_000).decode(errors="replace"))
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise WorkError(f"{url}: does not answer as it should: {reason}") from error
