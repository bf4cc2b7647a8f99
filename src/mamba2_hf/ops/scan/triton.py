"""The SSD scan on Triton: which kernels a call gets, and the order of the passes, forward and back.

The forward leaves nothing but its inputs for the backward, which recomputes the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import flops
from ..neighbors import Entering, Neighbors
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

    def __init__(self, given: Scan, call: Call | None = None) -> None:
        self.given = given
        self.call, self.kernels = _route(prepare(given) if call is None else call)
        self.cut = cut(self.call, self.kernels.chunk_size(self.call), marks=self.kernels is not portable)

    def forward(self, entering: Entering | None = None) -> tuple[Tensor, Tensor]:
        """``y`` and the final states; ``entering`` is given where rows are slices."""
        x = self.given.x
        y, final = self.kernels.walk(self.call, self.cut, self._entry(entering))
        return y.to(x.dtype).view(x.shape), final.view(final.shape[0], *x.shape[2:], final.shape[3])

    def backward(
        self, dy: Tensor, dfinal: Tensor | None, into: Into | None = None, entering: Entering | None = None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial states, each in its tensor's dtype.

        Args:
            dy: gradient of y. dfinal: gradient of the final states, or None.
            into: where those of x, B, C and dt go; new tensors if None.
            entering: as the forward left it, where rows are slices; the final states have no gradient then.
        """
        given, call, pieces = self.given, self.call, self.cut
        dout = channels_last(dy.to(call.args.x.dtype))
        if call.tma and not (fits_tma(dout) and dout.stride(2) == dout.shape[3]):
            dout = dout.clone(memory_format=torch.contiguous_format)
        dout = dout.view(call.args.x.shape)
        dy = self.kernels.before_gate(call, dout)
        if into is not None:
            into = into._replace(dx=into.dx.view(dout.shape))
        leave = dfinal if dfinal is None else dfinal.contiguous().view(call.state_shape)
        ask = None if entering is None else entering.neighbors.gradient_after
        leave = self._between(reverse=True, inputs=dy, maps=call.args.C, outer=leave, ask=ask)
        found = self.kernels.gradients(call, pieces, dout, dy, self._entry(entering), leave, into)

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

    def _entry(self, entering: Entering | None) -> Tensor | None:
        """The state that enters each segment, ``(segments, H, P, N)``; None where all are zero."""
        args = self.call.args
        outer, ask = args.initial_states, None
        if entering is not None and entering.state is not None:
            outer = entering.state.view(self.call.state_shape)
        elif entering is not None:
            ask = entering.ask_state
        return self._between(reverse=False, inputs=args.x, maps=args.B, outer=outer, ask=ask)

    def _between(
        self,
        *,
        reverse: bool,
        inputs: Tensor,
        maps: Tensor,
        outer: Tensor | None,
        ask: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Tensor | None:
        """The state (or its gradient) that enters each segment in walking direction.

        ``outer`` enters sequences; or what ``ask`` makes of each one's own state, from zero, and its decay.
        """
        if self.cut.per_sequence == 1 and ask is None:
            return outer
        heads, P, N = self.call.shape.heads, self.call.shape.head_dim, self.call.shape.state
        states = torch.empty(self.cut.segments, heads, P, N, dtype=torch.float32, device=inputs.device)
        decay = torch.empty(self.cut.segments, heads, dtype=torch.float32, device=inputs.device)
        given = {"reverse": reverse, "inputs": inputs, "maps": maps}
        self.kernels.summaries(self.call, self.cut, **given, states=states, decay=decay, open_=ask is not None)
        if ask is not None:
            own, passes = _joined(states, decay, self.cut.per_sequence, reverse)
            # In the heads of the input: which kernels run, and with which heads, is for every device to choose.
            own = own.view(-1, *self.given.x.shape[2:], N)
            outer = ask(own, passes.unflatten(1, (own.shape[1], -1))[..., 0]).contiguous().view(self.call.state_shape)
        if self.cut.per_sequence == 1:
            return outer
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


class PartsPasses:
    """The passes of a scan of wide states, as of scans of parts of their columns: what these read adds up, and each has
    states of its own.
    """

    def __init__(self, given: Scan) -> None:
        self.sizes = [columns.shape[-1] for columns in given.B.split(tables.LARGEST_16_BIT_STATE, -1)]
        initial: Any = [None] * len(self.sizes)
        if given.initial_states is not None:
            initial = given.initial_states.split(self.sizes, -1)
        self.parts = [
            ScanPasses(given._replace(B=B, C=C, D=None if place else given.D, initial_states=initial[place]))
            for place, (B, C) in enumerate(
                zip(given.B.split(self.sizes, -1), given.C.split(self.sizes, -1), strict=True)
            )
        ]

    def forward(self, entering: Entering | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`ScanPasses.forward`; nothing enters from elsewhere."""
        ys, finals = zip(*(part.forward() for part in self.parts), strict=True)
        return _added(ys), torch.cat(finals, -1)

    def backward(
        self, dy: Tensor, dfinal: Tensor | None, into: Into | None = None, entering: Entering | None = None
    ) -> tuple[Tensor | None, ...]:
        """See :meth:`ScanPasses.backward`; nothing enters from elsewhere."""
        leaving: Any = [None] * len(self.sizes) if dfinal is None else dfinal.split(self.sizes, -1)
        found: Any = [part.backward(dy, leave) for part, leave in zip(self.parts, leaving, strict=True)]
        dx, ddt, dA, dB, dC, dD, _, dbias, dinitial = zip(*found, strict=True)
        gradients = Into(_added(dx), torch.cat(dB, -1), torch.cat(dC, -1), _added(ddt))
        if into is not None:
            gradients = Into(*(_place(*pair) for pair in zip(gradients, into, strict=True)))
        return (
            gradients.dx,
            gradients.ddt,
            _added(dA),
            gradients.dB,
            gradients.dC,
            dD[0],
            None,
            None if dbias[0] is None else _added(dbias),
            None if dinitial[0] is None else torch.cat(dinitial, -1),
        )


def _added(parts: Sequence[Tensor]) -> Tensor:
    """The sum, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)


def scan_passes(given: Scan, entering: Entering | None = None) -> ScanPasses | PartsPasses:
    """The passes of a scan; ``entering`` is given where rows are slices."""
    call = prepare(given)
    wide = given.z is None and entering is None and tables.takes_fp32(call.shape, given.x.dtype)
    return PartsPasses(given) if wide and _on_hopper(call) is None else ScanPasses(given, call)


def _joined(states: Tensor, decay: Tensor, per_sequence: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """The states of segments, ``(B s, H, P, N)``, each from zero, and their decays ``(B s, H)``, to those of whole
    sequences, ``(B, H, P, N)`` and ``(B, H)``.
    """
    if per_sequence == 1:
        return states, decay
    states, decay = states.unflatten(0, (-1, per_sequence)), decay.unflatten(0, (-1, per_sequence))
    passed = decay if reverse else decay.flip(1)
    behind = passed.cumprod(1)  # (B, s, H) decays of the segments from the last one walked on
    after = torch.cat([torch.ones_like(behind[:, :1]), behind[:, :-1]], 1)
    after = after if reverse else after.flip(1)
    return (after[..., None, None] * states).sum(1), behind[:, -1]


def _fake(call: Scan) -> tuple[Tensor, Tensor]:
    _, _, heads, P, _, N, states = call.shape
    return call.x.new_empty(call.x.shape), call.x.new_empty(states, heads, P, N, dtype=torch.float32)


def _flops(call: Any) -> int:
    return flops.scan(call.x, call.B, call.packing.cu_seqlens)


@op("ssd_chunk_scan", fake=_fake, flops=(_flops, lambda call: flops.BACKWARD * _flops(call)))
def scan(call: Scan) -> tuple[Tensor, Tensor]:
    """``y`` and the final states."""
    return scan_passes(call).forward()


@scan.backward
def _backward(call: Scan, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    return scan_passes(call).backward(dy, dfinal)


_of_slices = scan.between(lambda call, entering: ScanPasses(call).forward(entering))
_of_slices.backward(lambda call, entering, dy, _: ScanPasses(call).backward(dy, None, entering=entering))


def ssd_chunk_scan(call: Scan, neighbors: Neighbors | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.scan.op.scan`."""
    dtype = call.x.dtype
    z = None if call.z is None else call.z.to(dtype)
    call = call._replace(B=call.B.to(dtype), C=call.C.to(dtype), z=z)
    y, states = scan(call) if neighbors is None else _of_slices(call, Entering(neighbors))
    return y, states


def _place(found: Tensor, target: Tensor) -> Tensor:
    """``found`` in its place, where it is not there yet."""
    return target if found.data_ptr() == target.data_ptr() else target.copy_(found)


def _on_hopper(call: Call) -> tuple[Call, ModuleType] | None:
    """The call as the kernels for Hopper take it, and the module that launches them; None where they do not."""
    narrow, hopper = call.narrowed(tables.HOPPER_HEAD), None
    if tables.hopper_kernels(call.chip, narrow.shape, call.args.x.dtype):
        hopper = _hopper()
    return (narrow, hopper) if hopper is not None and hopper.serves(narrow) else None


def _route(call: Call) -> tuple[Call, ModuleType]:
    """The call as the fastest kernels for it take it, and the module that launches them."""
    args, special = call.args, _on_hopper(call)
    if special is not None:
        return special
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
