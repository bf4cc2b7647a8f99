"""Decoding a whole layer for several sequences: norm, in_proj, convolution, state, out_proj with norm and residual.

The projections read each weight once and multiply it at the tensor cores, outputs as the rows of a product: there are
more of them than sequences. The gated norm's scale is one number per sequence and group, multiplied to the sums of
``out_proj``. Where its outputs are too few to fill a chip, its inputs are split: when the last program of a tile is
through, each adds up what all of them found for some of the rows, always in the same order.

The five launches overlap (``overlap.py``). What they do before they wait: a projection asks for its first weights, the
convolution and the update read states. Only the norm and the convolution let the next kernel start before their own
wait, so that a state is never read while the kernel that wrote it may be running.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.overlap import follow, lead, overlap, prefetch
from ..runtime.peers import constants, send, sum_number, total
from ..runtime.rows import channels_last, dense
from ..runtime.tables import cdiv, power_of_two
from ..scan.problem import fits_tma
from ..spec import MixerSpec, Peers
from .advance import advance_rows, one_later
from .op import LayerStep
from .step import part_multiplier


@triton.jit
def norm_rows_kernel(x, weight, y, counters, tiles, eps, stride,
                     D: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The norm of one row of ``x (rows, D)``. ``counters (tiles,)`` are set to zero for the kernels that follow."""
    row = tl.program_id(0)
    lead(OVERLAP)
    values, weights = (), ()
    squares = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range((D + BLOCK - 1) // BLOCK):
        k = i * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + row.to(tl.int64) * stride + k, mask=k < D, other=0.0).to(tl.float32)
        values = values + (value,)
        weights = weights + (tl.load(weight + k, mask=k < D, other=0.0),)
        squares += value * value
    scale = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    for i in tl.static_range((D + BLOCK - 1) // BLOCK):
        k = i * BLOCK + tl.arange(0, BLOCK)
        value = values[i] * scale * weights[i].to(tl.float32)
        tl.store(y + row.to(tl.int64) * D + k, value.to(y.dtype.element_ty), mask=k < D)
    if row == 0:
        tile = tl.arange(0, TILES)
        tl.store(counters + tile, tl.zeros([TILES], tl.int32), mask=tile < tiles)


@triton.jit
def _load_tile(source, row, column, rows, end,
               ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Tile ``(ROWS, COLUMNS)`` of a dense ``(rows, WIDTH)``, zero from ``end`` on, with ``TMA`` from ``WIDTH`` on."""
    if TMA:
        tile = source.load([row, column])
    else:
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        mask = (r < rows)[:, None] & (c < end)[None, :]
        tile = tl.load(source + r.to(tl.int64)[:, None] * WIDTH + c[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _sums_of_squares(squares, row, group, rows,
                     GROUPS: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Of one group of each row, ``(BM,)``, given their parts."""
    m = row + tl.arange(0, BM)
    total = tl.zeros([BM, BLOCK], tl.float32)
    for i in tl.static_range((PARTS + BLOCK - 1) // BLOCK):
        part = i * BLOCK + tl.arange(0, BLOCK)
        at = squares + (m * GROUPS + group)[:, None] * PARTS + part[None, :]
        total += tl.load(at, mask=(m < rows)[:, None] & (part < PARTS)[None, :], other=0.0)
    return tl.sum(total, 1)


@triton.jit
def _norm_scales(squares, row, group, rows, eps,
                 GROUPS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """The norm's scale of one group of each row, ``(BM,)``, given the parts of its sum of squares."""
    return tl.rsqrt(_sums_of_squares(squares, row, group, rows, GROUPS, PARTS, BM, BLOCK) / SIZE + eps)


@triton.jit
def _products(x, weight, squares, row, output, first, last, rows, outputs, eps,
              WIDTH: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """``weight @ x.T``, ``(BN, BM)``, over some of the blocks into which the inputs fall, ``BK`` at most of one group.

    With several groups the rows of ``x`` are taken times their norm's scales.
    """
    groups: tl.constexpr = WIDTH // SIZE
    blocks: tl.constexpr = (SIZE + BK - 1) // BK
    sums = tl.zeros([BN, BM], tl.float32)
    for i in range(first, last):
        group = i // blocks
        k = group * SIZE + i % blocks * BK
        tile = _load_tile(weight, output, k, outputs, (group + 1) * SIZE, BN, BK, WIDTH, TMA)
        inputs = _load_tile(x, row, k, rows, (group + 1) * SIZE, BM, BK, WIDTH, TMA)
        if groups > 1:
            scales = _norm_scales(squares, row, group, rows, eps, groups, SIZE, PARTS, BM, PARTS_BLOCK)
            sums += tl.dot(tile, inputs.T, input_precision=PRECISION) * scales[None, :]
        else:
            sums = tl.dot(tile, inputs.T, sums, input_precision=PRECISION)
    return sums


@triton.jit
def enter_rows_kernel(x, weight, weight_tiles, bias, u, rows, outputs, inner, maps, of_z, of_x, of_b, of_c, of_dt,
                      SCALED: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                      BK: tl.constexpr, AHEAD: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
                      OVERLAP: tl.constexpr):  # fmt: skip
    """``BN`` outputs of the projection of ``BM`` rows of ``x (rows, WIDTH)``; with ``SCALED`` times the multipliers of
    its parts, ``inner`` of z and of x and ``maps`` of B and of C first.
    """
    tiles_m = tl.cdiv(rows, BM)
    row, output = tl.program_id(0) % tiles_m * BM, tl.program_id(0) // tiles_m * BN
    m, n = (row + tl.arange(0, BM))[:, None], (output + tl.arange(0, BN))[None, :]
    if TMA:
        prefetch(weight, output, 0, outputs, WIDTH, BN, AHEAD, OVERLAP)
    follow(OVERLAP)
    offset = 0.0 if bias is None else tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    last: tl.constexpr = (WIDTH + BK - 1) // BK
    sums = _products(x, weight_tiles, None, row, output, 0, last, rows, outputs, 0.0,
                     WIDTH, WIDTH, 1, 1, BM, BN, BK, TMA, PRECISION)  # fmt: skip
    value = tl.trans(sums)
    if SCALED:
        value *= part_multiplier(n, inner, maps, of_z, of_x, of_b, of_c, of_dt)
    value = (value + offset).to(u.dtype.element_ty)
    tl.store(u + m.to(tl.int64) * outputs + n, value, mask=(m < rows) & (n < outputs))


@triton.jit
def leave_rows_kernel(raw, squares, weight, weight_tiles, bias, x, y, partial, counters, peers, ring_clock,
                      rows, outputs, eps, factor, joint_size, sx,
                      WIDTH: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PIECES: tl.constexpr,
                      JOINT: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr, TMA: tl.constexpr,
                      PRECISION: tl.constexpr, PLACE: tl.constexpr, PLACES: tl.constexpr, WORDS: tl.constexpr,
                      CLOCK: tl.constexpr,
                      OVERLAP: tl.constexpr):  # fmt: skip
    """``BN`` outputs of ``x`` plus ``factor`` times the projection of ``raw (rows, WIDTH)`` times its norm's scales,
    for ``BM`` rows.

    ``squares (rows, groups, PARTS)`` are the parts of the sums of squares that the scales come from, None without a
    norm, and then ``SIZE`` is ``WIDTH``. ``SPLIT`` programs
    share the inputs of a tile; ``partial (tiles, SPLIT, BN, BM)`` is theirs, and so are ``counters (tiles,)``, zero
    before the first. The last of them adds up; with several ``PIECES`` so many of them do, once the last has come, for
    some of the rows each. Without ``x`` nothing is added.

    With ``peers`` the projections are added up over devices. With ``JOINT`` the norm's one group of ``joint_size`` goes
    on in them, and so the scale comes after the sum; without ``peers`` it is left out, and the sum of squares is stored
    behind the outputs of a row.

    ``ring_clock (rows,)`` of a ring of ``R`` tokens moves on.
    """
    pid = tl.program_id(0)
    tile = pid // SPLIT
    tiles_m = tl.cdiv(rows, BM)
    row, output = tile % tiles_m * BM, tile // tiles_m * BN
    groups: tl.constexpr = WIDTH // SIZE
    blocks: tl.constexpr = groups * ((SIZE + BK - 1) // BK)
    each: tl.constexpr = (blocks + SPLIT - 1) // SPLIT
    first = pid % SPLIT * each
    if TMA:
        prefetch(weight, output, first * BK, outputs, WIDTH, BN, AHEAD, OVERLAP)
    follow(OVERLAP)
    if ring_clock is not None:  # it is there when the products are
        of_rows = row + tl.arange(0, BM)
        counts = tl.where((pid % SPLIT == 0) & (output == 0), of_rows < rows, False)
        t = tl.load(ring_clock + of_rows, mask=counts, other=0)
    sums = _products(raw, weight_tiles, squares, row, output, first, tl.minimum(first + each, blocks),
                     rows, outputs, eps, WIDTH, SIZE, PARTS, PARTS_BLOCK, BM, BN, BK, TMA, PRECISION)  # fmt: skip
    if ring_clock is not None:
        tl.store(ring_clock + of_rows, one_later(t, R), mask=counts)
    if SPLIT == 1:
        _leave_rows(sums, tile, tl.num_programs(0), row, output, squares, bias, x, y, peers, rows, outputs, eps,
                    factor, joint_size, sx, groups, SIZE, PARTS, PARTS_BLOCK, BM, BN, JOINT,
                    PLACE, PLACES, WORDS, CLOCK)  # fmt: skip
    else:
        piece_rows: tl.constexpr = BM // PIECES
        share = pid % SPLIT
        part = partial + tile.to(tl.int64) * (SPLIT * BN * BM) + tl.arange(0, BN)[:, None] * BM
        tl.store(part + share * (BN * BM) + tl.arange(0, BM)[None, :], sums)
        tl.debug_barrier()  # what all threads stored is there before the count says so
        seen = tl.atomic_add(counters + tile, 1, sem="acq_rel") + 1
        piece = 0
        if PIECES > 1:
            piece = share
            if piece < PIECES:
                while seen < SPLIT:
                    seen = tl.atomic_add(counters + tile, 0, sem="acquire")
        if (piece < PIECES) & (seen == SPLIT):
            column = piece * piece_rows
            every = tl.zeros([BN, piece_rows], tl.float32)
            for i in tl.static_range(SPLIT):
                at = part + i * (BN * BM) + column + tl.arange(0, piece_rows)[None, :]
                every += tl.load(at, cache_modifier=".cg")
            _leave_rows(every, tile * PIECES + piece, tl.num_programs(0) // SPLIT * PIECES, row + column, output,
                        squares, bias, x, y, peers, rows, outputs, eps, factor, joint_size, sx, groups, SIZE, PARTS,
                        PARTS_BLOCK, piece_rows, BN, JOINT, PLACE, PLACES, WORDS, CLOCK)  # fmt: skip


@triton.jit
def _leave_rows(sums, program, programs, row, output, squares, bias, x, y, peers, rows, outputs, eps, factor,
                joint_size, sx,
                GROUPS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, JOINT: tl.constexpr, PLACE: tl.constexpr,
                PLACES: tl.constexpr, WORDS: tl.constexpr, CLOCK: tl.constexpr):  # fmt: skip
    """What :func:`leave_rows_kernel` makes of finished products ``(BN, BM)``: one of ``programs`` that do so."""
    of_rows = row + tl.arange(0, BM)
    m, n = of_rows.to(tl.int64)[:, None], (output + tl.arange(0, BN))[None, :]
    mask = (m < rows) & (n < outputs)
    at, behind = m * (outputs + JOINT) + n, of_rows * (outputs + JOINT) + outputs
    added = tl.zeros([BM, BN], tl.float32)
    if x is not None:
        added += tl.load(x + m * sx + n, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        added += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32) * factor
    scales = tl.full([BM], 1.0, tl.float32)
    if JOINT:
        own = _sums_of_squares(squares, row, 0, rows, 1, PARTS, BM, PARTS_BLOCK)
        first = of_rows < tl.where(output == 0, rows, 0)
    elif GROUPS == 1 and squares is not None:
        scales = _norm_scales(squares, row, 0, rows, eps, 1, SIZE, PARTS, BM, PARTS_BLOCK)
    scales *= factor
    if peers is None:
        if JOINT:
            tl.store(y + behind, own.to(y.dtype.element_ty), mask=first)
        tl.store(y + at, (tl.trans(sums) * scales[:, None] + added).to(y.dtype.element_ty), mask=mask)
    else:
        number = sum_number(peers, program, programs)
        value = tl.trans(sums) * scales[:, None]
        send(peers, number, at, value, mask, PLACE, PLACES, WORDS)
        if JOINT:
            send(peers, number, behind, own, first, PLACE, PLACES, WORDS)
        value = total(peers, number, at, value, mask, PLACE, PLACES, WORDS, CLOCK)
        if JOINT:
            every = total(peers, number, behind, own, of_rows < rows, PLACE, PLACES, WORDS, CLOCK)
            value *= tl.rsqrt(every / joint_size + eps)[:, None]
        tl.store(y + m * outputs + n, (value + added).to(y.dtype.element_ty), mask=mask)


def rows_step(call: LayerStep) -> Tensor:
    """Launches the layer for ``stream (B, 1, d)``; states are updated in place."""
    stream, conv_state, ssm_state, weights, spec, _, residual, peers, ring, part = call
    (in_weight, in_bias, *_), (out_weight, out_bias, *_) = weights.in_proj, weights.out_proj
    group_size = call.width if weights.mixer.gated_norm_weight is None else min(spec.group_size, call.width)
    rows, _, size = stream.shape
    inner, device = call.width, stream.device
    stream = channels_last(stream)
    leave = tables.leave(tables.current_chip(), out_weight.dtype, rows, inner, size)
    counters = torch.empty(cdiv(size, leave.BN) * cdiv(rows, leave.BM), dtype=torch.int32, device=device)
    normed = _norm(stream, weights.norm_weight, spec.norm_eps, counters, in_weight.dtype)
    u = _enter(normed, in_weight, in_bias, inner, spec)
    of_mixer = (conv_state, ssm_state, ring, weights.mixer, spec, group_size)
    raw, squares = advance_rows(u, *of_mixer, out_weight.dtype, overlap())
    ends = (counters, leave, ring.clock)
    if part:
        y = torch.empty(rows, 1, size + call.is_joint, dtype=torch.float32, device=device)
        return _leave(raw, squares, out_weight, None, None, y, spec, call.is_joint, Peers(), *ends)
    to = stream if residual is None else channels_last(residual)
    y = torch.empty(rows, 1, size, dtype=to.dtype, device=device)
    return _leave(raw, squares, out_weight, out_bias, to, y, spec, call.is_joint, peers, *ends)


def _norm(stream: Tensor, weight: Tensor, eps: float, counters: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, 1, d)`` to its norm ``(B, d)``; sets ``counters`` to zero."""
    rows, _, size = stream.shape
    y = torch.empty(rows, size, dtype=dtype, device=stream.device)
    launch(
        norm_rows_kernel,
        (rows,),
        *(stream, weight.contiguous(), y, counters, counters.shape[0], eps, stream.stride(0)),
        D=size,
        BLOCK=min(tables.ROWS_NORM_BLOCK, power_of_two(size)),
        TILES=power_of_two(counters.shape[0]),
        num_warps=4,
        **overlap(),
    )
    return y


def _enter(x: Tensor, weight: Tensor, bias: Tensor | None, inner: int, spec: MixerSpec) -> Tensor:
    """``x (B, d)`` to its projection ``(B, outputs)``."""
    (rows, size), outputs = x.shape, weight.shape[0]
    chip = tables.current_chip()
    config = tables.enter(chip, weight.dtype, rows)
    u = torch.empty(rows, outputs, dtype=weight.dtype, device=x.device)
    weight = weight.contiguous()
    tma, (inputs, weights) = _tiled(chip, size, (x, config.BM, config.BK), (weight, config.BN, config.BK))
    launch(
        enter_rows_kernel,
        (cdiv(outputs, config.BN) * cdiv(rows, config.BM),),
        *(inputs, weight, weights, dense(bias), u, rows, outputs),
        *(inner, (outputs - 2 * inner - inner // spec.head_dim) // 2, *(spec.entering or (1.0,) * 5)),
        SCALED=bool(spec.entering),
        WIDTH=size,
        **_sizes(config, chip, weight),
        TMA=tma,
        **overlap(),
    )
    return u


def _leave(
    raw: Tensor,
    squares: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    spec: MixerSpec,
    joint: bool,
    peers: Peers,
    counters: Tensor,
    config: tables.Projection,
    clock: Tensor | None,
) -> Tensor:
    """``residual`` plus the projection of ``raw (B, H P)`` times its norm's scales, to ``y (B, 1, d)``; without the
    scales where the norm is ``joint`` and there are no ``peers``.
    """
    (rows, width), size = raw.shape, weight.shape[0]
    groups, parts = (1, 1) if squares is None else squares.shape[1:]
    chip = tables.current_chip()
    partial = None
    if config.split > 1:
        partial = torch.empty(
            counters.shape[0], config.split, config.BN, config.BM, dtype=torch.float32, device=raw.device
        )
    weight = weight.contiguous()
    tma, (inputs, weights) = _tiled(chip, width // groups, (raw, config.BM, config.BK), (weight, config.BN, config.BK))
    launch(
        leave_rows_kernel,
        (counters.shape[0] * config.split,),
        *(inputs, squares, weight, weights, dense(bias), residual, y, partial, counters, peers.table, clock),
        *(rows, size, spec.gated_norm_eps, spec.output_multiplier, spec.group_size),
        0 if residual is None else residual.stride(0),
        WIDTH=width,
        SIZE=width // groups,
        PARTS=parts,
        PARTS_BLOCK=min(tables.PARTS_BLOCK, power_of_two(parts)),
        SPLIT=config.split,
        # Several end sooner than the last one alone. They wait for it, which they can't where one runs after the other.
        PIECES=1 if chip.interpreted else 1 << (config.split.bit_length() - 1),
        JOINT=joint,
        R=tables.RING,
        **_sizes(config, chip, weight),
        **constants(peers),
        TMA=tma,
        **overlap(),
    )
    return y


def _sizes(config: tables.Projection, chip: tables.Chip, weight: Tensor) -> dict[str, Any]:
    return {
        "BM": config.BM,
        "BN": config.BN,
        "BK": config.BK,
        "AHEAD": config.ahead if config.ahead <= weight.shape[1] else 0,
        "PRECISION": tables.precision(chip, weight.dtype),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _tiled(chip: tables.Chip, group_size: int, *matrices: tuple[Tensor, int, int]) -> tuple[bool, list[Any]]:
    """Whether tiles are copied by descriptor, and the descriptors; else the matrices.

    Matrices come with the rows and columns of a tile. One that goes past its group must not be copied as it is.
    """
    whole = all(group_size == tensor.shape[1] or group_size % columns == 0 for tensor, _, columns in matrices)
    if not (chip.has_tma and whole and all(fits_tma(tensor) for tensor, _, _ in matrices)):
        return False, [tensor for tensor, _, _ in matrices]
    return True, [
        TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])
        for tensor, rows, columns in matrices
    ]
