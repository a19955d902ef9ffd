"""Submitting and scheduling against a server on loopback, through kfp's own client, as a user
does."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from pipelines import following, submit
from pipelines.submit import COMPILED
from tests.helpers.kfp_server import KfpServer

Run = Callable[..., CompletedProcess]
BUCKET: dict[str, Any] = {
    "pipeline": "caption_bucket",
    "param": ("caption_images=a", "caption_output=b"),
    "wait": True,
}
PLACES = ("--param", "caption_images=gs://b/in", "--param", "caption_output=gs://b/out")
NEEDED = [
    f"--param={name}=gs://b/{name}"
    for name in ("data_dataset", "data_output", "train_checkpoint_uri")
]


def test_a_run_is_started_and_the_pipeline_uploaded_once(captioner: Run) -> None:
    with KfpServer() as server:
        options = ("submit", "--host", server.host, "--pipeline", "train_captioner", *NEEDED)
        candidates = [{"name": "a"}, {"name": "b", "epochs": 3}]
        first = captioner(
            *options,
            "--param",
            "train_learning_rate=1e-4",
            "--param",
            f"train_candidates={json.dumps(candidates)}",
        )
        assert first.returncode == 0, first.stderr
        assert (
            "names images of this machine, captioner-core:" in first.stderr
            and "make push" in first.stderr
        )
        assert first.stdout.splitlines()[-1].endswith(f"{server.host}/#/runs/details/run-1")
        second = captioner(*options, "--experiment", "mine", "--run_name", "again", "--json")
        assert second.returncode == 0, second.stderr
        assert json.loads(second.stdout)["link"] == f"{server.host}/#/runs/details/run-2"

    assert len(server.pipelines) == len(server.versions) == 1, "the second run found the version"
    (version,) = server.versions.values()
    assert version["display_name"] == json.loads(second.stdout)["version"]
    parameters = server.runs["run-1"]["runtime_config"]["parameters"]
    assert (
        parameters["train_learning_rate"] == 1e-4 and parameters["train_candidates"] == candidates
    )
    assert server.runs["run-2"]["display_name"] == "again"
    assert [row["display_name"] for row in server.experiments.values()] == ["captioner", "mine"]


def test_new_content_becomes_a_new_version(
    captioner: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KfpServer() as server:
        config = submit.SubmitConfig(
            host=server.host,
            pipeline="caption_bucket",
            param=("caption_images=a", "caption_output=b"),
        )
        before = submit.submit(config).document["version"]
        changed = (
            (COMPILED / "caption_bucket.yaml")
            .read_text()
            .replace("captioner-core:", "another-core:")
        )
        (tmp_path / "caption_bucket.yaml").write_text(changed)
        monkeypatch.setattr(submit, "COMPILED", tmp_path)
        after = submit.submit(config).document["version"]
    assert before != after and [row["display_name"] for row in server.versions.values()] == [
        before,
        after,
    ]
    assert len(server.pipelines) == 1


@pytest.mark.parametrize(("end", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELED", 1)])
def test_waiting_follows_the_run_to_its_end(captioner: Run, end: str, code: int) -> None:
    before = ("PENDING", 503, "RUNNING") if end == "SUCCEEDED" else ()
    with KfpServer(states=(*before, end)) as server:
        done = captioner(
            "submit", "--host", server.host, "--pipeline", "caption_bucket", *PLACES, "--wait"
        )
    assert done.returncode == code, done.stderr
    for state in (*before, end):
        assert state == 503 or f"Preflight {str(state).lower()}" in done.stderr, done.stderr
    assert not any(word in done.stderr for word in ("driver", "executor", "root", "exit-handler"))
    assert done.stdout.startswith(f"{end.lower()}: {server.host}/#/runs/details/")
    assert done.stdout.strip().endswith(": failed: Preflight: main: Error (exit code 1)") == (
        end == "FAILED"
    )


LAUNCHER = (
    "E1127 12:00:00.000000      42 launcher_v2.go:473] Component failed to execute successfully: "
    "exit status 2"
)
DRIVER = "F1127 12:00:00.000000      13 main.go:127] KFP driver: driver.Container(...) failed"


@pytest.mark.parametrize("is_ui", [False, True], ids=["api", "ui"])
@pytest.mark.parametrize(
    ("failing", "message", "lines", "reason"),
    [
        (
            "preflight",
            "captioner: error: a: not there",
            [],
            "Preflight: captioner: error: a: not there",
        ),
        (
            "preflight",
            "",
            ["captioner: failed: b: fails", LAUNCHER],
            "Preflight: captioner: failed: b: fails",
        ),
        (
            "preflight",
            "",
            ["Traceback …", "ImportError: torch", LAUNCHER],
            "Preflight: ImportError: torch",
        ),
        ("preflight", "", [], "Preflight: main: Error (exit code 1)"),
        ("preflight-driver", "", ["{", "}", DRIVER], f"Preflight's driver: {DRIVER}"),
    ],
    ids=["message", "log", "defect", "nothing", "driver"],
)
def test_waiting_ends_with_the_failed_steps_own_words(
    failing: str,
    message: str,
    lines: list[str],
    reason: str,
    is_ui: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following, "POLL", 0.01)
    log = "\n".join(lines)
    with KfpServer(
        ("RUNNING", "FAILED"), failing=failing, message=message, log=log, is_ui=is_ui
    ) as server:
        done = submit.submit(submit.SubmitConfig(host=server.host, **BUCKET))
    assert done.exit_code == 1 and done.document["error"] == f"failed: {reason}"


def test_waiting_says_where_the_list_of_steps_has_stopped(
    monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(following, "POLL", 0.01)
    monkeypatch.setattr(following, "LIST_PAUSE", 0.05)
    said = {}
    for large in (True, False):
        with KfpServer(states=(*["RUNNING"] * 40, "SUCCEEDED"), large=large) as server:
            done = submit.submit(submit.SubmitConfig(host=server.host, **BUCKET))
        assert done.exit_code == 0
        said[large] = capfd.readouterr().err
    stopped = "too large for the server's list of steps, which has stopped; waiting for its end"
    assert said[True].count(stopped) == 1 and "Preflight succeeded" not in said[True]
    assert stopped not in said[False] and "Preflight succeeded" in said[False]


def test_an_empty_secret_that_got_to_the_server_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the UI's form, which refuses nothing."""
    monkeypatch.setattr(following, "POLL", 0.01)
    config = submit.SubmitConfig(host="http://x", **BUCKET)
    given = {**config.arguments(), "secret_name": ""}
    monkeypatch.setattr(submit.SubmitConfig, "arguments", lambda _: given)
    with KfpServer() as server:
        done = submit.submit(replace(config, host=server.host))
    assert (
        "Preflight's driver: F1127" in done.document["error"]
        and "Expected a non-empty string" in done.document["error"]
    )


@pytest.mark.parametrize(
    "command", [("submit",), ("schedule", "--name", "nightly", "--every", "3600")]
)
def test_an_empty_secret_is_refused_as_the_server_would_not_say_why(
    captioner: Run, command: tuple[str, ...]
) -> None:
    with KfpServer() as server:
        where = ("--host", server.host, "--pipeline", "caption_bucket", *PLACES)
        done = captioner(*command, *where, "--param", "secret_name=")
    assert done.returncode == 2 and not server.runs and not server.recurring, done.stdout
    assert (
        "param secret_name: is empty; name a Kubernetes secret, which need not exist" in done.stderr
    )


def test_a_schedule_is_made_once(captioner: Run) -> None:
    with KfpServer() as server:
        options = (
            "schedule",
            "--host",
            server.host,
            "--pipeline",
            "caption_bucket",
            *PLACES,
            "--name",
            "nightly",
        )
        done = captioner(*options, "--cron", "0 3 * * *")
        assert done.returncode == 0, done.stderr
        assert "/#/recurringrun/details/recurring_run-1" in done.stdout
        again = captioner(*options, "--every", "3600")
    (row,) = server.recurring.values()
    assert (
        row["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * *"
        and row["mode"] == "ENABLE"
        and row["no_catchup"]
    )
    assert again.returncode == 2 and "nightly: is already scheduled" in again.stderr


def test_who_is_asking_is_proved_by_a_token_that_is_never_shown(captioner: Run) -> None:
    with KfpServer(token="t0ken") as server:
        options = ("submit", "--host", server.host, "--pipeline", "caption_bucket", *PLACES)
        refused = captioner(*options)
        wrong = captioner(*options, KFP_TOKEN="wr0ng")
        done = captioner(*options, "--auth", "token", KFP_TOKEN="t0ken")
    assert refused.returncode == wrong.returncode == 2 and done.returncode == 0, done.stderr
    assert (
        "401" in refused.stderr
        and "--auth" in refused.stderr
        and len(refused.stderr.splitlines()) == 1
    )
    assert not any(
        "t0ken" in text or "wr0ng" in text for text in (wrong.stderr, done.stdout, done.stderr)
    )


@contextlib.contextmanager
def leading_to(elsewhere: str | None) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield the address of a server that leads to another, or is where people sign in; and the
    headers that it got."""
    got: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append(dict(self.headers))
            self.send_response(302 if elsewhere else 200)
            if elsewhere:
                self.send_header("Location", f"{elsewhere}/sign-in")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()


def test_a_token_goes_to_the_server_that_was_named_and_not_where_that_leads_to(
    captioner: Run,
) -> None:
    with leading_to(None) as (signing_in, there), leading_to(signing_in) as (host, here):
        captioner(
            "submit", "--host", host, "--pipeline", "caption_bucket", *PLACES, KFP_TOKEN="t0ken"
        )
    assert here[0]["Authorization"] == "Bearer t0ken"
    assert there and not any("t0ken" in str(headers) for headers in there)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--param", "caption_imags=x"), ["caption_imags", "caption_images"]),
        (("--param", "caption_images"), ["NAME=VALUE"]),
        ((), ["--param caption_images=…", "--param caption_output=…"]),
        ((*PLACES, "--param", "caption_num_beams=many"), ["caption_num_beams", "number integer"]),
        ((*PLACES, "--param", "caption_num_beams=1.5"), ["caption_num_beams", "number integer"]),
        ((*PLACES, "--param", "caption_num_beams=true"), ["caption_num_beams", "number integer"]),
        ((*PLACES, "--param", "gpu_tolerations={}"), ["gpu_tolerations", "list"]),
        ((*PLACES, "--auth", "iap"), ["--client_id"]),
        ((*PLACES, "--auth", "token"), ["KFP_TOKEN"]),
        ((*PLACES, "--host", "kfp.example.com"), ["kfp.example.com", "https://"]),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line_before_the_server_is_asked(
    captioner: Run, options: tuple[str, ...], words: list[str]
) -> None:
    host = () if "--host" in options else ("--host", "http://127.0.0.1:9")
    done = captioner("submit", *host, "--pipeline", "caption_bucket", *options, KFP_TOKEN="")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_a_server_that_is_not_there_is_said_at_once(captioner: Run) -> None:
    done = captioner(
        "submit", "--host", "http://127.0.0.1:9", "--pipeline", "caption_bucket", *PLACES
    )
    assert done.returncode == 1 and "no Kubeflow Pipelines server answers there" in done.stderr
    assert len(done.stderr.splitlines()) == 1
