"""Configurations: their checks, JSON, command lines and keys."""

import dataclasses
import inspect
from dataclasses import replace

import pytest

from model_lib import UserError
from model_lib.cli import COMMANDS, config_class, evaluate, parse
from model_lib.evaluate.config import EvaluateConfig
from model_lib.ingest.config import IngestConfig
from model_lib.model.config import DecodeConfig
from model_lib.options import as_arguments
from model_lib.train.config import TrainConfig, resolve

BASE = {"data": "d", "output": "o", "preset": "tiny"}


def test_numbers_from_json_become_the_options_kind() -> None:
    config = TrainConfig.from_options(**BASE, epochs=3.0, learning_rate=1)
    assert config.epochs == 3 and isinstance(config.epochs, int)
    assert isinstance(config.learning_rate, float)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, "unknown option 'epoch'"),
        ({"epochs": "many"}, "epochs: Input should be a valid integer"),
        ({"epochs": 2.5}, "epochs: Input should be a valid integer"),
        ({"epochs": 0}, "epochs: 0 is not at least 1"),
        ({"epochs": True}, "epochs: Input should be a valid integer"),
        ({"batch_size": 0}, "batch_size: 0 is not at least 1"),
        ({"learning_rate": 0}, "learning_rate: 0.0 is not above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: nan"),
        ({"precision": "int4"}, "precision: Input should be 'auto', 'bfloat16', 'float16' or"),
        ({"preset": "huge"}, "preset 'huge': unknown; one of clip-l-gpt2-medium,"),
        ({"vision": "x"}, "preset tiny: is trained from scratch"),
        ({"warmup": 1.0}, "warmup: 1.0 is not less than 1"),
        ({"dropout": 1}, "dropout: 1.0 is not less than 1"),
        ({"init_from": "a", "vision": "b", "preset": "clip-l-gpt2-medium"}, "has its own vision"),
        ({"objective": "self-critical"}, "self-critical: needs a trained captioner"),
        (
            {"objective": "self-critical", "init_from": "best", "label_smoothing": 0.1},
            "label_smoothing: self-critical training has no labels to smooth",
        ),
        ({"name": None}, "name: Input should be a valid string"),
        ({"name": "../x"}, "name '../x'"),
        ({"output": ""}, "output: is empty"),
        ({"seed": 2**63}, "seed: 9223372036854775808 is not at most"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError) as refused:
        TrainConfig.from_options(**{**BASE, **options})
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_option_is_named() -> None:
    with pytest.raises(UserError, match="data"):
        TrainConfig.from_options(output="o")


def test_none_means_the_presets_value() -> None:
    config = resolve(TrainConfig(data="d", output="o", dropout=0.0))
    assert (config.epochs, config.batch_size, config.learning_rate) == (10, 64, 1e-4)
    assert (config.precision, config.augment, config.dropout) == ("auto", True, 0.0)
    assert config.vision == "openai/clip-vit-large-patch14"
    assert resolve(config) == config


def test_the_second_stage_has_defaults_of_its_own() -> None:
    stage = {"objective": "self-critical", "init_from": "best"}
    config = resolve(TrainConfig(data="d", output="o", **stage))
    assert config.learning_rate == pytest.approx(1e-4 / 20)
    assert (config.dropout, config.label_smoothing, config.vision) == (0.0, 0.0, None)
    assert resolve(TrainConfig(data="d", output="o", **stage, dropout=0.2)).dropout == 0.2


def test_the_key_changes_with_what_shapes_the_result_only() -> None:
    key = TrainConfig(**BASE).key("fingerprint")
    same = {**BASE, "output": "x", "name": "n", "workers": 3, "checkpoint_minutes": 1}
    assert key == TrainConfig(**same).key("fingerprint")
    whole = resolve(TrainConfig(**BASE, epochs=6))
    assert whole.key() == resolve(TrainConfig(**BASE)).key() != replace(whole, epochs=7).key()
    assert key != TrainConfig(**BASE, seed=1).key("fingerprint")
    assert key != TrainConfig(**BASE).key("other")


def test_two_ways_to_say_the_input_are_not_mixed() -> None:
    for names in ([], ["annotations", "dataset"], ["train"], ["karpathy"], ["val", "annotations"]):
        with pytest.raises(UserError, match="give --dataset, or --annotations, or --train with"):
            IngestConfig(output="o", **dict.fromkeys(names, "x"))
    with pytest.raises(UserError, match="images: a dataset has its own"):
        IngestConfig(output="o", dataset="x", images="y")


def test_options_of_a_nested_configuration_stand_beside_the_others() -> None:
    base = {"model": "m", "data": "d", "output": "o"}
    config = EvaluateConfig.from_options(**base, top_k=7.0, num_beams=1, limit=3)
    assert config.decode == DecodeConfig(num_beams=1, top_k=7) and config.limit == 3
    assert config.to_dict()["top_k"] == 7 and "decode" not in config.to_dict()
    assert EvaluateConfig.from_options(**config.to_dict()) == config
    command = [*(f"--{name}={value}" for name, value in base.items()), "--limit=3"]
    assert sorted(as_arguments(config)) == sorted([*command, "--num_beams=1", "--top_k=7"])
    assert parse(evaluate, "evaluate", as_arguments(config)) == config
    assert config.key() == EvaluateConfig.from_options(**config.to_dict() | {"output": "x"}).key()
    assert config.key() != EvaluateConfig.from_options(**config.to_dict() | {"top_k": 8}).key()
    assert EvaluateConfig.from_options(**base, max_new_tokens=9).decode.num_beams == 5
    with pytest.raises(UserError, match="num_captions: an image is scored by one caption"):
        EvaluateConfig.from_options(**base, num_captions=2)


def test_every_option_is_explained() -> None:
    for cls in map(config_class, COMMANDS.values()):
        bases = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
        source = "".join(map(inspect.getsource, bases))
        for field in dataclasses.fields(cls):
            after = source.partition(f"    {field.name}:")[2].partition("\n")[2]
            assert after.lstrip().startswith('"""'), f"{cls.__name__}.{field.name}"
