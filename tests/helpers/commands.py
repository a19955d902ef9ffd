"""Runs the command line in processes of their own that cost no start of Python.

Each is forked from one that has imported what the commands need, and computed nothing: importing
torch anew for every command would cost more than the commands. What needs a start from nothing, as
memory or imports do, does it itself.
"""

import atexit
import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess

from model_lib.cli import main

PRELOADED = [
    "pipelines.train_captioner",
    "pipelines.submit",
    "torch",
    "transformers",
    "mlflow.pyfunc",
    "pycocoevalcap.eval",
    "model_lib.train.training",
    "model_lib.model.captioning",
    "model_lib.registry.registry",
]
TIMEOUT = 600.0
"""Seconds in which a command must end."""

_processes = multiprocessing.get_context("forkserver")


def prepare() -> None:
    """Start the process from which the others are forked, with this environment."""
    _processes.set_forkserver_preload([*PRELOADED, __name__])
    forkserver.ensure_running()


def run(
    arguments: list[str], folder: Path, environment: dict[str, str], stdin: str
) -> CompletedProcess:
    """Run `captioner` with these arguments, in this folder and environment; return what came of
    it."""
    with tempfile.TemporaryDirectory() as place:
        streams = [Path(place, name) for name in ("stdin", "stdout", "stderr")]
        streams[0].write_text(stdin)
        process = _processes.Process(
            target=_command, args=(arguments, folder, environment, streams)
        )
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(
                f"captioner {' '.join(arguments)}: has not ended after {TIMEOUT:.0f} seconds"
            )
        return CompletedProcess(
            arguments, process.exitcode, *(file.read_text() for file in streams[1:])
        )


def _command(
    arguments: list[str], folder: Path, environment: dict[str, str], streams: list[Path]
) -> None:
    for number, file in enumerate(streams):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (multiprocessing has closed it)
    sys.argv = ["captioner", *arguments]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
