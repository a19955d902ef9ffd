"""Weights and tokenizers of the parts: CLIP's vision tower and GPT-2.

Weights are read from safetensors files only; a pickle is never opened.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from transformers import GPT2Tokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from model_lib.errors import UserError, first_line
from model_lib.io import storage
from model_lib.io.errors import input_errors
from model_lib.io.validation import read_record, require_file_name
from model_lib.model.sources import folder_or_hub_name

FROM_A_LIBRARY = (
    *(
        OSError,
        ValueError,
        RuntimeError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        ImportError,
    ),
    *(SafetensorError, UnpicklingError, StrictDataclassError),
)
"""What transformers and what it uses raise on files that are not what they should be."""


@dataclass(frozen=True)
class _Index:
    """Of weights in several files."""

    weight_map: dict[str, str]
    metadata: Any = None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' bars and its notes about weights that are left out, which a user cannot
    act on."""
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def require_safetensors(folder: str) -> None:
    """Raise `UserError` if an index of a local model folder names anything but safetensors files in
    that folder.

    transformers opens what an index names, wherever it lies, and what has another ending as a
    pickle.
    """
    for index in Path(folder).glob("*.index.json"):
        if index.name.endswith(".safetensors.index.json"):
            what = "an index of safetensors files"
            names = read_record(str(index), _Index, what).weight_map.values()
            with input_errors(str(index), what):
                for name in names:
                    if not require_file_name(name).endswith(".safetensors"):
                        raise ValueError(f"{name!r:.60} is another kind of file")


def load_part(kind: type[PreTrainedModel], source: str) -> Any:
    """Load a transformers model of class `kind` from safetensors; `UserError` if `source` holds
    none."""
    name = folder_or_hub_name(source)
    require_safetensors(name)
    try:
        with quiet():
            config = kind.config_class.from_pretrained(name)
            if config.model_type != kind.config_class.model_type:
                raise UserError(
                    f"{source}: holds a {config.model_type} model, not a "
                    f"{kind.config_class.model_type}"
                )
            part, loading = kind.from_pretrained(
                name,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except FROM_A_LIBRARY as error:
        raise UserError(
            f"{source}: no {kind.__name__} weights (safetensors) can be loaded: {first_line(error)}"
        ) from error
    require_whole(source, loading)
    return part


def require_whole(source: str, loading: dict[str, Any]) -> None:
    """Raise `UserError` if weights were missing when `source` was loaded: transformers makes up
    random ones."""
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(
            f"{source}: {len(missing)} weights are missing, {missing[0]} for one; the folder is "
            "incomplete"
        )


def load_tokenizer(source: str) -> Any:
    """Load GPT-2's byte-level BPE from `tokenizer.json`, or from `vocab.json` and `merges.txt`."""
    name = folder_or_hub_name(source)
    try:
        with quiet():
            return GPT2Tokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers has no class of its own for what it raises
        raise UserError(
            f"{source}: no tokenizer (tokenizer.json, or vocab.json and merges.txt): "
            f"{first_line(error)}"
        ) from error


def load_trained(file: str) -> dict[str, torch.Tensor]:
    """Return the model's weights in a training checkpoint's safetensors file, their average if
    training kept one.

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
