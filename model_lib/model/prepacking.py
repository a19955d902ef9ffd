"""Matrices in the blocked layout that a CPU's matrix units read, for inference.

A step of decoding multiplies a few rows with every matrix of the decoder, so its time is that of
reading them. oneDNN strides through plain matrices, or reorders them in each call; reordered once,
they are read at 1.5 times the speed (`docs/benchmarks.md`). The operators are those that torch's
own compiler emits for frozen weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from model_lib.model.decoder import CrossAttention
from model_lib.model.float8 import Float8Linear

LARGE = 512 * 512
"""Values of a matrix from which packing pays; for smaller ones the call itself takes longer."""
TYPICAL_ROWS = 32
"""Rows for which the layout is chosen; it is as good for one and for hundreds."""


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this machine multiplies with packed matrices of `dtype`."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PackedLinear(nn.Module):
    """`nn.Linear` or GPT-2's `Conv1D` with a packed matrix, without gradients and parameters."""

    def __init__(self, plain: nn.Linear | Conv1D) -> None:
        super().__init__()
        weight = plain.weight.detach()
        self.transposed = isinstance(plain, Conv1D)
        self.trained = plain.weight.requires_grad
        weight = (weight.t() if self.transposed else weight).contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        self.bias = None if plain.bias is None else plain.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., in] times the matrix, plus the bias: [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def unpacked(self) -> nn.Linear | Conv1D:
        """Return the plain module with the same values."""
        weight = self.weight.to_dense()
        out, width = weight.shape
        plain: nn.Linear | Conv1D
        if self.transposed:
            plain = Conv1D(out, width)
        else:
            plain = nn.Linear(width, out, bias=self.bias is not None)
        plain.weight = nn.Parameter(weight.t().contiguous() if self.transposed else weight)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.clone())
        return plain.requires_grad_(self.trained).train(self.training)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self.unpacked()._save_to_state_dict(destination, prefix, keep_vars)


def pack(model: nn.Module) -> None:
    """Pack the large matrices of a model, in place; they are no longer among its parameters.

    Those that are multiplied with a norm's scale in each batch stay as they are.
    """
    cross = [module for module in model.modules() if isinstance(module, CrossAttention)]
    plain = {attention.c_attn for attention in cross}
    for name, module in list(model.named_modules()):
        is_matrix = isinstance(module, nn.Linear | Conv1D) and module not in plain
        if is_matrix and module.weight.numel() >= LARGE:
            model.set_submodule(name, PackedLinear(module))


def unpack(model: nn.Module) -> None:
    """Undo `pack` and `pack_float8`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear | Float8Linear):
            model.set_submodule(name, module.unpacked())
