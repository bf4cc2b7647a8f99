"""The SSD scan and its single step: arguments, contract, and the choice of a backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import dispatch
from ..checks import (
    check_devices,
    check_dt_limit,
    check_floating,
    check_heads,
    check_packing,
    check_rank,
    check_shape,
    check_sizes,
    check_slots,
    fail,
    limits,
)
from ..neighbors import Neighbors
from ..runtime.modes import needs_grad
from ..spec import INF, UNPACKED, Index, Packing, SSDShape, State


class Scan(NamedTuple):
    """Arguments of :func:`ssd_chunk_scan`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_states: Tensor | None = None
    packing: Packing = UNPACKED
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (0.0, INF)
    chunk_size: int | None = None

    @property
    def shape(self) -> SSDShape:
        """Sizes, of arguments that keep the contract."""
        batch, tokens, heads, head_dim = self.x.shape
        groups, state = self.B.shape[2:]
        return SSDShape(batch, tokens, heads, head_dim, groups, state, self.packing.states(batch))


class Update(NamedTuple):
    """Arguments of :func:`ssd_state_update`."""

    state: State
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (0.0, INF)
    slots: Index | None = None

    @property
    def shape(self) -> SSDShape:
        """Sizes, of arguments that keep the contract."""
        batch, heads, head_dim = self.x.shape
        return SSDShape(batch, 1, heads, head_dim, self.B.shape[1], self.state.shape[3], batch)

    @property
    def is_dense(self) -> bool:
        """Whether steps or rates are those of channels, not of heads."""
        return self.dt.dim() == 3 or self.A.dim() == 3 or _is_wide(self.dt_bias)


def ssd_chunk_scan(
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
    chunk_size: int | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The SSD layer over whole sequences ("Transformers are SSMs", Section 6): differentiable in every tensor.

    Args:
        x: ``(B, T, H, P)`` inputs; bf16, fp16, fp32 or fp64.
        dt: ``(B, T, H)`` step sizes. Bias, softplus and clamp are applied in that order, in fp32.
        A: ``(H,)`` decay rates, negative.
        B, C: ``(B, T, G, N)`` input and output maps; G divides H.
        D: ``(H,)`` or ``(H, P)`` skip.
        z: ``(B, T, H, P)`` gate; the output is multiplied by ``silu(z)``.
        dt_bias: ``(H,)``.
        dt_softplus: whether ``dt`` passes through softplus.
        dt_limit: ``(low, high)`` clamp of ``dt``.
        chunk_size: tiling hint; never changes the function. ``None`` leaves it to the backend.
        initial_states: ``(B, H, P, N)``, or ``(S, H, P, N)`` with ``cu_seqlens``; zeros if None.
        seq_idx: ``(B, T)`` integers; a new document starts where the value changes.
        cu_seqlens: ``(S + 1,)`` bounds of the documents of one flat row (B = 1). Tokens past the last bound belong to
            no document and come out as zeros.
        return_final_states: whether to return the states after the last token as well.
        backend: ``"torch"`` or ``"triton"``; None for the fastest that can serve the call.

    Returns:
        ``y (B, T, H, P)`` in the dtype of ``x``; with ``return_final_states`` also the states, shaped as
        ``initial_states``, fp32 (fp64 for fp64 inputs).

    Raises:
        ArgumentError: a shape, dtype, device or value breaks the contract.
        BackendError: ``backend`` was forced and cannot serve the call.
    """
    call = Scan(
        *(x, dt, A, B, C, D, z, dt_bias, initial_states),
        *(Packing(seq_idx, cu_seqlens), dt_softplus, limits(dt_limit), chunk_size),
    )
    y, states = scan(call, backend)
    return (y, states) if return_final_states else y


def scan(call: Scan, backend: str | None = None, neighbors: Neighbors | None = None) -> tuple[Tensor, Tensor]:
    """:func:`ssd_chunk_scan` of a record: ``y`` and the final states.

    With ``neighbors`` every row is a slice of one that other devices hold the rest of: what enters it comes from there,
    and the final states mean nothing.
    """
    shape = check_scan(call)
    backend = dispatch.choose("ssd_chunk_scan", call.x.device, backend, shape=shape, dtype=call.x.dtype).name
    run = dispatch.backend_module(backend).ssd_chunk_scan
    y, states = run(call) if neighbors is None else run(call, neighbors)
    return y, states


def ssd_state_update(
    state: Tensor,
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
    slots: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of the recurrence ("Transformers are SSMs", Equation 2); ``state`` is updated in place.

    Args:
        state: ``(B, H, P, N)``, or ``(S, H, P, N)`` with ``slots``; any floating dtype. The step is computed in fp32.
        x: ``(B, H, P)``.
        dt: ``(B, H)``, or ``(B, H, P)`` for a step size of every channel.
        A: ``(H,)``, negative, or ``(H, P, N)`` for a decay rate of every element of the state, as in Mamba-1.
        B, C: ``(B, G, N)``.
        dt_bias: ``(H,)`` or ``(H, P)``.
        D, z, dt_softplus, dt_limit, backend: as in :func:`ssd_chunk_scan`, ``z`` being ``(B, H, P)``.
        slots: ``(B,)`` integers, the row of ``state`` that belongs to each row of the batch, no two the same. A row
            with a negative one has no state: its output is zero.

    Returns:
        ``y (B, H, P)`` in the dtype of ``x``.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    call = Update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, limits(dt_limit), slots)
    if (known := dispatch.again("ssd_state_update", call, backend)) is not None:
        return known  # type: ignore[no-any-return]
    backend = dispatch.choose(
        *("ssd_state_update", x.device, backend),
        shape=check_update(call),
        dtype=x.dtype,
        differentiable=needs_grad(*call[1:9]),
    ).name
    y: Tensor = dispatch.backend_module(backend).ssd_state_update(call)
    return y


def check_scan(call: Scan) -> SSDShape:
    """Contract of ``ssd_chunk_scan``; returns the sizes, raises :class:`ArgumentError`."""
    x, dt, A, B, C, D, z, dt_bias, initial_states, packing, _, dt_limit, chunk_size = call
    check_rank("x", x, 4, "(B, T, H, P)")
    check_floating(x=x)
    batch, tokens, heads, head_dim = x.shape
    check_sizes("x", x, *x.shape)
    check_shape("dt", dt, (batch, tokens, heads), "(B, T, H)")
    check_rank("B", B, 4, "(B, T, G, N)")
    groups, state = B.shape[2:]
    check_shape("B", B, (batch, tokens, groups, state), "(B, T, G, N)")
    check_shape("C", C, (batch, tokens, groups, state), "(B, T, G, N), as B")
    check_heads(heads, head_dim, groups, A, D, dt_bias)
    check_floating(dt=dt, B=B, C=C)
    if z is not None:
        check_shape("z", z, tuple(x.shape), "(B, T, H, P), as x")
    check_dt_limit(dt_limit)
    if chunk_size is not None and chunk_size < 1:
        fail(f"chunk_size is {chunk_size}, expected a positive number, or None to leave the tiling to the backend")
    states = check_packing(batch, tokens, packing)
    if initial_states is not None:
        check_shape("initial_states", initial_states, (states, heads, head_dim, state), "(B or S, H, P, N)")
    check_devices(x.device, **call._asdict(), seq_idx=packing.seq_idx)
    return SSDShape(batch, tokens, heads, head_dim, groups, state, states)


def check_update(call: Update) -> SSDShape:
    """Contract of ``ssd_state_update``; returns the sizes, raises :class:`ArgumentError`."""
    state, x, dt, A, B, C, D, z, dt_bias, _, dt_limit, slots = call
    check_rank("state", state, 4, "(B, H, P, N)")
    check_floating(state=state)
    batch, heads, head_dim, n = state.shape
    if slots is not None:
        batch = check_slots(slots, x)
    check_shape("x", x, (batch, heads, head_dim), "(B, H, P)")
    check_shape("dt", dt, (batch, heads, head_dim)[: max(2, dt.dim())], "(B, H) or (B, H, P)")
    check_rank("B", B, 3, "(B, G, N)")
    groups = B.shape[1]
    check_shape("B", B, (batch, groups, n), "(B, G, N)")
    check_shape("C", C, (batch, groups, n), "(B, G, N), as B")
    check_heads(heads, head_dim, groups, None if A.dim() == 3 else A, D, None if _is_wide(dt_bias) else dt_bias)
    if A.dim() == 3:
        check_shape("A", A, (heads, head_dim, n), "(H, P, N), or (H,)")
    if dt_bias is not None and _is_wide(dt_bias):
        check_shape("dt_bias", dt_bias, (heads, head_dim), "(H, P), or (H,)")
    if z is not None:
        check_shape("z", z, tuple(x.shape), "(B, H, P), as x")
    check_dt_limit(dt_limit)
    check_devices(state.device, **call._asdict())
    return SSDShape(batch, 1, heads, head_dim, groups, n, batch)


def _is_wide(dt_bias: Tensor | None) -> bool:
    """Whether there is a number for every channel."""
    return dt_bias is not None and dt_bias.dim() == 2
