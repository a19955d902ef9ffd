"""Weights and tokenizers of the parts, as transformers has them.

Weights are read from safetensors files only; a pickle is never opened.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from model_lib.errors import UserError, first_line
from model_lib.io import storage
from model_lib.io.errors import input_errors
from model_lib.io.validation import read_record, require_file_name
from model_lib.model.sources import model_folder
from model_lib.model.tokens import tokenizer_problem


@dataclass(frozen=True)
class _Index:
    """Of weights in several files."""

    weight_map: dict[str, str]
    metadata: Any = None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and its notes about weights that are left out."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def loading_errors(source: str, what: str) -> Iterator[None]:
    """Raise a `UserError` that `source` cannot be loaded as `what`, for any error of transformers.

    On damaged files it, safetensors and tokenizers raise all kinds, down to plain `Exception`s.
    """
    try:
        with quiet_transformers():
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        message = f"{source}: cannot be loaded as {what}: {first_line(error)}"
        raise UserError(message) from error


def require_safetensors(folder: str) -> None:
    """Raise `UserError` if an index of a model folder names other files than its own safetensors.

    transformers opens what an index names, wherever it lies, and what has another ending as a
    pickle.
    """
    what = "an index of safetensors files"
    for index in Path(folder).glob("*.safetensors.index.json"):
        names = read_record(str(index), _Index, what).weight_map.values()
        with input_errors(str(index), what):
            for name in names:
                if not require_file_name(name).endswith(".safetensors"):
                    raise ValueError(f"{name!r:.60} is another kind of file")


def load_part(kind: type[PreTrainedModel], source: str, **config_options: Any) -> Any:
    """Load a transformers model of class `kind`, in float32, from safetensors.

    Args:
        kind: the class.
        source: hub name, folder or URI.
        config_options: values that the configuration gets instead of its own.

    Raises:
        UserError: `source` holds none.
    """
    folder = model_folder(source)
    with loading_errors(source, f"{kind.__name__} weights (safetensors)"):
        config = kind.config_class.from_pretrained(folder, **config_options)
        if config.model_type != (expected := kind.config_class.model_type):
            raise UserError(f"{source}: holds a {config.model_type} model, not a {expected}")
        return load_weights(kind, source, folder, config)


def load_weights(
    kind: type[PreTrainedModel], source: str, folder: str, config: PreTrainedConfig
) -> Any:
    """Load a model of class `kind` and of this configuration from a local folder, in float32."""
    require_safetensors(folder)
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    part, loading = kind.from_pretrained(folder, config=config, **options)
    require_complete(source, loading)
    return part


def require_complete(source: str, loading: dict[str, Any]) -> None:
    """Raise `UserError` if weights of `source` were missing: transformers makes up random ones."""
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{source}: {len(missing)} weights are missing, {missing[0]} for one; the folder is "
            "incomplete"
        )


def load_tokenizer(source: str) -> Any:
    """Load any tokenizer that `AutoTokenizer` knows, from a hub name, folder or URI.

    Raises:
        UserError: there is none, or it does not give back a simple sentence.
    """
    folder = model_folder(source, weights=False)
    with loading_errors(source, "a tokenizer (tokenizer.json, or vocab.json and merges.txt)"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if problem := tokenizer_problem(tokenizer):
            raise UserError(f"{source}: {problem}")
        return tokenizer


def load_trained(file: str) -> dict[str, torch.Tensor]:
    """Return the model's weights in a training checkpoint, their average if training kept one.

    Args:
        file: path or URI, safetensors.

    Raises:
        UserError: the file is no safetensors file.
    """
    try:
        tensors = load_safetensors(storage.read_bytes(file))
    except SafetensorError as error:
        raise UserError(f"{file}: is no safetensors file: {first_line(error)}") from error
    kind = "average." if any(name.startswith("average.") for name in tensors) else "model."
    return {
        name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)
    }
