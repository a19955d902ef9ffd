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
from model_lib.steps import preflight
from model_lib.steps.candidates import candidate_configs
from model_lib.steps.preflight import Needs, training_sources
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
    server: str, scenes: Path, saved_model: Path, gpt2_tokenizer: Path, tmp_path: Path
) -> None:
    preflight.preflight(
        Needs(
            dataset=str(scenes),
            folders=[str(scenes), ""],
            outputs=[str(tmp_path / "out"), str(tmp_path / "captions")],
            weights=[str(saved_model)],
            tokenizers=[str(gpt2_tokenizer)],
            pairs={"images": "", "output": ""},
            keys=["MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD"],
            environment={"MLFLOW_TRACKING_URI": server, "MLFLOW_TRACKING_PASSWORD": "x"},
        )
    )
    assert not list((tmp_path / "out").iterdir())


def test_everything_that_is_missing_is_named_at_once(
    server: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    needs = Needs(
        folders=[str(tmp_path / "gone"), str(scenes)],
        outputs=["/proc/x"],
        dataset=str(tmp_path / "empty"),
        weights=[str(tmp_path / "empty"), "models:/captioner@champion", "models:/captioner/99"],
        tokenizers=[str(tmp_path / "empty")],
        machines=SEVERAL,
        pairs={"caption_images": "x", "caption_output": ""},
        secret="mine",
        keys=["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI"],
        environment={"MLFLOW_TRACKING_URI": server},
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    with pytest.raises(UserError) as refused:
        preflight.preflight(needs)
    for words in (
        f"{tmp_path}/gone: not there",
        "/proc/x: cannot be written to",
        f"{tmp_path}/empty: holds no model",
        "train_nodes: there is no Kubernetes cluster here",
        f"{tmp_path}/empty: holds no tokenizer",
        f"{tmp_path}/empty/annotations/captions_train2017.json: not found",
        "models:/captioner/99: not in the model registry",
        "models:/captioner@champion: not in the model registry",
        "caption_output: is empty",
        "secret mine: no key MLFLOW_TRACKING_PASSWORD",
    ):
        assert words in str(refused.value), str(refused.value)
    assert "MLFLOW_TRACKING_URI" not in str(refused.value) and str(scenes) not in str(refused.value)


def test_a_data_set_as_its_archives_is_there_and_without_one_of_them_is_not(archives: Path) -> None:
    preflight.preflight(Needs(dataset=str(archives), environment={}))
    (archives / "val2017.zip").unlink()
    with pytest.raises(UserError, match="archives/val2017: not found, nor COCO's archive of it"):
        preflight.preflight(Needs(dataset=str(archives), environment={}))


def test_a_tracking_server_that_is_not_there_is_named_within_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (
        "CAPTIONER_RETRY_SECONDS",
        "MLFLOW_HTTP_REQUEST_TIMEOUT",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    ):
        monkeypatch.setenv(name, "600")  # so that they are put back as they were
    do_not_wait_long()
    assert (
        os.environ["CAPTIONER_RETRY_SECONDS"] == os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
    )
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        WorkError, match=f"MLflow at {address}: "
    ):  # which may pass: the step is tried again
        preflight.preflight(Needs(environment={"MLFLOW_TRACKING_URI": address}))


def test_a_check_without_an_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket behind a firewall answers neither yes nor no."""
    monkeypatch.setattr(preflight, "TIMEOUT", 0.5)
    monkeypatch.setattr(preflight, "_readable", lambda folder: time.sleep(30))
    with pytest.raises(WorkError, match="reading gs://far/away: no answer within"):
        preflight.preflight(Needs(folders=["gs://far/away"], environment={}))


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
    needs = Needs(weights=["team/gpt2"], tokenizers=["team/gpt2@v1"], environment={})
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.push("team/gpt2", "1" * 40, tmp_path / "gpt2", "main", "v1")
        preflight.preflight(needs)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        preflight.preflight(needs)
        with pytest.raises(UserError, match=r"team/clip: .*cache.*HF_HUB_OFFLINE is set"):
            preflight.preflight(Needs(weights=["team/clip"], environment={}))


def test_the_weights_that_candidates_start_from() -> None:
    common = {"vision": "", "decoder": "", "tokenizer": ""}
    assert training_sources([]) == ([], [])
    assert training_sources(candidate_configs([{"name": "a"}], preset="tiny", **common)) == ([], [])
    two = [{"name": "a"}, {"name": "b", "decoder": "gs://b/gpt2", "tokenizer": "gs://b/bpe"}]
    weights, tokenizers = training_sources(
        candidate_configs(two, preset="clip-l-gpt2-medium", **common)
    )
    assert weights == [
        "gs://b/gpt2",
        "openai-community/gpt2-medium",
        "openai/clip-vit-large-patch14",
    ]
    assert tokenizers == ["gs://b/bpe", "openai-community/gpt2-medium"]


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
    monkeypatch.setattr(preflight, "preflight", None)
    for name in (
        "CAPTIONER_RETRY_SECONDS",
        "MLFLOW_HTTP_REQUEST_TIMEOUT",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    ):
        monkeypatch.setenv(name, "1")
    required = {
        "run_name": "r",
        "secret_name": "s",
        "secret_keys": [],
        "candidates": [{"name": "a"}],
        "preset": "tiny",
    }
    with pytest.raises(SystemExit, match="2"):
        component.python_func(**{**required, **options})
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
