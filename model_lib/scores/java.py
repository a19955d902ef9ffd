"""The official scores' Java programs."""

import re
import subprocess
from collections.abc import Mapping, Sequence

from model_lib.errors import WorkError

FRUGAL = (
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:CompressedClassSpaceSize=64m",
    "-XX:ReservedCodeCacheSize=64m",
)
"""Java options with which METEOR and the tokeniser run as fast, on any number of captions, and
start within 1 GB of address space. By itself Java reserves more than 4 GB."""
REASON = re.compile(r"could not|failed to|insufficient memory|exception|error(?! occurred)", re.I)
MEMORY = re.compile(r"insufficient memory|OutOfMemory|reserve|allocat|heap", re.I)
KILLED = (-9, 137)


def run_java(
    arguments: Sequence[str],
    memory: str,
    text: bytes = b"",
    environment: Mapping[str, str] | None = None,
) -> bytes:
    """Return what a Java program prints.

    Args:
        arguments: options, program and its arguments.
        memory: how much the program needs, for the message.
        text: its standard input.
        environment: variables; None: this process's.

    Raises:
        WorkError: it failed; with Java's own words, which may be on either output.
    """
    command = ["java", "-XX:ErrorFile=/dev/null", *arguments]  # not in the working directory
    try:
        process = subprocess.run(command, input=text, capture_output=True, env=environment)
    except OSError as error:
        raise WorkError(f"Java did not start: {error}") from error
    if process.returncode == 0:
        return process.stdout
    lines = (process.stderr + b"\n" + process.stdout).decode(errors="replace").splitlines()
    reasons = [line.strip() for line in lines if REASON.search(line)]
    last = process.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
    message = f"Java ended with exit code {process.returncode}: {(reasons or last[-1:])[0]}"
    if MEMORY.search(message) or process.returncode in KILLED:
        message += f"; give it {memory} of memory (ulimit -v, or the container's limit)"
    raise WorkError(message)
