"""Backward kernels of the SSD scan; ``state_kernel`` has left the states S and their gradients dS at every chunk.

The gradient of the log decay ``a_i`` is a row sum minus a column sum of the same matrix,

    da_i = <dy_i, y_i - D x_i> - <x_i, dx_i - D dy_i> + [i last] (sum_j w_j + exp(a_last) <dS, S>),
    w_j  = <x_j, exp(a_last - a_j) dt_j dS^T B_j>,

two large numbers that nearly cancel. They do cancel because both are taken through the same rounded weights
``(C_i . B_j) exp(a_i - a_j) dt_j``; with a stored y in place of the recomputed one the digits would be lost.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import chunk_bounds, load_chunk_state, load_documents, load_steps, load_tokens, store_tokens, widen


@triton.jit
def gate_backward_kernel(
    dout, z, dy, tokens, width, d_row, d_token, d_head, z_row, z_token, z_head,
    P: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``dy = dout * silu(z)``, ``(B, T, H, P)``."""
    row = tl.cast(tl.program_id(2), tl.int64)
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (t < tokens) & (c < width)
    h = c // P
    p = c % P
    grad = tl.load(dout + row * d_row + t * d_token + h * d_head + p, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(z + row * z_row + t * z_token + h * z_head + p, mask=mask, other=0.0).to(tl.float32)
    tl.store(dy + (row * tokens + t) * width + c, grad * gate / (1.0 + tl.exp(-gate)), mask=mask)


@triton.jit
def inputs_backward_kernel(
    x, B, C, z, dout, dy, steps, D, document, states, dstates, dx, dz, dots, ends, table,
    tokens, per_row, H,
    x_row, x_token, x_head, b_row, b_token, b_head, c_row, c_token, c_head, z_row, z_token, z_head,
    o_row, o_token, o_head, d_row, d_token, d_head,
    PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    D_RANK: tl.constexpr, HAS_Z: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    PACKED: tl.constexpr, TMA: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x and z, and what those of steps and log decays need, for one chunk and ``HEADS`` heads of a group.

    ``dots (chunks, H, 2, Q)``: row and column sums. ``ends (chunks, H)``: what stands at the chunk's last token.
    """
    P_TILES: tl.constexpr = (P + BP - 1) // BP
    blocks = H // HEADS
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks
    row, start, end = chunk_bounds(chunk, table, tokens, per_row, Q, PACKED)
    if PACKED:
        if start < 0:
            return
    h0 = block * HEADS
    g = h0 // PER_GROUP
    q = tl.arange(0, Q)
    b_tile = load_tokens(B, b_row, b_token, b_head, row, start, end, g, 0, Q, BN, N, TMA)  # (Q, N)
    c_tile = load_tokens(C, c_row, c_token, c_head, row, start, end, g, 0, Q, BN, N, TMA)  # (Q, N)
    scores = tl.dot(b_tile, tl.trans(c_tile), input_precision=PRECISION)  # (Q, Q): rows j, columns i
    causal = q[:, None] <= q[None, :]
    if HAS_DOCUMENTS:
        doc, doc_before, doc_last = load_documents(document, chunk, start, Q)
        causal = causal & (doc[:, None] == doc[None, :])
    scores = tl.where(causal, scores, 0.0)

    for k in tl.range(0, HEADS, num_stages=STAGES):
        h = h0 + k
        index = tl.cast(chunk, tl.int64) * H + h
        step, log, whole = load_steps(steps, index, Q)
        enters = tl.exp2(log)
        leaves = tl.exp2(whole - log)
        passes = tl.exp2(whole)
        if HAS_DOCUMENTS:
            enters = tl.where(doc == doc_before, enters, 0.0)
            leaves = tl.where(doc == doc_last, leaves, 0.0)
            passes = tl.where(doc_last == doc_before, passes, 0.0)
        weights = scores * (tl.exp2(tl.minimum(log[None, :] - log[:, None], 0.0)) * step[:, None])
        weights = weights.to(b_tile.dtype)
        column = tl.zeros([Q], tl.float32)
        row_sum = tl.zeros([Q], tl.float32)
        at_last = 0.0
        if D_RANK == 1:
            skip = tl.load(D + h).to(tl.float32)
        for tile in tl.static_range(P_TILES):
            p0 = tile * BP
            # Their product comes first, so that registers hold the two tiles no longer than that.
            dstate = load_chunk_state(dstates, chunk * H + h, 0, p0, P, N, BP, BN, TMA)  # (N, P)
            state = load_chunk_state(states, chunk * H + h, 0, p0, P, N, BP, BN, TMA)  # (N, P)
            at_last += passes * tl.sum(tl.sum(widen(state, ASM) * widen(dstate, ASM), 1), 0)
            if D_RANK == 2:
                p = p0 + tl.arange(0, BP)
                skip = tl.load(D + h * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]

            grad = tl.dot(b_tile, dstate, input_precision=PRECISION) * (leaves * step)[:, None]
            x_tile = load_tokens(x, x_row, x_token, x_head, row, start, end, h, p0, Q, BP, P, TMA)  # (Q, P)
            at_last += tl.sum(grad * widen(x_tile, ASM))
            dy_tile = load_tokens(dy, d_row, d_token, d_head, row, start, end, h, p0, Q, BP, P, TMA)  # (Q, P)
            grad = tl.dot(weights, dy_tile, grad, input_precision=PRECISION)
            column += tl.sum(grad * widen(x_tile, ASM), 1)
            if D_RANK > 0:
                grad += widen(dy_tile, ASM) * skip
            store_tokens(dx, grad.to(x_tile.dtype), tokens * H * P, H * P, P, row, start, end, h, p0, Q, BP, P, TMA)

            out = tl.dot(c_tile, state, input_precision=PRECISION) * enters[:, None]
            out = tl.dot(tl.trans(weights), x_tile, out, input_precision=PRECISION)
            row_sum += tl.sum(out * widen(dy_tile, ASM), 1)
            if HAS_Z:
                if D_RANK > 0:
                    out += widen(x_tile, ASM) * skip
                gate = load_tokens(z, z_row, z_token, z_head, row, start, end, h, p0, Q, BP, P, TMA).to(tl.float32)
                dout_tile = load_tokens(dout, o_row, o_token, o_head, row, start, end, h, p0, Q, BP, P, TMA)
                sigmoid = 1.0 / (1.0 + tl.exp(-gate))
                dgate = dout_tile.to(tl.float32) * out * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                store_tokens(
                    dz, dgate.to(x_tile.dtype), tokens * H * P, H * P, P, row, start, end, h, p0, Q, BP, P, TMA
                )

        tl.store(dots + index * (2 * Q) + q, row_sum)
        tl.store(dots + index * (2 * Q) + Q + q, column)
        tl.store(ends + index, at_last)


@triton.jit
def maps_backward_kernel(
    x, B, C, dy, steps, document, states, dstates, partial, dD, table,
    tokens, per_row, H, rows,
    x_row, x_token, x_head, b_row, b_token, b_head, c_row, c_token, c_head, d_row, d_token, d_head,
    PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    D_RANK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    PACKED: tl.constexpr, TMA: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C from one chunk, one tile of N and ``HEADS`` heads of a group.

    ``partial (PER_GROUP / HEADS, 2, B, T, G, N)``, fp32: dB and dC of each block of heads; the caller sums the blocks.
    On the way, each chunk's share of dD, ``(chunks, H)`` or ``(chunks, H, P)``.
    """
    P_TILES: tl.constexpr = (P + BP - 1) // BP
    N_TILES: tl.constexpr = (N + BN - 1) // BN
    blocks = H // HEADS
    n0 = tl.program_id(0) % N_TILES * BN
    block = tl.program_id(0) // N_TILES % blocks
    chunk = tl.program_id(0) // (N_TILES * blocks)
    row, start, end = chunk_bounds(chunk, table, tokens, per_row, Q, PACKED)
    if PACKED:
        if start < 0:
            return
    h0 = block * HEADS
    g = h0 // PER_GROUP
    q = tl.arange(0, Q)
    dB = tl.zeros([Q, BN], tl.float32)
    dC = tl.zeros([Q, BN], tl.float32)
    dscores = tl.zeros([Q, Q], tl.float32)  # rows j, columns i
    causal = q[:, None] <= q[None, :]
    if HAS_DOCUMENTS:
        doc, doc_before, doc_last = load_documents(document, chunk, start, Q)
        causal = causal & (doc[:, None] == doc[None, :])

    for k in tl.range(0, HEADS, num_stages=STAGES):
        h = h0 + k
        index = tl.cast(chunk, tl.int64) * H + h
        step, log, whole = load_steps(steps, index, Q)
        enters = tl.exp2(log)
        leaves = tl.exp2(whole - log)
        if HAS_DOCUMENTS:
            enters = tl.where(doc == doc_before, enters, 0.0)
            leaves = tl.where(doc == doc_last, leaves, 0.0)
        dskip = 0.0
        for tile in tl.static_range(P_TILES):
            p0 = tile * BP
            x_tile = load_tokens(x, x_row, x_token, x_head, row, start, end, h, p0, Q, BP, P, TMA)  # (Q, P)
            dy_tile = load_tokens(dy, d_row, d_token, d_head, row, start, end, h, p0, Q, BP, P, TMA)
            state = load_chunk_state(states, chunk * H + h, n0, p0, P, N, BP, BN, TMA)  # (N, P)
            dstate = load_chunk_state(dstates, chunk * H + h, n0, p0, P, N, BP, BN, TMA)
            products = tl.dot(x_tile, tl.trans(dy_tile), input_precision=PRECISION)
            decay = tl.exp2(tl.minimum(log[None, :] - log[:, None], 0.0))
            dscores += products * (decay * step[:, None])
            scaled = (widen(dy_tile, ASM) * enters[:, None]).to(x_tile.dtype)
            dC = tl.dot(scaled, tl.trans(state), dC, input_precision=PRECISION)
            scaled = (widen(x_tile, ASM) * (leaves * step)[:, None]).to(x_tile.dtype)
            dB = tl.dot(scaled, tl.trans(dstate), dB, input_precision=PRECISION)
            if D_RANK > 0 and n0 == 0:
                both = widen(x_tile, ASM) * widen(dy_tile, ASM)
                if D_RANK == 1:
                    dskip += tl.sum(tl.sum(both, 1), 0)
                else:
                    p = p0 + tl.arange(0, BP)
                    tl.store(dD + index * P + p, tl.sum(both, 0), mask=p < P)
        if D_RANK == 1 and n0 == 0:
            tl.store(dD + index, dskip)

    b_tile = load_tokens(B, b_row, b_token, b_head, row, start, end, g, n0, Q, BN, N, TMA)  # (Q, N)
    c_tile = load_tokens(C, c_row, c_token, c_head, row, start, end, g, n0, Q, BN, N, TMA)
    dscores = tl.where(causal, dscores, 0.0).to(b_tile.dtype)
    dB = tl.dot(dscores, c_tile, dB, input_precision=PRECISION)
    dC = tl.dot(tl.trans(dscores), b_tile, dC, input_precision=PRECISION)
    G = H // PER_GROUP
    side = tl.cast(rows, tl.int64) * tokens * G * N
    target = partial + (block % (PER_GROUP // HEADS)) * 2 * side
    store_tokens(target, dB, tokens * G * N, G * N, N, row, start, end, g, n0, Q, BN, N, False)
    store_tokens(target + side, dC, tokens * G * N, G * N, N, row, start, end, g, n0, Q, BN, N, False)


@triton.jit
def sum_kernel(partial, dB, dC, size, width, stride_token, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums the blocks of ``partial (BLOCKS, 2, size)`` in order, rounding once; tokens hold ``width`` elements."""
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    side = tl.program_id(1)
    mask = i < size
    total = tl.zeros([BLOCK], tl.float32)
    for block in tl.static_range(BLOCKS):
        total += tl.load(partial + (2 * block + side) * tl.cast(size, tl.int64) + i, mask=mask, other=0.0)
    to = i // width * stride_token + i % width
    if side == 0:
        tl.store(dB + to, total, mask=mask)
    else:
        tl.store(dC + to, total, mask=mask)
