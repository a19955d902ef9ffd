"""The mean of several models' weights is a model like any other."""

import json
from pathlib import Path

import pytest
import torch

from model_lib import Captioner, UserError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.train.averaging import average
from tests.helpers.small import small_model


def test_each_weight_is_the_mean_and_the_model_is_evaluated(data: Path, tmp_path: Path) -> None:
    models = [small_model(seed) for seed in range(3)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    (tmp_path / "0" / "training.json").write_text(json.dumps({"name": "a", "mlflow_run_id": "x"}))
    output = str(tmp_path / "mean")
    sources = [str(tmp_path / str(number)) for number in range(3)]
    assert average(sources, output) == sources
    mean = Captioner.from_pretrained(output, device="cpu", dtype=torch.float32)
    for name, weight in mean.state_dict().items():
        expected = torch.stack([model.state_dict()[name] for model in models]).mean(0)
        assert torch.allclose(weight, expected, atol=1e-6)
    assert mean.training_record["name"] == "average" and not mean.training_record["mlflow_run_id"]
    options = {"model": output, "data": str(data), "output": str(tmp_path / "e"), "limit": 3}
    assert evaluate(EvaluateConfig(**options)).name == "average"


def test_models_of_different_kinds_are_refused(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "a")
    small_model(n_layer=1).save_pretrained(tmp_path / "b")
    squashed = small_model()
    squashed.config.image_stretch = True
    squashed.save_pretrained(tmp_path / "c")
    for other, problem in (("b", "is of another shape"), ("c", "sees images otherwise")):
        with pytest.raises(UserError, match=problem):
            average([str(tmp_path / "a"), str(tmp_path / other)], str(tmp_path / "o"))
    with pytest.raises(UserError, match="two models or more"):
        average([str(tmp_path / "a")], str(tmp_path / "o"))
