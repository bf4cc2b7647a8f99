"""Matrix products whose rows do not depend on how many there are, nor on where among them they stand.

A BLAS chooses its kernel, and with it the order of every sum, by the number of rows. So rows are multiplied in blocks
of one size, the last one filled up by zeros. Within a block most kernels sum all rows alike. Where one does not, which
is found out once for every shape, rows are multiplied one by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .modes import product_dtype, without_autocast

ROWS = {"cpu": 16, "cuda": 64}
"""Of a block: as few as cost about what one costs, while a weight has to be read."""

_alike: dict[tuple[object, ...], bool] = {}


def blockwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, ``(..., d)`` to ``(..., d')``, without a gradient."""
    dtype = product_dtype(weight)
    with without_autocast(x.device):
        weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
        rows = x.detach().reshape(-1, x.shape[-1])
        size = ROWS[x.device.type] if _sums_alike(weight, bias) else 1
        count, padded = rows.shape[0], -(-rows.shape[0] // size) * size
        filled = torch.zeros(padded, rows.shape[1], dtype=dtype, device=x.device)  # begins where memory is aligned
        filled[:count] = rows
        y = torch.empty(padded, weight.shape[0], dtype=dtype, device=x.device)
        for block, out in zip(filled.split(size), y.split(size), strict=True):
            out.copy_(F.linear(block, weight, bias))
    return y[:count].view(*x.shape[:-1], -1)


def _sums_alike(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a product of a block with a weight of this kind gives equal rows for equal rows."""
    key = (*weight.shape, weight.dtype, weight.device, weight.stride(), bias is None, torch.get_num_threads())
    if key not in _alike:
        row = torch.cos(1.7 * torch.arange(weight.shape[1], device=weight.device)).to(weight.dtype)
        y = F.linear(row.expand(ROWS[weight.device.type], -1).contiguous(), weight, bias)
        _alike[key] = bool(((y == y[0]) | y.isnan()).all())
    return _alike[key]
