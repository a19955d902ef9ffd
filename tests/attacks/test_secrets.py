"""Secrets of the environment are in nothing that is produced: no log, YAML, database, model,
checkpoint or page."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pyarrow.parquet as pq
import pytest

from model_lib.errors import UserError, printable
from tests.helpers.services import Faults, faulty_proxy, mlflow_server, refusing

SECRET = "s3cr3t-9f27c1d4"
NAMES = [
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "CAPTIONER_MLFLOW_TRACKING_PASSWORD",
    "HF_TOKEN",
]
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
    """Tracked by a server that lets in whoever has the password."""
    stages = [
        ["ingest", "--dataset", str(scenes), "--output", "data"],
        ["train", "--data", "data", "--output", "out", "--preset", "tiny", "--epochs", "1"],
        [
            "evaluate",
            "--model",
            "out/best",
            "--data",
            "data",
            "--output",
            "evaluated",
            "--limit",
            "4",
            "--num_beams",
            "1",
        ],
        ["register", "--evaluations", "evaluated"],
        [
            "batch",
            "--images",
            str(scenes / "val2017"),
            "--output",
            "captions",
            "--model",
            "models:/captioner@champion",
        ],
        ["compile", "--output", "compiled"],
        ["info", "--json"],
    ]
    faults = Faults(0.0, seed=0)
    password = ENVIRONMENT["MLFLOW_TRACKING_PASSWORD"]
    faults.authorization = f"Basic {base64.b64encode(f'somebody:{password}'.encode()).decode()}"
    command = [sys.executable, "-c", PROCESS, json.dumps(stages)]
    with mlflow_server(tmp_path / "server") as server, faulty_proxy(server, faults) as address:
        given = {"MLFLOW_TRACKING_URI": address, "MLFLOW_TRACKING_USERNAME": "somebody"}
        environment = {**os.environ, **ENVIRONMENT, **given}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        environment.pop("MLFLOW_TRACKING_PASSWORD")
        denied = [sys.executable, "-m", "model_lib", "models"]
        assert (
            subprocess.run(denied, cwd=tmp_path, env=environment, capture_output=True).returncode
            == 1
        )
    made = [file for file in tmp_path.rglob("*") if file.is_file()]
    endings = {file.suffix for file in made}
    assert {".db", ".html", ".json", ".log", ".parquet", ".safetensors", ".yaml"} <= endings
    tables = [
        str(pq.read_table(file).to_pylist()).encode() for file in made if file.suffix == ".parquet"
    ]
    for content in (done.stdout, done.stderr, *tables, *(file.read_bytes() for file in made)):
        assert SECRET.encode() not in content and faults.authorization.encode() not in content


@pytest.mark.parametrize(
    ("command", "place", "names"),
    [
        (["models"], "MLFLOW_TRACKING_URI", ["MLFLOW_TRACKING_TOKEN"]),
        (["caption", "-f", "x.jpg", "--model", "somebody/captioner"], "HF_ENDPOINT", ["HF_TOKEN"]),
        (
            ["ingest", "--dataset", "s3://bucket/coco", "--output", "out"],
            "AWS_ENDPOINT_URL",
            ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"],
        ),
    ],
    ids=["mlflow", "hub", "s3"],
)
def test_what_a_server_refuses_is_not_told(
    command: list[str], place: str, names: list[str], tmp_path: Path
) -> None:
    """In a process that starts from nothing: a hub's address is read when its package is
    imported."""
    secrets = {name: ENVIRONMENT[name] for name in names}
    with refusing() as (address, proofs):
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", place: address, **secrets}
        given = [sys.executable, "-m", "model_lib", *command]
        done = subprocess.run(
            given, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
    assert any(secrets[names[0]] in proof for proof in proofs), (proofs, done.stderr)
    assert (
        done.returncode in (1, 2)
        and "Traceback" not in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert SECRET not in done.stderr + done.stdout


def test_a_password_in_an_address_is_not_in_what_fails(
    captioner: Callable[..., CompletedProcess], data: Path
) -> None:
    address = f"http://user:{SECRET}@127.0.0.1:9"
    given = ("train", "--data", data, "--output", "out", "--preset", "tiny", "--epochs", "1")
    done = captioner(*given, MLFLOW_TRACKING_URI=address)
    assert done.returncode == 1 and "MLflow at http://user:***@127.0.0.1:9: fails" in done.stderr, (
        done.stderr
    )
    assert SECRET not in done.stderr + done.stdout


@pytest.mark.parametrize("command", ["models", "rollback"])
def test_what_mlflow_itself_says_holds_no_password(
    captioner: Callable[..., CompletedProcess], command: str
) -> None:
    given = {
        "MLFLOW_TRACKING_URI": f"http://user:{SECRET}@127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    done = captioner(command, **given)
    assert done.returncode == 1 and "http://user:***@127.0.0.1:9" in done.stderr, done.stderr
    assert SECRET not in done.stderr + done.stdout


@pytest.mark.parametrize(
    "address", [f"postgresql://u:{SECRET}@h/db", f"redis://:{SECRET}@h", f"http://u:a@{SECRET}@h/x"]
)
def test_no_message_holds_a_password(address: str) -> None:
    assert SECRET not in printable(f"{address}: gone") and SECRET not in str(
        UserError(f"{address}: gone")
    )
