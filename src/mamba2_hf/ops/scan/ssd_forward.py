"""Forward kernels of the SSD scan: one walk writes outputs, one passes states only, a link joins segments.

A program walks the chunks of one segment for one head (and one tile of its channels) with the state in registers, fp32.
A sequence is one segment unless that leaves the chip idle; then its segments' states are found first (``state_kernel``)
and linked (``link_kernel``). Names as in ``NOTATION.md``; ``a`` is the in-chunk log2 decay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    load_documents,
    load_steps,
    load_tokens,
    segment_bounds,
    state_tile,
    store_chunk_state,
    store_tokens,
    widen,
)


@triton.jit(do_not_specialize=["tokens", "per_row", "per_segment"])
def walk_kernel(
    x, B, C, z, y, steps, D, document, entry, final, table,
    tokens, per_row, per_segment, H,
    x_row, x_token, x_head, b_row, b_token, b_head, c_row, c_token, c_head, z_row, z_token, z_head,
    PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    D_RANK: tl.constexpr, HAS_Z: tl.constexpr, HAS_ENTRY: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    PACKED: tl.constexpr, TMA: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``y`` of one segment, head and channel tile; the state after the sequence goes to ``final (sequences, H, P, N)``.

    ``entry (segments, H, P, N)`` is the state before each segment (zero without).
    """
    TILES: tl.constexpr = (P + BP - 1) // BP
    segment = tl.program_id(0) // (H * TILES)
    h = tl.program_id(0) // TILES % H
    p0 = tl.program_id(0) % TILES * BP
    g = h // PER_GROUP
    row, start, end, chunk, sequence, _, last = segment_bounds(segment, table, tokens, per_row, per_segment, Q, PACKED)
    if PACKED:
        if sequence < 0:
            return
    q = tl.arange(0, Q)
    offsets, inside = state_tile(0, p0, P, N, BP, BN)
    if HAS_ENTRY:
        before = tl.load(entry + (tl.cast(segment, tl.int64) * H + h) * (P * N) + offsets, mask=inside, other=0.0)
        state = before.to(tl.float32)  # (N, P)
    else:
        state = tl.zeros([BN, BP], tl.float32)
    if D_RANK == 1:
        skip = tl.load(D + h).to(tl.float32)
    if D_RANK == 2:
        p = p0 + tl.arange(0, BP)
        skip = tl.load(D + h * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]

    for c in tl.range(0, tl.cdiv(end - start, Q), num_stages=STAGES):
        t = start + c * Q
        c_tile = load_tokens(C, c_row, c_token, c_head, row, t, end, g, 0, Q, BN, N, TMA)  # (Q, N)
        b_tile = load_tokens(B, b_row, b_token, b_head, row, t, end, g, 0, Q, BN, N, TMA)  # (Q, N)
        x_tile = load_tokens(x, x_row, x_token, x_head, row, t, end, h, p0, Q, BP, P, TMA)  # (Q, P)
        step, log, whole = load_steps(steps, tl.cast(chunk + c, tl.int64) * H + h, Q)
        enters = tl.exp2(log)  # decay from the chunk's start to each token
        leaves = tl.exp2(whole - log)  # from each token to the chunk's end
        passes = tl.exp2(whole)
        causal = q[:, None] >= q[None, :]
        if HAS_DOCUMENTS:
            doc, doc_before, doc_last = load_documents(document, chunk + c, t, Q)
            causal = causal & (doc[:, None] == doc[None, :])
            enters = tl.where(doc == doc_before, enters, 0.0)
            leaves = tl.where(doc == doc_last, leaves, 0.0)
            passes = tl.where(doc_last == doc_before, passes, 0.0)
        weights = tl.dot(c_tile, tl.trans(b_tile), input_precision=PRECISION)  # (Q, Q)
        weights = tl.where(causal, weights, 0.0) * tl.exp2(tl.minimum(log[:, None] - log[None, :], 0.0))
        weights = (weights * step[None, :]).to(x_tile.dtype)
        out = tl.dot(c_tile, state.to(c_tile.dtype), input_precision=PRECISION) * enters[:, None]
        out = tl.dot(weights, x_tile, out, input_precision=PRECISION)
        if D_RANK > 0:
            out += widen(x_tile, ASM) * skip
        if HAS_Z:
            gate = load_tokens(z, z_row, z_token, z_head, row, t, end, h, p0, Q, BP, P, TMA).to(tl.float32)
            out = out * gate / (1.0 + tl.exp(-gate))
        store_tokens(y, out.to(x_tile.dtype), tokens * H * P, H * P, P, row, t, end, h, p0, Q, BP, P, TMA)
        scaled = (widen(x_tile, ASM) * (leaves * step)[:, None]).to(x_tile.dtype)
        state = tl.dot(tl.trans(b_tile), scaled, state * passes, input_precision=PRECISION)

    if last:
        tl.store(final + (tl.cast(sequence, tl.int64) * H + h) * (P * N) + offsets, state, mask=inside)


@triton.jit(do_not_specialize=["tokens", "per_row", "per_segment"])
def state_kernel(
    inputs, maps, steps, document, entry, at_chunks, decay, after, table,
    tokens, per_row, per_segment, H,
    i_row, i_token, i_head, m_row, m_token, m_head,
    PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    REVERSE: tl.constexpr, SUMMARY: tl.constexpr, OPEN: tl.constexpr, HAS_ENTRY: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks a segment passing the state only: ``S <- passes S + maps^T (inputs * weight)``.

    Forward, ``inputs`` is x, ``maps`` is B and the weight ``leaves * dt``. ``REVERSE`` walks from the end with the
    gradient of the state: ``inputs`` is dy, ``maps`` is C and the weight ``enters``.

    ``SUMMARY``: starts from zero and leaves the segment's own state in ``after (segments, H, P, N)`` and its decay in
    ``decay (segments, H)`` for ``link_kernel``; the segment that nothing follows is skipped, unless the sequence goes
    on elsewhere (``OPEN``). Otherwise every chunk's
    state on entering it (seen in walking direction) goes to ``at_chunks (chunks, H, N, P)``, and what comes out of the
    sequence to ``after (sequences, H, P, N)``.
    """
    P_TILES: tl.constexpr = (P + BP - 1) // BP
    N_TILES: tl.constexpr = (N + BN - 1) // BN
    segment = tl.program_id(0) // (H * P_TILES * N_TILES)
    h = tl.program_id(0) // (P_TILES * N_TILES) % H
    p0 = tl.program_id(0) % P_TILES * BP
    n0 = tl.program_id(0) // P_TILES % N_TILES * BN
    g = h // PER_GROUP
    row, start, end, chunk, sequence, first, last = segment_bounds(
        segment, table, tokens, per_row, per_segment, Q, PACKED
    )
    if PACKED:
        if sequence < 0:
            return
    ends = first if REVERSE else last
    if SUMMARY:
        if not OPEN:
            if ends:
                return
    offsets, inside = state_tile(n0, p0, P, N, BP, BN)
    if HAS_ENTRY:
        before = tl.load(entry + (tl.cast(segment, tl.int64) * H + h) * (P * N) + offsets, mask=inside, other=0.0)
        state = before.to(tl.float32)  # (N, P)
    else:
        state = tl.zeros([BN, BP], tl.float32)
    total = 1.0
    count = tl.cdiv(end - start, Q)
    for i in tl.range(0, count, num_stages=STAGES):
        c = count - 1 - i if REVERSE else i
        t = start + c * Q
        tile = load_tokens(inputs, i_row, i_token, i_head, row, t, end, h, p0, Q, BP, P, TMA)  # (Q, P)
        map_tile = load_tokens(maps, m_row, m_token, m_head, row, t, end, g, n0, Q, BN, N, TMA)  # (Q, N)
        step, log, whole = load_steps(steps, tl.cast(chunk + c, tl.int64) * H + h, Q)
        weight = tl.exp2(log) if REVERSE else tl.exp2(whole - log)
        passes = tl.exp2(whole)
        if HAS_DOCUMENTS:
            doc, doc_before, doc_last = load_documents(document, chunk + c, t, Q)
            weight = tl.where(doc == (doc_before if REVERSE else doc_last), weight, 0.0)
            passes = tl.where(doc_last == doc_before, passes, 0.0)
        if not REVERSE:
            weight *= step
        if SUMMARY:
            total *= passes
        else:
            store_chunk_state(at_chunks, state.to(tile.dtype), (chunk + c) * H + h, n0, p0, P, N, BP, BN, TMA)
        scaled = (widen(tile, ASM) * weight[:, None]).to(tile.dtype)
        state = tl.dot(tl.trans(map_tile), scaled, state * passes, input_precision=PRECISION)

    if SUMMARY:
        tl.store(after + (tl.cast(segment, tl.int64) * H + h) * (P * N) + offsets, state, mask=inside)
        if (p0 == 0) & (n0 == 0):
            tl.store(decay + tl.cast(segment, tl.int64) * H + h, total)
    else:
        if ends:
            tl.store(after + (tl.cast(sequence, tl.int64) * H + h) * (P * N) + offsets, state, mask=inside)


@triton.jit(do_not_specialize=["per_sequence"])
def link_kernel(
    states, decay, outer, first_segment, per_sequence, H,
    P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, HAS_OUTER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Turns each segment's own state, in place, into the state that enters it (in walking direction).

    ``outer (sequences, H, P, N)`` enters each sequence: the initial states, or with ``REVERSE`` the gradients of the
    final ones.
    """
    sequence = tl.program_id(0)
    h = tl.program_id(2)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < P * N
    if PACKED:
        begin = tl.load(first_segment + sequence)
        count = tl.load(first_segment + sequence + 1) - begin
    else:
        begin = sequence * per_sequence
        count = per_sequence
    if HAS_OUTER:
        state = tl.load(outer + (tl.cast(sequence, tl.int64) * H + h) * (P * N) + offsets, mask=mask, other=0.0)
        state = state.to(tl.float32)
    else:
        state = tl.zeros([BLOCK], tl.float32)
    for i in range(0, count - 1):
        segment = begin + (count - 1 - i if REVERSE else i)
        index = tl.cast(segment, tl.int64) * H + h
        own = tl.load(states + index * (P * N) + offsets, mask=mask, other=0.0)
        tl.store(states + index * (P * N) + offsets, state, mask=mask)
        state = state * tl.load(decay + index) + own
    final = tl.cast(begin if REVERSE else begin + count - 1, tl.int64)  # its own state was not computed
    tl.store(states + (final * H + h) * (P * N) + offsets, state, mask=mask)
