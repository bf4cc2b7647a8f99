"""The oracles: one function, written three ways, to be read beside the paper.

All three take what :func:`mamba2_hf.ops.ssd_chunk_scan` takes, compute in the dtype of ``x`` (use fp64) and favor
clarity over speed and memory. ``seq_idx`` separates documents; see ``NOTATION.md`` for names and equations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import document_numbers
from ..spec import INF, compute_dtype


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
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token at a time. Returns ``y (B, T, H, P)`` and the last state ``(B, H, P, N)``."""
    batch, tokens, heads, head_dim = x.shape
    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, x.dtype)
    B, C = _per_head(B, heads), _per_head(C, heads)  # (B, T, H, N)
    state = x.new_zeros(batch, heads, head_dim, B.shape[-1]) if initial_states is None else initial_states.to(x.dtype)
    ys = []
    for t in range(tokens):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        decay = torch.exp(dt[:, t] * A.to(x.dtype))[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return _skip_and_gate(torch.stack(ys, 1), x, D, z), state


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


def ssd_quadratic(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The masked attention form. Returns ``y (B, T, H, P)`` and the last state ``(B, H, P, N)``."""
    heads = x.shape[2]
    matrix = ssd_attention_matrix(
        dt, A, B, C, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, seq_idx=seq_idx
    )
    y = torch.einsum("bhij,bjhp->bihp", matrix.to(x.dtype), x)
    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, x.dtype)
    a = torch.cumsum(dt * A.to(x.dtype), 1)  # (B, T, H)
    document = document_numbers(seq_idx) if seq_idx is not None else torch.zeros_like(a[..., 0], dtype=torch.long)
    in_first, in_last = (document == 0)[..., None], (document == document[:, -1:])[..., None]  # (B, T, 1)
    B, C = _per_head(B, heads), _per_head(C, heads)
    weight = torch.exp(a[:, -1:] - a) * dt * in_last
    state = torch.einsum("bth,bthp,bthn->bhpn", weight, x, B)
    if initial_states is not None:
        decay = torch.exp(a) * in_first
        y = y + torch.einsum("bth,bthn,bhpn->bthp", decay, C, initial_states.to(x.dtype))
        state = state + (decay * in_last)[:, -1, :, None, None] * initial_states
    return _skip_and_gate(y, x, D, z), state


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The chunked form (paper, Section 6): attention inside a chunk, the recurrence between chunks.

    Returns ``y (B, T, H, P)`` and the last state ``(B, H, P, N)``.
    """
    state, ys = initial_states, []
    for start in range(0, x.shape[1], chunk_size):
        chunk = slice(start, start + chunk_size)
        ids = seq_idx[:, chunk] if seq_idx is not None else None
        if ids is not None and state is not None and start > 0:
            state = state * (ids[:, 0] == seq_idx[:, start - 1])[:, None, None, None]  # type: ignore[index]
        y, state = ssd_quadratic(
            x[:, chunk],
            dt[:, chunk],
            A,
            B[:, chunk],
            C[:, chunk],
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            initial_states=state,
            seq_idx=ids,
        )
        ys.append(y)
    assert state is not None  # T >= 1, so one chunk ran
    return _skip_and_gate(torch.cat(ys, 1), x, D, z), state


def _per_head(tensor: Tensor, heads: int) -> Tensor:
    return tensor.repeat_interleave(heads // tensor.shape[2], 2)  # (B, T, G, N) -> (B, T, H, N)


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None]).to(x.dtype)
    return y if z is None else y * F.silu(z)
