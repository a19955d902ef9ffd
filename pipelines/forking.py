"""Steps of a local run as processes that are forked from one with their imports done.

By itself kfp.local starts a new Python for each step, and each imports torch, transformers and
MLflow again.
"""

import atexit
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = [
    "kfp.dsl.executor_main",
    "mlflow.pyfunc",
    "model_lib.batch.batching",
    "model_lib.evaluate.evaluation",
    "model_lib.registry.registry",
    "model_lib.train.launch",
    "model_lib.train.training",
    "pycocoevalcap.eval",
]
"""What the steps import; a package that is not installed is passed over."""
CONTEXT = multiprocessing.get_context("forkserver")
CHILDREN = threading.Lock()
"""Steps run side by side, and to start one looks whether others have ended, which only one may."""


def forked_steps() -> AbstractContextManager[None]:
    """Return a context in which kfp.local's `SubprocessRunner` forks its steps.

    The process that they are forked from starts at once, with this process's environment.
    """
    CONTEXT.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    return _forking()


@contextmanager
def _forking() -> Iterator[None]:
    from kfp.local import subprocess_task_handler as handler

    original = handler.run_local_subprocess
    handler.run_local_subprocess = _run_step
    try:
        yield
    finally:
        handler.run_local_subprocess = original


def _run_step(full_command: Sequence[str], env_vars: Mapping[str, str] | None = None) -> int:
    """Run a step in place of kfp's own function: print its output, and return its exit code.

    The command is a shell's, its script, the component's source, and arguments.
    """
    source, *arguments = full_command[3:]
    reader, writer = CONTEXT.Pipe(duplex=False)
    environment = {**os.environ, **(env_vars or {})}
    process = CONTEXT.Process(target=_step, args=(source, arguments, environment, writer))
    with CHILDREN:
        process.start()
    writer.close()
    with os.fdopen(os.dup(reader.fileno()), errors="replace") as lines:
        for line in lines:
            print(line, end="")
    print("\n")
    wait([process.sentinel])
    with CHILDREN:
        process.join()
    return int(process.exitcode or 0)


def _step(
    source: str, arguments: list[str], environment: dict[str, str], writer: Connection
) -> None:
    """Be a step."""
    from kfp.dsl import executor_main

    for stream in (1, 2):
        os.dup2(writer.fileno(), stream)
    writer.close()
    streams: dict[str, Any] = {"buffering": 1, "errors": "backslashreplace", "closefd": False}
    sys.stdout, sys.stderr = os.fdopen(1, "w", **streams), os.fdopen(2, "w", **streams)
    os.environ.clear()
    os.environ.update(environment)
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder, "ephemeral_component.py")
        module.write_text(source)
        sys.argv = ["executor_main", "--component_module_path", str(module), *arguments]
        try:
            executor_main.executor_main()
        finally:
            atexit._run_exitfuncs()
