"""Training checkpoints at any fsspec URI: found whole, or not found at all.

    <output>/checkpoints/step-00000120/state.safetensors  weights, their average, AdamW's moments
                                       state.json         step, scores, what the run was made from
                                       manifest.json      sizes and sha256 of both, written last
                         step-00000120-validated/         the same after the validation of this step

Resuming takes the newest checkpoint whose manifest holds, whatever half-written ones lie beside it.
There are no random states in it: all random numbers follow from the seed and the step. No pickle is
read or written.
"""

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model_lib.errors import UserError, WorkError, first_line
from model_lib.io import storage
from model_lib.io.errors import disk_is_full
from model_lib.io.remote_cache import local_copy
from model_lib.io.validation import parse
from model_lib.train.config import TrainConfig

log = logging.getLogger(__name__)
FILES = {"state.safetensors", "state.json"}
FORMAT_VERSION = 2
"""Of what is in a checkpoint; part of what a run was made from."""


@dataclass(frozen=True)
class Position:
    """Where a run stands: what `state.json` says."""

    step: int
    validated: int
    """The last step that was validated …"""
    stale: int
    """… and how many validations were no better than the best."""
    best: list[Any] | None
    """CIDEr and negative loss of the best model."""
    origin: str
    """What the run was made from."""
    learner: dict[str, Any]
    unsent: list[Any]
    """Points that MLflow may not have; their values may be NaN."""
    configuration: dict[str, Any]


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, averages: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return copies on the CPU of all tensors that a run goes on from."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
    tensors |= {f"average.{name}": average for name, average in averages.items()}
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def restore(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Put the weights and the optimiser's moments of a snapshot back; return the averages."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        if key.startswith("model."):
            parameters[key.removeprefix("model.")].data.copy_(tensor)
        elif key.startswith("optimizer."):
            _, kind, name = key.split(".", 2)
            optimizer.state[parameters[name]][kind] = tensor.to(parameters[name].device, copy=True)
    averages = {name: tensor for name, tensor in tensors.items() if name.startswith("average.")}
    return {name.removeprefix("average."): tensor for name, tensor in averages.items()}


class Checkpoints:
    """The checkpoints under an output folder.

    Args:
        output: folder or URI of the run.
        kept: newest ones to keep; the one before the newest is there should the newest prove
            broken.
    """

    def __init__(self, output: str, kept: int = 2) -> None:
        self.folder, self.kept = storage.join(output, "checkpoints"), kept

    def _uri(self, name: str, *file: str) -> str:
        return storage.join(self.folder, name, *file)

    def _names(self) -> list[str]:
        return [name for name in storage.list_names(self.folder) if name.startswith("step-")]

    def write(self, name: str, tensors: Mapping[str, Tensor], position: Position) -> None:
        """Write a checkpoint, and then remove older ones and what kills left half-written.

        Args:
            name: "step-…"; names sort by age.
            tensors: a `snapshot`.
            position: in the run.

        Raises:
            WorkError: it could not be written; those before it are untouched.
        """
        entries = {}
        try:
            with storage.atomic_file(self._uri(name, "state.safetensors")) as part:
                entries["state.safetensors"] = _write_safetensors(Path(part), tensors)
            with storage.atomic_file(self._uri(name, "state.json")) as part:
                Path(part).write_text(json.dumps(asdict(position)))
                entries["state.json"] = _entry(Path(part))
            storage.write_json(self._uri(name, "manifest.json"), entries)
        except Exception as error:
            self._remove_quietly(name)
            raise unwritten(self._uri(name), error) from error
        names = self._names()
        whole = [other for other in names if storage.exists(self._uri(other, "manifest.json"))]
        for other in names:
            if other not in whole[-self.kept :] and other != name:
                self._remove_quietly(other)

    def _remove_quietly(self, name: str) -> None:
        try:
            storage.remove(self._uri(name))
        except (
            Exception
        ) as error:  # a role without the right to delete, for example: nothing to end a run for
            log.warning("%s: not removed: %s", self._uri(name), first_line(error))

    def newest(self) -> str | None:
        """Return the URI of the newest whole checkpoint, or None if there is none.

        Raises:
            WorkError: a checkpoint cannot be read, whole or not.
        """
        for name in reversed(self._names()):
            try:
                with local_copy(self._uri(name)) as folder:
                    entries = json.loads((folder / "manifest.json").read_text())
                    if not isinstance(entries, dict) or entries.keys() != FILES:
                        raise ValueError(
                            f"its manifest does not name {' and '.join(sorted(FILES))}"
                        )
                    if all(_entry(folder / file) == entry for file, entry in entries.items()):
                        return self._uri(name)
            except (
                FileNotFoundError,
                NotADirectoryError,
                IsADirectoryError,
                ValueError,
                RecursionError,
            ) as error:
                log.warning(
                    "checkpoint %s is not whole (%s); trying the one before", self._uri(name), error
                )
                continue
            except OSError as error:  # it may be whole: to begin anew would be to lose it
                raise WorkError(
                    f"{self._uri(name)}: cannot be read: {first_line(error)}; see to its store, "
                    "or to room in "
                    f"{tempfile.gettempdir()}, and start again"
                ) from error
            log.warning(
                "checkpoint %s is damaged; removing it and trying the one before", self._uri(name)
            )
            self._remove_quietly(name)
        return None


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {
            "bytes": file.stat().st_size,
            "sha256": hashlib.file_digest(content, "sha256").hexdigest(),
        }


def _write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write float32 tensors on the CPU as safetensors does; return the file's entry in the
    manifest.

    The format (huggingface.co/docs/safetensors): the header's length, the header in JSON, the
    values one after another. Written and hashed in one pass over memory that is there, which leaves
    training more of the CPU than `save_file`.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name}: {tensor.dtype} is not float32")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    values: list[Any] = [tensor.flatten().numpy() for tensor in tensors.values()]
    with file.open("wb") as target:
        for part in (len(text).to_bytes(8, "little"), text, *values):
            target.write(part)
            digest.update(part)
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


def load(uri: str) -> tuple[dict[str, Tensor], Position]:
    """Return the tensors of a whole checkpoint, and the run's position."""
    with restoring(uri), local_copy(uri) as folder:
        position = parse(Position, (folder / "state.json").read_bytes())
        if min(position.step, position.validated, position.stale) < 0:
            raise ValueError("its steps are negative")
        return load_file(folder / "state.safetensors"), position


@contextlib.contextmanager
def restoring(uri: str) -> Iterator[None]:
    """Raise a `UserError` if a checkpoint, whole as it is, holds something else than its run
    writes."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise UserError(
            f"{uri}: is a checkpoint of something else ({first_line(error)}); remove it and start "
            "again: it goes on "
            "from the checkpoint before"
        ) from error


def require_room(config: TrainConfig, model: nn.Module) -> None:
    """Raise `UserError` now if the disk has no room for what a run will write."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    copies = 3 + (config.ema is not None and config.ema > 0)  # weights, two moments, their average
    one, best = 4 * trained * copies, 4 * sum(p.numel() for p in model.parameters())
    output = Path(storage.filesystem(config.output)[1])
    there = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    what = (
        f"{config.checkpoints_kept} checkpoints, one more while it is written, and the best model"
    )
    storage.require_room(config.output, (config.checkpoints_kept + 1) * one + best - there, what)


def unwritten(uri: str, error: Exception) -> WorkError:
    """Return what to tell the user when `uri` could not be written."""
    full = disk_is_full(error)
    remedy = "make room there" if full else "see to its store"
    return WorkError(
        f"{uri}: cannot be written: {'the disk is full' if full else first_line(error)}; {remedy} "
        "and start again: it "
        "goes on from the checkpoint before, which is whole"
    )
