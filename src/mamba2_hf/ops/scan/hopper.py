"""Launches of the scan kernels for Hopper."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.tables import cdiv
from .gluon import TensorDescriptor, gl
from .hopper_kernels import chunk_backward_kernel, state_kernel, walk_kernel
from .portable import sum_blocks
from .problem import Call, Cut, Gradients, Into, fits_tma

Q, P = tables.HOPPER_CHUNK, tables.HOPPER_HEAD
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def serves(call: Call) -> bool:
    """Whether a scan of the right sizes has a layout and options that these kernels take."""
    plain = call.args.z is None and not call.packed and (call.args.D is None or call.args.D.dim() == 1)
    return plain and call.tma and all(t.stride(2) == t.shape[3] for t in (call.args.x, call.args.B, call.args.C))


def chunk_size(call: Call) -> int:
    """Tokens of a chunk."""
    return Q


def walk(call: Call, cut: Cut, entry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``y`` and the final states; ``entry (segments, H, P, N)`` enters the segments."""
    _, _, heads, _, groups, N, _ = call.shape
    per_group = heads // groups
    config = tables.hopper_walk(per_group, N)
    y = torch.empty(call.args.x.shape, dtype=call.args.x.dtype, device=call.args.x.device)
    final = torch.empty(call.state_shape, dtype=torch.float32, device=y.device)
    launch(
        walk_kernel,
        (cut.segments * groups * cdiv(per_group, config.heads),),
        *(_tokens(call.args.x, P), _tokens(call.args.B, N), _tokens(call.args.C, N), _tokens(y, P)),
        *(cut.steps, _or(call.args.D, final), _or(entry, final), final, heads, cut.per_row, cut.per_segment),
        **_sizes(call, config),
        HAS_D=call.args.D is not None,
        HAS_ENTRY=entry is not None,
    )
    return y, final


def summaries(
    call: Call, cut: Cut, *, reverse: bool, inputs: Tensor, maps: Tensor, states: Tensor, decay: Tensor, open_: bool
) -> None:
    """Leaves each segment's own state (or its gradient) in ``states``, and its decay in ``decay``; of a segment that
    nothing follows only where sequences are ``open_``.
    """
    _, heads, _, N = call.state_shape
    per_group = heads // call.shape.groups
    config = tables.hopper_state(per_group, N)
    x, m = _tokens(inputs, P), _tokens(maps, N)
    launch(
        state_kernel,
        (cut.segments * call.shape.groups * cdiv(per_group, config.heads),),
        *(x, m, x, m, x, x, cut.steps, states, states, states, states, decay, heads, cut.per_row, cut.per_segment),
        **_sizes(call, config),
        FORWARD=not reverse,
        REVERSE=reverse,
        SUMMARY=True,
        OPEN=open_,
        HAS_ENTRY=False,
        HAS_DENTRY=False,
    )


def before_gate(call: Call, dout: Tensor) -> Tensor:
    """``dout``: there is no gate."""
    return dout


def gradients(
    call: Call, cut: Cut, dout: Tensor, dy: Tensor, entry: Tensor | None, leave: Tensor | None, into: Into | None
) -> Gradients:
    """Everything of the backward that is not about single numbers; see :class:`Gradients`.

    ``dy`` is ``dout``. ``entry`` and ``leave (segments, H, P, N)``: states, and their gradients, between segments.
    """
    x, D = call.args.x, call.args.D
    _, tokens, heads, _, groups, N, _ = call.shape
    per_group = heads // groups
    X, B, C, dY = _tokens(x, P), _tokens(call.args.B, N), _tokens(call.args.C, N), _tokens(dout, P)

    # The state on entering every chunk, and its gradient on leaving it.
    states, dstates = (torch.empty(cut.chunks * heads, P, N, dtype=x.dtype, device=x.device) for _ in range(2))
    after = torch.empty(2, *call.state_shape, dtype=torch.float32, device=x.device)
    S, dS = _states(states), _states(dstates)
    config = tables.hopper_state(per_group, N)
    launch(
        state_kernel,
        (2 * cut.segments * groups * cdiv(per_group, config.heads),),
        *(X, B, dY, C, S, dS, cut.steps, _or(entry, after), _or(leave, after), after[0], after[1], after),
        *(heads, cut.per_row, cut.per_segment),
        **_sizes(call, config),
        FORWARD=True,
        REVERSE=True,
        SUMMARY=False,
        OPEN=False,
        HAS_ENTRY=entry is not None,
        HAS_DENTRY=leave is not None,
    )

    if into is not None and fits_tma(into.dx) and into.dB.stride() == into.dC.stride():
        dx, dB, dC = into[:3]
    else:
        dx, dB, dC = (torch.empty(t.shape, dtype=x.dtype, device=x.device) for t in (x, call.args.B, call.args.B))
    dots = torch.empty(cut.chunks, heads, 4, Q, dtype=torch.float32, device=x.device)
    ends = torch.empty(cut.chunks, heads, dtype=torch.float32, device=x.device)
    config = tables.hopper_gradients(call.chip, per_group, N, cut.chunks * groups)
    blocks = per_group // config.heads
    to_B, to_C = dB, dC
    if blocks > 1:
        partial = torch.empty(blocks, 2, *call.args.B.shape, dtype=torch.float32, device=x.device)
        to_B, to_C = partial[0].unbind()
    launch(
        chunk_backward_kernel,
        (cut.chunks * groups * blocks,),
        *(B, C, X, dY, S, dS, _tokens(dx, P), cut.steps, _or(D, ends), dots, ends, to_B, to_C),
        *(heads, tokens, cut.per_row, partial.stride(0) if blocks > 1 else 0, *to_B.stride()[:2]),
        **_sizes(call, config),
        HAS_D=D is not None,
    )
    if blocks > 1:
        sum_blocks(partial, dB, dC)
    return Gradients(dx, None, dB, dC, None, after[1], dots, ends)


def _sizes(call: Call, config: tables.HopperConfig) -> dict[str, int]:
    return {
        **call.sizes,
        "PIECES": call.pieces,
        "Q": Q,
        "HEADS": config.heads,
        "STAGES": config.stages,
        "REGISTERS": config.registers,
        "num_warps": 4,
        "maxnreg": config.launched,
    }


def _tokens(tensor: Tensor, width: int) -> TensorDescriptor:
    """Tiles ``(1, Q, width)`` of a ``(B, T, heads, width)`` tensor seen as ``(B, T, heads width)``."""
    batch, tokens, heads, _ = tensor.shape
    row, token = tensor.stride()[:2]
    return _descriptor(tensor, [batch, tokens, heads * width], [row, token, 1], [1, Q, width])


def _states(tensor: Tensor) -> TensorDescriptor:
    """Whole states of a ``(chunks H, P, N)`` buffer."""
    return _descriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, *tensor.shape[1:]])


def _descriptor(tensor: Tensor, shape: list[int], strides: list[int], tile: list[int]) -> TensorDescriptor:
    made = TensorDescriptor.__new__(TensorDescriptor)  # its checks are ours already, and take longer than all the rest
    made.base, made.shape, made.strides, made.block_shape = tensor, shape, strides, tile
    made.layout, made.padding = _layout(tuple(tile), tensor.dtype), "zero"
    return made


@functools.cache
def _layout(tile: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(tile), DTYPES[dtype])


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """``tensor``; for None another one, for the kernel to point at and not to read."""
    return other if tensor is None else tensor
