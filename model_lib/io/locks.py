"""An output folder for one run alone: others are kept out, and what a kill left half-written is
gone.

A local folder is locked by the system, which takes the lock away when its process ends, however
that ends. Other stores know no locks: there a file says who is at work, and changes every few
seconds for as long as they are.
"""

import contextlib
import fcntl
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_lib.errors import UserError, WorkError, first_line, printable
from model_lib.io import storage

log = logging.getLogger(__name__)
LOCK = ".lock"
"""The file; a local one stays, as removing it would let two runs hold two files of one name."""
BEAT = 5.0
"""Seconds between two signs of life in a bucket."""
SILENCE = 30.0
"""Seconds without one after which a run counts as dead. Whoever waits counts them: machines' clocks
differ."""
SETTLE = 1.0
"""Seconds to wait after writing the file: of two runs that begin together, the first to write then
sees the other's."""
GRACE = 10.0
"""Seconds in which a run that lost its folder may end in good order."""


@contextlib.contextmanager
def output_lock(folder: str) -> Iterator[None]:
    """Make an output folder ready and keep other runs out of it.

    Raises:
        UserError: it cannot be written to.
        WorkError: another run is at work in it, which may pass.
    """
    if not storage.is_local(folder):
        storage.require_writable(folder)
        with _Lease(folder):
            yield
        return
    with _locked(folder):
        storage.require_writable(folder)
        _remove_parts(Path(storage.filesystem(folder)[1]))
        yield


def _remove_parts(folder: Path) -> None:
    """Remove what kills left half-written, but not in folders below that are other runs'
    outputs."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not Path(place, name, LOCK).exists()]
        for name in files:
            if name.startswith(".part-"):
                Path(place, name).unlink(missing_ok=True)


def _at_work(folder: str, who: str) -> WorkError:
    return WorkError(f"{folder}: {who} is at work there; wait for it, or choose another output")


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    try:
        os.makedirs(path := storage.filesystem(folder)[1], exist_ok=True)
        lock = Path(path, LOCK).open("a+")  # noqa: SIM115 (what goes wrong in the body is another thing)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to: {error.strerror or error}; choose another output"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise _at_work(folder, lock.read().strip() or "another process") from None
        except OSError as error:  # a network's disk without locks
            log.warning(
                "%s: cannot be locked (%s): let no other run write there meanwhile",
                folder,
                error.strerror,
            )
        with contextlib.suppress(OSError):  # a full disk: who holds the lock is only said
            lock.truncate(0)
            lock.write(f"{_me()}\n")
            lock.flush()
        yield


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


class _Lease:
    """A lock in a folder of a bucket: a file with this run's name and a number that goes up.

    Args:
        folder: URI of the folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.uri = folder, storage.join(folder, LOCK)
        self.said = {
            "who": _me(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "run": uuid.uuid4().hex,
        }
        self.beats = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._live, name=f"lease of {folder}", daemon=True)

    def __enter__(self) -> None:
        there = self._read()
        if there is not None and not _dead(there):
            self._wait_for_silence(there)
        self._beat()
        time.sleep(SETTLE)
        there = self._read()
        if there is not None and there["run"] != self.said["run"]:
            raise _at_work(self.folder, there["who"])
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        try:
            if self._mine():
                storage.remove(self.uri)
        except Exception as error:  # it goes out by itself
            log.info("%s: not removed: %s", self.uri, first_line(error))

    def _wait_for_silence(self, there: dict[str, Any]) -> None:
        """Return once the run that left the file gives no sign of life; `WorkError` if it does."""
        log.warning(
            "%s: %s was at work there; looking for %.0f s whether it is",
            self.folder,
            printable(there["who"]),
            SILENCE,
        )
        until = time.monotonic() + SILENCE
        while time.monotonic() < until:
            time.sleep(min(1.0, SILENCE / 10))
            now = self._read()
            if now is None:
                return
            if now != there:
                raise _at_work(self.folder, now["who"])

    def _read(self) -> dict[str, Any] | None:
        """Return what the file says, or nothing if there is none that a run wrote."""
        try:
            document = storage.read_json(self.uri)
            return {name: document[name] for name in ("who", "host", "pid", "run", "beats")}
        except (UserError, LookupError, TypeError):
            return None

    def _mine(self) -> bool:
        there = self._read()
        return there is None or there["run"] == self.said["run"]

    def _beat(self) -> None:
        self.beats += 1
        storage.write_json(self.uri, {**self.said, "beats": self.beats})

    def _live(self) -> None:
        """Give signs of life; end the run if another took the folder over, for which this one was
        dead."""
        while not self.ended.wait(BEAT):
            try:
                if self._mine():
                    self._beat()
                    continue
            except (
                Exception
            ) as error:  # a store that fails: others see the silence, and this run sees them later
                log.info("%s: no sign of life: %s", self.uri, first_line(error))
                continue
            log.error(
                "%s: another run took it over while this one gave no sign of life; ending",
                self.folder,
            )
            signal.pthread_kill(
                threading.main_thread().ident or 0, signal.SIGINT
            )  # wakes it from what it waits for
            if not self.ended.wait(GRACE):  # or it ignores that: a shell's background job does
                os._exit(130)
            return


def _dead(there: dict[str, Any]) -> bool:
    """Whether the run that a file names was on this machine and is no more."""
    if there["host"] != socket.gethostname():
        return False
    try:
        os.kill(there["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, TypeError, OverflowError):
        return False
    return False
