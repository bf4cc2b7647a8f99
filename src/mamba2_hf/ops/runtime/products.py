"""Matrix products whose rows do not depend on how many there are, nor on where among them they stand.

A BLAS chooses its kernel, and with it the order of every sum, by the number of rows, and by how they lie in memory. So
rows are multiplied in blocks of one size, the last one filled up by zeros, each from an aligned address. Within a block
most kernels sum all rows alike. Where one does not, which is found out once for every shape, the next smaller size is
taken, and in the end one row at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .modes import product_dtype, without_autocast

ROWS = {"cpu": (16, 1), "cuda": (128, 64, 16, 1)}
"""Of a block, by preference: as many as cost little more than one, while a weight has to be read."""

ALIGNED = 64

_sizes: dict[tuple[object, ...], int] = {}


def blockwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, ``(..., d)`` to ``(..., d')``, without a gradient."""
    dtype = product_dtype(weight)
    with without_autocast(x.device):
        weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
        rows = x.detach().reshape(-1, x.shape[-1])
        size, count = _block_size(weight, bias), rows.shape[0]
        blocks, full = -(-count // size), count // size
        filled, y = (_aligned(blocks, size, width, weight) for width in reversed(weight.shape))
        filled[:full] = rows[: full * size].unflatten(0, (full, size))
        if full < blocks:
            filled[full, : count - full * size] = rows[full * size :]
        for block, out in zip(filled, y, strict=True):
            _multiply(block, weight, bias, out)
    return y.flatten(0, 1)[:count].view(*x.shape[:-1], -1)


def _aligned(blocks: int, rows: int, width: int, like: Tensor) -> Tensor:
    """Zeros ``(blocks, rows, width)``: every block is dense and begins at a multiple of ``ALIGNED`` numbers."""
    held = like.new_zeros(blocks, -(-rows * width // ALIGNED) * ALIGNED)
    return held[:, : rows * width].unflatten(1, (rows, width))


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(rows, weight.T, out=out)
    return torch.addmm(bias, rows, weight.T, out=out)


def _block_size(weight: Tensor, bias: Tensor | None) -> int:
    """The rows of a block for a weight of this kind: equal ones give equal results wherever they stand."""
    lies = *weight.stride(), weight.data_ptr() % ALIGNED
    key = (*weight.shape, *lies, weight.dtype, weight.device, bias is None, torch.get_num_threads())
    if key not in _sizes:
        row = torch.cos(1.7 * torch.arange(weight.shape[1], device=weight.device)).to(weight.dtype)
        for size in ROWS[weight.device.type]:
            y = weight.new_empty(size, weight.shape[0])
            _multiply(row.expand(size, -1).contiguous(), weight, bias, y)
            if bool(((y == y[0]) | y.isnan()).all()):
                break
        _sizes[key] = size
    return _sizes[key]
