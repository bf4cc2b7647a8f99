"""Matrix products of few rows, where PyTorch's own are slow, and those that do not depend on their number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..spec import Linear
from .modes import observed, transformed
from .products import blockwise

SKINNY_ROWS = 4
ALIGNED = 8  # elements: rows of results of other lengths keep a GPU's BLAS from its quick kernels
ALIGNED_ROWS = 64
ONEDNN_OUTPUTS = 2**20  # 4 MiB: what oneDNN returns is copied once


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, ``(..., d)`` to ``(..., d')``.

    A few rows times a weight is a matter of reading the weight once, at the speed of the memory. For fp32 on a CPU
    PyTorch leaves that to its BLAS, which may take two to six times as long: MKL multiplies one row on one core, and
    up to about 16 as slowly. So outside of autograd, graphs and dispatch modes up to ``SKINNY_ROWS`` are taken as
    columns, two at least, and more, up to ``ONEDNN_OUTPUTS``, by oneDNN. On a GPU up to ``ALIGNED_ROWS`` are taken as
    columns where the outputs of a row are no multiple of ``ALIGNED``, as an odd vocabulary is.
    """
    if dispatch.is_batch_invariant():
        return blockwise(x, weight, bias)
    if x.is_cuda and weight.shape[0] % ALIGNED and _is_plain(x, weight):
        rows = x.reshape(-1, x.shape[-1])
        count = rows.shape[0]
        if 1 < count <= ALIGNED_ROWS:  # as columns, so that what is odd is how many rows there are
            y = (weight @ F.pad(rows, (0, 0, 0, -count % ALIGNED)).T)[:, :count].T.contiguous()
            return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)
    if _on_plain_cpu(x, weight):
        rows = x.reshape(-1, x.shape[-1])  # (R, d)
        count = rows.shape[0]
        if 0 < count <= SKINNY_ROWS:
            columns = (rows if count > 1 else rows.expand(2, -1).contiguous()).T
            y = (weight @ columns)[:, :count].T.contiguous()
            return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)
        if 0 < count * weight.shape[0] <= ONEDNN_OUTPUTS and torch.backends.mkldnn.is_available():
            return F.linear(x.to_mkldnn(), weight, bias).to_dense()
    return F.linear(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` as PyTorch computes it, unless it has to be batch-invariant."""
    return blockwise(x, weight, bias) if dispatch.is_batch_invariant() else F.linear(x, weight, bias)


def project(x: Tensor, weights: Linear) -> Tensor:
    """A projection and what LoRA adds to it, batch-invariant, ``(..., d)`` to ``(..., d')``."""
    y, lora = blockwise(x, weights.weight, weights.bias), weights.lora
    if lora is None:
        return y
    lowered = blockwise(x, lora.down.to(y.dtype), None)
    return y + lora.scale * blockwise(lowered, lora.up.to(y.dtype), None)


def _on_plain_cpu(*tensors: Tensor) -> bool:
    """Whether nothing but their values is asked of these tensors, fp32 on a CPU."""
    return _is_plain(*tensors) and all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors
    )


def _is_plain(*tensors: Tensor) -> bool:
    """Whether nothing but their values is asked of these tensors of one dtype: no gradient, graph or transform, no
    dispatch mode, and no autocast.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed() or observed():
        return False
    known = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    return known and len({t.dtype for t in tensors}) == 1 and not torch.is_autocast_enabled(tensors[0].device.type)
