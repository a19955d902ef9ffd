"""Secrets of the environment are in no output: log, YAML, database, model, checkpoint or page."""

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
from tests.helpers.warm_python import warm_python

SECRET = "s3cr3t-9f27c1d4"
KEYS = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
NAMES = ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "CAPTIONER_MLFLOW_TRACKING_PASSWORD"]
NAMES += ["HF_TOKEN", *KEYS, "AWS_SESSION_TOKEN", "WEBHOOK_URL"]
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


def test_outputs_and_logs_of_the_stages_hold_none(scenes: Path, tmp_path: Path) -> None:
    """Tracked by a server that requires the password."""
    batch = f"batch --images {scenes}/val2017 --output captions"
    stages = [
        f"ingest --dataset {scenes} --output data",
        "train --data data --output out --preset tiny --epochs 1",
        "evaluate --model out/best --data data --output evaluated --limit 4 --num_beams 1",
        "register --evaluations evaluated",
        f"{batch} --model models:/captioner@champion",
        "compile --output compiled",
        "info --json",
    ]
    faults = Faults(0.0, seed=0)
    password = ENVIRONMENT["MLFLOW_TRACKING_PASSWORD"]
    faults.authorization = f"Basic {base64.b64encode(f'somebody:{password}'.encode()).decode()}"
    command = [warm_python(), "-c", PROCESS, json.dumps([stage.split() for stage in stages])]
    with mlflow_server(tmp_path / "server") as server, faulty_proxy(server, faults) as address:
        variables = {"MLFLOW_TRACKING_URI": address, "MLFLOW_TRACKING_USERNAME": "somebody"}
        environment = {**os.environ, **ENVIRONMENT, **variables}
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "timeout": 600}
        process = subprocess.run(command, **options)
        assert process.returncode == 0, process.stderr[-3000:]
        environment.pop("MLFLOW_TRACKING_PASSWORD")
        denied = subprocess.run([warm_python(), "-m", "model_lib", "models"], **options)
        assert denied.returncode == 1
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    suffixes = {file.suffix for file in files}
    assert {".db", ".html", ".json", ".log", ".parquet", ".safetensors", ".yaml"} <= suffixes
    contents = [process.stdout, process.stderr, *(file.read_bytes() for file in files)]
    tables = [file for file in files if file.suffix == ".parquet"]
    contents += [str(pq.read_table(file).to_pylist()).encode() for file in tables]
    for content in contents:
        assert SECRET.encode() not in content and faults.authorization.encode() not in content


@pytest.mark.parametrize(
    ("command", "variable", "names"),
    [
        (["models"], "MLFLOW_TRACKING_URI", ["MLFLOW_TRACKING_TOKEN"]),
        (["caption", "-f", "x.jpg", "--model", "somebody/captioner"], "HF_ENDPOINT", ["HF_TOKEN"]),
        (["ingest", "--dataset", "s3://b/coco", "--output", "out"], "AWS_ENDPOINT_URL", KEYS),
    ],
    ids=["mlflow", "hub", "s3"],
)
def test_a_secret_that_a_server_refuses_is_not_shown(
    command: list[str], variable: str, names: list[str], tmp_path: Path
) -> None:
    # A hub's address is read when its package is imported.
    python = sys.executable if variable == "HF_ENDPOINT" else warm_python()
    secrets = {name: ENVIRONMENT[name] for name in names}
    with refusing() as (address, proofs):
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", variable: address, **secrets}
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 600}
        words = [python, "-m", "model_lib", *command]
        process = subprocess.run(words, env=environment, **options)
    assert any(secrets[names[0]] in proof for proof in proofs), (proofs, process.stderr)
    assert process.returncode in (1, 2) and "Traceback" not in process.stderr
    assert process.stderr.count("\n") == 1 and SECRET not in process.stderr + process.stdout


@pytest.mark.parametrize("command", ["models", "rollback", "train"])
def test_a_password_in_an_address_is_not_shown(
    captioner: Callable[..., CompletedProcess], data: Path, command: str
) -> None:
    address = f"http://user:{SECRET}@127.0.0.1:9"
    options = ("--data", data, "--output", "out", "--preset", "tiny") if command == "train" else ()
    process = captioner(command, *options, MLFLOW_TRACKING_URI=address)
    assert process.returncode == 1, process.stderr
    assert "MLflow at http://user:***@127.0.0.1:9: fails" in process.stderr
    assert SECRET not in process.stderr + process.stdout


@pytest.mark.parametrize(
    "address", [f"postgresql://u:{SECRET}@h/db", f"redis://:{SECRET}@h", f"http://u:a@{SECRET}@h/x"]
)
def test_no_message_holds_a_password(address: str) -> None:
    assert SECRET not in printable(f"{address}: gone")
    assert SECRET not in str(UserError(f"{address}: gone"))
