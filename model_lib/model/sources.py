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
from model_lib.io.remote_cache import cached_folder
from model_lib.io.validation import read_record

REGISTRIES = {"models:/": "model_lib.registry.model_uris"}
"""By prefix of a source the module that resolves it, imported when a source has that prefix, as
fsspec does with protocols. It has `pin_version(source)` and `download_model(source)`."""


def _registry_of(source: str) -> Any:
    """Return the module of the registry that a source belongs to, or None."""
    names = (module for prefix, module in REGISTRIES.items() if source.startswith(prefix))
    name = next(names, None)
    return None if name is None else importlib.import_module(name)


def folder_or_hub_name(source: str) -> str:
    """Return a local folder for a path or URI, and a hub name unchanged."""
    if "://" in source:
        return cached_folder(source)
    if source.startswith((".", "/", "~")) or Path(source).exists():
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise UserError(f"{source}: no such folder")
        return str(folder)
    if source.count("/") > 1:
        raise UserError(f"{source}: no such folder, and not a hub name of the form owner/name")
    return source


def resolve_captioner(source: str) -> str:
    """Return a local folder (or a hub name) that holds a captioner; `UserError` if it does not."""
    source = str(source)
    if (registry := _registry_of(source)) is not None:
        return str(registry.download_model(source))
    folder = folder_or_hub_name(source)
    if Path(folder).is_dir():
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

    None for a registry's version, which never changes, and for a hub name. Raises as
    `resolve_captioner`.
    """
    if _registry_of(source) is not None:
        return None
    folder = resolve_captioner(source)
    return weights_digest(folder) if Path(folder).is_dir() else None


def lasting_source(source: str) -> str:
    """Return a source that means the same later: an alias as its version, a path as absolute."""
    if (registry := _registry_of(source)) is not None:
        return str(registry.pin_version(source))
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
