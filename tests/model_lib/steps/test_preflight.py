"""The needs of a pipeline are checked at once, against a real MLflow server: one line names all
problems."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.preflight.component import preflight as component
from model_lib import UserError
from model_lib.errors import WorkError
from model_lib.steps.form import Form, candidate_configs, read_form
from model_lib.steps.preflight import preflight, training_sources
from model_lib.tracking.server import do_not_wait_long
from model_lib.train.trainjob import Machines
from tests.helpers.hub import running_hub
from tests.helpers.kube_server import KubeServer
from tests.helpers.services import free_port, mlflow_server

SEVERAL = Machines(
    nodes=2,
    image="x",
    cpu=1,
    memory=1,
    gpu_resource="nvidia.com/gpu",
    gpu_count="0",
    gpu_node_selector={},
    gpu_tolerations=[],
    secret_name="mine",
    secret_variables={},
)


NO_CAPTIONS: dict = {"images": "", "caption_options": {}, "caption_workers": 1}


def form(output: str, **parameters: Any) -> Form:
    """Return the parameters of training if `data` or a preset is among them, else of captioning."""
    training = {"preset": "tiny", "candidates": [{"name": "a"}]} if "data" in parameters else {}
    return read_form(output=output, **{**NO_CAPTIONS, **training, **parameters})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


def test_what_is_there_is_accepted(
    server: str, scenes: Path, saved_model: Path, archives: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    environment = {"MLFLOW_TRACKING_URI": server, "KFP_WORKFLOW": "w"}
    preflight(
        form(output, data=str(scenes), images=str(scenes)),
        output=output,
        model=str(saved_model),
        environment=environment,
    )
    assert not list((tmp_path / "out").iterdir())
    packed = form(output, data=str(archives))
    preflight(packed, output=output, environment={})
    (archives / "val2017.zip").unlink()
    with pytest.raises(UserError, match="archives/val2017: not found, nor COCO's archive of it"):
        preflight(packed, output=output, environment={})


def test_everything_that_is_missing_is_named_at_once(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = str(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    start = {"name": "a", "vision": empty, "decoder": empty, "tokenizer": empty}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    with pytest.raises(UserError) as refused:
        preflight(
            form(
                "/proc/x",
                data=empty,
                images=str(tmp_path / "gone"),
                preset="clip-l-gpt2-medium",
                candidates=[start, {"name": "b", "init_from": "models:/captioner/99"}],
            ),
            output="/proc/x",
            model="models:/captioner@champion",
            machines=SEVERAL,
            secret="mine",
            environment={"KFP_WORKFLOW": "w"},
        )
    for words in (
        f"{tmp_path}/gone: not there",
        "/proc/x: cannot be written to",
        f"{empty}: holds no model",
        "train_nodes: there is no Kubernetes cluster here",
        f"{empty}: holds no tokenizer",
        f"{empty}: holds nothing; expected COCO 2017's layout",
        "models:/captioner/99: not in the model registry",
        "models:/captioner@champion: not in the model registry",
        "secret mine: no key MLFLOW_TRACKING_URI",
    ):
        assert words in str(refused.value), str(refused.value)


def test_a_tracking_server_that_is_not_there_is_named_within_a_minute() -> None:
    do_not_wait_long()
    for name in ("CAPTIONER_RETRY_SECONDS", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        assert os.environ[name] == "10"
    address = f"http://127.0.0.1:{free_port()}"
    environment = {"MLFLOW_TRACKING_URI": address}
    with pytest.raises(WorkError, match=f"MLflow at {address}: "):  # the step is tried again
        preflight(form("memory://o"), output="memory://o", environment=environment)


def test_a_check_without_an_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket behind a firewall answers neither yes nor no."""
    monkeypatch.setattr("model_lib.steps.preflight.TIMEOUT", 0.5)
    monkeypatch.setattr("model_lib.io.storage.exists", lambda folder: time.sleep(30))
    with pytest.raises(WorkError, match="reading gs://far/away: no answer within"):
        preflight(form("/tmp", images="gs://far/away"), output="/tmp", environment={})


def test_the_rehearsed_trainjob_has_nothing_from_the_secret_in_plain_text(
    scenes: Path, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    """It is the document that the step sends, which does not adopt its secret's variables."""
    environment.setenv("CAPTIONER_MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/secret.db")
    environment.setenv("KFP_RUN_ID", "kfp-1")
    environment.setenv("KFP_POD_NAME", "step")
    options = {name: getattr(SEVERAL, name) for name in ("nodes", "image", "cpu", "memory")}
    secret = {"secret_name": "s", "secret_variables": {"hub": "HF_TOKEN"}}
    candidate = {"candidates": [{"name": "a"}], "preset": "tiny", "data": str(scenes)}
    candidate |= {"output": str(tmp_path / "out"), **NO_CAPTIONS}
    with KubeServer(tmp_path) as cluster:
        environment.setenv("KUBECONFIG", str(cluster.kubeconfig))
        component.python_func(
            run_name="r", gpu_resource="nvidia.com/gpu", **candidate, **options, **secret
        )
    (document,) = cluster.checked
    variables = {row["name"]: row.get("value") for row in document["spec"]["trainer"]["env"]}
    assert variables == {"KFP_RUN_ID": "kfp-1", "HF_TOKEN": None}


def test_weights_in_the_cache_are_enough_where_the_hub_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    start = {"vision": "team/gpt2", "decoder": "team/gpt2", "tokenizer": "team/gpt2@v1"}
    output = str(tmp_path / "out")
    listed = [{"name": "a", **start}]
    candidates = form(output, data="-", preset="clip-l-gpt2-medium", candidates=listed)
    candidates = replace(candidates, ingest=None)
    other = form(output, images=str(tmp_path))
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.push("team/gpt2", "1" * 40, tmp_path / "gpt2", "main", "v1")
        preflight(candidates, output=output, environment={})
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        preflight(candidates, output=output, environment={})
        with pytest.raises(UserError, match=r"team/clip: .*cache.*HF_HUB_OFFLINE is set"):
            preflight(other, output=output, model="team/clip", environment={})


def test_the_weights_that_candidates_start_from() -> None:
    assert training_sources(candidate_configs([{"name": "a"}], "tiny", {})) == ([], [])
    two = [{"name": "a"}, {"name": "b", "decoder": "gs://b/gpt2", "tokenizer": "gs://b/bpe"}]
    configs = candidate_configs(two, "clip-l-gpt2-medium", {})
    gpt2, clip = "openai-community/gpt2-medium", "openai/clip-vit-large-patch14"
    assert training_sources(configs) == (["gs://b/gpt2", gpt2, clip], ["gs://b/bpe", gpt2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_options": {"precision": "fp16"}}, "precision: Input should be 'auto', 'bfloat16'"),
        ({"train_options": {"learning_rate": -1.0}}, "train_options: learning_rate: -1.0"),
        ({"train_options": {"preset": "tiny"}}, "train_options: preset is a parameter of its own"),
        ({"register_options": {"min_gain": -1.0}}, "min_gain: -1.0 is not at least 0"),
        ({"register_options": {"metric": "Cider"}}, "metric 'Cider': unknown; one of CIDEr"),
        ({"register_options": {"metric": "CLIPScore"}}, "metric CLIPScore needs clip in eval_op"),
        ({"register_options": {"metric": "SPICE"}}, "metric SPICE is not computed in a pipeline"),
        ({"eval_options": {"num_beams": 0}}, "eval_options: num_beams: 0 is not at least 1"),
        ({"eval_options": {"limit": -1}}, "limit: -1 is not at least 0"),
        ({"eval_options": {"data": "x"}}, "eval_options: data is set by the pipeline; leave it"),
        ({"ingest_workers": 65.0}, "ingest_workers: 65.0 is not from 1 to 64"),
        ({"gpu_count": ""}, "gpu_count '': is not a whole number"),
        ({"candidates": [{"name": "a", "colour": "red"}]}, "unknown option 'colour'"),
    ],
)
def test_options_out_of_range_are_refused_before_any_work(
    options: dict, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("model_lib.steps.preflight.preflight", None)
    required = {"run_name": "r", "secret_name": "s", "preset": "tiny", "data": "d"}
    required |= {"output": "o", **NO_CAPTIONS}
    with pytest.raises(SystemExit, match="2"):
        component.python_func(**{**required, "candidates": [{"name": "a"}], **options})
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        ([], "expected a JSON list"),
        ({"name": "a"}, "expected a JSON list"),
        ([{"name": "a", "lerning_rate": 1}], "lerning_rate"),
        ([{"name": "a"}, {"name": "a"}], "a name of its own"),
        ([{"name": "a", "output": "x"}], "output is set by the pipeline"),
        ([{"name": "a", "epochs": -1}], "epochs: -1"),
    ],
)
def test_wrong_candidates_are_refused(candidates: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        candidate_configs(candidates, "tiny", {})
