"""A Python that starts at once: each process is forked from one that has imported what the tests'
programs need, and computed nothing.

`warm_python()` returns a program that takes `-m MODULE …` or `-c CODE …` as `python` does. It hands
its arguments, environment, folder and streams to a server, which all processes of a test run share,
passes SIGINT and SIGTERM on to the process that this forks, and ends as that does. Killing the
program kills that process and what it started. A test of imports, memory or threads starts
`sys.executable`.
"""

import atexit
import fcntl
import gc
import importlib
import inspect
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

PRELOADED = (
    "torch.distributed.run",
    "model_lib.train.training",
    "model_lib.batch.batching",
    "model_lib.evaluate.evaluation",
    "model_lib.registry.registry",
    "mlflow.pyfunc",
    "mlflow.cli",
    "uvicorn",
    "mlflow.server.fastapi_app",
    "pycocoevalcap.eval",
    "pipelines.train_captioner",
    "pipelines.submit",
    "kfp.local",
    "kfp.dsl.executor",
    "gcsfs",
    "s3fs",
    "moto.moto_server.werkzeug_app",
    "moto.s3.urls",
)
PROGRAM = """#!{python} -SsE
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "little")], [0, 1, 2])
server.sendall(request)
process = int(server.recv(8))
for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, frame: os.kill(process, number))
code = int(server.recv(8))
if code < 0:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@cache
def warm_python() -> str:
    """Return the program's path, once its server runs."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    owner = os.getppid() if run else os.getpid()
    folder = Path(tempfile.gettempdir(), f"warm-python-{owner}")
    folder.mkdir(exist_ok=True)
    program = folder / "python"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            with (folder / "log").open("w") as log:
                server = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(folder), str(owner)],
                    cwd=Path(__file__).parents[2],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
            assert server.stdout is not None
            assert server.stdout.read(1) == b".", (folder / "log").read_text()
    return str(program)


def main() -> None:
    folder, owner_end = Path(sys.argv[1]), os.pidfd_open(int(sys.argv[2]))
    for module in PRELOADED:
        importlib.import_module(module)
    # kfp looks at the stack for each property of a step; reading its source, too, takes seconds.
    inspect.stack = partial(inspect.stack, 0)  # type: ignore[assignment]
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(64)
        program = folder / "python"
        program.write_text(PROGRAM.format(python=sys.executable, address=str(folder / "socket")))
        program.chmod(0o755)
        os.write(1, b".")
        os.dup2(0, 1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while owner_end not in select.select([listener, owner_end], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                os.setsid()
                arguments = start(connection)
                sys.executable = str(program)
                run(arguments)
            connection.close()
    shutil.rmtree(folder)


def start(connection: socket.socket) -> list[str]:
    """Fork the process of a request, and return its arguments in it. The parent waits for its end.

    When the program is killed, so are both and what they started.
    """
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        arguments, folder, environment = json.loads(file.read(int.from_bytes(size, "little")))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if process:
        for stream in streams:
            os.close(stream)
        connection.send(f"{process:8}".encode())
        ended, _, _ = select.select([connection, os.pidfd_open(process)], [], [])
        if connection in ended:
            os.killpg(0, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    return arguments


def run(arguments: list[str]) -> NoReturn:
    """Do what `python` does with `-m MODULE …` or `-c CODE …`, and end this process."""
    option, target, *rest = arguments
    sys.argv = [option, *rest]
    code: object = 0
    try:
        if option == "-m":
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            module = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(target, module.__dict__)
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # An interpreter's own end would take a second, for all that was imported.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else bool(code))


if __name__ == "__main__":
    main()
