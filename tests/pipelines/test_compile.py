"""The compiled pipelines are up to date, and their parameters are the stages' options."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_lib.config import EvaluateConfig, IngestConfig, RegisterConfig, StageConfig, TrainConfig
from pipelines.compile import CompileConfig, compile_all
from pipelines.train_captioner import train_captioner

COMPILED = Path(__file__).parents[2] / "pipelines" / "compiled"
STAGES = {"data": IngestConfig, "train": TrainConfig, "eval": EvaluateConfig, "register": RegisterConfig}
PIPELINES_OWN = {"train_candidates", "train_checkpoint_uri", "caption_images", "caption_output"}


def test_the_committed_yaml_is_what_the_code_compiles_to(tmp_path: Path) -> None:
    compile_all(CompileConfig(output=str(tmp_path)))
    fresh = {file.name: file.read_text() for file in tmp_path.iterdir()}
    committed = {file.name: file.read_text() for file in COMPILED.iterdir()}
    assert fresh == committed, "run make compile and commit pipelines/compiled"


def parameters() -> dict[str, Any]:
    (document,) = yaml.safe_load_all((COMPILED / "train_captioner.yaml").read_text())
    return document["root"]["inputDefinitions"]["parameters"]


def test_every_parameter_is_prefixed_and_documented() -> None:
    for name in parameters():
        assert name.split("_")[0] in {*STAGES, "caption"}, name
        assert f"`{name}`" in train_captioner.description, name


@pytest.mark.parametrize("name", sorted(set(parameters()) - PIPELINES_OWN))
def test_parameters_have_the_names_and_defaults_of_the_stages_options(name: str) -> None:
    prefix, _, option = name.partition("_")
    stage: type[StageConfig] = STAGES[prefix]
    assert option in stage.__dataclass_fields__, name
    given = parameters()[name]
    if given.get("isOptional"):
        default = stage.__dataclass_fields__[option].default
        assert given["defaultValue"] == (default if default is not None else ""), name


def test_steps_with_effects_outside_are_never_cached() -> None:
    (document,) = yaml.safe_load_all((COMPILED / "train_captioner.yaml").read_text())
    tasks = {}
    for dag in [document["root"], *document["components"].values()]:
        tasks.update(dag.get("dag", {}).get("tasks", {}))
    for name in ("ingest", "judge", "register", "caption"):
        assert not tasks[name]["cachingOptions"].get("enableCache"), name
    for name in ("train", "evaluate"):
        assert tasks[name]["cachingOptions"]["enableCache"], name


@pytest.mark.parametrize("stage", ["ingest", "train", "evaluate", "judge", "register", "caption"])
def test_components_hold_no_logic(stage: str) -> None:
    """A component's body calls the library: no loop over data, no branch, no definition."""
    component = getattr(importlib.import_module(f"components.{stage}.component"), stage)
    (function,) = ast.parse(inspect.getsource(component.python_func)).body
    nodes = list(ast.walk(function))
    assert any(isinstance(node, ast.ImportFrom) and (node.module or "").startswith("model_lib") for node in nodes)
    assert not any(isinstance(node, ast.If | ast.While | ast.Try | ast.ClassDef | ast.Lambda) for node in nodes)
