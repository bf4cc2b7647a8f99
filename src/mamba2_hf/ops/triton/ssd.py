"""Launch code of the SSD scan: from the op's arguments to kernels and back.

:func:`scan_forward` and :func:`scan_backward` take and return tensors and plain numbers only. The backward recomputes
from the inputs; what the forward leaves for it, besides them, is the states between segments of long sequences.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..checks import SSDShape
from . import configs
from .configs import Chip, Config
from .prep import layout_kernel, prep_backward_kernel, prep_kernel
from .ssd_backward import gate_backward_kernel, inputs_backward_kernel, maps_backward_kernel, sum_kernel
from .ssd_forward import link_kernel, state_kernel, walk_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 256
# On Hopper, Triton 3.6 reads past shared memory in the product that updates a 16-bit state of more than 128.
LARGEST_STATE = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 256}
LAYOUT_BLOCK, LINK_BLOCK, SUM_BLOCK, PREP_HEADS = 128, 1024, 1024, 16


def supports(*, shape: SSDShape, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether a scan of these sizes can be served, and why (not)."""
    if dtype not in DTYPES:
        return False, f"dtype {dtype} is not bfloat16, float16 or float32"
    if shape.head_dim > LARGEST_HEAD:
        return False, f"head_dim {shape.head_dim} is above {LARGEST_HEAD}"
    if shape.state > LARGEST_STATE[dtype]:
        return False, f"state size {shape.state} is above {LARGEST_STATE[dtype]}, the most for {dtype}"
    return True, "the Triton scan serves it"


class Arguments(NamedTuple):
    """The op's arguments, in one order for forward, backward and autograd."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None
    seq_idx: Tensor | None
    cu_seqlens: Tensor | None
    dt_softplus: bool
    low: float
    high: float


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
) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.ssd_chunk_scan`; always returns the final states too."""
    B, C, z = (t if t is None else t.to(x.dtype) for t in (B, C, z))
    y, states, _ = torch.ops.mamba2_hf.ssd_chunk_scan(
        *(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, *map(float, dt_limit))
    )
    return y, states


def scan_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the scan.

    Args:
        args: the fields of :class:`Arguments`.

    Returns:
        ``y``, the final states, and the states between segments, ``(segments, H, P, N)``, which are to be handed to
        :func:`scan_backward` (none of them, ``(0,)``, where no sequence was cut).
    """
    call = _prepare(Arguments(*args))
    x, B, C, z, D = call.x, call.B, call.C, call.z, call.D
    P, N = call.shape.head_dim, call.shape.state
    config = configs.walk(call.chip, x.dtype, P, N)
    cut = _cut(call, config.Q)
    entry, between = call.initial_states, x.new_empty(0, dtype=torch.float32)
    if cut.per_sequence > 1:
        entry = between = _between(call, cut, reverse=False, inputs=x, maps=B, outer=entry)
    y = (torch.zeros if call.packed else torch.empty)(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty(call.state_shape, dtype=torch.float32, device=x.device)
    tma = call.tma
    walk_kernel[(cut.segments * call.shape.heads * triton.cdiv(P, config.BP),)](
        _tokens(x, config.Q, config.BP, tma),
        _tokens(B, config.Q, config.BN, tma),
        _tokens(C, config.Q, config.BN, tma),
        _tokens(z, config.Q, config.BP, tma),
        _tokens(y, config.Q, config.BP, tma),
        *(cut.steps, cut.a, D, cut.document, entry, final, cut.segment_table),
        *(call.shape.tokens, cut.per_row, cut.per_segment, call.shape.heads),
        *(*_strides(x), *_strides(B), *_strides(C), *_strides(z)),
        **call.sizes,
        **_tiles(config),
        D_RANK=0 if D is None else D.dim(),
        HAS_Z=z is not None,
        HAS_ENTRY=entry is not None,
        **_flags(call, cut),
    )
    return y, final, between


def scan_backward(dy: Tensor, dfinal: Tensor | None, between: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial states, each in its tensor's dtype.

    Args:
        dy: gradient of y. dfinal: gradient of the final states, or None.
        between: as :func:`scan_forward` returned it.
        args: the fields of :class:`Arguments`.
    """
    given = Arguments(*args)
    call = _prepare(given)
    x, B, C, z, D, chip = call.x, call.B, call.C, call.z, call.D, call.chip
    batch, tokens, heads, P, groups, N, _ = call.shape
    per_group = heads // groups
    config = configs.inputs_backward(chip, x.dtype, P, N)
    cut = _cut(call, config.Q)
    dout = _last_contiguous(dy.to(x.dtype))
    dy = dout
    if z is not None:
        dy = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        gate_backward_kernel[(triton.cdiv(tokens, 8), triton.cdiv(heads * P, 512), batch)](
            *(dout, z, dy, tokens, heads * P, *_strides(dout), *_strides(z)),
            P=P,
            BLOCK=512,
            ROWS=8,
            enable_fp_fusion=True,
        )
    call = call._replace(tma=call.tma and _fits_tma(dout) and _fits_tma(dy))
    tma = call.tma

    # The state on entering every chunk, and its gradient on leaving it, (chunks, H, N, P).
    states, dstates = (torch.empty(cut.chunks, heads, N, P, dtype=x.dtype, device=x.device) for _ in range(2))
    entry = call.initial_states
    if cut.per_sequence > 1:
        entry = between
    scratch = torch.empty(call.state_shape, dtype=torch.float32, device=x.device)
    _walk_states(call, cut, reverse=False, inputs=x, maps=B, entry=entry, at_chunks=states, after=scratch)
    leave = dfinal if dfinal is None else dfinal.contiguous()
    if cut.per_sequence > 1:
        leave = _between(call, cut, reverse=True, inputs=dy, maps=C, outer=leave)
    dinitial = scratch
    _walk_states(call, cut, reverse=True, inputs=dy, maps=C, entry=leave, at_chunks=dstates, after=dinitial)

    new = torch.zeros if call.packed else torch.empty
    dx = new(x.shape, dtype=x.dtype, device=x.device)
    dz = None if z is None else new(x.shape, dtype=x.dtype, device=x.device)
    dstep, da = torch.empty_like(cut.steps), torch.empty_like(cut.a)
    n_heads = configs.heads_per_program(per_group, config.heads)
    views = (
        *(cut.steps, cut.a, D, cut.document),
        *(_states(states, config.BN, config.BP, tma), _states(dstates, config.BN, config.BP, tma)),
    )
    inputs_backward_kernel[(cut.chunks * heads // n_heads,)](
        _tokens(x, config.Q, config.BP, tma),
        _tokens(B, config.Q, config.BN, tma),
        _tokens(C, config.Q, config.BN, tma),
        _tokens(z, config.Q, config.BP, tma),
        _tokens(dout, config.Q, config.BP, tma),
        _tokens(dy, config.Q, config.BP, tma),
        *views,
        _tokens(dx, config.Q, config.BP, tma),
        _tokens(dz, config.Q, config.BP, tma),
        *(dstep, da, cut.chunk_table),
        *(tokens, cut.per_row, heads),
        *(*_strides(x), *_strides(B), *_strides(C), *_strides(z), *_strides(dout), *_strides(dy)),
        **call.sizes,
        HEADS=n_heads,
        **_tiles(config),
        D_RANK=0 if D is None else D.dim(),
        HAS_Z=z is not None,
        **_flags(call, cut),
    )

    config = configs.maps_backward(chip, x.dtype, P, N, config.Q)
    n_heads = configs.heads_per_program(per_group, config.heads)
    blocks = per_group // n_heads
    dD = None if D is None else new(cut.chunks, *D.shape, dtype=torch.float32, device=x.device)
    partial = new(blocks, 2, *B.shape, dtype=torch.float32, device=x.device)
    maps_backward_kernel[(cut.chunks * heads // n_heads * triton.cdiv(N, config.BN),)](
        _tokens(x, config.Q, config.BP, tma),
        _tokens(B, config.Q, config.BN, tma),
        _tokens(C, config.Q, config.BN, tma),
        _tokens(dy, config.Q, config.BP, tma),
        *(cut.steps, cut.a, cut.document),
        *(_states(states, config.BN, config.BP, tma), _states(dstates, config.BN, config.BP, tma)),
        *(partial, dD, cut.chunk_table),
        *(tokens, cut.per_row, heads, batch),
        *(*_strides(x), *_strides(B), *_strides(C), *_strides(dy)),
        **call.sizes,
        HEADS=n_heads,
        D_RANK=0 if D is None else D.dim(),
        **_tiles(config),
        **_flags(call, cut),
    )
    dB, dC = (torch.empty(B.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    sum_kernel[(triton.cdiv(dB.numel(), SUM_BLOCK), 2)](
        partial, dB, dC, dB.numel(), BLOCKS=blocks, BLOCK=SUM_BLOCK, enable_fp_fusion=True
    )

    ddt = new(batch, tokens, heads, dtype=given.dt.dtype, device=x.device)
    shares = torch.empty(cut.chunks, 2, heads, dtype=torch.float32, device=x.device)
    prep_backward_kernel[(cut.chunks, triton.cdiv(heads, PREP_HEADS))](
        *(call.dt, call.dt_bias, call.A, cut.steps, dstep, da, ddt, shares, cut.chunk_table),
        *(tokens, cut.per_row, heads, given.low, given.high, *call.dt.stride()[:2]),
        **call.prep_flags(cut.Q),
    )
    dA, dbias = shares.sum(0)
    bias, initial = given.dt_bias, given.initial_states
    return (
        dx,
        ddt,
        dA.to(given.A.dtype),
        dB,
        dC,
        None if dD is None or given.D is None else dD.sum(0).to(given.D.dtype),
        dz,
        None if bias is None else dbias.to(bias.dtype),
        None if initial is None else dinitial.to(initial.dtype),
    )


class _Call(NamedTuple):
    """The arguments made ready for kernels, and what follows from them."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None
    seq_idx: Tensor | None
    cu_seqlens: Tensor | None
    limits: tuple[float, float]
    dt_softplus: bool
    shape: SSDShape
    chip: Chip
    tma: bool

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        return self.shape.states, self.shape.heads, self.shape.head_dim, self.shape.state

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "PER_GROUP": self.shape.heads // self.shape.groups,
            "P": self.shape.head_dim,
            "N": self.shape.state,
        }

    def prep_flags(self, Q: int) -> dict[str, Any]:
        return {
            "Q": Q,
            "BH": PREP_HEADS,
            "HAS_BIAS": self.dt_bias is not None,
            "SOFTPLUS": self.dt_softplus,
            "CLAMP": not self.dt_softplus or self.limits != (0.0, math.inf),
            "PACKED": self.packed,
            "enable_fp_fusion": True,
        }


class _Cut(NamedTuple):
    """How rows are cut into chunks and segments, and each chunk's steps and log decays."""

    Q: int
    chunks: int  # of all rows together; an upper bound where packed
    per_row: int
    segments: int  # of all sequences together; an upper bound where packed
    per_segment: int  # chunks
    per_sequence: int  # segments of the longest sequence
    chunk_table: Tensor | None
    segment_table: Tensor | None
    first_segment: Tensor | None
    steps: Tensor  # (chunks, H, Q)
    a: Tensor  # (chunks, H, Q)
    document: Tensor | None  # (chunks, Q)


def _prepare(given: Arguments) -> _Call:
    batch, tokens, heads, P = given.x.shape
    groups, N = given.B.shape[2:]
    cu = given.cu_seqlens
    states = batch if cu is None else cu.shape[0] - 1
    x, B, C = (_last_contiguous(t) for t in (given.x, given.B, given.C))
    z = None if given.z is None else _last_contiguous(given.z)
    chip = configs.current_chip()
    # A descriptor would read on into the next document: packed rows are read through masked pointers.
    aligned = all(_fits_tma(t) for t in (x, B, C, z) if t is not None)
    initial, D = given.initial_states, given.D
    return _Call(
        *(x, _last_contiguous(given.dt), given.A.contiguous(), B, C),
        D=D if D is None else D.contiguous(),
        z=z,
        dt_bias=given.dt_bias if given.dt_bias is None else given.dt_bias.contiguous(),
        initial_states=initial if initial is None else initial.contiguous(),
        seq_idx=given.seq_idx,
        cu_seqlens=cu if cu is None else cu.to(x.device),
        limits=(given.low, given.high),
        dt_softplus=given.dt_softplus,
        shape=SSDShape(batch, tokens, heads, P, groups, N, states),
        chip=chip,
        tma=chip.has_tma and cu is None and aligned,
    )


def _segment_length(chip: Chip, batch: int, tokens: int, heads: int, P: int, N: int, dtype: torch.dtype) -> int:
    tiles = triton.cdiv(P, configs.walk(chip, dtype, P, N).BP)
    return configs.segment_tokens(chip, batch * heads * tiles, tokens)


def segments_between(
    batch: int, tokens: int, heads: int, P: int, N: int, dtype: torch.dtype, documents: int | None
) -> int:
    """How many segments' states :func:`scan_forward` returns beside its results; 0 where it cuts no sequence."""
    length = _segment_length(configs.current_chip(), batch, tokens, heads, P, N, dtype)
    if tokens <= length:
        return 0
    return batch * triton.cdiv(tokens, length) if documents is None else tokens // length + documents


def _cut(call: _Call, Q: int) -> _Cut:
    batch, tokens, heads, P, _, N, sequences = call.shape
    device = call.x.device
    length = _segment_length(call.chip, batch, tokens, heads, P, N, call.x.dtype)
    per_segment = length // Q
    per_row = triton.cdiv(tokens, Q)
    per_sequence = triton.cdiv(tokens, length)
    chunk_table = segment_table = first_segment = None
    if call.cu_seqlens is None:
        chunks, segments = batch * per_row, batch * per_sequence
    else:
        chunks = tokens // Q + sequences
        segments = sequences if per_sequence == 1 else tokens // length + sequences
        tables = torch.full((2 * chunks + 7 * segments + 1,), -1, dtype=torch.int32, device=device)
        chunk_table, segment_table, first_segment = tables.split([2 * chunks, 6 * segments, segments + 1])
        layout_kernel[(sequences,)](
            *(call.cu_seqlens, chunk_table, segment_table, first_segment, sequences, per_segment),
            Q=Q,
            BLOCK=LAYOUT_BLOCK,
            enable_fp_fusion=True,
        )
    document = None
    if call.seq_idx is not None:
        numbers = F.pad((call.seq_idx[:, 1:] != call.seq_idx[:, :-1]).to(torch.int32).cumsum(1), (1, 0))
        padding = numbers[:, -1:].expand(-1, per_row * Q - tokens)
        document = torch.cat([numbers, padding], 1).to(torch.int32)
    steps, a = torch.empty(2, chunks, heads, Q, dtype=torch.float32, device=device)
    prep_kernel[(chunks, triton.cdiv(heads, PREP_HEADS))](
        *(call.dt, call.dt_bias, call.A, steps, a, chunk_table),
        *(tokens, per_row, heads, *call.limits, *call.dt.stride()[:2]),
        **call.prep_flags(Q),
    )
    return _Cut(
        *(Q, chunks, per_row, segments, per_segment, per_sequence),
        *(chunk_table, segment_table, first_segment, steps, a, document),
    )


def _between(call: _Call, cut: _Cut, *, reverse: bool, inputs: Tensor, maps: Tensor, outer: Tensor | None) -> Tensor:
    """The state (or its gradient) that enters each segment in walking direction, ``(segments, H, P, N)``."""
    heads, P, N = call.shape.heads, call.shape.head_dim, call.shape.state
    states = torch.empty(cut.segments, heads, P, N, dtype=torch.float32, device=inputs.device)
    decay = torch.empty(cut.segments, heads, dtype=torch.float32, device=inputs.device)
    _walk_states(call, cut, reverse=reverse, inputs=inputs, maps=maps, entry=None, decay=decay, after=states)
    link_kernel[(call.shape.states, triton.cdiv(P * N, LINK_BLOCK), heads)](
        *(states, decay, outer, cut.first_segment, cut.per_sequence, heads),
        P=P,
        N=N,
        BLOCK=LINK_BLOCK,
        REVERSE=reverse,
        HAS_OUTER=outer is not None,
        PACKED=call.packed,
        enable_fp_fusion=True,
    )
    return states


def _walk_states(
    call: _Call,
    cut: _Cut,
    *,
    reverse: bool,
    inputs: Tensor,
    maps: Tensor,
    entry: Tensor | None,
    after: Tensor,
    at_chunks: Tensor | None = None,
    decay: Tensor | None = None,
) -> None:
    P, N = call.shape.head_dim, call.shape.state
    config = configs.state(call.chip, inputs.dtype, P, N, cut.Q)
    programs = call.shape.heads * triton.cdiv(P, config.BP) * triton.cdiv(N, config.BN)
    state_kernel[(cut.segments * programs,)](
        _tokens(inputs, config.Q, config.BP, call.tma),
        _tokens(maps, config.Q, config.BN, call.tma),
        *(cut.steps, cut.a, cut.document, entry),
        None if at_chunks is None else _states(at_chunks, config.BN, config.BP, call.tma),
        *(decay, after, cut.segment_table),
        *(call.shape.tokens, cut.per_row, cut.per_segment, call.shape.heads),
        *(*_strides(inputs), *_strides(maps)),
        **call.sizes,
        **_tiles(config),
        REVERSE=reverse,
        SUMMARY=at_chunks is None,
        HAS_ENTRY=entry is not None,
        **_flags(call, cut),
    )


def _flags(call: _Call, cut: _Cut) -> dict[str, Any]:
    return {
        "HAS_DOCUMENTS": cut.document is not None,
        "PACKED": call.packed,
        "TMA": call.tma,
        "ASM": call.chip.is_hopper and not call.chip.interpreted and call.x.dtype != torch.float32,
        "PRECISION": configs.precision(call.chip, call.x.dtype),
    }


def _tiles(config: Config) -> dict[str, int]:
    return {
        "Q": config.Q,
        "BP": config.BP,
        "BN": config.BN,
        "STAGES": config.stages,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _fits_tma(tensor: Tensor) -> bool:
    size = tensor.element_size()
    sixteen = all(stride * size % 16 == 0 for stride in (*tensor.stride()[:-1], tensor.shape[-1]))
    return sixteen and tensor.data_ptr() % 16 == 0


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
