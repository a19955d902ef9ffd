"""The cache of what is fetched: whole or not there, fetched once for all who want it, and clear of
what kills leave."""

import os
import signal
import subprocess
import sys
from pathlib import Path

FETCHING = """
import sys, time
from pathlib import Path
from model_lib.io.remote_cache import cached

def fetch(part):
    (part / "weights").write_text("half")
    print("fetching", flush=True)
    sys.stdin.readline()
    (part / "weights").write_text("whole")

print("begun", flush=True)
print((cached(["a model"], fetch) / "weights").read_text(), flush=True)
"""


def fetching(cache: Path) -> subprocess.Popen[str]:
    """Return a process that has begun to ask for a folder; if it is the one that fetches, it waits
    for a line."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, "-c", FETCHING], env=environment, text=True, **pipes
    )
    assert process.stdout.readline() == "begun\n"
    return process


def test_what_a_killed_process_fetched_is_gone_and_others_wait_for_the_one_that_fetches(
    tmp_path: Path,
) -> None:
    killed = fetching(tmp_path)
    assert killed.stdout.readline() == "fetching\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [file.read_text() for file in tmp_path.rglob("weights")] == ["half"]

    first = fetching(tmp_path)
    assert first.stdout.readline() == "fetching\n"
    second = fetching(tmp_path)
    assert first.communicate("\n")[0] == second.communicate("\n")[0] == "whole\n"
    assert [file.read_text() for file in tmp_path.rglob("weights")] == ["whole"]
