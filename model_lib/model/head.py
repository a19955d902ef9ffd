"""The head's logits as float32, from 16-bit products that lose nothing by GPT-2's large offset.

GPT-2's logits all lie far below zero (-32 to -80), where bfloat16 has steps of 0.25 to 0.5. Nearly
all of that is the same for each token: the product with the vocabulary's mean row. Without it,
softmax and the order of the logits do not change.
"""

import torch
from torch import Tensor

MULTIPLE = 64
"""Of which the number of logits is one, as matrix units prefer."""


@torch.no_grad()
def centred(weight: Tensor, dtype: torch.dtype | None = None, multiple: int = 1) -> Tensor:
    """Return the head's matrix [V, D] less its mean row, in `dtype` (by default its own), with rows
    of zeros up to a `multiple` of rows."""
    words, width = weight.shape
    padding = -words % multiple
    result = weight.new_empty(words + padding, width, dtype=dtype)
    # The difference is computed in float32 and rounded once, without a float32 copy.
    torch.sub(weight, weight.mean(0, dtype=torch.float32), out=result.narrow(0, 0, words))
    result.narrow(0, words, padding).zero_()
    return result


def head_logits(hidden: Tensor, matrix: Tensor) -> Tensor:
    """Return `hidden` [..., D] times a `centred` matrix [V, D], in its dtype: float32 [..., V]."""
    product = float32_product(hidden.flatten(0, -2).to(matrix.dtype), matrix.t())
    return product.unflatten(0, hidden.shape[:-1])


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two matrices as float32; on CUDA, sums are never rounded to 16 bits."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()
