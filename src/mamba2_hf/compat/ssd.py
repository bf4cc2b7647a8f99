"""The functions of mamba_ssm that a Mamba-2 layer calls, over this package's scan, mixer and step."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..errors import ArgumentError
from ..ops import Inner, MixerSpec, MixerWeights, Packing
from ..ops.checks import limits
from ..ops.spec import INF

HEAD_DIM = 64  # at most, of the heads that a state without heads is cut into


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """The SSD scan over whole sequences, differentiable in every tensor and in its states.

    Args:
        x: ``(B, T, H, P)``. dt: ``(B, T, H)``. A: ``(H,)``, negative. B, C: ``(B, T, G, N)``.
        chunk_size: changes nothing but the time it takes.
        D: ``(H,)`` or ``(H, P)``. z: ``(B, T, H, P)``. dt_bias: ``(H,)``.
        initial_states: ``(B, H, P, N)``, before the first document of each row; of one row with ``cu_seqlens``,
            ``(S, H, P, N)`` too.
        seq_idx: ``(B, T)`` integers, the document of each token.
        cu_seqlens: ``(S + 1,)`` bounds of the documents of one row. They are kept apart, here also without ``seq_idx``.
        dt_softplus, dt_limit: softplus and clamp of ``dt + dt_bias``.
        return_final_states: whether to return the states after each row's last document, ``(B, H, P, N)``.
        return_varlen_states: whether to return the states after each document of ``cu_seqlens``, ``(S, H, P, N)``.
        state_dtype: of the states that are returned; inside, they are fp32 whatever it says. None for fp32.

    Returns:
        ``(B, T, H, P)``, contiguous; in a tuple before the states that are asked for.

    Raises:
        ArgumentError: a shape, dtype, device or combination does not fit.
    """
    if return_varlen_states and cu_seqlens is None:
        raise ArgumentError("return_varlen_states=True was given without cu_seqlens, the bounds of the documents")
    wide = (None if tensor is None else tensor.to(x.dtype) for tensor in (B, C, z))
    B, C, z = wide  # type: ignore[assignment]
    if cu_seqlens is not None:
        initial_states = _before_first(initial_states, cu_seqlens.shape[0] - 1)
    y, states = ops.ssd_chunk_scan(
        *(x, dt, A, B, C),
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=bool(dt_softplus),
        dt_limit=dt_limit,
        initial_states=initial_states,
        seq_idx=seq_idx if cu_seqlens is None else None,
        cu_seqlens=cu_seqlens,
        return_final_states=True,
    )
    y, states = y.contiguous(), states if state_dtype is None else states.to(state_dtype)
    if not return_final_states and not return_varlen_states:
        return y
    final = states if cu_seqlens is None else states.index_select(0, _last_document(cu_seqlens))
    return (y, *((final,) if return_final_states else ()), *((states,) if return_varlen_states else ()))


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, INF),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float | None = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """A mixer from the output of in_proj to that of out_proj, differentiable in every tensor.

    Args:
        zxbcdt: ``(B, T, 2 m + 2 H P + 2 G N + H)``: gate and value of an MLP of m channels (usually none), then z, x,
            B, C, dt.
        conv1d_weight: ``(H P + 2 G N, K)``. conv1d_bias: ``(H P + 2 G N,)``. dt_bias, A: ``(H,)``.
        D: ``(H,)``, or ``(H, P)``, which tells P too.
        initial_states, seq_idx, dt_limit, return_final_states, chunk_size, state_dtype: as in
            :func:`mamba_chunk_scan_combined`.
        rmsnorm_weight: ``(H P,)``; None gates without a norm. rmsnorm_eps, norm_before_gate: of that norm, which takes
            the mean over each group's channels.
        outproj_weight: ``(d, m + H P)``. outproj_bias: ``(d,)``. None leaves out_proj out.
        headdim: P. ngroups: G.

    Returns:
        ``(B, T, d)``; with ``return_final_states`` also ``(B, H, P, N)``.

    Raises:
        ArgumentError: a shape, dtype, device or combination does not fit.
    """
    headdim = D.shape[1] if D is not None and D.dim() == 2 else headdim
    if headdim is None:
        raise ArgumentError("headdim is None, and D is not (H, P): pass the channels of a head")
    heads = A.shape[0]
    inner = heads * headdim
    mlp = (zxbcdt.shape[-1] - inner - conv1d_weight.shape[0] - heads) // 2
    y, _, states = ops.inner(
        Inner(
            zxbcdt[..., 2 * mlp :],
            MixerWeights(conv1d_weight, conv1d_bias, dt_bias, A, None, D, rmsnorm_weight),
            MixerSpec(
                *(headdim, ngroups, activation),
                gated_norm_eps=1e-6 if rmsnorm_eps is None else rmsnorm_eps,
                group_size=inner // ngroups,
                norm_before_gate=norm_before_gate,
                dt_limit=limits(dt_limit),
            ),
            Packing(seq_idx),
            ssm_initial_states=initial_states,
            states=return_final_states,
        )
    )
    if mlp:
        gate, value = zxbcdt[..., : 2 * mlp].chunk(2, -1)
        y = torch.cat([F.silu(gate) * value, y], -1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    if not return_final_states:
        return y
    return y, states if state_dtype is None else states.to(state_dtype)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the recurrence; ``state`` is updated in place.

    Heads may be left out (Mamba-1); B and C are then those of all channels. Numbers that a head's channels share are
    recognized where they share memory, as those of ``expand`` do, and take no time.

    Args:
        state: ``(B, H, P, N)``. x, dt, z: ``(B, H, P)``. A: ``(H, P, N)``. B, C: ``(B, G, N)``. D, dt_bias: ``(H, P)``.
        dt_softplus: whether ``dt + dt_bias`` passes through softplus.
        state_batch_indices: ``(B,)``, the row of ``state (S, H, P, N)`` that belongs to each row of the batch. A row
            with a negative one has no state: its output is zero.

    Returns:
        Shaped as ``x``.

    Raises:
        ArgumentError: a shape, dtype or device does not fit.
    """
    B, C = (tensor[:, None] if tensor.dim() == 2 else tensor for tensor in (B, C))
    if state.dim() == 3:
        heads = (-1, math.gcd(state.shape[1], HEAD_DIM))
        state, x, dt = (tensor.unflatten(1, heads) for tensor in (state, x, dt))
        A = A.unflatten(0, heads)
        z = None if z is None else z.unflatten(1, heads)
        D, dt_bias = (tensor if tensor is None else tensor.unflatten(0, heads) for tensor in (D, dt_bias))
        return selective_state_update(
            *(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
        ).flatten(1)
    if _shared(A, 1) and _shared(A, 2) and _shared(dt, 2) and (dt_bias is None or _shared(dt_bias, 1)):
        # Every step comes by here: `select` takes half the time of an index.
        A, dt, dt_bias = A.select(2, 0).select(1, 0), dt.select(2, 0), None if dt_bias is None else dt_bias.select(1, 0)
    return ops.ssd_state_update(
        *(state, x, dt, A, B, C),
        D=D.select(1, 0) if D is not None and _shared(D, 1) else D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=bool(dt_softplus),
        slots=state_batch_indices,
    )


def _shared(tensor: Tensor, dim: int) -> bool:
    """Whether all numbers along a dimension are the same one in memory."""
    return tensor.stride(dim) == 0 or tensor.shape[dim] == 1


def _before_first(states: Tensor | None, documents: int) -> Tensor | None:
    """The initial states of all documents of a row, of those that a row starts from, ``(1, ...)``, if that is given."""
    if states is None or states.shape[0] == documents:
        return states
    return F.pad(states, (0, 0) * (states.dim() - 1) + (0, documents - states.shape[0]))


def _last_document(cu_seqlens: Tensor) -> Tensor:
    """``(1,)``: the last document that has tokens."""
    numbers = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    return torch.where(cu_seqlens.diff() > 0, numbers, 0).amax(0, keepdim=True)
