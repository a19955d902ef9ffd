"""Training checkpoints at any fsspec URI.

    <output>/checkpoints/step-00000120/state.safetensors  weights, their average, AdamW's moments
                                       state.json         step, scores, configuration
                                       manifest.json      sha256 of both, written last
                         step-00000120-validated/         the same after the validation of this step

Resuming takes the newest checkpoint that matches its manifest; half-written ones are ignored. No
random state is kept: all random numbers follow from the seed and the step. No pickle is read or
written.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_lib.errors import UserError, WorkError, first_line
from model_lib.io import storage
from model_lib.io.errors import store_errors
from model_lib.io.remote_cache import local_copy
from model_lib.io.validation import parse
from model_lib.train.validation import ValidationScore

log = logging.getLogger(__name__)
WEIGHTS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT_VERSION = 4
"""Of a checkpoint's content; a run resumes from checkpoints of its own version."""


@dataclass(frozen=True)
class Position:
    """Where a run stands: the content of `state.json`."""

    step: int
    validated: int
    """Last step that was validated."""
    stale: int
    """Validations since the best one."""
    best: ValidationScore | None
    skipped: int
    """Steps whose gradients were not finite."""
    scaler: dict[str, Any]
    """State of the loss scaler."""
    configuration: dict[str, Any]


def load(uri: str) -> tuple[dict[str, Tensor], Position]:
    """Return the tensors of a whole checkpoint, and the run's position.

    Raises:
        UserError: it does not hold what a training run writes.
    """
    with store_errors(uri), local_copy(uri) as folder:
        try:
            position = parse(Position, (folder / STATE).read_bytes())
            return load_file(folder / WEIGHTS), position
        except (ValueError, SafetensorError) as error:
            raise UserError(
                f"{uri}: is a checkpoint of something else ({first_line(error)}); remove it and "
                "start again: it goes on from the checkpoint before"
            ) from error


def digest(file: Path) -> str:
    """Return the sha256 of a local file in hex."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class Checkpoints:
    """The checkpoints under a run's output folder, of which the newest `kept` are kept."""

    def __init__(self, output: str, kept: int = 2) -> None:
        self.folder, self.kept = storage.join(output, "checkpoints"), kept
        self._known: set[str] = set()

    def _uri(self, *parts: str) -> str:
        return storage.join(self.folder, *parts)

    def _names(self) -> list[str]:
        return [name for name in storage.list_names(self.folder) if name.startswith("step-")]

    def newest(self) -> str | None:
        """Return the URI of the newest whole checkpoint, or None.

        Raises:
            UserError, WorkError: a checkpoint cannot be read; it may be whole.
        """
        names = self._names()
        self._known = set(names)
        for name in reversed(names):
            if self._is_whole(name):
                return self._uri(name)
            log.warning("checkpoint %s is not whole; trying the one before", self._uri(name))
        return None

    def _is_whole(self, name: str) -> bool:
        try:
            with store_errors(self._uri(name)), local_copy(self._uri(name)) as folder:
                manifest = storage.read_json(str(folder / MANIFEST))
                return bool(manifest == {file: digest(folder / file) for file in (WEIGHTS, STATE)})
        except UserError as error:
            if isinstance(error.__cause__, PermissionError):
                raise
            return False

    def write(self, name: str, tensors: Mapping[str, Tensor], position: Position) -> None:
        """Write a checkpoint, then remove older ones and half-written ones.

        Args:
            name: "step-…"; names sort by age.
            tensors: a `TrainStep.snapshot`.
            position: of the run at that moment.

        Raises:
            WorkError: it could not be written, and those before it are untouched; or another run
                has written a newer one, in a bucket, which has no locks.
        """
        rivals = [other for other in self._names() if other >= name and other not in self._known]
        if rivals:
            raise WorkError(
                f"{self._uri(rivals[-1])}: another run wrote this checkpoint meanwhile, so this "
                "one stops; give each run an output of its own"
            )
        self._known.add(name)
        state = json.dumps(asdict(position)).encode()
        manifest = {STATE: hashlib.sha256(state).hexdigest()}
        try:
            with storage.atomic_file(self._uri(name, WEIGHTS)) as part:
                save_file(dict(tensors), part)
                manifest[WEIGHTS] = digest(Path(part))
            storage.write_bytes(self._uri(name, STATE), state)
            storage.write_json(self._uri(name, MANIFEST), manifest)
        except Exception:
            self._remove(name)
            raise
        names = self._names()
        whole = [other for other in names if storage.exists(self._uri(other, MANIFEST))]
        for other in set(names) - {name, *whole[-self.kept :]}:
            self._remove(other)

    def _remove(self, name: str) -> None:
        try:
            storage.remove(self._uri(name))
        except (UserError, WorkError) as error:  # a role may write and not delete
            log.warning("%s: not removed: %s", self._uri(name), first_line(error))
