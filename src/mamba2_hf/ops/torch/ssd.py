"""SSD in chunks (paper, Section 6) and the single step, in PyTorch.

What keeps it lean: ``C B^T`` is formed once per group and not per head; the state products run as one matrix product
per chunk and group with the heads side by side; states pass between chunks in a blocked scan whose work is linear in
the number of chunks; and a differentiable call keeps its inputs only and recomputes the rest in the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import SSDShape
from ..reference import compute_dtype, step_size
from .autocast import without_autocast
from .packing import chunk_layout, document_ids, drop_tail
from .tiles import in_tiles, needs_grad

CHUNK_SIZE = 64  # tokens of a chunk: the quadratic part costs Q per token, passing states costs N P / Q
SCAN_BLOCK = 16  # chunks whose states are passed by one matrix product
# Floor of every log decay: exp(-87) is about the least normal fp32 number, exp of less is several times slower, and
# running sums stay small enough for their differences to be exact where it matters.
LOWEST = -87.0


@without_autocast
def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    shape: SSDShape,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    return_final_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`mamba2_hf.ops.ssd_chunk_scan`; the states are None only where they were not asked for."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(x.device, torch.int64)
        x, dt, B, C, z = drop_tail(cu_seqlens, x, dt, B, C, z)
        if initial_states is None and not return_final_states:  # then documents need no chunks of their own
            seq_idx, cu_seqlens = document_ids(cu_seqlens, shape.tokens)[None], None

    def step(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None, ids: Tensor | None, state: Tensor | None):
        return scan(
            *(x, dt, A, B, C),
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            chunk_size=chunk_size,
            initial_states=state,
            seq_idx=ids,
            cu_seqlens=cu_seqlens,
        )

    return in_tiles(
        step,
        (x, dt, B, C, z, seq_idx),
        (initial_states,),
        width=shape.batch * shape.heads * shape.head_dim,
        record=needs_grad(x, dt, A, B, C, D, z, dt_bias, initial_states),
        divisible=cu_seqlens is None,
    )
