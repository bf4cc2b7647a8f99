"""The SSD scan on Triton: which kernels a call gets, and the order of the passes, forward and back.

The forward leaves nothing but its inputs for the backward, which recomputes the rest.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import flops
from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.op import op
from ..runtime.rows import channels_last
from ..runtime.sums import sum_rows
from ..runtime.tables import cdiv
from . import portable
from .op import Scan
from .problem import Call, Into, cut, fits_tma, prepare, step_gradients
from .ssd_forward import link_kernel


class ScanPasses:
    """The passes of one scan: what its forward and its backward have in common is prepared once."""

    def __init__(self, given: Scan) -> None:
        self.given = given
        self.call, self.kernels = _route(prepare(given))
        self.cut = cut(self.call, self.kernels.chunk_size(self.call), marks=self.kernels is not portable)

    def forward(self) -> tuple[Tensor, Tensor]:
        """``y`` and the final states."""
        x = self.given.x
        y, final = self.kernels.walk(self.call, self.cut, self._entry())
        return y.to(x.dtype).view(x.shape), final.view(final.shape[0], *x.shape[2:], final.shape[3])

    def backward(self, dy: Tensor, dfinal: Tensor | None, into: Into | None = None) -> tuple[Tensor | None, ...]:
        """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial states, each in its tensor's dtype.

        Args:
            dy: gradient of y. dfinal: gradient of the final states, or None.
            into: where those of x, B, C and dt go; new tensors if None.
        """
        given, call, pieces = self.given, self.call, self.cut
        dy = channels_last(dy.to(call.args.x.dtype))
        if call.tma and not (fits_tma(dy) and dy.stride(2) == dy.shape[3]):
            dy = dy.clone(memory_format=torch.contiguous_format)
        dy = dy.view(call.args.x.shape)
        if into is not None:
            into = into._replace(dx=into.dx.view(dy.shape))
        leave = dfinal if dfinal is None else dfinal.contiguous().view(call.state_shape)
        leave = self._between(reverse=True, inputs=dy, maps=call.args.C, outer=leave)
        found = self.kernels.gradients(call, pieces, dy, self._entry(), leave, into)

        if into is None:
            new = torch.zeros if call.packed else torch.empty
            ddt = new(call.args.dt.shape, dtype=given.dt.dtype, device=dy.device)
        else:
            ddt = into.ddt.zero_() if call.packed else into.ddt
        shares = step_gradients(
            *(call.args, pieces.steps, found.dots, found.ends, ddt, pieces.per_row, pieces.chunk_table)
        )
        share = sum_rows(shares, torch.float32)  # of A, dt_bias and D
        dx, dB, dC, dD, dz = found.dx, found.dB, found.dC, found.dD, found.dz
        if into is None:
            dx, dB, dC = (t.to(given.x.dtype) for t in (dx, dB, dC))
        else:
            dx, dB, dC = (_place(*pair) for pair in zip((dx, dB, dC), into, strict=False))
        if dD is None and given.D is not None:
            dD = share[2]
        bias, initial = given.dt_bias, given.initial_states
        return (
            dx.view(given.x.shape),
            ddt,
            share[0].to(given.A.dtype),
            dB,
            dC,
            None if given.D is None else dD.to(given.D.dtype),
            None if dz is None else dz.to(given.x.dtype),
            None if bias is None else share[1].to(bias.dtype),
            None if initial is None else found.dinitial.view(initial.shape).to(initial.dtype),
        )

    def _entry(self) -> Tensor | None:
        """The state that enters each segment, ``(segments, H, P, N)``; None where all are zero."""
        call = self.call
        return self._between(reverse=False, inputs=call.args.x, maps=call.args.B, outer=call.args.initial_states)

    def _between(self, *, reverse: bool, inputs: Tensor, maps: Tensor, outer: Tensor | None) -> Tensor | None:
        """The state (or its gradient) that enters each segment in walking direction; ``outer`` enters sequences."""
        if self.cut.per_sequence == 1:
            return outer
        heads, P, N = self.call.shape.heads, self.call.shape.head_dim, self.call.shape.state
        states = torch.empty(self.cut.segments, heads, P, N, dtype=torch.float32, device=inputs.device)
        decay = torch.empty(self.cut.segments, heads, dtype=torch.float32, device=inputs.device)
        given = {"reverse": reverse, "inputs": inputs, "maps": maps}
        self.kernels.summaries(self.call, self.cut, **given, states=states, decay=decay)
        launch(
            link_kernel,
            (self.call.shape.states, cdiv(P * N, tables.LINK_BLOCK), heads),
            *(states, decay, outer, self.cut.first_segment, self.cut.per_sequence, heads),
            P=P,
            N=N,
            BLOCK=tables.LINK_BLOCK,
            REVERSE=reverse,
            HAS_OUTER=outer is not None,
            PACKED=self.call.packed,
        )
        return states


def _fake(call: Scan) -> tuple[Tensor, Tensor]:
    _, _, heads, P, _, N, states = call.shape
    return call.x.new_empty(call.x.shape), call.x.new_empty(states, heads, P, N, dtype=torch.float32)


def _flops(call: Any) -> int:
    return flops.scan(call.x, call.B, call.packing.cu_seqlens)


@op("ssd_chunk_scan", fake=_fake, flops=(_flops, lambda call: flops.BACKWARD * _flops(call)))
def scan(call: Scan) -> tuple[Tensor, Tensor]:
    """``y`` and the final states."""
    return ScanPasses(call).forward()


@scan.backward
def _backward(call: Scan, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    return ScanPasses(call).backward(dy, dfinal)


def ssd_chunk_scan(call: Scan) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.ssd_chunk_scan`; always returns the final states too."""
    dtype = call.x.dtype
    z = None if call.z is None else call.z.to(dtype)
    y, states = scan(call._replace(B=call.B.to(dtype), C=call.C.to(dtype), z=z))
    return y, states


def _place(found: Tensor, target: Tensor) -> Tensor:
    """``found`` in its place, where it is not there yet."""
    return target if found.data_ptr() == target.data_ptr() else target.copy_(found)


def _route(call: Call) -> tuple[Call, ModuleType]:
    """The call as the fastest kernels for it take it, and the module that launches them."""
    args, narrow = call.args, call.narrowed(tables.HOPPER_HEAD)
    if tables.hopper_kernels(call.chip, narrow.shape, args.x.dtype):
        hopper = _hopper()
        if hopper is not None and hopper.serves(narrow):
            return narrow, hopper
    if tables.takes_fp32(call.shape, args.x.dtype):
        z = None if args.z is None else args.z.float()
        call = prepare(args._replace(x=args.x.float(), B=args.B.float(), C=args.C.float(), z=z))
    return call, portable


@functools.cache
def _hopper() -> ModuleType | None:
    """The launches for Hopper; None where Gluon, an experimental part of Triton, has changed."""
    try:
        from . import hopper
    except (ImportError, AttributeError):
        return None
    return hopper
