"""Tables on disk: they hold what memory would not, and say so when the disk is full."""

import subprocess
import sys

from model_lib.io.scratch import DiskSet

FULL = """
import resource
from model_lib.io import scratch
scratch.CACHE = 100
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
keys = scratch.DiskSet()
for key in range(1_000_000):
    keys.add(f"images/{key * 7919 % 1_000_003}.jpg")
"""


def test_a_key_is_new_once() -> None:
    keys = DiskSet()
    assert [keys.add(key) for key in (1, "1", 1, "a", "a", 2**62, "ä\0b", "ä\0c")] == [
        *(True, True, False, True, False, True, True, True)
    ]


def test_a_full_disk_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]
    assert done.returncode and "WorkError: the folder of temporary files: " in line
    assert "; make room there, or let TMPDIR name another folder" in line
