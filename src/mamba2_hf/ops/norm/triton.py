"""RMSNorm over groups of channels, forward and backward: plain, or gated in either order.

A program holds one group of one or a few rows, cut into chunks of a power of two so that widths such as 5120 waste no
lanes. Nothing but the inputs is kept for the backward, which recomputes the mean square; there each program takes a run
of rows, so that the weight's gradient is summed in registers, then over programs in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.op import op
from ..runtime.rows import channels_last, vector_strides
from ..runtime.sums import sum_rows
from ..runtime.tables import cdiv, power_of_two
from ..scan.prep import _silu
from .op import Norm


@triton.jit
def _load(base, row, stride, column, mask, UNIT: tl.constexpr):
    """A tile ``(rows, columns)`` in its own dtype; rows are ``stride * UNIT`` apart."""
    return tl.load(base + row.to(tl.int64)[:, None] * stride * UNIT + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, row, stride, column, value, mask, UNIT: tl.constexpr):
    tl.store(base + row.to(tl.int64)[:, None] * stride * UNIT + column[None, :], value.to(base.dtype.element_ty), mask)


@triton.jit
def norm_forward_kernel(x, z, weight, y, sums, M, eps, sx, sz, sy,
                        SIZE: tl.constexpr, GATE_LAST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
                        BLOCK: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """One group of ``ROWS`` rows. With ``sums (M,)`` its sum of squares goes there, and nothing is scaled by it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * SIZE
    values, gates = (), ()
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in tl.static_range(CHUNKS):
        column = k * BLOCK + tl.arange(0, BLOCK)
        mask = (row < M)[:, None] & (column < SIZE)[None, :]
        value = _load(x, row, sx, first + column, mask, UNIT).to(tl.float32)
        if z is not None:
            gate = _silu(_load(z, row, sz, first + column, mask, UNIT).to(tl.float32))
            if not GATE_LAST:
                value *= gate
            gates = gates + (gate,)
        squares += value * value
        values = values + (value,)
    total = tl.sum(squares, 1)
    if sums is not None:
        tl.store(sums + row, total, mask=row < M)
    scale = tl.rsqrt(total / SIZE + eps)[:, None]
    for k in tl.static_range(CHUNKS):
        column = k * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(weight + first + column, mask=column < SIZE, other=0.0).to(tl.float32)
        value = values[k]
        if sums is None:
            value *= scale
        value *= w[None, :]
        if GATE_LAST and z is not None:
            value *= gates[k]
        _store(y, row, sy, first + column, value, (row < M)[:, None] & (column < SIZE)[None, :], UNIT)


@triton.jit
def _load_row(x, z, dy, more, row, first, end, sx, sz, sdy, smore,
              SIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """What the backward reads of some rows, in chunks: x, dy, z and more of dx."""
    values, gradients, gates, others = (), (), (), ()
    for k in tl.static_range(CHUNKS):
        column = k * BLOCK + tl.arange(0, BLOCK)
        mask = (row < end)[:, None] & (column < SIZE)[None, :]
        values = values + (_load(x, row, sx, first + column, mask, UNIT),)
        gradients = gradients + (_load(dy, row, sdy, first + column, mask, UNIT),)
        if z is not None:
            gates = gates + (_load(z, row, sz, first + column, mask, UNIT),)
        if more is not None:
            others = others + (_load(more, row, smore, first + column, mask, UNIT),)
    return values, gradients, gates, others


@triton.jit
def norm_backward_kernel(x, z, weight, dy, more, dx, dz, y, partial, all_squares, all_products, M, RUN, eps,
                         sx, sz, sdy, smore, sdx, sdz, sy,
                         SIZE: tl.constexpr, WHOLE: tl.constexpr, GATE_LAST: tl.constexpr, UNIT: tl.constexpr,
                         ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """Computes dx and dz of one group in ``RUN`` rows, and their share of dweight; if it has a place, y too.

    With ``u`` the normed input, ``n = u r`` and ``e`` the gradient of ``n``: ``du = r (e - n mean(e n))``. ``more``, if
    any, is added to dx. The rows after the current ones are under way while it is computed. Where the group is a part
    of one of ``WHOLE`` channels, the sums over all of these of squares of ``u`` and of ``e u`` are given, ``(M,)``.
    """
    first = tl.program_id(1) * SIZE
    r0 = tl.program_id(0) * RUN
    end = tl.minimum(r0 + RUN, M)
    sums, weights = (), ()
    for k in tl.static_range(CHUNKS):
        column = k * BLOCK + tl.arange(0, BLOCK)
        sums = sums + (tl.zeros([ROWS, BLOCK], tl.float32),)
        weights = weights + (tl.load(weight + first + column, mask=column < SIZE, other=0.0),)
    row = r0 + tl.arange(0, ROWS)
    values, gradients, gates, others = _load_row(
        x, z, dy, more, row, first, end, sx, sz, sdy, smore, SIZE, UNIT, BLOCK, CHUNKS
    )
    for step in range(0, RUN, ROWS):
        row = r0 + step + tl.arange(0, ROWS)
        xs, dys, zs, rest = values, gradients, gates, others
        values, gradients, gates, others = _load_row(
            x, z, dy, more, row + ROWS, first, end, sx, sz, sdy, smore, SIZE, UNIT, BLOCK, CHUNKS
        )
        # Sums over threads cost more than sums in them: one of each, after the chunks.
        squares, projection = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
        sigmoids = ()
        for k in tl.static_range(CHUNKS):
            u, e = xs[k].to(tl.float32), dys[k].to(tl.float32)
            e *= weights[k].to(tl.float32)[None, :]
            if z is not None:
                raw = zs[k].to(tl.float32)
                sigmoid = tl.sigmoid(raw)
                sigmoids = sigmoids + (sigmoid,)
                if GATE_LAST:
                    e *= raw * sigmoid
                else:
                    u *= raw * sigmoid
            squares += u * u
            projection += u * e
        if all_squares is None:
            total, product = tl.sum(squares, 1), tl.sum(projection, 1)
        else:
            total = tl.load(all_squares + row, mask=row < end, other=0.0)
            product = tl.load(all_products + row, mask=row < end, other=0.0)
        scale = tl.rsqrt(total / WHOLE + eps)
        mean = (product / WHOLE * scale * scale * scale)[:, None]  # so that du = r e - u * mean
        scale = scale[:, None]
        added = ()
        for k in tl.static_range(CHUNKS):
            column = k * BLOCK + tl.arange(0, BLOCK)
            mask = (row < end)[:, None] & (column < SIZE)[None, :]
            value, gradient = xs[k].to(tl.float32), dys[k].to(tl.float32)
            w = weights[k].to(tl.float32)[None, :]
            if z is not None:
                raw = zs[k].to(tl.float32)
                gate = raw * sigmoids[k]
                slope = sigmoids[k] * (1.0 + raw - gate)
                if GATE_LAST:
                    normed = value * scale
                    result = normed * w * gate
                    dgate = gradient * w * normed
                    gradient *= gate
                    dvalue = gradient * w * scale - value * mean
                else:
                    u = value * gate
                    normed = u * scale
                    result = normed * w
                    du = gradient * w * scale - u * mean
                    dgate = du * value
                    dvalue = du * gate
                _store(dz, row, sdz, first + column, dgate * slope, mask, UNIT)
            else:
                normed = value * scale
                result = normed * w
                dvalue = gradient * w * scale - value * mean
            if y is not None:
                _store(y, row, sy, first + column, result, mask, UNIT)
            if more is not None:
                dvalue += rest[k].to(tl.float32)
            _store(dx, row, sdx, first + column, dvalue, mask, UNIT)
            share = gradient * normed
            added = added + (sums[k] + share,)
        sums = added
    width = tl.num_programs(1) * SIZE
    for k in tl.static_range(CHUNKS):
        column = k * BLOCK + tl.arange(0, BLOCK)
        to = partial + tl.program_id(0).to(tl.int64) * width + first + column
        tl.store(to, tl.sum(sums[k], 0), mask=column < SIZE)


@triton.jit
def norm_products_kernel(x, z, weight, dy, products, M, sx, sz, sdy,
                         SIZE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                         CHUNKS: tl.constexpr):  # fmt: skip
    """Of ``ROWS`` rows that are a part of a group, with a gate in either order, the ``products`` that
    ``norm_backward_kernel`` takes.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    found = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in tl.static_range(CHUNKS):
        column = k * BLOCK + tl.arange(0, BLOCK)
        mask = (row < M)[:, None] & (column < SIZE)[None, :]
        value = _load(x, row, sx, column, mask, UNIT).to(tl.float32)
        value *= _silu(_load(z, row, sz, column, mask, UNIT).to(tl.float32))
        value *= tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)[None, :]
        found += value * _load(dy, row, sdy, column, mask, UNIT).to(tl.float32)
    tl.store(products + row, tl.sum(found, 1), mask=row < M)


@triton.jit
def gate_kernel(x, z, dy, y, dx, dz, rows, width, sz, sdz, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Some rows of ``x * silu(z)`` to ``y``, if given; with ``dy`` those of the gradients to ``dx`` and ``dz``.

    Rows of ``z`` and ``dz`` lie ``sz`` and ``sdz`` apart, all others ``width``.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < rows) & (column < width)
    at = row * width + column
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    raw = tl.load(z + row * sz + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(raw)
    gate = raw * sigmoid
    if y is not None:
        tl.store(y + at, (value * gate).to(y.dtype.element_ty), mask=mask)
    if dy is not None:
        gradient = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, (gradient * gate).to(dx.dtype.element_ty), mask=mask)
        slope = sigmoid * (1.0 + raw - gate)
        tl.store(dz + row * sdz + column, (gradient * value * slope).to(dz.dtype.element_ty), mask=mask)


def gate_forward(x: Tensor, z: Tensor) -> Tensor:
    """``x * silu(z)``, ``(..., d)``, of a dense ``x``."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _gate(x, z, None, y, None, None)
    return y


def gate_backward(dy: Tensor, x: Tensor, z: Tensor, dz: Tensor, y: Tensor | None) -> Tensor:
    """The gradient of ``x``; that of ``z`` goes to ``dz``, and what the forward returned to ``y``, if given."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _gate(x, z, dy.contiguous(), y, dx, dz)
    return dx


def _gate(x: Tensor, z: Tensor, dy: Tensor | None, y: Tensor | None, dx: Tensor | None, dz: Tensor | None) -> None:
    flat_z, flat_dz, width = _as_rows(z), None if dz is None else dz.view(-1, dz.shape[-1]), x.shape[-1]
    rows, block = flat_z.shape[0], min(tables.GATE_BLOCK, power_of_two(width))
    launch(
        gate_kernel,
        (cdiv(rows, tables.GATE_ROWS), cdiv(width, block)),
        *(x, flat_z, dy, y, dx, flat_dz, rows, width, flat_z.stride(0), 0 if flat_dz is None else flat_dz.stride(0)),
        ROWS=tables.GATE_ROWS,
        BLOCK=block,
        num_warps=8,
    )


def norm_forward(call: Norm, sums: Tensor | None = None) -> Tensor:
    """Launches the norm of :func:`gated_rms_norm`, without autograd.

    With ``sums (rows,)``, fp32, for each row's sum of squares what is normed is not divided by its root, which is for
    whoever knows the other parts of the one group.
    """
    x, z, weight, eps, group_size, _, dtype = call
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, gate = _as_rows(x), _as_rows(z)
    unit, strides = vector_strides(rows, gate, _as_rows(y))
    tile = tables.norm_tile(group_size, *tables.NORM_FORWARD)
    launch(
        norm_forward_kernel,
        (cdiv(rows.shape[0], tile.rows), width // group_size),
        *(rows, gate, weight.contiguous(), y, sums, rows.shape[0], eps, *strides),
        **_constants(call, unit, tile),
    )
    return y


class NormGradients(NamedTuple):
    """Gradients of a norm's inputs."""

    x: Tensor
    z: Tensor | None
    weight: Tensor


class WholeGroup(NamedTuple):
    """Of the one group of which a norm has a part."""

    size: int
    """Channels."""
    squares: Tensor
    """``(rows,)``, fp32: sums of squares, as :func:`norm_forward` gives those of a part."""
    products: Tensor
    """``(rows,)``, fp32: as :func:`norm_products` gives those of a part."""


def norm_products(dy: Tensor, call: Norm) -> Tensor:
    """``(rows,)``, fp32: sums of the products of what a gated norm divides with that one's gradient, given ``dy`` of
    its result.
    """
    x, z, weight, _, size, *_ = call
    read = [_as_rows(t) for t in (x, z, dy)]
    unit, strides = vector_strides(*read)
    tile, count = tables.norm_tile(size, *tables.NORM_FORWARD), read[0].shape[0]
    products = torch.empty(count, dtype=torch.float32, device=x.device)
    constants = _constants(call, unit, tile)
    del constants["GATE_LAST"]
    launch(
        norm_products_kernel,
        (cdiv(count, tile.rows),),
        *(*read[:2], weight.contiguous(), read[2], products, count, *strides),
        **constants,
    )
    return products


def norm_backward(
    dy: Tensor,
    call: Norm,
    *,
    more: Tensor | None = None,
    dz: Tensor | None = None,
    y: Tensor | None = None,
    whole: WholeGroup | None = None,
) -> NormGradients:
    """Launches the backward of the norm.

    Args:
        dy: the gradient.
        call: the forward's arguments.
        more: what else the gradient of ``x`` is to contain, shaped as ``x``.
        dz: the (strided) tensor that receives the gate's gradient; a new one if None.
        y: where the forward's result goes once more, contiguous; nowhere if None.
        whole: where the channels are a part of one group.
    """
    x, z, weight, eps, group_size, *_ = call
    width = x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if z is not None and dz is None:
        dz = torch.empty(z.shape, dtype=z.dtype, device=x.device)
    read = [_as_rows(t) for t in (x, z, dy, more)]
    written = [None if t is None else t.view(-1, width) for t in (dx, dz, y)]
    unit, strides = vector_strides(*read, *written)
    tile = tables.norm_tile(group_size, *tables.NORM_BACKWARD)
    rows, groups = read[0].shape[0], width // group_size
    run = cdiv(cdiv(rows * groups * tile.warps, tables.NORM_BACKWARD_WARPS), tile.rows) * tile.rows
    programs = cdiv(rows, run)
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    launch(
        norm_backward_kernel,
        (programs, groups),
        *(*read[:2], weight.contiguous(), *read[2:], *written, partial),
        *((None, None) if whole is None else whole[1:]),
        *(rows, run, eps, *strides),
        WHOLE=group_size if whole is None else whole.size,
        **_constants(call, unit, tile),
    )
    return NormGradients(dx, dz, sum_rows(partial, weight.dtype))


@op("rms_norm", fake=lambda call: call.x.new_empty(call.x.shape, dtype=call.dtype))
def gated_rms_norm(call: Norm) -> Tensor:
    """See :func:`mamba2_hf.ops.gated_rms_norm`."""
    return norm_forward(call)


@gated_rms_norm.backward
def _backward(call: Norm, dy: Tensor) -> NormGradients:
    return norm_backward(dy, call)


def _constants(call: Norm, unit: int, tile: tables.NormTile) -> dict[str, Any]:
    rows, block, chunks, warps = tile
    sizes = {"SIZE": call.group_size, "UNIT": unit, "ROWS": rows, "BLOCK": block, "CHUNKS": chunks, "num_warps": warps}
    return sizes | {"GATE_LAST": call.norm_before_gate}


def _as_rows(x: Tensor | None) -> Any:
    """``x`` as ``(rows, width)``, None where there is none."""
    return None if x is None else channels_last(x.reshape(-1, x.shape[-1]))
