"""Configurations: checked when made, made from loose options, keyed by what shapes the result."""

import dataclasses
import inspect

import pytest

from model_lib import UserError
from model_lib.cli import COMMANDS, config_class
from model_lib.evaluate.config import EvaluateConfig
from model_lib.ingest.config import IngestConfig
from model_lib.train.config import TrainConfig

BASE = {"data": "d", "output": "o", "preset": "tiny"}


def test_numbers_from_json_become_the_options_kind() -> None:
    config = TrainConfig.from_options(**BASE, epochs=3.0, learning_rate=1)
    assert (
        config.epochs == 3
        and isinstance(config.epochs, int)
        and isinstance(config.learning_rate, float)
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epoch": 3}, "unknown option 'epoch'"),
        ({"epochs": "many"}, "epochs: 'many' is not int"),
        ({"epochs": 2.5}, "epochs: 2.5 is not int"),
        ({"epochs": -1}, "epochs: -1 is not at least 0"),
        ({"epochs": True}, "epochs: True is not int"),
        ({"learning_rate": float("nan")}, "learning_rate: nan"),
        ({"precision": "int4"}, "precision: 'int4' is not one of"),
        ({"preset": "huge"}, "preset 'huge': unknown; one of clip-l-gpt2-medium, tiny"),
        ({"vision": "x"}, "preset tiny: is trained from scratch"),
        ({"warmup": 1.0}, "warmup"),
        ({"name": None}, "name: None is not str"),
        ({"name": "../x"}, "name '../x'"),
        ({"output": ""}, "output: is empty"),
        ({"seed": 2**63}, "seed: 9223372036854775808 is not at most"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UserError) as refused:
        TrainConfig.from_options(**{**BASE, **options})
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_option_is_named() -> None:
    with pytest.raises(UserError, match="data"):
        TrainConfig.from_options(output="o")


def test_zero_means_the_presets_own() -> None:
    config = TrainConfig(data="d", output="o")
    assert (config.epochs, config.batch_size, config.learning_rate, config.precision) == (
        5,
        64,
        1e-4,
        "auto",
    )


def test_the_key_changes_with_what_shapes_the_result_only() -> None:
    key = TrainConfig(**BASE).key("fingerprint")
    assert key == TrainConfig(
        **{**BASE, "output": "x", "name": "n"}, workers=3, checkpoint_minutes=1
    ).key("fingerprint")
    assert key != TrainConfig(**BASE, seed=1).key("fingerprint")
    assert key != TrainConfig(**BASE).key("other")


@pytest.mark.parametrize("cls", [IngestConfig, EvaluateConfig])
def test_two_ways_to_say_the_input_are_not_mixed(
    cls: type[IngestConfig] | type[EvaluateConfig],
) -> None:
    base = {"output": "o"}
    with pytest.raises(UserError, match="give either"):
        cls(**base)
    with pytest.raises(UserError, match="give either"):
        cls(**base, annotations="a")


def test_a_model_and_a_results_file_are_not_evaluated_together() -> None:
    with pytest.raises(UserError, match="give either"):
        EvaluateConfig(output="o", model="m", data="d", results="r", annotations="a")


def test_every_option_is_explained() -> None:
    for cls in map(config_class, COMMANDS.values()):
        source = "".join(
            inspect.getsource(base) for base in cls.__mro__ if dataclasses.is_dataclass(base)
        )
        for field in dataclasses.fields(cls):
            _, _, after = source.partition(f"    {field.name}:")
            assert after.partition("\n")[2].lstrip().startswith('"""'), (
                f"{cls.__name__}.{field.name}"
            )
