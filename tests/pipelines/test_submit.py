"""Submitting and scheduling against a server on loopback, through kfp's own client, as a user
does."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from model_lib import UserError
from pipelines import following, submit
from pipelines.submit import COMPILED
from tests.helpers.http_server import Handler, serving
from tests.helpers.kfp_server import KfpServer

Run = Callable[..., CompletedProcess]
BUCKET: dict[str, Any] = {
    "pipeline": "caption_bucket",
    "param": ("images=a", "output=b"),
    "wait": True,
}
PIPELINE = ("--pipeline", "caption_bucket")
PARAMETERS = ("--param", "images=gs://b/in", "--param", "output=gs://b/out")
TRAINING = ["--param=data=gs://b/data", "--param=output=gs://b/output"]


def waited(server: KfpServer) -> Any:
    """Start a run of caption_bucket and wait for it; return the command's output."""
    return submit.submit(submit.SubmitConfig(host=server.host, **BUCKET))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "POLL", 0.01)


def test_a_run_is_started_and_the_pipeline_uploaded_once(captioner: Run) -> None:
    with KfpServer() as server:
        options = ("submit", "--host", server.host, "--pipeline", "train_captioner", *TRAINING)
        candidates = [{"name": "a"}, {"name": "b", "epochs": 3}]
        typed = ('train_options={"learning_rate": 1e-4}', f"candidates={json.dumps(candidates)}")
        first = captioner(*options, *(f"--param={parameter}" for parameter in typed))
        assert first.returncode == 0, first.stderr
        assert "local images, as captioner-core:" in first.stderr and "make push" in first.stderr
        assert first.stdout.splitlines()[-1].endswith(f"{server.host}/#/runs/details/run-1")
        second = captioner(*options, "--experiment", "mine", "--run_name", "again", "--json")
        assert second.returncode == 0, second.stderr
        assert json.loads(second.stdout)["link"] == f"{server.host}/#/runs/details/run-2"

    assert len(server.pipelines) == len(server.versions) == 1, "the second run found the version"
    (version,) = server.versions.values()
    assert version["display_name"] == json.loads(second.stdout)["version"]
    parameters = server.runs["run-1"]["runtime_config"]["parameters"]
    assert parameters["train_options"] == {"learning_rate": 1e-4}
    assert parameters["candidates"] == candidates
    assert server.runs["run-2"]["display_name"] == "again"
    assert [row["display_name"] for row in server.experiments.values()] == ["captioner", "mine"]


def test_new_content_becomes_a_new_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with KfpServer() as server:
        before = waited(server).document["version"]
        content = (COMPILED / "caption_bucket.yaml").read_text()
        changed = content.replace("captioner-core:", "another-core:")
        (tmp_path / "caption_bucket.yaml").write_text(changed)
        monkeypatch.setattr(submit, "COMPILED", tmp_path)
        after = waited(server).document["version"]
    versions = [row["display_name"] for row in server.versions.values()]
    assert before != after and versions == [before, after] and len(server.pipelines) == 1


@pytest.mark.parametrize(("end", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELED", 1)])
def test_waiting_follows_the_run_to_its_end(end: str, code: int, capfd: Any) -> None:
    before = ("PENDING", 503, "RUNNING") if end == "SUCCEEDED" else ()
    with KfpServer(states=(*before, end)) as server:
        done = waited(server)
    log = capfd.readouterr().err
    assert done.exit_code == code and done.document["state"] == end
    for state in (*before, end):
        assert state == 503 or f"Preflight {str(state).lower()}" in log, log
    assert not any(word in log for word in ("driver", "executor", "root", "exit-handler"))
    (line,) = done.lines
    assert line.startswith(f"{end.lower()}: {server.host}/#/runs/details/")
    is_explained = line.endswith(": failed: Preflight: main: Error (exit code 1)")
    assert is_explained == (end == "FAILED")


LAUNCHER = "E1127 12:00:00.000000      42 launcher_v2.go:473] Component failed to execute "
LAUNCHER += "successfully: exit status 2"
DRIVER = "F1127 12:00:00.000000      13 main.go:127] KFP driver: driver.Container(...) failed"
OWN = "captioner: error: a: not there"
PROGRAM = ["Traceback …", "ImportError: torch", LAUNCHER]


@pytest.mark.parametrize("is_ui", [False, True], ids=["api", "ui"])
@pytest.mark.parametrize(
    ("failing", "message", "lines", "reason"),
    [
        ("preflight", OWN, [], f"Preflight: {OWN}"),
        ("preflight", "", [OWN, LAUNCHER], f"Preflight: {OWN}"),
        ("preflight", "", PROGRAM, "Preflight: ImportError: torch"),
        ("preflight", "", [], "Preflight: main: Error (exit code 1)"),
        ("preflight-driver", "", ["{", "}", DRIVER], f"Preflight's driver: {DRIVER}"),
    ],
    ids=["message", "log", "defect", "nothing", "driver"],
)
def test_waiting_ends_with_the_failed_steps_last_line(
    failing: str, message: str, lines: list[str], reason: str, is_ui: bool
) -> None:
    failure = {"failing": failing, "message": message, "log": "\n".join(lines)}
    with KfpServer(("RUNNING", "FAILED"), is_ui=is_ui, **failure) as server:
        done = waited(server)
    assert done.exit_code == 1 and done.document["error"] == f"failed: {reason}"


@pytest.mark.parametrize("large", [True, False])
def test_waiting_says_where_the_list_of_steps_has_stopped(
    large: bool, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(following, "LIST_PAUSE", 0.05)
    with KfpServer(states=(*["RUNNING"] * 40, "SUCCEEDED"), large=large) as server:
        assert waited(server).exit_code == 0
    log = capfd.readouterr().err
    assert log.count("too large for the server's list of steps; waiting for its end") == large
    assert ("Preflight succeeded" in log) == (not large)


def test_a_failed_run_that_is_not_listed_says_where_the_reason_is() -> None:
    with KfpServer(states=("RUNNING", "FAILED"), large=True) as server:
        error = waited(server).document["error"]
    assert error.startswith("failed, and the server lists no step that did")


def test_without_a_manifest_the_log_of_the_failed_tasks_pod_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(KfpServer, "_manifest", lambda *_: {})
    with KfpServer(("FAILED",), failing="preflight-driver", log=DRIVER) as server:
        assert waited(server).document["error"] == f"failed: Preflight's driver: {DRIVER}"


def test_an_empty_secret_that_got_to_the_server_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the UI's form, which refuses nothing."""
    empty = {"images": "a", "output": "b", "secret_name": ""}
    monkeypatch.setattr(submit.SubmitConfig, "arguments", lambda _: empty)
    with KfpServer() as server:
        error = waited(server).document["error"]
    assert "Preflight's driver: F1127" in error and "Expected a non-empty string" in error


@pytest.mark.parametrize(
    "command", [("submit",), ("schedule", "--name", "nightly", "--every", "3600")]
)
def test_an_empty_secret_is_refused_as_the_server_would_not_say_why(
    captioner: Run, command: tuple[str, ...]
) -> None:
    with KfpServer() as server:
        options = ("--host", server.host, *PIPELINE, *PARAMETERS)
        done = captioner(*command, *options, "--param", "secret_name=")
    assert done.returncode == 2 and not server.runs and not server.recurring, done.stdout
    assert "param secret_name: is empty; name a Kubernetes secret" in done.stderr


def test_a_schedule_is_made_once(captioner: Run) -> None:
    with KfpServer() as server:
        options = ("schedule", "--host", server.host, *PIPELINE, *PARAMETERS, "--name", "nightly")
        done = captioner(*options, "--cron", "0 3 * * *")
        assert done.returncode == 0, done.stderr
        assert "/#/recurringrun/details/recurring_run-1" in done.stdout
        again = captioner(*options, "--every", "3600")
    (row,) = server.recurring.values()
    assert row["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * *"
    assert row["mode"] == "ENABLE" and row["no_catchup"]
    assert again.returncode == 2 and "nightly: is already scheduled" in again.stderr


def test_who_is_asking_is_proved_by_a_token_that_is_never_shown(captioner: Run) -> None:
    with KfpServer(token="t0ken") as server:
        options = ("submit", "--host", server.host, *PIPELINE, *PARAMETERS)
        refused = captioner(*options)
        wrong = captioner(*options, KFP_TOKEN="wr0ng")
        done = captioner(*options, "--auth", "token", KFP_TOKEN="t0ken")
    assert refused.returncode == wrong.returncode == 2 and done.returncode == 0, done.stderr
    assert "401" in refused.stderr and "--auth" in refused.stderr
    shown = (wrong.stderr, done.stdout, done.stderr)
    assert not any("t0ken" in text or "wr0ng" in text for text in shown)


@contextlib.contextmanager
def leading_to(elsewhere: str | None) -> Iterator[tuple[str, list[Message]]]:
    """Yield the address of a server that leads to another, or is where people sign in; and the
    headers that it got."""
    got: list[Message] = []

    class Leading(Handler):
        def do_GET(self) -> None:
            got.append(self.headers)
            location = [("Location", f"{elsewhere}/sign-in")] if elsewhere else []
            self.reply(302 if elsewhere else 200, headers=location)

    with serving(Leading) as address:
        yield address, got


def test_a_token_goes_to_the_server_that_was_named_and_not_where_that_leads_to(
    captioner: Run,
) -> None:
    with leading_to(None) as (signing_in, there), leading_to(signing_in) as (host, here):
        captioner("submit", "--host", host, *PIPELINE, *PARAMETERS, KFP_TOKEN="t0ken")
    assert here[0]["Authorization"] == "Bearer t0ken"
    assert there and not any("t0ken" in str(headers) for headers in there)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--param", "imags=x"), ["imags", "images"]),
        (("--param", "images"), ["NAME=VALUE"]),
        ((), ["--param images=…", "--param output=…"]),
        *(
            ((*PARAMETERS, f"--param=caption_workers={value}"), ["workers", "number integer"])
            for value in ("many", "1.5", "true")
        ),
        ((*PARAMETERS, "--param", "gpu_tolerations={}"), ["gpu_tolerations", "list"]),
        ((*PARAMETERS, "--auth", "iap"), ["--client_id"]),
        ((*PARAMETERS, "--auth", "token"), ["KFP_TOKEN"]),
        ((*PARAMETERS, "--host", "kfp.example.com"), ["kfp.example.com", "https://"]),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line_before_the_server_is_asked(
    captioner: Run, options: tuple[str, ...], words: list[str]
) -> None:
    host = () if "--host" in options else ("--host", "http://127.0.0.1:9")
    done = captioner("submit", *host, *PIPELINE, *options, KFP_TOKEN="")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("pipeline", "parameter", "message"),
    [
        ("train_captioner", "preset=huge", "preset 'huge': unknown; one of clip-l-gpt2"),
        ("train_captioner", 'candidates=[{"name": "a", "colour": 1}]', "option 'colour'"),
        ("train_captioner", 'candidates=[{"name": "a", "ema": NaN}]', "ema: nan is not a"),
        ("train_captioner", "candidates=[]", "candidates: expected a JSON list of objects"),
        (
            "train_captioner",
            'train_options={"dropout": NaN}',
            "train_options: dropout: nan is not a finite",
        ),
        ("train_captioner", 'register_options={"metric": "Cider"}', "metric 'Cider': unknown"),
        (
            "train_captioner",
            'register_options={"min_gain": NaN}',
            "min_gain: nan is not a finite number",
        ),
        ("train_captioner", 'eval_options={"num_beams": 0}', "eval_options: num_beams: 0 is not"),
        ("train_captioner", "gpu_count=many", "gpu_count 'many': is not a whole number"),
        ("caption_bucket", 'caption_options={"colour": 1}', "unknown option 'colour'"),
        ("caption_bucket", 'caption_options={"output": "x"}', "output is set by the pipeline"),
        ("caption_bucket", "caption_workers=65", "caption_workers: 65 is not from 1 to 64"),
        ("train_captioner", "ingest_workers=0", "ingest_workers: 0 is not from 1 to 64"),
        ("train_captioner", 'ingest_options={"images": "x"}', "ingest_options: images: a dataset"),
    ],
)
def test_what_preflight_would_refuse_is_refused_before_anything_is_uploaded(
    pipeline: str, parameter: str, message: str
) -> None:
    required = ("images=gs://b/in", "output=gs://b/out")
    if pipeline == "train_captioner":
        required = tuple(option.removeprefix("--param=") for option in TRAINING)
    with pytest.raises(UserError, match=re.escape(message)):
        submit.SubmitConfig(host="http://h", pipeline=pipeline, param=(*required, parameter))


def test_a_server_that_is_not_there_is_said_at_once(captioner: Run) -> None:
    done = captioner("submit", "--host", "http://127.0.0.1:9", *PIPELINE, *PARAMETERS)
    assert done.returncode == 1 and "127.0.0.1:9: no server answers there" in done.stderr
    assert not any("Retrying" in line or "Traceback" in line for line in done.stderr.splitlines())
