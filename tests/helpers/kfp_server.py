"""A server on loopback that speaks the part of Kubeflow Pipelines' v2beta1 REST API which kfp's
client uses here.

It checks its input as the real one does: YAML is parsed strictly, parameters have the pipeline's
types, ids are known. A run's state advances each time that it is read.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2
from requests_toolbelt import MultipartDecoder

from tests.helpers.http_server import ApiServer, Handler, Refused

WORKFLOW = "caption-bucket-x7k2p"
"""Name of the runs' workflow."""
LAST = {"preflight": 42, "preflight-driver": 30}
"""Number of the node with the last attempt of what fails."""
KINDS: dict[str, Any] = {"STRING": str, "BOOLEAN": bool, "LIST": list, "STRUCT": dict}
KINDS |= {"NUMBER_INTEGER": int, "NUMBER_DOUBLE": (int, float)}


def parse_strictly(text: str) -> tuple[Any, dict[str, Any]]:
    """Parse a compiled pipeline as the server does on upload; `ValueError` for anything that it
    would refuse.

    Returns:
        The PipelineSpec, and each executor's KubernetesExecutorConfig, which the driver parses when
        a task starts.
    """
    spec, platform = None, pipeline_spec_pb2.PlatformSpec()
    for document in yaml.safe_load_all(text):
        if "platforms" in document:
            json_format.ParseDict(document, platform)
        elif spec is None:
            spec = json_format.ParseDict(document, pipeline_spec_pb2.PipelineSpec())
        else:
            raise ValueError("multiple pipeline specs provided")
    is_named = spec is not None and spec.pipeline_info.name and spec.HasField("root")
    if not is_named or spec.schema_version != "2.1.0":
        raise ValueError("no pipeline spec of schema version 2.1.0 with a name and a root")
    executors = platform.platforms["kubernetes"].deployment_spec.executors
    kind = kubernetes_executor_config_pb2.KubernetesExecutorConfig
    configs = {
        name: json_format.ParseDict(json_format.MessageToDict(config), kind())
        for name, config in executors.items()
    }
    return spec, configs


def take_output(text: str, root: str) -> pipeline_spec_pb2.ExecutorOutput:
    """Take what a step's program left, as the launcher of 2.17 does after its work; `ValueError`
    for what it refuses.

    Args:
        text: the program's executor output, JSON.
        root: the run's own folder, in which all its artifacts lie.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"invalid value {constant}")

    output = pipeline_spec_pb2.ExecutorOutput()
    json_format.ParseDict(json.loads(text, parse_constant=refuse), output)
    for name, artifacts in output.artifacts.items():
        for artifact in artifacts.artifacts:
            if not artifact.uri.startswith(root):
                raise ValueError(f"{artifact.uri} does not have expected bucket prefix {root}")
            for key, value in artifact.metadata.fields.items():
                if value.WhichOneof("kind") == "null_value":
                    raise ValueError(f"{name}: {key}: unknown/unsupported value type NullValue")
    return output


class KfpServer(ApiServer):
    """Keeps what it was asked for in tables.

    Args:
        states: of a run, one for each time it is read; an integer is an HTTP status to fail with.
        token: that requests must bear, if any.
        failing: the node that fails if a run does.
        message: that the failing node's pod left for Kubernetes, of which Argo makes its node's.
        log: of that pod.
        large: whether the runs' workflows are so large that the list of nodes stops after its first
            look.
        is_ui: whether this is the UI's server, which passes requests to the API server on, but none
            of v1alpha1.
    """

    def __init__(
        self,
        states: tuple[str | int, ...] = ("RUNNING", "SUCCEEDED"),
        token: str | None = None,
        failing: str = "preflight",
        message: str = "",
        log: str = "",
        large: bool = False,
        is_ui: bool = False,
    ) -> None:
        self.states, self.token = list(states), token
        self.failing, self.message, self.log = failing, message, log
        self.large, self.is_ui = large, is_ui
        self.listed: list[dict] = []
        self.experiments: dict[str, dict] = {}
        self.pipelines: dict[str, dict] = {}
        self.versions: dict[str, dict] = {}
        self.specs: dict[str, Any] = {}
        self.runs: dict[str, dict] = {}
        self.recurring: dict[str, dict] = {}
        super().__init__()

    def route(self, request: Handler, path: str, query: dict[str, str]) -> dict | str:
        authorization = request.headers.get("Authorization")
        if self.token and authorization != f"Bearer {self.token}":
            raise Refused(401, "Unauthenticated")
        body = request.body()

        def document() -> dict:
            return json.loads(body)

        def upload() -> dict:
            return self._upload(query, body, request.headers["Content-Type"])

        add, named = self._add, self._named
        experiments, pipelines, recurring = self.experiments, self.pipelines, self.recurring
        api = "/apis/v2beta1"
        routes: dict[str, Callable[..., dict | str]] = {
            f"GET {api}/healthz": lambda: {"multi_user": False},
            f"GET {api}/experiments": lambda: {"experiments": named(experiments, query)},
            f"POST {api}/experiments": lambda: add(experiments, "experiment_id", document()),
            f"GET {api}/pipelines": lambda: {"pipelines": named(pipelines, query)},
            f"POST {api}/pipelines": lambda: add(pipelines, "pipeline_id", document()),
            f"GET {api}/pipelines/([^/]+)/versions": lambda owner: self._versions(owner, query),
            f"POST {api}/pipelines/upload_version": upload,
            f"POST {api}/runs": lambda: self._start(document(), self.runs, "run_id"),
            f"GET {api}/runs": lambda: self._list(query),
            f"GET {api}/runs/([^/]+)": self._look,
            f"POST {api}/runs/([^/]+):terminate": self._terminate,
            "GET /apis/v1beta1/runs/([^/]+)": self._manifest,
            "GET /apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log": self._log,
            "GET /k8s/pod/logs": lambda: self._ui_log(query),
            f"GET {api}/recurringruns": lambda: {"recurringRuns": named(recurring, query)},
            f"POST {api}/recurringruns": lambda: self._schedule(document()),
            f"DELETE {api}/recurringruns/([^/]+)": lambda key: recurring.pop(key) and {},
        }
        for pattern, function in routes.items():
            if match := re.fullmatch(pattern, f"{request.command} {path}"):
                return function(*match.groups())
        raise Refused(404, f"{request.command} {path}: not found")

    def _add(self, table: dict[str, dict], key: str, row: dict) -> dict:
        if not row.get("display_name"):
            raise Refused(400, "Invalid input error: display_name is empty")
        identity = f"{key.removesuffix('_id')}-{len(table) + 1}"
        table[identity] = {**row, key: identity}
        return table[identity]

    def _named(self, table: dict[str, dict], query: dict[str, str]) -> list[dict]:
        rows = list(table.values())
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
            if predicate["operation"] not in ("EQUALS", 1) or predicate["key"] != "display_name":
                raise Refused(400, f"Invalid input error: filter {predicate}")
            rows = [row for row in rows if row["display_name"] == predicate["stringValue"]]
        return rows

    def _versions(self, owner: str, query: dict[str, str]) -> dict:
        own = {key: row for key, row in self.versions.items() if row["pipeline_id"] == owner}
        return {"pipeline_versions": self._named(own, query)}

    def _upload(self, query: dict[str, str], body: bytes, kind: str) -> dict:
        if query["pipelineid"] not in self.pipelines:
            raise Refused(404, f"Pipeline {query['pipelineid']} not found")
        text = MultipartDecoder(body, kind).parts[0].content.decode()
        try:
            spec, _ = parse_strictly(text)
        except (ValueError, json_format.ParseError) as error:
            raise Refused(400, f"Invalid input error: {error}") from error
        row = {"display_name": query["name"], "pipeline_id": query["pipelineid"]}
        answer = self._add(self.versions, "pipeline_version_id", row)
        self.specs[answer["pipeline_version_id"]] = spec
        return answer

    def _start(self, row: dict, table: dict[str, dict], key: str) -> dict:
        reference = row["pipeline_version_reference"]
        version = reference["pipeline_version_id"]
        if self.versions.get(version, {}).get("pipeline_id") != reference["pipeline_id"]:
            raise Refused(404, f"PipelineVersion {reference} not found")
        if row["experiment_id"] not in self.experiments:
            raise Refused(404, f"Experiment {row['experiment_id']} not found")
        values = row["runtime_config"].get("parameters", {})
        inputs = self.specs[version].root.input_definitions.parameters
        kinds = pipeline_spec_pb2.ParameterType.ParameterTypeEnum
        for name, value in values.items():
            kind = kinds.Name(inputs[name].parameter_type)
            if not isinstance(value, KINDS[kind]):
                raise Refused(400, f"Invalid input error: parameter {name} is not of type {kind}")
        for name, about in inputs.items():
            if not about.is_optional and name not in values:
                raise Refused(400, f"Invalid input error: input parameter {name} is required")
        return self._add(table, key, row)

    def _schedule(self, row: dict) -> dict:
        cron = row["trigger"].get("cron_schedule", {}).get("cron")
        if cron and len(cron.split()) != 6:
            raise Refused(400, f"Invalid input error: cron is not a supported format: {cron}")
        return self._start(row, self.recurring, "recurring_run_id")

    def _list(self, query: dict[str, str]) -> dict:
        """List an experiment's runs; each recurring run has fired once by then."""
        fired = {run.get("recurring_run_id") for run in self.runs.values()}
        for key in self.recurring.keys() - fired:
            names = ("display_name", "experiment_id", "pipeline_version_reference")
            row = {name: self.recurring[key][name] for name in (*names, "runtime_config")}
            self._start({**row, "recurring_run_id": key}, self.runs, "run_id")
        rows = self.runs.values()
        return {"runs": [run for run in rows if run["experiment_id"] == query["experiment_id"]]}

    def _terminate(self, run_id: str) -> dict:
        self.runs[run_id]["state"] = "CANCELED"
        return {}

    def _look(self, run_id: str) -> dict:
        if run_id not in self.runs:
            raise Refused(404, f"Run {run_id} not found")
        if "state" in self.runs[run_id]:
            return self.runs[run_id]
        parameters = self.runs[run_id]["runtime_config"].get("parameters", {})
        if parameters.get("secret_name") == "":
            self.states, self.failing = ["FAILED"], "preflight-driver"
            self.log = "F1127 12:00:00.000000      13 main.go:127] KFP driver: failed: resolving "
            self.log += "input parameter. Expected a non-empty string"
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, int):
            raise Refused(state, "the server has a bad moment")
        # The real server lists every node of Argo's workflow under Argo's names, with the ids of
        # those below. `run.error` stays null.
        is_step = self.failing == "preflight"
        names = ["root", "root-driver", "exit-handler-1", "preflight-driver"]
        names += ["preflight", "executor"] if is_step or state != "FAILED" else []
        failed = {"root", "exit-handler-1", self.failing, *(["executor"] if is_step else [])}
        nodes = [
            {
                "task_id": str(number),
                "display_name": name,
                "state": state if state != "FAILED" or name in failed else "SUCCEEDED",
                "child_tasks": [{"pod_name": f"{WORKFLOW}-{number}0"}],
            }
            for number, name in enumerate(names)
        ]
        if not self.large or not self.listed:
            self.listed = nodes
        details = {"task_details": self.listed}
        return {**self.runs[run_id], "state": state, "error": None, "run_details": details}

    def _manifest(self, run_id: str) -> dict:
        driver = {"templateName": "system-container-driver", "type": "Pod"}
        impl = {"templateName": "retry-system-container-impl", "type": "Pod"}
        message = f": {self.message}" if self.message else ""
        ends = {"phase": "Failed", "message": f"main: Error (exit code 1){message}"}
        lost = {"phase": "Error", "message": "pod deleted"}  # the attempt before
        below = [f"{WORKFLOW}-41", f"{WORKFLOW}-42"]
        driven = ends if self.failing == "preflight-driver" else {"phase": "Succeeded"}
        nodes = {
            "30": {**driver, **driven},
            "40": {"type": "Retry", "phase": "Failed", "children": below},
            "41": {**impl, **lost, "startedAt": "2026-11-27T12:00:00Z"},
            "42": {**impl, **ends, "startedAt": "2026-11-27T12:02:00Z"},
        }
        names = {number: f"{WORKFLOW}-{number}" for number in nodes}
        named = {names[number]: {**node, "id": names[number]} for number, node in nodes.items()}
        status = {"compressedNodes": "H4sI"} if self.large else {"nodes": named}
        manifest = {"metadata": {"name": WORKFLOW}, "status": status}
        runtime = {"workflow_manifest": json.dumps(manifest)}
        return {"run": {"id": run_id}, "pipeline_runtime": runtime}

    def _log(self, run_id: str, node: str) -> str:
        if self.is_ui:
            raise Refused(404, "Cannot GET")
        if node != f"{WORKFLOW}-{LAST[self.failing]}" or not self.log:
            # The status is sent before the log is looked for.
            return json.dumps({"error_message": "Failed to read logs", "error_details": "…"})
        return self.log

    def _ui_log(self, query: dict[str, str]) -> str:
        template = "system-container-driver"
        if self.failing == "preflight":
            template = "retry-system-container-impl"
        pod = f"{WORKFLOW}-{template}-{LAST[self.failing]}"
        if not self.is_ui or query["podname"] != pod or not self.log:
            raise Refused(404, "Could not get main container logs")
        return self.log
