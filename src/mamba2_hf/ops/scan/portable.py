"""Launches of the portable scan kernels, which run wherever Triton does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.tables import Config, cdiv
from .problem import Call, Cut, Gradients, Into, strides
from .ssd_backward import gate_backward_kernel, inputs_backward_kernel, maps_backward_kernel, sum_kernel
from .ssd_forward import state_kernel, walk_kernel


def chunk_size(call: Call) -> int:
    """Tokens of a chunk."""
    return tables.walk(call.chip, call.args.x.dtype, call.shape.head_dim, call.shape.state).Q


def walk(call: Call, cut: Cut, entry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``y`` and the final states; ``entry (segments, H, P, N)`` enters the segments."""
    (x, _, _, B, C, D, z, *_), P, tma = call.args, call.shape.head_dim, call.tma
    config = tables.walk(call.chip, x.dtype, P, call.shape.state)
    y = (torch.zeros if call.packed else torch.empty)(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty(call.state_shape, dtype=torch.float32, device=x.device)
    launch(
        walk_kernel,
        (cut.segments * call.shape.heads * cdiv(P, config.BP),),
        _tokens(x, config.Q, config.BP, tma),
        _tokens(B, config.Q, config.BN, tma),
        _tokens(C, config.Q, config.BN, tma),
        _tokens(z, config.Q, config.BP, tma),
        _tokens(y, config.Q, config.BP, tma),
        *(cut.steps, D, cut.document, entry, final, cut.segment_table),
        *(call.shape.tokens, cut.per_row, cut.per_segment, call.shape.heads),
        *(*strides(x), *strides(B), *strides(C), *strides(z)),
        **call.sizes,
        **_tiles(config),
        D_RANK=0 if D is None else D.dim(),
        HAS_Z=z is not None,
        HAS_ENTRY=entry is not None,
        **_flags(call, cut),
    )
    return y, final


def summaries(
    call: Call, cut: Cut, *, reverse: bool, inputs: Tensor, maps: Tensor, states: Tensor, decay: Tensor, open_: bool
) -> None:
    """Leaves each segment's own state (or its gradient) in ``states``, and its decay in ``decay``; of a segment that
    nothing follows only where sequences are ``open_``.
    """
    _walk_states(
        *(call, cut), reverse=reverse, inputs=inputs, maps=maps, entry=None, decay=decay, after=states, open_=open_
    )


def before_gate(call: Call, dout: Tensor) -> Tensor:
    """From the gradient of the output to that of what the gate multiplies."""
    x, z = call.args.x, call.args.z
    if z is None:
        return dout
    batch, tokens, heads, P = x.shape
    dy = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        gate_backward_kernel,
        (cdiv(tokens, tables.GATE_ROWS), cdiv(heads * P, tables.GATE_BLOCK), batch),
        *(dout, z, dy, tokens, heads * P, *strides(dout), *strides(z)),
        P=P,
        BLOCK=tables.GATE_BLOCK,
        ROWS=tables.GATE_ROWS,
    )
    return dy


def gradients(
    call: Call, cut: Cut, dout: Tensor, dy: Tensor, entry: Tensor | None, leave: Tensor | None, into: Into | None
) -> Gradients:
    """Everything of the backward that is not about single numbers; see :class:`Gradients`.

    ``dy`` is what :func:`before_gate` makes of ``dout``. ``entry`` and ``leave (segments, H, P, N)``: states, and their
    gradients, between segments. ``into`` is not used.
    """
    (x, _, _, B, C, D, z, *_), chip = call.args, call.chip
    batch, tokens, heads, P, groups, N, _ = call.shape
    per_group = heads // groups
    # The state on entering every chunk, and its gradient on leaving it, (chunks, H, N, P).
    states, dstates = (torch.empty(cut.chunks, heads, N, P, dtype=x.dtype, device=x.device) for _ in range(2))
    dinitial = torch.empty(call.state_shape, dtype=torch.float32, device=x.device)
    _walk_states(call, cut, reverse=False, inputs=x, maps=B, entry=entry, at_chunks=states, after=dinitial)  # scratch
    _walk_states(call, cut, reverse=True, inputs=dy, maps=C, entry=leave, at_chunks=dstates, after=dinitial)

    new = torch.zeros if call.packed else torch.empty
    dx = new(x.shape, dtype=x.dtype, device=x.device)
    dz = None if z is None else new(x.shape, dtype=x.dtype, device=x.device)
    dots = torch.empty(cut.chunks, heads, 2, cut.Q, dtype=torch.float32, device=x.device)
    ends = torch.empty(cut.chunks, heads, dtype=torch.float32, device=x.device)
    config, tma = tables.inputs_backward(chip, x.dtype, P, N), call.tma
    n_heads = tables.heads_per_program(per_group, config.heads)
    launch(
        inputs_backward_kernel,
        (cut.chunks * heads // n_heads,),
        _tokens(x, config.Q, config.BP, tma),
        _tokens(B, config.Q, config.BN, tma),
        _tokens(C, config.Q, config.BN, tma),
        _tokens(z, config.Q, config.BP, tma),
        _tokens(dout, config.Q, config.BP, tma),
        _tokens(dy, config.Q, config.BP, tma),
        *(cut.steps, D, cut.document),
        *(_states(states, config.BN, config.BP, tma), _states(dstates, config.BN, config.BP, tma)),
        _tokens(dx, config.Q, config.BP, tma),
        _tokens(dz, config.Q, config.BP, tma),
        *(dots, ends, cut.chunk_table),
        *(tokens, cut.per_row, heads),
        *(*strides(x), *strides(B), *strides(C), *strides(z), *strides(dout), *strides(dy)),
        **call.sizes,
        HEADS=n_heads,
        **_tiles(config),
        D_RANK=0 if D is None else D.dim(),
        HAS_Z=z is not None,
        **_flags(call, cut),
    )

    config = tables.maps_backward(chip, x.dtype, P, N, config.Q)
    n_heads = tables.heads_per_program(per_group, config.heads)
    blocks = per_group // n_heads
    dD = None if D is None else new(cut.chunks, *D.shape, dtype=torch.float32, device=x.device)
    partial = new(blocks, 2, *B.shape, dtype=torch.float32, device=x.device)
    launch(
        maps_backward_kernel,
        (cut.chunks * heads // n_heads * cdiv(N, config.BN),),
        _tokens(x, config.Q, config.BP, tma),
        _tokens(B, config.Q, config.BN, tma),
        _tokens(C, config.Q, config.BN, tma),
        _tokens(dy, config.Q, config.BP, tma),
        *(cut.steps, cut.document),
        *(_states(states, config.BN, config.BP, tma), _states(dstates, config.BN, config.BP, tma)),
        *(partial, dD, cut.chunk_table),
        *(tokens, cut.per_row, heads, batch),
        *(*strides(x), *strides(B), *strides(C), *strides(dy)),
        **call.sizes,
        HEADS=n_heads,
        D_RANK=0 if D is None else D.dim(),
        **_tiles(config),
        **_flags(call, cut),
    )
    dB, dC = (torch.empty(B.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    sum_blocks(partial, dB, dC)
    return Gradients(dx, dz, dB, dC, None if dD is None else dD.sum(0), dinitial, dots, ends)


def sum_blocks(partial: Tensor, dB: Tensor, dC: Tensor) -> None:
    """Adds up ``(blocks, 2, B, T, G, N)`` in order; ``dB`` and ``dC (B, T, G, N)`` have equally spaced tokens."""
    blocks, _, batch, tokens, groups, N = partial.shape
    width = groups * N
    launch(
        sum_kernel,
        (cdiv(batch * tokens * width, tables.SUM_BLOCK), 2),
        *(partial, dB, dC, batch * tokens * width, width, dB.stride(1)),
        BLOCKS=blocks,
        BLOCK=tables.SUM_BLOCK,
    )


def _walk_states(
    call: Call,
    cut: Cut,
    *,
    reverse: bool,
    inputs: Tensor,
    maps: Tensor,
    entry: Tensor | None,
    after: Tensor,
    at_chunks: Tensor | None = None,
    decay: Tensor | None = None,
    open_: bool = False,
) -> None:
    P, N = call.shape.head_dim, call.shape.state
    config = tables.state(call.chip, inputs.dtype, P, N, cut.Q)
    programs = call.shape.heads * cdiv(P, config.BP) * cdiv(N, config.BN)
    launch(
        state_kernel,
        (cut.segments * programs,),
        _tokens(inputs, config.Q, config.BP, call.tma),
        _tokens(maps, config.Q, config.BN, call.tma),
        *(cut.steps, cut.document, entry),
        None if at_chunks is None else _states(at_chunks, config.BN, config.BP, call.tma),
        *(decay, after, cut.segment_table),
        *(call.shape.tokens, cut.per_row, cut.per_segment, call.shape.heads),
        *(*strides(inputs), *strides(maps)),
        **call.sizes,
        **_tiles(config),
        REVERSE=reverse,
        SUMMARY=at_chunks is None,
        OPEN=open_,
        HAS_ENTRY=entry is not None,
        **_flags(call, cut),
    )


def _flags(call: Call, cut: Cut) -> dict[str, Any]:
    return {
        "HAS_DOCUMENTS": cut.document is not None,
        "PACKED": call.packed,
        "TMA": call.tma,
        "ASM": call.chip.is_hopper and not call.chip.interpreted and call.args.x.dtype != torch.float32,
        "PRECISION": tables.precision(call.chip, call.args.x.dtype),
    }


def _tiles(config: Config) -> dict[str, int]:
    return {
        "Q": config.Q,
        "BP": config.BP,
        "BN": config.BN,
        "STAGES": config.stages,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _tokens(tensor: Tensor | None, Q: int, width: int, tma: bool) -> Any:
    """A ``(B, T, heads, width)`` tensor as the kernels take it: a descriptor of its tiles, or the tensor itself."""
    if tensor is None or not tma:
        return tensor
    b, t, h, w = tensor.shape
    row, token, head, _ = tensor.stride()
    return TensorDescriptor(tensor, [b, h, t, w], [row, head, token, 1], [1, 1, Q, width])


def _states(tensor: Tensor, bn: int, bp: int, tma: bool) -> Any:
    """A ``(chunks, H, N, P)`` buffer as the kernels take it."""
    if not tma:
        return tensor
    flat = tensor.flatten(0, 1)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, bn, bp])
