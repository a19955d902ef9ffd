"""Memory limits as a container has them: the kernel kills the stage; with more memory the same
command ends the same.

The limit is a control group's (version 1 or 2), which only root can make; or a process's own limit
of addresses, under which libraries below Python may abort by themselves.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_lib.data.shards import read_manifest
from tests.helpers.batches import captions_by_name, read_output
from tests.helpers.training import same_best

CAPTIONER = (sys.executable, "-m", "model_lib")
TRAIN = ("--preset", "tiny", "--epochs", "2", "--checkpoint_steps", "1", "--data")
GROUPS = Path("/sys/fs/cgroup")
ADDRESSES = 'ulimit -v "$0" && exec "$@"'
JOIN = 'echo $$ > "$0" && exec "$@"'
PLENTY = 8 * 2**30
LIMITS = (0.7, 0.6, 0.5, 0.4)
"""Parts of the most memory that the stage used. A little less kills nothing: code is read again and
again."""
KILLS = 3


class Group:
    """A control group whose processes may use so much memory together."""

    def __init__(self) -> None:
        old = (GROUPS / "memory").is_dir()
        self.folder = (GROUPS / "memory" if old else GROUPS) / f"captioner-test-{os.getpid()}"
        self.limit = self.folder / ("memory.limit_in_bytes" if old else "memory.max")
        self.peak = self.folder / ("memory.max_usage_in_bytes" if old else "memory.peak")
        self.folder.mkdir()

    def run(self, limit: int, *arguments: object) -> subprocess.CompletedProcess:
        """Run `captioner` with these arguments under a limit of so many bytes."""
        self.limit.write_text(str(limit))
        command = ["sh", "-c", JOIN, self.folder / "cgroup.procs", *CAPTIONER, *arguments]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)


@pytest.fixture()
def group() -> Iterator[Group]:
    try:
        cgroup = Group()
    except OSError:
        pytest.skip("no control group can be made: needs root and a writable /sys/fs/cgroup")
    try:
        if not cgroup.limit.exists() or not cgroup.peak.exists():
            pytest.skip("the system's control groups do not limit memory")
        yield cgroup
    finally:
        cgroup.folder.rmdir()


def survivors(group: Group, tmp_path: Path, *arguments: object) -> list[Path]:
    """Run a stage with memory enough, then with ever less until killed so often, then with enough;
    return those."""
    whole = group.run(PLENTY, *arguments, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    peak, killed = int(group.peak.read_text()), []
    for limit in LIMITS:
        output = tmp_path / str(limit)
        done = group.run(int(limit * peak), *arguments, "--output", output)
        if done.returncode != -signal.SIGKILL:
            assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
            continue
        again = group.run(PLENTY, *arguments, "--output", output)
        assert again.returncode == 0, again.stderr
        killed.append(output)
        if len(killed) == KILLS:
            break
    print(f"{arguments[0]}: killed at {[file.name for file in killed]} of {peak >> 20} MiB")
    assert len(killed) == KILLS
    return killed


@pytest.mark.soak
def test_training_ends_with_the_same_model(group: Group, data: Path, tmp_path: Path) -> None:
    for output in survivors(group, tmp_path, "train", *TRAIN, data):
        assert same_best(output, tmp_path / "whole")


@pytest.mark.soak
def test_training_under_a_limit_of_addresses_tells_or_goes_on_the_same(
    data: Path, tmp_path: Path
) -> None:
    ended: dict[int, list[int]] = {}

    def run(kilobytes: int | str, output: Path) -> subprocess.CompletedProcess:
        command = ["sh", "-c", ADDRESSES, kilobytes, *CAPTIONER, "train", *TRAIN, data]
        words = [str(part) for part in (*command, "--output", output)]
        environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{output}.db"}
        return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)

    assert run("unlimited", tmp_path / "whole").returncode == 0
    for megabytes in range(2000, 3600, 100):
        output = tmp_path / str(megabytes)
        done = run(megabytes * 1024, output)
        ended.setdefault(done.returncode, []).append(megabytes)
        assert done.returncode in (0, 1, -signal.SIGABRT, -signal.SIGSEGV, 127), done.stderr
        if done.returncode == 1:
            assert "captioner: failed: " in done.stderr, done.stderr
            assert "Traceback" not in done.stderr, done.stderr
        if output.exists() and done.returncode:
            assert run("unlimited", output).returncode == 0
            assert same_best(output, tmp_path / "whole")
    print(f"exit codes, and the limits in MB that gave them: {ended}")
    assert len(ended[1]) > 3 and ended[0]


def test_ingest_ends_with_the_same_shards(group: Group, scenes: Path, tmp_path: Path) -> None:
    for output in survivors(group, tmp_path, "ingest", "--dataset", scenes):
        ours, theirs = (read_manifest(str(folder)) for folder in (output, tmp_path / "whole"))
        assert [shard.sha256 for shard in ours.shards] == [shard.sha256 for shard in theirs.shards]
        assert ours.fingerprint == theirs.fingerprint


@pytest.mark.soak
def test_batch_ends_with_the_same_captions(
    group: Group, scenes: Path, saved_model: Path, tmp_path: Path
) -> None:
    options = ("--images", scenes / "train2017", "--model", saved_model, "--shard_images", "4")
    for output in survivors(group, tmp_path, "batch", *options):
        ours, theirs = (captions_by_name(read_output(o)) for o in (output, tmp_path / "whole"))
        assert ours == theirs and len(ours) == 64
