"""Training checkpoints at any fsspec URI: found whole, or not found at all.

    <output>/checkpoints/step-00000120/state.safetensors   weights, their average, AdamW's moments, random state
                                       state.json          the position in the run and what it was made from
                                       manifest.json       sizes and sha256 of both, written last

Resuming takes the newest checkpoint whose manifest holds, whatever half-written ones lie beside it. No pickle is
read or written.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model_lib import storage
from model_lib.errors import UserError

log = logging.getLogger(__name__)
KEPT = 2
"""Checkpoints kept; the one before the newest is there should the newest prove broken."""


def _folder(output: str) -> str:
    return storage.join(output, "checkpoints")


def save(
    output: str,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, Tensor],
    state: dict[str, Any],
) -> None:
    """Write the checkpoint of `step` and remove the oldest ones."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = {f"model.{name}": p.detach() for name, p in trained.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value.detach()
    tensors |= {f"average.{name}": average for name, average in averages.items()}
    tensors["random"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["random_cuda"] = torch.cuda.get_rng_state(device)
    target = storage.join(_folder(output), f"step-{step:08d}")
    with tempfile.TemporaryDirectory() as scratch:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, f"{scratch}/state.safetensors")
        Path(scratch, "state.json").write_text(json.dumps(state))
        entries = {file.name: _entry(file) for file in sorted(Path(scratch).iterdir())}
        storage.upload_folder(scratch, target)
    storage.write_json(storage.join(target, "manifest.json"), entries)
    names = _names(output)
    whole = [name for name in names if storage.exists(storage.join(_folder(output), name, "manifest.json"))]
    for name in names:  # older ones, and what a kill left half-written
        if name not in whole[-KEPT:] and not target.endswith(name):
            storage.remove(storage.join(_folder(output), name))


def _names(output: str) -> list[str]:
    return [name for name in storage.list_names(_folder(output)) if name.startswith("step-")]


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def newest(output: str) -> str | None:
    """Return a local folder with the newest whole checkpoint under `output`, or None if there is none."""
    for name in reversed(_names(output)):
        uri = storage.join(_folder(output), name)
        try:
            folder = Path(storage.local_folder(uri))
            entries = json.loads((folder / "manifest.json").read_text())
            if all(_entry(folder / file) == entry for file, entry in entries.items()):
                return str(folder)
        except (OSError, ValueError, AttributeError, UserError) as error:
            log.warning("checkpoint %s is not whole (%s); trying the one before", uri, error)
            continue
        log.warning("checkpoint %s is damaged; trying the one before", uri)
    return None


def read_state(folder: str) -> dict[str, Any]:
    """Return the position and origin of the run that `save` was given."""
    return dict(json.loads(Path(folder, "state.json").read_text()))


def restore(folder: str, model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Put trained weights, the optimiser's moments and the random state back; return the averages."""
    tensors = load_file(f"{folder}/state.safetensors")
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        if key.startswith("model."):
            parameters[key.removeprefix("model.")].data.copy_(tensor)
        elif key.startswith("optimizer."):
            _, kind, name = key.split(".", 2)
            # As torch keeps it: the fused AdamW reads its step count on the device, the plain one on the CPU.
            beside = kind != "step" or optimizer.defaults["fused"]
            optimizer.state[parameters[name]][kind] = tensor.to(parameters[name].device if beside else "cpu")
    torch.set_rng_state(tensors["random"])
    device = next(model.parameters()).device
    if "random_cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random_cuda"], device)
    averages = {name: tensor for name, tensor in tensors.items() if name.startswith("average.")}
    return {name.removeprefix("average."): tensor for name, tensor in averages.items()}
