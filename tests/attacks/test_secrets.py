"""Secrets of the environment are in nothing that is produced: no log, YAML, database, model, checkpoint or page."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from model_lib.errors import UserError, printable

SECRET = "s3cr3t-9f27c1d4"
NAMES = ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "CAPTIONER_MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"]
NAMES += ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WEBHOOK_URL"]
ENVIRONMENT = {name: f"{SECRET}-{number}" for number, name in enumerate(NAMES)}
PROCESS = """
import json, sys
from model_lib.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as stop:
        assert not stop.code, (words, stop.code)
"""


def test_what_the_stages_make_and_say_holds_none(scenes: Path, tmp_path: Path) -> None:
    stages = [
        ["ingest", "--dataset", str(scenes), "--output", "data"],
        ["train", "--data", "data", "--output", "out", "--preset", "tiny", "--epochs", "1"],
        ["evaluate", "--model", "out/best", "--data", "data", "--output", "judged", "--limit", "4", "--num_beams", "1"],
        ["register", "--evaluations", "judged"],
        ["batch", "--images", str(scenes / "val2017"), "--output", "captions", "--model", "models:/captioner@champion"],
        ["compile", "--output", "compiled"],
        ["info", "--json"],
    ]
    environment = {**os.environ, **ENVIRONMENT}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-c", PROCESS, json.dumps(stages)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [file for file in tmp_path.rglob("*") if file.is_file()]
    endings = {file.suffix for file in made}
    assert {".db", ".html", ".json", ".parquet", ".safetensors", ".yaml"} <= endings
    for content in (done.stdout, done.stderr, *(file.read_bytes() for file in made)):
        assert SECRET.encode() not in content


def test_a_password_in_an_address_is_not_in_what_fails(captioner: Callable[..., CompletedProcess], data: Path) -> None:
    address = f"http://user:{SECRET}@127.0.0.1:9"
    given = ("train", "--data", data, "--output", "out", "--preset", "tiny", "--epochs", "1")
    done = captioner(*given, MLFLOW_TRACKING_URI=address)
    assert done.returncode == 1 and "MLflow at http://user:***@127.0.0.1:9: fails" in done.stderr, done.stderr
    assert SECRET not in done.stderr + done.stdout


@pytest.mark.parametrize("command", ["models", "rollback"])
def test_what_mlflow_itself_says_holds_no_password(captioner: Callable[..., CompletedProcess], command: str) -> None:
    given = {"MLFLOW_TRACKING_URI": f"http://user:{SECRET}@127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = captioner(command, **given)
    assert done.returncode == 1 and "http://user:***@127.0.0.1:9" in done.stderr, done.stderr
    assert SECRET not in done.stderr + done.stdout


@pytest.mark.parametrize(
    "address", [f"postgresql://u:{SECRET}@h/db", f"redis://:{SECRET}@h", f"http://u:a@{SECRET}@h/x"]
)
def test_no_message_holds_a_password(address: str) -> None:
    assert SECRET not in printable(f"{address}: gone") and SECRET not in str(UserError(f"{address}: gone"))
