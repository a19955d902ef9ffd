"""The needs of a pipeline are checked at once, against a real MLflow server: one line names all
problems."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.preflight.component import preflight as component
from model_lib import UserError
from model_lib.errors import WorkError
from model_lib.ingest.config import IngestConfig
from model_lib.steps.candidates import candidate_configs
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


def test_what_is_there_is_accepted(
    server: str, scenes: Path, saved_model: Path, archives: Path, tmp_path: Path
) -> None:
    preflight(
        data=IngestConfig(dataset=str(scenes), output="-"),
        images=str(scenes),
        caption_output=str(tmp_path / "captions"),
        outputs=[str(tmp_path / "out"), ""],
        weights=[str(saved_model), ""],
        keys=["MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD"],
        environment={"MLFLOW_TRACKING_URI": server, "MLFLOW_TRACKING_PASSWORD": "x"},
    )
    assert not list((tmp_path / "out").iterdir())
    data = IngestConfig(dataset=str(archives), output="-")
    preflight(data=data, environment={})
    (archives / "val2017.zip").unlink()
    with pytest.raises(UserError, match="archives/val2017: not found, nor COCO's archive of it"):
        preflight(data=data, environment={})


def test_everything_that_is_missing_is_named_at_once(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = str(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    start = {"name": "a", "vision": empty, "decoder": empty, "tokenizer": empty}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    with pytest.raises(UserError) as refused:
        preflight(
            data=IngestConfig(dataset=empty, output="-"),
            images=str(tmp_path / "gone"),
            outputs=["/proc/x"],
            weights=["models:/captioner@champion", "models:/captioner/99"],
            candidates=candidate_configs([start]),
            machines=SEVERAL,
            secret="mine",
            keys=["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI"],
            environment={"MLFLOW_TRACKING_URI": server},
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
        "caption_output: is empty",
        "secret mine: no key MLFLOW_TRACKING_PASSWORD",
    ):
        assert words in str(refused.value), str(refused.value)
    assert "MLFLOW_TRACKING_URI" not in str(refused.value)


def test_a_tracking_server_that_is_not_there_is_named_within_a_minute() -> None:
    do_not_wait_long()
    for name in ("CAPTIONER_RETRY_SECONDS", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        assert os.environ[name] == "10"
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(WorkError, match=f"MLflow at {address}: "):  # the step is tried again
        preflight(environment={"MLFLOW_TRACKING_URI": address})


def test_a_check_without_an_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket behind a firewall answers neither yes nor no."""
    monkeypatch.setattr("model_lib.steps.preflight.TIMEOUT", 0.5)
    monkeypatch.setattr("model_lib.io.storage.exists", lambda folder: time.sleep(30))
    with pytest.raises(WorkError, match="reading gs://far/away: no answer within"):
        preflight(images="gs://far/away", caption_output="/tmp", environment={})


def test_the_rehearsed_trainjob_has_nothing_from_the_secret_in_plain_text(
    data: Path, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    """It is the document that the step sends, which does not adopt its secret's variables."""
    environment.setenv("CAPTIONER_MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/secret.db")
    environment.setenv("KFP_RUN_ID", "kfp-1")
    environment.setenv("KFP_POD_NAME", "step")
    options = {name: getattr(SEVERAL, name) for name in ("nodes", "image", "cpu", "memory")}
    secret = {"secret_name": "s", "secret_keys": [], "secret_variables": {"hub": "HF_TOKEN"}}
    candidate = {"candidates": [{"name": "a"}], "preset": "tiny"}
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
    candidates = candidate_configs([{"name": "a", **start}])
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.push("team/gpt2", "1" * 40, tmp_path / "gpt2", "main", "v1")
        preflight(candidates=candidates, environment={})
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        preflight(candidates=candidates, environment={})
        with pytest.raises(UserError, match=r"team/clip: .*cache.*HF_HUB_OFFLINE is set"):
            preflight(weights=["team/clip"], environment={})


def test_the_weights_that_candidates_start_from() -> None:
    common = {"vision": "", "decoder": "", "tokenizer": ""}
    assert training_sources(candidate_configs([{"name": "a"}], preset="tiny", **common)) == ([], [])
    two = [{"name": "a"}, {"name": "b", "decoder": "gs://b/gpt2", "tokenizer": "gs://b/bpe"}]
    configs = candidate_configs(two, preset="clip-l-gpt2-medium", **common)
    gpt2, clip = "openai-community/gpt2-medium", "openai/clip-vit-large-patch14"
    assert training_sources(configs) == (["gs://b/gpt2", gpt2, clip], ["gs://b/bpe", gpt2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "precision: Input should be 'auto', 'bfloat16'"),
        ({"learning_rate": -1.0}, "learning_rate: -1.0"),
        ({"min_gain": -1.0}, "min_gain: -1.0 is not at least 0"),
        ({"metric": "Cider"}, "metric 'Cider': unknown; one of CIDEr"),
        ({"metric": "CLIPScore"}, "register_metric CLIPScore: needs eval_clip"),
        ({"metric": "SPICE"}, "register_metric SPICE: is not computed in a pipeline"),
        ({"num_beams": 0}, "num_beams: 0 is not at least 1"),
        ({"limit": -1}, "limit: -1 is not at least 0"),
        ({"gpu_count": ""}, "gpu_count '': is not a whole number"),
        ({"candidates": [{"name": "a", "colour": "red"}]}, "unknown option 'colour'"),
    ],
)
def test_options_out_of_range_are_refused_before_any_work(
    options: dict, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("model_lib.steps.preflight.preflight", None)
    required = {"run_name": "r", "secret_name": "s", "secret_keys": [], "preset": "tiny"}
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
        candidate_configs(candidates, preset="tiny")
