"""The cluster's manifests are valid and modest, and docs/cluster.md and docs/serving.md name only
what there is."""

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime

from model_lib import __version__
from model_lib.cli import parse, serve
from model_lib.exits import MISTAKE
from model_lib.io import url_policy
from model_lib.registry.model_uris import CHAMPION_URI
from pipelines.placement import (
    BUCKET,
    GPU_NODES,
    GPU_RESOURCE,
    GPU_TOLERATIONS,
    HUB,
    MLFLOW,
    SECRET,
    USER,
    WEBHOOK,
)
from pipelines.submit import COMPILED, ScheduleConfig, SubmitConfig, pipeline_inputs

Run = Callable[..., subprocess.CompletedProcess]
ROOT = Path(__file__).parents[1]
MANIFESTS = sorted((ROOT / "deploy").glob("*.yaml"))
DOCUMENTS = [document for file in MANIFESTS for document in yaml.safe_load_all(file.read_text())]
RUNTIMES = [document for document in DOCUMENTS if document["kind"] == "TrainingRuntime"]
INFERENCES = [document for document in DOCUMENTS if document["kind"] == "InferenceService"]
SERVICES = [document for document in DOCUMENTS if document["kind"] == "Service"]
WORKLOADS = [
    document
    for document in DOCUMENTS
    if "template" in document.get("spec", {}) and document not in RUNTIMES
]
OF_KSERVE = frozenset(
    ["annotations", "deploymentStrategy", "labels", "maxReplicas", "minReplicas", "timeout"]
)
"""Keys of a predictor, in KServe 0.21's v1beta1, that are not a pod's."""
PIPELINES = {"train_captioner", "caption_bucket"}
PAGE = (ROOT / "docs" / "cluster.md").read_text()
SERVING_PAGE = (ROOT / "docs" / "serving.md").read_text()


def name_of(document: dict[str, Any]) -> str:
    return f"{document['kind']}-{document['metadata']['name']}"


def as_deployment(inference: dict[str, Any]) -> dict[str, Any]:
    """Return the Deployment that KServe makes of an InferenceService in the mode Standard."""
    metadata, predictor = inference["metadata"], inference["spec"]["predictor"]
    name = f"{metadata['name']}-predictor"
    annotations = metadata["annotations"] | predictor["annotations"]
    about = {"labels": {"app": f"isvc.{name}"}, "annotations": annotations}
    pod = {key: value for key, value in predictor.items() if key not in OF_KSERVE}
    spec = {
        "selector": {"matchLabels": about["labels"]},
        "strategy": predictor["deploymentStrategy"],
        "template": {"metadata": about, "spec": pod},
    }
    about = {"name": name, "namespace": metadata["namespace"], **about}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": about, "spec": spec}


def validate(document: dict[str, Any]) -> None:
    if document["kind"] == "InferenceService":
        assert document["apiVersion"] == "serving.kserve.io/v1beta1"
        assert set(document["spec"]) == {"predictor"}
        document = as_deployment(document)
    if document["kind"] == "TrainingRuntime":  # Kubeflow Trainer's own kind, and its own models
        assert TrainerV1alpha1TrainingRuntime.from_dict(document).to_dict() == document
        return
    kubernetes_validate.validate(document, "1.32", strict=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_manifests_are_what_kubernetes_takes(document: dict[str, Any]) -> None:
    validate(document)


def test_a_manifest_with_a_misspelt_key_is_not() -> None:
    service = SERVICES[0]
    with pytest.raises(kubernetes_validate.ValidationError):
        validate({**service, "spec": {**service["spec"], "selectors": {}}})


def test_a_mistake_in_the_input_is_not_retried_and_anything_else_is() -> None:
    """The expression was evaluated with expr-lang 1.17.7, as Argo 4.0.5 does, on these messages of
    its nodes."""
    (patch,) = yaml.safe_load_all((ROOT / "deploy" / "argo-retries.yaml").read_text())
    defaults = yaml.safe_load(patch["data"]["workflowDefaults"])["spec"]["templateDefaults"]
    strategy = defaults["retryStrategy"]
    words = re.fullmatch(r'not \(lastRetry\.message contains "(.*)"\)', strategy["expression"])
    assert words is not None and words[1] == MISTAKE and strategy["retryPolicy"] == "Always"
    assert words[1] in "main: Error (exit code 1): captioner: error: gs://b/x: no such file"
    failed = "main: Error (exit code 1): captioner: failed: gs://b: fails"
    for message in ("", "pod deleted", failed, "OOMKilled"):
        assert words[1] not in message


def test_a_machine_that_trains_gets_signals_and_is_not_root() -> None:
    (runtime,) = RUNTIMES
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["shareProcessNamespace"], "or it is process 1"
    security = {"runAsUser": USER, "runAsGroup": USER, "runAsNonRoot": True}
    assert pod["securityContext"] == security
    (container,) = pod["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"tmp": "/tmp", "shm": "/dev/shm"}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("workload", [*WORKLOADS, *map(as_deployment, INFERENCES)], ids=name_of)
def test_pods_are_modest_and_watched(workload: dict[str, Any]) -> None:
    pod = workload["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    claims = workload["spec"].get("volumeClaimTemplates", [])
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    volumes |= {claim["metadata"]["name"] for claim in claims}
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"]["drop"] == ["ALL"]
        assert security["readOnlyRootFilesystem"]
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert container["resources"]["limits"]["memory"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        assert re.search(r":[^:/]*\d", container["image"]), "an image has a version"
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_pods_fit_their_selectors_and_services(workload: dict[str, Any]) -> None:
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (service,) = (s for s in SERVICES if s["spec"]["selector"].items() <= labels.items())
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    ports = container["ports"]
    open_ports = {*(port["name"] for port in ports), *(port["containerPort"] for port in ports)}
    for port in service["spec"]["ports"]:
        assert port.get("targetPort", port["port"]) in open_ports


def test_the_champion_is_served_by_this_version_with_the_secrets_keys() -> None:
    (inference,) = INFERENCES
    assert inference["metadata"]["annotations"] == {"serving.kserve.io/deploymentMode": "Standard"}
    (container,) = inference["spec"]["predictor"]["containers"]
    assert container["name"] == "kserve-container", "KServe looks for it"
    assert container["image"] == f"captioner-serve:{__version__}"
    command, name, *options = container["args"]
    config = parse(serve, name, options)
    assert command == "captioner" and config.model == CHAMPION_URI and config.host == "0.0.0.0"
    assert [port["containerPort"] for port in container["ports"]] == [config.port]
    assert inference["spec"]["predictor"]["annotations"]["prometheus.io/port"] == str(config.port)
    assert inference["metadata"]["name"] == config.name
    values = {v["name"]: v.get("valueFrom", {}).get("secretKeyRef") for v in container["env"]}
    assert values.pop(url_policy.VARIABLE) is None
    assert set(values) == {*MLFLOW, *BUCKET} - {"MLFLOW_UI_URL"}
    for variable, reference in values.items():
        assert (reference["name"], reference["key"]) == (SECRET, variable)
        assert reference.get("optional", False) == (variable != "MLFLOW_TRACKING_URI")


def test_a_gpu_is_one_command_away() -> None:
    text = (ROOT / "deploy" / "kserve.yaml").read_text()
    assert "s/#gpu //" in SERVING_PAGE
    _, inference = yaml.safe_load_all(text.replace("#gpu ", ""))
    validate(inference)
    predictor = inference["spec"]["predictor"]
    assert predictor["containers"][0]["resources"]["limits"][GPU_RESOURCE] == 1
    assert predictor["nodeSelector"].items() <= GPU_NODES.items()
    assert predictor["tolerations"] == [t for t in GPU_TOLERATIONS if t["key"] == GPU_RESOURCE]


def variables() -> list[dict[str, Any]]:
    """Return the environment variables of all containers."""
    pods = [workload["spec"]["template"]["spec"] for workload in WORKLOADS]
    containers = [container for pod in pods for container in pod["containers"]]
    return [variable for container in containers for variable in container.get("env", [])]


def test_passwords_come_from_a_secret_that_the_page_makes() -> None:
    assert not [document for document in DOCUMENTS if document["kind"] == "Secret"]
    assert not re.search(r"://[^\s/$]*:[^\s/$]*@", "".join(file.read_text() for file in MANIFESTS))
    secret = [v for v in variables() if re.search("PASSWORD|TOKEN|SECRET|KEY", v["name"])]
    assert secret
    for variable in secret:
        reference = variable["valueFrom"]["secretKeyRef"]
        command = f"create secret generic {reference['name']} --namespace mlflow "
        command += f'--from-literal={reference["key"]}="$(openssl rand -hex 24)"'
        assert command in PAGE


def test_config_maps_that_pods_read_are_made_by_the_page() -> None:
    text = "".join(file.read_text() for file in MANIFESTS)
    references = re.findall(r"configMapKeyRef:\n\s+name: (\S+)\n\s+key: (\S+)", text)
    assert references
    for name, key in references:
        assert re.search(rf"kubectl create configmap {name} .*--from-literal={key}=", PAGE)


def blocks(page: str = PAGE) -> list[str]:
    """Return a page's shell blocks: those that are indented by four spaces, each without its
    indentation."""
    blocks = re.findall(r"(?:^|\n\n)((?: {4}.*\n(?:\n(?= {4}))?)+)", page)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in blocks]


def commands(word: str) -> list[list[str]]:
    """Return the words of each command of the page that starts with `word`, or with it in
    `.venv/bin`."""
    lines = [line.strip() for block in blocks() for line in block.replace("\\\n", " ").splitlines()]
    starts = (f"{word} ", f".venv/bin/{word} ")
    split = [shlex.split(line) for line in lines if line.startswith(starts)]
    assert split, f"the page has no {word} command"
    return split


@pytest.mark.parametrize("block", [*blocks(), *blocks(SERVING_PAGE)])
def test_shell_blocks_are_shell(block: str) -> None:
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_variables_are_set_before_they_are_used() -> None:
    known = {"PWD"}
    variable = re.compile(r"\$\{?([A-Za-z_]+)|(?:export |\s)([A-Z]+)=|for (\w+) in")
    for block in blocks():
        for line in block.splitlines():
            # What a line sets may be used further right on it.
            for match in variable.finditer(line):
                used, *produced = match.groups()
                assert used is None or used in known, f"{used} in: {line}"
                known |= {name for name in produced if name}


def test_manifests_named_are_there_and_all_are_named() -> None:
    there = {f"deploy/{file.name}" for file in MANIFESTS}
    words = {word for block in [*blocks(), *blocks(SERVING_PAGE)] for word in block.split()}
    mentioned = {word for word in words if word.startswith("deploy/")}
    assert mentioned == there


def test_make_targets_named_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    mentioned = {line[1] for line in commands("make")} | set(re.findall(r"`make ([a-z-]+)", PAGE))
    assert mentioned <= targets


def options(captioner: Run, command: str) -> set[str]:
    done = captioner(command, "--help")
    assert done.returncode == 0, done.stderr
    return {option.replace("-", "_") for option in re.findall(r"--([a-z][\w-]*)", done.stdout)}


@pytest.mark.parametrize("command", sorted({line[1] for line in commands("captioner")}))
def test_options_of_captioner_in_commands_are_there(captioner: Run, command: str) -> None:
    words = [word for line in commands("captioner") if line[1] == command for word in line]
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    assert {name.replace("-", "_") for name in names} <= options(captioner, command)


def test_options_of_captioner_in_the_text_are_there(captioner: Run) -> None:
    start = PAGE.index("## 9.")
    spans = re.findall(r"`(--[^`\n]+)`", PAGE[start : PAGE.index("\n## 10.", start)])
    mentioned = {option for span in spans for option in re.findall(r"--([a-z_]+)", span)}
    known = options(captioner, "submit") | options(captioner, "schedule")
    assert {"auth", "client_id"} <= mentioned <= known


RUNS = [line for line in commands("captioner") if "--pipeline" in line]


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_runs_are_given_parameters_that_their_pipeline_takes(number: int) -> None:
    """They are the pipeline's, of the right type, and none that it needs is missing."""
    line = RUNS[number]
    values = {word[2:]: line[at + 1] for at, word in enumerate(line[:-1]) if word.startswith("--")}
    params = tuple(line[at + 1] for at, word in enumerate(line) if word == "--param")
    common = {"host": values["host"], "pipeline": values["pipeline"], "param": params}
    if line[1] == "schedule":
        config: Any = ScheduleConfig(**common, name=values["name"], cron=values["cron"])
    else:
        config = SubmitConfig(**common)
    assert len(config.arguments()) == len(params)


def test_parameters_in_the_text_are_there() -> None:
    known = {name for pipeline in PIPELINES for name in pipeline_inputs(pipeline)}
    prefixes = "data|ingest|train|eval|register|caption|gpu|secret"
    mentioned = set(re.findall(rf"`((?:{prefixes})_[a-z_]+)[`=]", PAGE)) - PIPELINES
    assert mentioned and mentioned <= known


def table(heading: str) -> list[list[str]]:
    """Return the cells of the page's table whose first line begins so."""
    start = PAGE.index(heading)
    rows = PAGE[start : PAGE.index("\n\n", start)].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_fields_in_the_table_are_those_of_the_form() -> None:
    cells = " ".join(row[0] for row in table("| field | is |"))
    assert sorted(re.findall(r"`(\w+)`", cells)) == sorted(pipeline_inputs("train_captioner"))


def test_secret_keys_in_the_text_are_those_of_the_steps() -> None:
    cells = " ".join(row[0] for row in table("| key | for |"))
    assert set(re.findall(r"`([A-Z_]+)`", cells)) == {*MLFLOW, *BUCKET, *HUB, *WEBHOOK}


def steps(pipeline: str) -> dict[str, set[str]]:
    """Return the secret's keys that each step of a compiled pipeline sees, by its display name."""
    spec, platform = yaml.safe_load_all((COMPILED / f"{pipeline}.yaml").read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    dags = [c["dag"] for c in (spec["root"], *spec["components"].values()) if "dag" in c]
    keys: dict[str, set[str]] = {}
    for task in (task for dag in dags for task in dag["tasks"].values()):
        label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
        if label is not None:
            pairs = [pair for env in executors[label]["secretAsEnv"] for pair in env["keyToEnv"]]
            keys.setdefault(task["taskInfo"]["name"], set()).update(p["secretKey"] for p in pairs)
    return keys


def test_steps_and_their_keys_in_the_table_are_those_of_the_pipelines() -> None:
    words = {"S3": BUCKET, "hub": HUB, "webhook": WEBHOOK}
    documented: dict[str, set[str]] = {}
    for step, *_, last in table("| step | reads | writes |"):
        keys = {key for word in words if word in last for key in words[word]}
        documented.setdefault(step.partition(",")[0], set()).update({*MLFLOW, *keys})
    assert documented == steps("caption_bucket") | steps("train_captioner")


def test_nodes_are_those_that_the_pipelines_ask_for() -> None:
    (pool,) = (line for line in commands("gcloud") if "--spot" in line)
    gpu = GPU_NODES["cloud.google.com/gke-accelerator"]
    assert f"type={gpu},count=1,gpu-driver-version=default" in pool
    tainted = pool[pool.index("--node-taints") + 1]
    assert tainted in {f"{t['key']}={t.get('value')}:{t['effect']}" for t in GPU_TOLERATIONS}
    # GKE taints GPU nodes with the resource's name.
    assert GPU_RESOURCE in {t["key"] for t in GPU_TOLERATIONS}
