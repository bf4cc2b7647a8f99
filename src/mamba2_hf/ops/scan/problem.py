"""A scan made ready for kernels: arguments, chunks, segments, step sizes and decays."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..packing import document_numbers
from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.rows import dense
from ..runtime.tables import Chip, cdiv
from ..spec import Packing, SSDShape
from .op import Scan
from .prep import layout_kernel, prep_kernel


class Call(NamedTuple):
    """A scan's arguments made ready for kernels, and what follows from them.

    ``shape`` is that of ``x``; ``dt``, ``A`` and ``D`` have fewer heads where these are in pieces.
    """

    args: Scan
    shape: SSDShape
    chip: Chip
    tma: bool

    @property
    def packed(self) -> bool:
        """Whether one row holds several documents with states of their own."""
        return self.args.packing.cu_seqlens is not None

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """``(B or S, H, P, N)``."""
        return self.shape.states, self.shape.heads, self.shape.head_dim, self.shape.state

    @property
    def pieces(self) -> int:
        """Heads of the shape that a head of ``dt`` is; see :meth:`narrowed`."""
        return self.shape.heads // self.args.dt.shape[2]

    def narrowed(self, P: int) -> Call:
        """The same scan with heads of ``P`` channels: a head of several times as many is so many heads with one step,
        rate and skip. The call itself where its heads are no such.
        """
        args, (_, _, heads, head_dim, _, _, _) = self.args, self.shape
        pieces = head_dim // P
        if pieces * P != head_dim or pieces == 1 or args.x.stride(2) != head_dim:
            return self
        x = args.x.unflatten(3, (pieces, P)).flatten(2, 3)
        initial = args.initial_states
        if initial is not None:
            initial = initial.view(-1, heads * pieces, P, initial.shape[3])
        shape = self.shape._replace(heads=heads * pieces, head_dim=P)
        return self._replace(args=args._replace(x=x, initial_states=initial), shape=shape)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes that kernels are compiled for."""
        return {
            "PER_GROUP": self.shape.heads // self.shape.groups,
            "P": self.shape.head_dim,
            "N": self.shape.state,
        }

    def prep_flags(self, Q: int) -> dict[str, Any]:
        """Options of both kernels in ``prep.py``."""
        return {
            "Q": Q,
            "BH": tables.PREP_HEADS,
            "HAS_BIAS": self.args.dt_bias is not None,
            "SOFTPLUS": self.args.dt_softplus,
            "CLAMP": not self.args.dt_softplus or self.args.dt_limit != (0.0, math.inf),
            "PACKED": self.packed,
        }


class Cut(NamedTuple):
    """How rows are cut into chunks and segments, and each chunk's decays and steps."""

    Q: int
    chunks: int  # of all rows together; an upper bound where packed
    per_row: int
    segments: int  # of all sequences together; an upper bound where packed
    per_segment: int  # chunks
    per_sequence: int  # segments of the longest sequence
    chunk_table: Tensor | None
    segment_table: Tensor | None
    first_segment: Tensor | None
    steps: Tensor  # (chunks, H, 2, Q): log2 decays from the chunk's start, step sizes
    document: Tensor | None  # (chunks, Q), where kernels are to tell documents apart


class Into(NamedTuple):
    """Where a backward is to leave gradients, where the caller has a place for them: views with a dense last size."""

    dx: Tensor  # (B, T, H, P)
    dB: Tensor  # (B, T, G, N)
    dC: Tensor  # (B, T, G, N)
    ddt: Tensor  # (B, T, H)


class Gradients(NamedTuple):
    """What the kernels of a backward give; ``dots`` and ``ends`` are for ``prep.prep_backward_kernel``."""

    dx: Tensor
    dz: Tensor | None
    dB: Tensor
    dC: Tensor
    dD: Tensor | None  # None where `dots` holds what it sums
    dinitial: Tensor
    dots: Tensor
    ends: Tensor


def prepare(given: Scan) -> Call:
    """Makes the arguments ready: last dimensions contiguous, devices and sizes settled."""
    x, B, C = (last_contiguous(t) for t in (given.x, given.B, given.C))
    z = None if given.z is None else last_contiguous(given.z)
    seq_idx, cu_seqlens = given.packing
    chip = tables.current_chip()
    # A descriptor would read on into the next document: packed rows are read through masked pointers.
    aligned = all(fits_tma(t) for t in (x, B, C, z) if t is not None)
    args = given._replace(
        x=x,
        dt=last_contiguous(given.dt),
        A=given.A.contiguous(),
        B=B,
        C=C,
        D=dense(given.D),
        z=z,
        dt_bias=dense(given.dt_bias),
        initial_states=dense(given.initial_states),
        packing=Packing(seq_idx, cu_seqlens if cu_seqlens is None else cu_seqlens.to(x.device)),
    )
    return Call(args, given.shape, chip, tma=chip.has_tma and cu_seqlens is None and aligned)


def cut(call: Call, Q: int, *, marks: bool = False) -> Cut:
    """Cuts a scan into chunks of ``Q`` tokens.

    With ``marks`` the log decays themselves keep documents apart, and kernels need not know about them.
    """
    batch, tokens, _, _, _, _, sequences = call.shape
    device, heads = call.args.x.device, call.args.dt.shape[2]
    seq_idx, cu_seqlens = call.args.packing
    length = tables.segment_tokens(call.chip, call.shape, call.args.x.dtype)
    per_segment = length // Q
    per_row = cdiv(tokens, Q)
    per_sequence = cdiv(tokens, length)
    chunk_table = segment_table = first_segment = None
    if cu_seqlens is None:
        chunks, segments = batch * per_row, batch * per_sequence
    else:
        chunks = tokens // Q + sequences
        segments = sequences if per_sequence == 1 else tokens // length + sequences
        table = torch.full((2 * chunks + 7 * segments + 1,), -1, dtype=torch.int32, device=device)
        chunk_table, segment_table, first_segment = table.split([2 * chunks, 6 * segments, segments + 1])
        launch(
            layout_kernel,
            (sequences,),
            *(cu_seqlens, chunk_table, segment_table, first_segment, sequences, per_segment),
            Q=Q,
            BLOCK=tables.LAYOUT_BLOCK,
        )
    document = None
    marked = seq_idx if marks else None
    if seq_idx is not None and not marks:
        numbers = document_numbers(seq_idx)
        padding = numbers[:, -1:].expand(-1, per_row * Q - tokens)
        document = torch.cat([numbers, padding], 1).to(torch.int32)
    steps = torch.empty(chunks, heads, 2, Q, dtype=torch.float32, device=device)
    launch(
        prep_kernel,
        (chunks, cdiv(heads, tables.PREP_HEADS)),
        *(call.args.dt, call.args.dt_bias, call.args.A, steps, marked, chunk_table),
        *(tokens, per_row, heads, *call.args.dt_limit, *call.args.dt.stride()[:2]),
        *((0, 0) if marked is None else marked.stride()),
        **call.prep_flags(Q),
        MARKS=marked is not None,
    )
    return Cut(
        *(Q, chunks, per_row, segments, per_segment, per_sequence),
        *(chunk_table, segment_table, first_segment, steps, document),
    )


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    """The first three strides; zeros for a tensor that is not there."""
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]


def last_contiguous(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def fits_tma(tensor: Tensor) -> bool:
    """Whether tiles of a tensor can be copied by descriptor: addresses are multiples of 16 bytes."""
    size = tensor.element_size()
    sixteen = all(stride * size % 16 == 0 for stride in (*tensor.stride()[:-1], tensor.shape[-1]))
    return sixteen and tensor.data_ptr() % 16 == 0
