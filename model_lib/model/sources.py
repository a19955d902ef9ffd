"""Where models come from: a hub name, a local folder, an fsspec URI or a model registry.

Needs no torch.
"""

import hashlib
import importlib
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict  # pydantic refuses that of Python before 3.12

from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.io.hub import download_model, pin_revision
from model_lib.io.remote_cache import cached_folder
from model_lib.io.validation import read_record

RIVAL = "hf:"
"""Prefix of another project's captioner, before its hub name, folder or URI: see `rivals`."""
REGISTRIES = {"models:/": "model_lib.registry.model_uris"}
"""By prefix of a source the module that resolves it, imported when a source has that prefix, as
fsspec does with protocols. It has `pin_version(source)` and `download_model(source)`."""


def _registry_of(source: str) -> Any:
    """Return the module of the registry that a source belongs to, or None."""
    names = (module for prefix, module in REGISTRIES.items() if source.startswith(prefix))
    name = next(names, None)
    return None if name is None else importlib.import_module(name)


def is_hub_name(source: str) -> bool:
    """Return whether a source is neither an address nor a local path."""
    is_address = "://" in source or _registry_of(source) is not None
    return not (is_address or source.startswith((".", "/", "~")) or Path(source).exists())


def model_folder(source: str, weights: bool = True, subfolder: str = "", **options: Any) -> str:
    """Return a local folder with a model's files: of a folder, URI or hub name.

    Args:
        source: a hub name may have a revision: owner/name@revision.
        weights: whether weights are needed, or a tokenizer alone.
        subfolder: of the source.
        options: of the hub's client: revision, cache_dir, token, …

    Raises:
        UserError: there is no such model.
        WorkError: its store or the hub failed.
    """
    if is_hub_name(source):
        return download_model(source, subfolder, weights, **options)
    folder = Path(cached_folder(source) if "://" in source else source).expanduser() / subfolder
    if not folder.is_dir():
        raise UserError(f"{source}: no such folder")
    return str(folder)


def captioner_folder(source: str, **options: Any) -> str:
    """Return a local folder that holds a captioner; options and errors as for `model_folder`."""
    source = str(source)
    if source.startswith(RIVAL):
        raise UserError(
            f"{source}: is another project's captioner, which caption, batch and evaluate take"
        )
    if (registry := _registry_of(source)) is not None:
        return str(registry.download_model(source))
    folder = model_folder(source, **options)
    config = Path(folder) / "config.json"
    document = storage.read_json(str(config)) if config.is_file() else None
    if not isinstance(document, dict) or document.get("model_type") != "captioner":
        raise UserError(f"{source}: not a captioner model folder, by its config.json")
    if not any(Path(folder).glob("*.safetensors")):
        raise UserError(f"{source}: the model folder holds no safetensors weights")
    return folder


def weights_digest(folder: str) -> str:
    """Return the SHA-256 of a local model folder's `config.json` and safetensors files, in hex."""
    digest = hashlib.sha256()
    for file in sorted([Path(folder, "config.json"), *Path(folder).glob("*.safetensors")]):
        with file.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.name} {sha256}\n".encode())
    return digest.hexdigest()


def source_digest(source: str) -> str | None:
    """Return the digest of a model folder's weights, which somebody may replace.

    None for a registry's version and a hub's commit, which never change. Raises as
    `captioner_folder`, or for another project's captioner as `model_folder`.
    """
    if source.startswith(RIVAL):
        rival = source.removeprefix(RIVAL)
        return None if is_hub_name(rival) else weights_digest(model_folder(rival))
    if _registry_of(source) is not None or is_hub_name(source):
        return None
    return weights_digest(captioner_folder(source))


def lasting_source(source: str) -> str:
    """Return a source that means the same later: an alias as its version, a hub name with its
    commit, a path as absolute."""
    if source.startswith(RIVAL):
        return RIVAL + lasting_source(source.removeprefix(RIVAL))
    if (registry := _registry_of(source)) is not None:
        return str(registry.pin_version(source))
    if is_hub_name(source):
        return pin_revision(source)
    return storage.absolute(source) if storage.is_folder(source) else source


class TrainingRecord(TypedDict, total=False):
    """What training writes beside a model, as far as it is read again."""

    name: str
    data_fingerprint: str
    mlflow_run_id: str | None
    configuration: dict[str, Any]


def read_training(folder: str) -> dict[str, Any]:
    """Return the `TrainingRecord` beside the model in `folder`; empty if there is none."""
    file = Path(folder) / "training.json"
    if not file.is_file():
        return {}
    return dict(read_record(str(file), TrainingRecord, "what captioner train wrote; remove it"))
