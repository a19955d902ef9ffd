"""Where weights and tokenizers come from: a hub name, a local folder, an fsspec URI or the MLflow registry.

Weights are read from safetensors files only; a pickle is never opened.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GPT2Tokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from model_lib import storage
from model_lib.errors import UserError


def choose_device(device: str) -> torch.device:
    """Return the named device, or the best present one for "auto"; `UserError` if it is not there."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: not available here; use auto, cpu, cuda or mps") from error
    return chosen


def _folder_or_hub_name(source: str) -> str:
    """Return a local folder for a path or URI, and a hub name unchanged."""
    if "://" in source:
        return storage.local_folder(source)
    if source.startswith((".", "/", "~")) or Path(source).exists():
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise UserError(f"{source}: no such folder")
        return str(folder)
    if source.count("/") > 1:
        raise UserError(f"{source}: no such folder, and not a hub name of the form owner/name")
    return source


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' bars and its notes about weights that are left out, which a user cannot act on."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_part(kind: type[PreTrainedModel], source: str) -> Any:
    """Load a transformers model of class `kind` from safetensors; `UserError` if `source` holds none."""
    name = _folder_or_hub_name(source)
    try:
        with quiet():
            config = kind.config_class.from_pretrained(name)
            if config.model_type != kind.config_class.model_type:
                raise UserError(f"{source}: holds a {config.model_type} model, not a {kind.config_class.model_type}")
            part, loading = kind.from_pretrained(
                name, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{source}: no {kind.__name__} weights (safetensors) can be loaded: {first_line(error)}"
        ) from error
    require_whole(source, loading)
    return part


def require_whole(source: str, loading: dict[str, Any]) -> None:
    """Raise `UserError` if weights were missing when `source` was loaded: transformers makes up random ones."""
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(f"{source}: {len(missing)} weights are missing, {missing[0]} for one; the folder is incomplete")


def load_tokenizer(source: str) -> Any:
    """Load GPT-2's byte-level BPE from `tokenizer.json`, or from `vocab.json` and `merges.txt`."""
    name = _folder_or_hub_name(source)
    try:
        with quiet():
            return GPT2Tokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source}: no tokenizer (tokenizer.json, or vocab.json and merges.txt): {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    """Return what an exception says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def resolve_captioner(source: str) -> str:
    """Return a local folder (or a hub name) that holds a captioner; `UserError` if it does not."""
    source = str(source)
    if source.startswith("models:/"):
        from model_lib.registry import download_model

        return download_model(source)
    folder = _folder_or_hub_name(source)
    if Path(folder).is_dir():
        config = Path(folder) / "config.json"
        if not config.is_file() or storage.read_json(str(config)).get("model_type") != "captioner":
            raise UserError(f"{source}: not a captioner model folder (its config.json should say so)")
        if not any(Path(folder).glob("*.safetensors")):
            raise UserError(f"{source}: the model folder holds no safetensors weights")
    return folder


def lasting_source(source: str) -> str:
    """Return a model's source so that it means the same later: an alias as its version, a path as an absolute one."""
    if source.startswith("models:/"):
        from model_lib.registry import pin_version

        return pin_version(source)
    return storage.absolute(source) if storage.is_folder(source) else source


def read_training(folder: str) -> dict[str, Any]:
    """Return what training wrote beside the model in `folder`: name, data, MLflow run; empty if it wrote nothing."""
    file = Path(folder) / "training.json"
    return dict(storage.read_json(str(file))) if file.is_file() else {}
