"""Both pipelines and the server in their real images, as a cluster runs them: not as root, on a
read-only root, with a bucket, MLflow and a webhook elsewhere. `make test-containers` builds the
images first.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import fsspec
import mlflow
import pytest

from components import CORE, EVALUATE, MODEL, SERVE
from model_lib import __version__
from model_lib.errors import UserError
from model_lib.tracking.server import MlflowTracking
from pipelines import train_captioner
from pipelines.caption_bucket import caption_bucket
from pipelines.local import RUN_LABEL, run_locally
from tests.helpers.batches import read_output
from tests.helpers.evaluations import register_champion
from tests.helpers.inference import encode, get, images, infer, metrics
from tests.helpers.services import (
    free_port,
    gcs_emulator,
    mlflow_server,
    put_folder,
    running,
    webhook,
)
from tests.helpers.small import small_model

pytestmark = pytest.mark.containers
ROOT = Path(__file__).parents[2]
IMAGES = (CORE, MODEL, EVALUATE, SERVE)
VERSION_LINE = re.compile(rf"^captioner +{re.escape(__version__)}$", re.MULTILINE)
"""Of `captioner info`."""


@pytest.fixture(scope="module")
def engine() -> Any:
    client = docker.from_env()
    for image in IMAGES:
        client.images.get(image)
    return client


def inside(image: str, *command: str, limits: Sequence[str] = ()) -> str:
    """Run a command as the pipelines' steps run, and return what it printed."""
    options = ["--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp", *limits, image]
    return subprocess.run(
        ["docker", "run", *options, *command], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_labelled_not_root_and_healthy(engine: Any, image: str) -> None:
    config = engine.images.get(image).attrs["Config"]
    assert config["User"] == "1000:1000" and inside(image, "id", "-u").strip() == "1000"
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert re.fullmatch("[0-9a-f]{40}", config["Labels"]["org.opencontainers.image.revision"])
    check = config["Healthcheck"]["Test"]
    assert check == ["CMD", "captioner", "info"]
    assert VERSION_LINE.search(inside(image, *check[1:]))
    # The library alone is there, no pipelines.
    assert "captioner COMMAND --help" in inside(image, "captioner", "--help")
    with pytest.raises(subprocess.CalledProcessError):
        inside(image, "touch", "/opt/code/x")


@pytest.mark.usefixtures("engine")
def test_a_step_works_on_as_many_cores_as_its_limit_leaves() -> None:
    limits = ("--cpus", "1")
    assert json.loads(inside(CORE, "captioner", "info", "--json", limits=limits))["cpus"] == 1
    code = "import torch; from model_lib.model.precision import choose_device; "
    code += "choose_device('auto'); print(torch.get_num_threads())"
    assert inside(MODEL, "python", "-c", code, limits=limits) == "1\n"


@pytest.mark.usefixtures("engine")
def test_a_step_leaves_its_reason_where_kubernetes_keeps_it(tmp_path: Path) -> None:
    kept = tmp_path / "termination-log"
    kept.touch()
    kept.chmod(0o666)  # as the kubelet makes it
    mounts = ("--volume", f"{kept}:/dev/termination-log")
    command = "captioner ingest --dataset /gone --output /tmp/data"
    with pytest.raises(subprocess.CalledProcessError) as ended:
        inside(CORE, *command.split(), limits=mounts)
    assert ended.value.returncode == 2 and kept.read_text() == ended.value.stderr
    assert kept.read_text().startswith("captioner: error: /gone: not there")


def versions(lines: str) -> dict[str, str]:
    """Return the versions of packages, from lines as pip freeze prints them."""
    return dict(line.lower().split("==") for line in lines.splitlines() if "==" in line)


def test_each_image_holds_what_its_stages_need_and_no_more() -> None:
    for image in IMAGES:
        torch, java = image != CORE, image == EVALUATE
        packages = set(versions(inside(image, "pip", "freeze")))
        has_java, has_compiler = (
            inside(image, "sh", "-c", f"command -v {program} || true").strip() != ""
            for program in ("java", "g++")
        )
        assert ("torch" in packages, "transformers" in packages) == (torch, torch), image
        assert (has_java, "pycocoevalcap" in packages) == (java, java), image
        assert has_compiler == (image == MODEL), "torch.compile needs one"
        assert ("prometheus_client" in packages) == (image == SERVE), image
        assert {"kfp", "mlflow-skinny", "gcsfs", "s3fs", "pyarrow"} <= packages
        if image == CORE:
            gpu = {name for name in packages if name.startswith(("nvidia", "cuda", "triton"))}
            assert gpu <= {"nvidia-ml-py"}  # pure Python, with which MLflow reads a GPU's load


def test_the_packages_are_those_of_the_constraints() -> None:
    pinned = versions((ROOT / "constraints.txt").read_text())
    installed = {**versions(inside(EVALUATE, "pip", "freeze"))}
    installed |= versions(inside(SERVE, "pip", "freeze"))
    installed = {name: version.split("+")[0] for name, version in installed.items()}
    accelerators = ("nvidia-", "cuda-", "triton")  # torch itself pins what its CUDA builds need
    free = {name for name in installed if name not in pinned and not name.startswith(accelerators)}
    assert len(installed) > 100 and free <= {"captioner", "pip", "setuptools"}
    others = {name for name in installed.keys() & pinned if installed[name] != pinned[name]}
    assert not others


class Watched:
    """How each container that starts while it watches was started."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.seen = engine, []
        self.events = engine.events(decode=True, filters={"event": "start"})
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        for event in self.events:
            started = self.engine.api.inspect_container(event["id"])
            config, read_only = started["Config"], started["HostConfig"]["ReadonlyRootfs"]
            self.seen.append((config["Image"], config["User"], read_only))


def test_both_pipelines_in_containers(
    engine: Any,
    scenes: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    with (
        mlflow_server(tmp_path / "mlflow") as server,
        gcs_emulator("b", tmp_path / "gcs") as bucket,
        webhook() as (address, notifications),
    ):
        # MLflow under the name that the secret's key has in a pod, and no other.
        environment = {**bucket, "CAPTIONER_MLFLOW_TRACKING_URI": server, "WEBHOOK_URL": address}
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
        monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
        fs = fsspec.filesystem("gs", skip_instance_cache=True)
        put_folder(fs, scenes, "b/scenes")
        fs.pipe_file("b/scenes/val2017/broken.jpg", b"no image")

        def run(pipeline: Any, arguments: dict[str, Any], name: str) -> None:
            monkeypatch.setenv("KFP_RUN_ID", str(uuid.uuid4()))
            (tmp_path / name).mkdir()
            (tmp_path / name / "mine").write_text("of somebody else")
            run_locally(pipeline, arguments, tmp_path / name, "docker")
            # Only captioner's own files change hands.
            assert (tmp_path / name / "mine").stat().st_uid == os.getuid()

        for path in (finished, finished / "best", *(finished / "best").iterdir()):
            path.chmod(0o755)
        watched = Watched(engine)
        arguments = {
            "data": "gs://b/scenes",
            "output": "gs://b/out",
            # One of them goes on from a folder of this machine, which the containers' user may
            # read.
            "candidates": [
                {"name": "slow", "learning_rate": 1e-6, "init_from": str(finished / "best")},
                {"name": "fast"},
            ],
            "preset": "tiny",
            "train_options": {"epochs": 2},
            "eval_options": {"num_beams": 1},
        }
        run(train_captioner.define(parallel=1), arguments, "train")

        client = mlflow.MlflowClient(server)
        champion = client.get_model_version_by_alias("captioner", "champion")
        runs = client.search_runs([client.get_experiment_by_name("captioner").experiment_id])
        nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
        (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        assert {run.info.run_name for run in nested} == {"slow", "fast"}
        assert parent.info.status == "FINISHED"
        assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in nested)
        assert all(run.data.metrics["val_METEOR"] >= 0 for run in nested), "by the image's Java"
        assert champion.tags["name"] in ("slow", "fast")

        arguments = {
            "images": "gs://b/scenes/val2017",
            "output": "gs://b/captions",
            "caption_options": {"shard_images": 5},
            "caption_workers": 2,
        }
        run(caption_bucket, arguments, "caption")
        parts = sorted(fs.glob("b/captions/*/captions/*.parquet"))
        rows = read_output("b/captions", fs)
        assert len(parts) == 3 and len({row["uri"] for row in rows}) == len(rows) == 13
        assert {row["model"] for row in rows} == {"models:/captioner/1"}
        assert sorted(row["status"] for row in rows) == ["error"] + ["ok"] * 12

        # Once more: nothing is done again.
        before = [fs.info(part)["generation"] for part in parts]
        run(caption_bucket, arguments, "again")
        assert [fs.info(part)["generation"] for part in parts] == before

        # Without the images, the first step says so, and the last one still calls the webhook.
        arguments["images"] = "gs://b/nowhere"
        with pytest.raises(UserError, match="gs://b/nowhere: not there"):
            run(caption_bucket, arguments, "no")

    watched.events.close()
    assert [post["state"] for post in notifications] == [*["SUCCEEDED"] * 3, "FAILED"]
    images = {image for image, *_ in watched.seen}
    users = {(user.split(":")[0] != "0", read_only) for _, user, read_only in watched.seen}
    assert images == {CORE, MODEL, EVALUATE} and users == {(True, True)} and len(watched.seen) >= 22
    out = capfd.readouterr().err
    training = ("ingest", "evaluate-champion", "train", "evaluate", "register")
    for step in ("preflight", *training, "plan", "caption", "merge", "close"):
        assert f"step {step}" in out, step


def test_an_interrupted_run_leaves_no_container_at_work(engine: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "model_lib", "run", "--runner=docker", "--scenes=8"]
    # A test's process may ignore interrupts, and what it starts would too.
    catch_signals = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    run = subprocess.Popen([*command, f"--workdir={tmp_path}/work"], preexec_fn=catch_signals)
    ours = {"label": RUN_LABEL}
    while not engine.containers.list(filters=ours):
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130 and not engine.containers.list(filters=ours)


class Clients:
    """Clients that ask for captions of one image each, again and again."""

    def __init__(self, files: list[Path]) -> None:
        self.bodies = [json.dumps(images([encode(file)])).encode() for file in files]
        self.expected: dict[tuple[str, int], list[Any]] = {}
        """The first answer, by version and image."""
        self.address = ""
        self.lost: list[Any] = []

    def ask(self, number: int) -> str:
        """Ask once, and return the model's version."""
        number %= len(self.bodies)
        answer = infer(self.address, self.bodies[number])
        version = answer.body.get("model_version", "")
        if answer.status != 200 or answer.output() != self.expected.setdefault(
            (version, number), answer.output()
        ):
            self.lost.append(answer)
        return version

    def ask_until(self, stopped: threading.Event) -> set[str]:
        """Ask again and again, and return the model's versions."""
        versions = {self.ask(0)}
        while not stopped.is_set():
            versions.add(self.ask(0))
        return versions

    def rate(self, clients: int, requests: int) -> float:
        """Return answers a second."""
        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(self.ask, range(requests)))
        return requests / (time.monotonic() - began)


def served(engine: Any, tracking: str) -> tuple[Any, str]:
    """Return a container that serves the champion, and its address."""
    port = free_port()
    champion = f"captioner serve --port {port} --model models:/captioner@champion"
    container = engine.containers.run(
        SERVE,
        champion.split(),
        detach=True,
        network_mode="host",
        read_only=True,
        tmpfs={"/tmp": ""},
        cap_drop=["ALL"],
        environment={"MLFLOW_TRACKING_URI": tracking, "OMP_NUM_THREADS": "1"},
    )
    address = f"http://127.0.0.1:{port}"
    while True:
        container.reload()
        assert container.status != "exited", container.logs().decode()
        try:
            assert get(f"{address}/v2/health/ready").status == 200
        except OSError:
            time.sleep(0.1)
        else:
            return container, address


def test_64_clients_lose_nothing_also_while_a_new_champion_takes_over(
    engine: Any, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    clients, containers = Clients(sorted((scenes / "val2017").iterdir())), []
    with mlflow_server(tmp_path / "mlflow") as server:
        try:
            for name in ("first", "second"):
                small_model(len(name)).save_pretrained(tmp_path / name / "model")
            tracking = MlflowTracking(server)
            register_champion(tracking, tmp_path / "first", tmp_path / "first" / "model")
            old, clients.address = served(engine, server)
            containers.append(old)
            clients.rate(1, 4)
            alone, together = clients.rate(1, 16), clients.rate(64, 256)
            counts = metrics(clients.address)
            assert counts['captioner_requests_total{status="200"}'] == 4 + 16 + 256
            assert counts["captioner_batch_images_count"] < 4 + 16 + 256 / 4
            # A rolling restart: the new one is ready before the old one is stopped.
            tracking.client.delete_registered_model_alias("captioner", "champion")
            register_champion(tracking, tmp_path / "second", tmp_path / "second" / "model")
            stopped = threading.Event()
            with ThreadPoolExecutor(64) as pool:
                answers = [pool.submit(clients.ask_until, stopped) for _ in range(64)]
                try:
                    new, clients.address = served(engine, server)
                    containers.append(new)
                    time.sleep(5)  # as the manifest's preStop, for requests that are on their way
                    old.stop(timeout=60)
                finally:
                    stopped.set()
            assert {version for answer in answers for version in answer.result()} == {"1", "2"}
            assert old.wait()["StatusCode"] == 143 and b"Traceback" not in old.logs()
        finally:
            for container in containers:
                container.remove(force=True)
    assert not clients.lost
    with capsys.disabled():
        print(f"\n64 clients: {together:.0f} images/s; one by one: {alone:.0f}")


def test_pushed_images_are_locked_by_digest_and_compiled_in(tmp_path: Path) -> None:
    """`make push` to a registry on loopback, from a copy of this tree."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed (Debian's package of that name)")
    port = free_port()
    config = tmp_path / "registry.yml"
    storage = f"storage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}}}"
    config.write_text(f"version: 0.1\n{storage}\nhttp: {{addr: '127.0.0.1:{port}'}}\n")
    copy = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / ".venv").symlink_to(Path(sys.executable).parents[1])
    name = f"localhost:{port}/captions"
    serve = [program, "serve", str(config)]
    with running(serve, f"http://127.0.0.1:{port}/v2/", tmp_path / "registry.log"):
        for image in IMAGES:
            pushed = image.replace("captioner-", f"{name}/captioner-")
            subprocess.run(["docker", "tag", image, pushed], check=True)
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        subprocess.run(["make", "push", f"REGISTRY={name}"], cwd=copy, env=environment, check=True)
        lock = (copy / "images" / "images.lock").read_text()
        digest = rf"{re.escape(name)}/captioner-\1@sha256:[0-9a-f]{{64}}"
        digests = re.findall(rf"^(core|model|evaluate|serve) ({digest})$", lock, re.M)
        assert [image for image, _ in digests] == ["core", "model", "evaluate", "serve"]
        for pipeline in ("train_captioner", "caption_bucket"):
            compiled = (copy / "pipelines" / "compiled" / f"{pipeline}.yaml").read_text()
            used = set(re.findall(r"^ *image: (.*)$", compiled, re.MULTILINE))
            assert used <= {digest for _, digest in digests} and len(used) > 1
        assert VERSION_LINE.search(inside(digests[0][1], "captioner", "info"))
