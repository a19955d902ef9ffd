"""A vision tower whose matrix products are in float8, for captioning on GPUs that have it.

Each row of the input and each row of the matrix has a scale of its own, which keeps the products'
error at a few per cent; sums are in float32.
"""

import torch
from torch import Tensor, nn

from model_lib.errors import UserError, first_line

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
MULTIPLE = 16
"""Of which the sides of a float8 matrix are one."""


class Float8Linear(nn.Module):
    """`nn.Linear` in float8, without gradients and parameters."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.original = [plain]  # in a list, so that it is no module of this one
        self.weight, self.scale = _scaled(plain.weight.detach())
        self.bias = None if plain.bias is None else plain.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., in] times the matrix, plus the bias: [..., out], in the dtype of `x`."""
        rows, scale = _scaled(x.flatten(0, -2))
        product = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale.t(),
            bias=self.bias,
            out_dtype=x.dtype,
        )
        return product.view(*x.shape[:-1], -1)

    def unpacked(self) -> nn.Linear:
        """Return the plain module."""
        return self.original[0]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self.unpacked()._save_to_state_dict(destination, prefix, keep_vars)


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [R, C] in float8, and their scales, float32 [R, 1]."""
    largest = rows.abs().amax(1, keepdim=True).float()
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    return (rows / scale).to(FLOAT8), scale


def pack_float8(tower: nn.Module) -> None:
    """Let the linear layers of a bfloat16 tower multiply in float8, in place.

    Raises:
        UserError: the device does not multiply float8 matrices with a scale a row.
    """
    for name, module in list(tower.named_modules()):
        sides = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else ()
        if sides and not any(side % MULTIPLE for side in sides):
            tower.set_submodule(name, Float8Linear(module))
            example = module.weight.new_zeros(MULTIPLE, sides[0])
            try:
                tower.get_submodule(name)(example)
            except (RuntimeError, NotImplementedError) as error:
                raise UserError(
                    f"precision float8: {module.weight.device} does not multiply float8 matrices, "
                    f"as an H100 does; use auto ({first_line(error)})"
                ) from error
