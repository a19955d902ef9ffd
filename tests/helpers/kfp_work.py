"""The server of `kfp_server`, which also does the runs' work: each in a process, by kfp.local."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.kfp_server import KfpServer

WORK = """
import json, sys
from pathlib import Path
from model_lib.exits import exit_in_one_line
from pipelines import train_captioner
from pipelines.caption_bucket import caption_bucket
from pipelines.local import run_locally

name, arguments, work = sys.argv[1:]
pipeline = caption_bucket if name == "caption-bucket" else train_captioner.define(1)
with exit_in_one_line():
    run_locally(pipeline, json.loads(arguments), Path(work), "subprocess")
"""
CLOSE = "from model_lib.steps.closing import close_pipeline; close_pipeline('run', 'CANCELED')"


class WorkingKfpServer(KfpServer):
    """Does the work of its runs, one process each.

    It has no cache, no second machine, and shows every failure as one of the first step. A run that
    is terminated is killed, and then closed as the exit handler does it.

    Args:
        folder: for the runs' logs and outputs.
        tracking_uri: of the MLflow server.
    """

    def __init__(self, folder: Path, tracking_uri: str) -> None:
        super().__init__()
        self.folder, self.tracking_uri = folder, tracking_uri
        self.processes: dict[str, subprocess.Popen] = {}

    def _environment(self, run_id: str) -> dict[str, str]:
        own = {"MLFLOW_TRACKING_URI": self.tracking_uri, "KFP_RUN_ID": run_id}
        return {**os.environ, **own}

    def _start(self, row: dict, table: dict[str, dict], key: str) -> dict:
        answer = super()._start(row, table, key)
        if table is self.runs:
            run_id = answer["run_id"]
            name = self.pipelines[row["pipeline_version_reference"]["pipeline_id"]]["display_name"]
            work = self.folder / run_id
            work.mkdir()
            arguments = json.dumps(row["runtime_config"].get("parameters", {}))
            with (work / "log").open("w") as log:
                self.processes[run_id] = subprocess.Popen(
                    [sys.executable, "-c", WORK, name, arguments, str(work)],
                    stdout=log,
                    stderr=log,
                    env=self._environment(run_id),
                    start_new_session=True,
                )
        return answer

    def _look(self, run_id: str) -> dict:
        code = self.processes[run_id].poll() if run_id in self.processes else None
        self.states = ["RUNNING" if code is None else "FAILED" if code else "SUCCEEDED"]
        if code:
            self.message = (self.folder / run_id / "log").read_text().strip().splitlines()[-1]
        return super()._look(run_id)

    def _terminate(self, run_id: str) -> dict:
        process = self.processes[run_id]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        environment = self._environment(run_id)
        subprocess.run([sys.executable, "-c", CLOSE], env=environment, check=True)
        return super()._terminate(run_id)
