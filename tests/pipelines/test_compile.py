"""The compiled pipelines: up to date, taken by the server, and placed on the cluster as they should
be."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from model_lib.steps.captioning import plan_captions
from model_lib.steps.form import MOST_WORKERS
from pipelines.compile import CompileConfig, compile_all
from pipelines.train_captioner import CANDIDATES
from tests.helpers.kfp_server import parse_strictly

ROOT = Path(__file__).parents[2]
COMPILED = ROOT / "pipelines" / "compiled"
NAMES = ["train_captioner", "caption_bucket"]
ON_GPU = {"train", "evaluate", "evaluate-champion", "caption"}
CACHED = {"train", "train-job", "evaluate"}
STEPS = {name: {"preflight", "caption", "merge", "close"} for name in NAMES}
STEPS["caption_bucket"] |= {"plan"}
STEPS["train_captioner"] |= {"ingest", "ingest-help", "evaluate-champion", "train", "train-job"}
STEPS["train_captioner"] |= {"evaluate", "register"}
LONGEST_CHAIN = {"train_captioner": 8, "caption_bucket": 5}
"""Steps one after another for one candidate and one worker: each costs a pod and some seconds."""
NODE, COMPRESSED, RAW = 12, 2_800, 64_000
"""Of an iteration of a loop, as measured on KFP 2.17 with Argo 4.0.5: nodes, bytes."""


def compiled(name: str) -> tuple[Any, dict[str, Any]]:
    return parse_strictly((COMPILED / f"{name}.yaml").read_text())


def dags(spec: Any) -> list[tuple[Any, Any]]:
    """Return each DAG with the definitions of its inputs."""
    nested = [(c.dag, c.input_definitions) for c in spec.components.values() if c.HasField("dag")]
    return [(spec.root.dag, spec.root.input_definitions), *nested]


def containers(spec: Any) -> dict[str, dict[str, Any]]:
    """Return each executor's container, by the executor's label."""
    executors = json_format.MessageToDict(spec.deployment_spec)["executors"]
    return {label: executor["container"] for label, executor in executors.items()}


def tasks(spec: Any) -> dict[str, Any]:
    """Return every task that runs a container, by name."""
    every = [pair for dag, _ in dags(spec) for pair in dag.tasks.items()]
    graphs = {name for name, component in spec.components.items() if component.HasField("dag")}
    return {name: task for name, task in every if task.component_ref.name not in graphs}


def test_the_committed_yaml_is_what_the_code_compiles_to(tmp_path: Path) -> None:
    compile_all(CompileConfig(output=str(tmp_path)))
    fresh = {file.name: file.read_text() for file in tmp_path.iterdir()}
    committed = {file.name: file.read_text() for file in COMPILED.iterdir()}
    assert fresh == committed, "run make compile and commit pipelines/compiled"


@pytest.mark.parametrize("name", NAMES)
def test_the_server_takes_the_yaml(name: str) -> None:
    spec, configs = compiled(name)
    assert spec.pipeline_info.name == name.replace("_", "-")
    assert set(tasks(spec)) == STEPS[name] and len(configs) == len(STEPS[name])


def test_a_field_that_the_server_does_not_know_is_refused() -> None:
    """The strictness of the test above."""
    text = (COMPILED / "caption_bucket.yaml").read_text()
    for good, bad in (("cachingOptions:", "cashingOptions:"), ("secretAsEnv:", "secretsAsEnv:")):
        assert good in text
        with pytest.raises((ValueError, json_format.ParseError)):
            parse_strictly(text.replace(good, bad, 1))


@pytest.mark.parametrize("name", NAMES)
def test_what_flows_between_steps_has_one_type(name: str) -> None:
    """The server's driver refuses a value of another type than the step's input; kfp compiles such
    a pipeline."""
    spec, _ = compiled(name)
    checked = 0
    for dag, own in dags(spec):
        for task_name, task in dag.tasks.items():
            component = spec.components[task.component_ref.name]
            for input_name, source in task.inputs.parameters.items():
                if input_name not in component.input_definitions.parameters:
                    continue  # kfp's own, for resources
                expected = component.input_definitions.parameters[input_name].parameter_type
                if outer := source.component_input_parameter:
                    if outer == task.parameter_iterator.item_input:
                        continue
                    assert own.parameters[outer].parameter_type == expected, (task_name, input_name)
                elif source.HasField("task_output_parameter"):
                    reference = source.task_output_parameter
                    producer = dag.tasks[reference.producer_task].component_ref.name
                    outputs = spec.components[producer].output_definitions.parameters
                    output = outputs[reference.output_parameter_key]
                    assert output.parameter_type == expected, (task_name, input_name)
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("name", NAMES)
def test_no_output_is_one_of_several_steps(name: str) -> None:
    """Of a branch whose step came from the cache the driver knows no state, and `dsl.OneOf` fails
    over it."""
    spec, _ = compiled(name)
    for dag, _own in dags(spec):
        for output in dag.outputs.parameters.values():
            assert not output.HasField("value_from_oneof")
        for output in dag.outputs.artifacts.values():
            assert len(output.artifact_selectors) <= 1


def test_evaluate_waits_for_whichever_step_trained() -> None:
    spec, _ = compiled("train_captioner")
    (loop,) = [dag for dag, _ in dags(spec) if "evaluate" in dag.tasks]
    (branches,) = loop.tasks["evaluate"].dependent_tasks
    inner = spec.components[loop.tasks[branches].component_ref.name].dag.tasks
    steps = [spec.components[task.component_ref.name].dag.tasks for task in inner.values()]
    assert sorted(name for names in steps for name in names) == ["train", "train-job"]


def test_preflight_has_time_for_its_image_to_be_pulled() -> None:
    for name in NAMES:
        spec, configs = compiled(name)
        assert configs["exec-preflight"].active_deadline_seconds == 900
        assert tasks(spec)["preflight"].retry_policy.max_retry_count == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_named_by_a_step_reaches_it(name: str) -> None:
    """Resources, secrets and placement take parameters by name, through loops and conditions."""
    spec, configs = compiled(name)
    for dag, own in dags(spec):
        for task_name, task in dag.tasks.items():
            named = {p.component_input_parameter for p in task.inputs.parameters.values()} - {""}
            component = spec.components[task.component_ref.name]
            if component.executor_label:
                config = str(configs[component.executor_label])
                named |= set(re.findall(r'component_input_parameter: "([^"]+)"', config))
            named -= {task.parameter_iterator.item_input}
            assert named <= set(own.parameters), task_name


@pytest.mark.parametrize("name", NAMES)
def test_every_step_has_resources_retries_a_time_limit_and_no_root(name: str) -> None:
    spec, configs = compiled(name)
    for task_name, task in tasks(spec).items():
        assert task.task_info.name[0].isupper(), f"{task_name} has no display name"
        label = spec.components[task.component_ref.name].executor_label
        resources = containers(spec)[label]["resources"]
        for kind in ("CpuRequest", "CpuLimit", "MemoryRequest", "MemoryLimit"):
            assert resources[f"resource{kind}"], (task_name, kind)
        config = configs[label]
        assert 0 < config.active_deadline_seconds <= 3 * 24 * 3600
        assert config.image_pull_policy == "IfNotPresent"
        security = config.security_context
        assert (security.run_as_user, security.run_as_non_root) == (1000, True)
        assert {mount.mount_path for mount in config.empty_dir_mounts} >= {"/tmp"}
        retries = task.retry_policy
        assert retries.max_retry_count > 0 and retries.backoff_factor == 2
        # Argo gives up, and stops what runs, so long after the first attempt began.
        attempts = retries.max_retry_count + 1
        assert retries.backoff_max_duration.seconds > attempts * config.active_deadline_seconds
        assert task.caching_options.enable_cache == (task_name in CACHED), task_name
        gpu = resources.get("accelerator")
        assert (gpu is not None) == (task_name in ON_GPU), task_name
        if gpu is not None:
            # A count that is a number counts as none in the driver of 2.17.
            assert gpu["resourceCount"] == "{{$.inputs.parameters['pipelinechannel--gpu_count']}}"
            assert config.node_selector.HasField("node_selector_json")
            assert len(config.tolerations) == 1
            assert {mount.mount_path for mount in config.empty_dir_mounts} == {"/tmp", "/dev/shm"}


def parameters(name: str) -> dict[str, Any]:
    return dict(compiled(name)[0].root.input_definitions.parameters)


@pytest.mark.parametrize("name", NAMES)
def test_a_person_can_fill_in_the_form(name: str) -> None:
    """The UI shows the parameters sorted by name, without their descriptions."""
    inputs = parameters(name)
    assert len(inputs) <= 18 and all(about.description for about in inputs.values())
    assert {p for p, about in inputs.items() if not about.is_optional} <= {"images", "output"}
    assert len(compiled(name)[0].pipeline_info.description) < 250
    assert inputs["gpu_count"].parameter_type == pipeline_spec_pb2.ParameterType.STRING


@pytest.mark.parametrize("name", NAMES)
def test_the_workflow_stays_small_whatever_the_bucket(
    name: str, saved_model: Path, tmp_path: Path
) -> None:
    """A workflow of Argo's is at most 1 MiB compressed; above 1 MiB raw, KFP's list of tasks
    freezes."""
    manifest = (COMPILED / f"{name}.yaml").read_bytes()
    assert len(zlib.compress(manifest)) + MOST_WORKERS * COMPRESSED < 300_000
    loops = parameters(name)["caption_workers"].default_value.number_value
    if name == "train_captioner":
        loops += 2 * len(CANDIDATES)  # each is about two iterations of captioning
    assert len(manifest) + loops * RAW < 2**20
    model = tmp_path / ("a-long-name-" * 10)
    model.symlink_to(saved_model)
    for count in (1, 3, 100):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.jpg").write_bytes(b"")
        options = {"shard_images": 1}
        planned = plan_captions(
            str(folder), str(tmp_path), str(model), options, MOST_WORKERS, below="captions"
        )
        assert planned[0].startswith("captions/")
        assert len(planned[1]) == min(count, MOST_WORKERS)
        assert len(json.dumps(planned)) < 8_000


def longest_chain(spec: Any, dag: Any) -> int:
    """Return the number of steps that run one after another."""
    lengths: dict[str, int] = {}

    def length(name: str) -> int:
        if name not in lengths:
            task = dag.tasks[name]
            inputs = [*task.inputs.parameters.values(), *task.inputs.artifacts.values()]
            before = set(task.dependent_tasks)
            for source in inputs:
                kind = source.WhichOneof("kind")
                before.add(getattr(getattr(source, kind), "producer_task", ""))
            before &= set(dag.tasks)
            component = spec.components[task.component_ref.name]
            own = longest_chain(spec, component.dag) if component.HasField("dag") else 1
            lengths[name] = own + max(map(length, before), default=0)
        return lengths[name]

    return max(map(length, dag.tasks))


@pytest.mark.parametrize("name", NAMES)
def test_few_steps_run_one_after_another(name: str) -> None:
    spec, _ = compiled(name)
    assert longest_chain(spec, spec.root.dag) == LONGEST_CHAIN[name]


@pytest.mark.parametrize("name", NAMES)
def test_secrets_are_named_and_never_held(name: str, tmp_path: Path) -> None:
    """No parameter asks for a secret's value, and none that lies about in the environment gets into
    the YAML."""
    spec, configs = compiled(name)
    secrets = [env for config in configs.values() for env in config.secret_as_env]
    keys = {pair.env_var for env in secrets for pair in env.key_to_env}
    assert {"CAPTIONER_MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"} <= keys
    assert {"WEBHOOK_URL", "HF_TOKEN"} <= keys
    # A server with its MLflow plugin sets these itself; a pod that has one twice is refused.
    assert not {key for key in keys if key.startswith("MLFLOW_")}
    # Whatever a run may require of the secret, the step that checks it sees.
    checked = configs["exec-preflight"].secret_as_env
    seen = {pair.secret_key for env in checked for pair in env.key_to_env}
    assert {key.removeprefix("CAPTIONER_") for key in keys} == seen
    secret = re.compile("password|token$|secret|credential|webhook|access_key|api_key")
    assert {p for p in parameters(name) if secret.search(p)} == {"secret_name"}
    for env in secrets:
        assert env.optional, "a missing key is for the preflight to say; a pod would never start"
        assert env.secret_name_parameter.component_input_parameter.endswith("secret_name")
    assert not any("env" in container for container in containers(spec).values())

    environment = {**os.environ, **dict.fromkeys(keys, "planted-secret")}
    command = [sys.executable, "-m", "model_lib", "compile", "--output", str(tmp_path)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
    text = (tmp_path / f"{name}.yaml").read_text()
    assert "planted-" not in text and text == (COMPILED / f"{name}.yaml").read_text()


@pytest.mark.parametrize("stage", sorted(STEPS["train_captioner"]))
def test_components_hold_no_logic(stage: str) -> None:
    """A component's body is one call of the library: no branch, and it ends in one line."""
    stage = stage.replace("-", "_")
    component = getattr(import_module(f"components.{stage}.component"), stage)
    (function,) = ast.parse(inspect.getsource(component.python_func)).body
    logic = ast.If | ast.While | ast.Try | ast.ClassDef | ast.Lambda
    assert not any(isinstance(node, logic) for node in ast.walk(function))
    last = function.body[-1]
    assert isinstance(last, ast.With) and ast.unparse(last.items[0]) == "exit_in_one_line()"


@pytest.mark.parametrize("name", NAMES)
def test_every_step_knows_its_run_and_its_workflow(name: str) -> None:
    """A scheduled run's name is empty (KFP 2.17): then it is called after its workflow."""
    for config in compiled(name)[1].values():
        fields = {row.name: row.field_path for row in config.field_path_as_env}
        labels = {"KFP_RUN_ID": "pipeline/runid", "KFP_WORKFLOW": "workflows.argoproj.io/workflow"}
        assert fields == {name: f"metadata.labels['{label}']" for name, label in labels.items()}


def test_images_come_by_digest_from_the_lock(tmp_path: Path) -> None:
    """What make push writes is what the compiled pipelines run."""
    digest = f"@sha256:{7:064x}"
    names = ("core", "model", "evaluate")
    lock = {name: f"registry.example/captioner-{name}{digest}" for name in names}
    for package in ("components", "model_lib", "pipelines"):
        shutil.copytree(ROOT / package, tmp_path / package)
    (tmp_path / "images").mkdir()
    lines = ["# made", *(f"{name} {image}" for name, image in lock.items())]
    (tmp_path / "images" / "images.lock").write_text("\n".join(lines))
    code = "from pipelines.compile import *; compile_all(CompileConfig(output='out'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    spec, _ = parse_strictly((tmp_path / "out" / "train_captioner.yaml").read_text())
    assert {container["image"] for container in containers(spec).values()} == set(lock.values())
