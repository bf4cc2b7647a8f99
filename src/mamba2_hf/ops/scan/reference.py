"""The scan to be read beside the paper: the recurrence that tests hold every backend against, and the matrix it is.

See ``NOTATION.md`` for names and equations. Clarity comes before speed and memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import document_numbers
from ..spec import INF, Packing, compute_dtype
from .op import Scan


def step_size(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """``clamp(softplus(dt + dt_bias), dt_limit)`` in ``dtype``, any shape ``(..., H)`` (paper, Section 2)."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    low, high = dt_limit
    return dt if dt_softplus and low == 0.0 and high == INF else dt.clamp(low, high)


def ssd_recurrent(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, seq_idx: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token at a time, in the dtype of ``x`` (use fp64).

    Args:
        x, dt, A, B, C, seq_idx, options: as :func:`mamba2_hf.ops.ssd_chunk_scan` takes them.

    Returns:
        ``y (B, T, H, P)`` and the last state ``(B, H, P, N)``.
    """
    call = Scan(x, dt, A, B, C, packing=Packing(seq_idx), **options)
    batch, tokens, heads, head_dim = x.shape
    dt = step_size(dt, call.dt_bias, call.dt_softplus, call.dt_limit, x.dtype)
    B, C = (maps.repeat_interleave(heads // maps.shape[2], 2) for maps in (B, C))  # (B, T, H, N)
    initial = call.initial_states
    state = x.new_zeros(batch, heads, head_dim, B.shape[-1]) if initial is None else initial.to(x.dtype)
    ys = []
    for t in range(tokens):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        decay = torch.exp(dt[:, t] * A.to(x.dtype))[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    y = torch.stack(ys, 1)
    if call.D is not None:
        y = y + x * (call.D if call.D.dim() == 2 else call.D[:, None]).to(x.dtype)
    return y if call.z is None else y * F.silu(call.z), state


def ssd_attention_matrix(
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    seq_idx: Tensor | None = None,
) -> Tensor:
    """The matrix that SSD multiplies ``x`` with: ``M_ij = (C_i . B_j) exp(a_i - a_j) dt_j`` for ``i >= j``, else 0.

    Decay and step size are included; ``D``, the gate and any initial state are not.

    Args:
        dt: ``(B, T, H)`` step sizes, before bias and softplus.
        A: ``(H,)``, negative.
        B, C: ``(B, T, G, N)``.
        seq_idx: ``(B, T)``; entries across documents are zero.

    Returns:
        ``(B, H, T, T)``, fp32 (fp64 for fp64 inputs). It takes ``4 B H T^2`` bytes.

    Source: "Transformers are SSMs", Section 5 (the dual, quadratic form) and Equation 16 for the 1-SS mask.
    """
    heads, tokens, dtype = A.shape[0], dt.shape[1], compute_dtype(B.dtype)
    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    a = torch.cumsum(dt * A.to(dtype), 1)  # (B, T, H)
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=dt.device).tril()
    if seq_idx is not None:
        document = document_numbers(seq_idx)
        mask = mask & (document[:, :, None] == document[:, None, :])  # (B, T, T)
    log_decay = (a[:, :, None] - a[:, None, :]).masked_fill(~mask[..., None], -INF)  # (B, T, T, H)
    scores = torch.einsum("bign,bjgn->bgij", C.to(dtype), B.to(dtype)).repeat_interleave(heads // B.shape[2], 1)
    return scores * torch.exp(log_decay).permute(0, 3, 1, 2) * dt.transpose(1, 2)[:, :, None, :]
