"""Device and number format of the arithmetic: autocast's dtype and the loss scaler it needs; and
whether torch.compile can work here."""

import contextlib
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

from model_lib.errors import UserError, first_line
from model_lib.io.cpus import cpu_count

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEVICES = Path("/dev")
"""Where Linux shows a machine's GPUs, and a container its own."""
WIDE = 512
"""Width of a decoder from which 16 bits are faster than 32 on a CPU that has them."""


def choose_device(device: str) -> torch.device:
    """Return the named device, or the best one here for "auto".

    It also limits torch, which starts a thread for each core of the machine, to those of the
    container.

    Raises:
        UserError: it cannot be used; for "auto", where the machine has an NVIDIA GPU, and that
            cannot.
    """
    torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available() or _has_nvidia_gpu():
            device = "cuda"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {device}: not available here: {first_line(error):.300}; --device cpu works "
            "everywhere"
        ) from error
    if chosen.type == "cuda":
        # cuDNN's attention builds a plan for each shape, for tenths of a second, and captions have
        # many.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return chosen


def _has_nvidia_gpu() -> bool:
    """Return whether the machine has a GPU that the user has not hidden, whatever torch can use."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not is_hidden and any(DEVICES.glob("nvidia[0-9]*"))


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype for `precision` ("auto", "bfloat16", "float16", "float32") on `device`.

    Raises:
        UserError: float16 was asked for on a CPU, where its training is not supported.
    """
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float16
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    if precision == "float16" and device.type == "cpu":
        raise UserError("precision float16: not supported on a CPU; use bfloat16 or float32")
    return DTYPES[precision]


def inference_dtype(precision: str, device: torch.device, width: int) -> torch.dtype:
    """Return the dtype of the weights of a model that captions.

    Args:
        precision: "auto", "bfloat16", "float16", "float32", or "float8", which is bfloat16 but for
            the vision tower (`model.float8`).
        device: where it runs.
        width: of its decoder; on a CPU a narrow one is faster in float32.
    """
    if precision != "auto":
        return DTYPES["bfloat16" if precision == "float8" else precision]
    narrow = device.type == "cpu" and width < WIDE
    return torch.float32 if narrow else autocast_dtype("auto", device)


def autocast(dtype: torch.dtype, device: torch.device) -> Any:
    """Return the context in which forward passes run."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def loss_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Return the scaler that keeps float16 gradients from vanishing; others it does not change."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def compile_problem(device: str) -> str | None:
    """Return why torch.compile cannot work on a type of device here, "cpu" or "cuda"; None if it
    can."""
    compiler = "g++" if device == "cpu" else "gcc"
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if shutil.which(compiler) is None:
        return f"torch.compile needs {compiler} (apt-get install {compiler})"
    if device == "cuda" and not header.exists():
        return "torch.compile needs Python.h (apt-get install python3-dev)"
    return None
