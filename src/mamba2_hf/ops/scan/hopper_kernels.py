"""The SSD scan's kernels for Hopper, in Gluon: 16-bit inputs, heads of 64 channels, states of 16 to 256.

What they gain over the portable kernels comes from three things. One warp copies tiles while groups of four warps
multiply (*producer* and *consumers*), so nothing waits for memory. Consumers of one program are heads that share B and
C, which are read once for all of them. And the state lies transposed, ``(P, N)``, in registers, where the matrix unit
takes it as it is: the only tile that goes through shared memory on its way is the chunk's matrix.

A wider head is ``PIECES`` heads of 64 channels with the same steps and skip: ``H`` and ``PER_GROUP`` count the pieces,
``steps (chunks, H / PIECES, 2, Q)``, log2 decays and step sizes (see ``problem.py``), and ``D (H / PIECES,)`` the
heads. Tiles past a row's end read as zeros and are not written. Names as in ``NOTATION.md``.
"""

from __future__ import annotations

from .gluon import (
    async_copy,
    barrier,
    copy_async,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    store_tile,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.constexpr_function
def product(columns):
    """Layout of a ``(64, columns)`` product of four warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def operand(columns):
    """Layout of the left operand of such a product in registers. Its values lie where those of a product do."""
    return gl.DotOperandLayout(operand_index=0, parent=product(columns), k_width=2)


@gluon.jit
def fetch_steps(shared, steps, index, Q: gl.constexpr):
    """Starts copying the ``2 Q`` numbers of chunk and head ``index``."""
    lane = gl.arange(0, 2 * Q, layout=gl.BlockedLayout([1], [32], [4], [0]))
    copy_async(shared, steps + index * (2 * Q) + lane)
    async_copy.commit_group()


@gluon.jit
def idle(bars, count, STAGES: gl.constexpr):
    """What a consumer without a head does: it frees the tiles that others read."""
    ready, empty = bars
    for i in range(count):
        mbarrier.wait(ready.index(i % STAGES), i // STAGES & 1)
        mbarrier.arrive(empty.index(i % STAGES), count=1)


@gluon.jit
def pipeline(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Barriers of a ring of tiles: ready (filled), and empty (read by all consumers)."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    return ready, empty


# Forward


@gluon.jit
def walk_producer(tiles, shared, bars, place, count, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
                  HEADS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Copies B, C and the heads' x of one chunk after the other."""
    x, B, C = tiles
    x_s, b_s, c_s = shared
    ready, empty = bars
    row, g, h0, first = place
    for i in range(count):
        s = i % STAGES
        t = (first + i) * Q
        mbarrier.wait(empty.index(s), i // STAGES & 1 ^ 1)
        bar = ready.index(s)
        mbarrier.expect(bar, 2 * B.block_type.nbytes + HEADS * x.block_type.nbytes)
        load_tile(C, [row, t, g * N], bar, c_s.index(s))
        load_tile(B, [row, t, g * N], bar, b_s.index(s))
        for k in gl.static_range(HEADS):
            load_tile(x, [row, t, (h0 + k) * P], bar, x_s.index(s * HEADS + k))


@gluon.jit
def walk_inputs(x, a_j, dt_j, last, Q: gl.constexpr, P: gl.constexpr):
    """A chunk's ``x^T (P, j)`` as an operand; the same scaled to what reaches the state; and the decays from its start.

    ``a_j, dt_j, last``: the log decays, the steps, and the last of the decays.
    """
    xt = x.reshape([Q, P]).permute((1, 0)).load(operand(Q))
    leaves = gl.exp2(last - a_j) * dt_j
    scaled = gl.convert_layout(xt, product(Q), assert_trivial=True).to(gl.float32) * leaves[None, :]
    return xt, scaled.to(x.dtype), gl.exp2(a_j)


@gluon.jit
def walk_consumer(y, steps, D, entry, final, shared, own, bars, place, count, chunk, H, per_group, segment, ends,
                  PIECES: gl.constexpr, K: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
                  HEADS: gl.constexpr, STAGES: gl.constexpr, HAS_D: gl.constexpr, HAS_ENTRY: gl.constexpr):  # fmt: skip
    """One head. ``ends`` is the sequence whose last segment this is, or -1.

    The state is a tuple of ``PARTS`` tiles of at most 128 columns, so that one part at a time is an operand: with more
    registers in use than there are, every product would wait for the one before it.
    """
    x_s, b_s, c_s = shared
    p_s, y_s, f_s = own
    ready, empty = bars
    row, g, h0, first = place
    h = h0 + K
    if h < (g + 1) * per_group:
        PART: gl.constexpr = 128 if N > 128 else N
        PARTS: gl.constexpr = N // PART
        narrow: gl.constexpr = product(Q)
        wide: gl.constexpr = product(PART)
        down: gl.constexpr = gl.SliceLayout(1, narrow)
        across: gl.constexpr = gl.SliceLayout(0, narrow)
        dtype: gl.constexpr = x_s.dtype
        p = gl.arange(0, P, layout=gl.SliceLayout(1, wide))
        n = gl.arange(0, PART, layout=gl.SliceLayout(0, wide))
        inside = p[:, None] * N + n[None, :]
        state = ()
        for part in gl.static_range(PARTS):
            if HAS_ENTRY:
                at = (segment.to(gl.int64) * H + h) * (P * N) + part * PART + inside
                state = state + (gl.load(entry + at).to(gl.float32),)
            else:
                state = state + (gl.zeros([P, PART], gl.float32, layout=wide),)
        if HAS_D:
            skip = gl.load(D + h // PIECES).to(gl.float32)
        i_at = gl.arange(0, Q, layout=down)
        j_at = gl.arange(0, Q, layout=across)
        zero = gl.zeros([Q, Q], gl.float32, layout=narrow)
        matrix = p_s.index(K)
        out_tile = y_s.index(K)
        heads = H // PIECES
        index = chunk.to(gl.int64) * heads + h // PIECES
        fetch_steps(f_s.index(2 * K), steps, index, Q)
        for i in range(count):
            s = i % STAGES
            async_copy.wait_group(0)
            f = f_s.index(2 * K + i % 2)
            a_i = f.slice(0, Q).load(down)
            a_j = f.slice(0, Q).load(across)
            dt_j = f.slice(Q, Q).load(across)
            whole = f.slice(Q - 1, 1)
            passes = gl.exp2(whole.load(gl.SliceLayout(0, wide)))
            after_i = gl.minimum(i + 1, count - 1).to(gl.int64)
            fetch_steps(f_s.index(2 * K + (i + 1) % 2), steps, index + after_i * heads, Q)
            mbarrier.wait(ready.index(s), i // STAGES & 1)
            b_tile = b_s.index(s).reshape([Q, N])
            c_tile = c_s.index(s).reshape([Q, N])
            scores = warpgroup_mma(c_tile, b_tile.permute((1, 0)), zero, use_acc=False, is_async=True)  # (i, j)
            if PARTS == 1:
                xt, scaled, enters = walk_inputs(x_s.index(s * HEADS + K), a_j, dt_j, whole.load(across), Q, P)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            weights = scores * (gl.exp2(a_i[:, None] - a_j[None, :]) * dt_j[None, :])
            matrix.store(gl.where(i_at[:, None] >= j_at[None, :], weights, 0.0).to(dtype))
            fence_async_shared()
            barrier()
            out = zero
            passed = ()
            for part in gl.static_range(PARTS):
                maps = c_tile.slice(part * PART, PART, dim=1).permute((1, 0))
                left = gl.convert_layout(state[part].to(dtype), operand(Q))
                out = warpgroup_mma(left, maps, out, use_acc=part > 0, is_async=True)  # (P, i)
                passed = passed + (state[part] * passes[None, :],)
                out = warpgroup_mma_wait(0, deps=(out,))
            if PARTS > 1:  # not before, to have the registers
                a_j = f.slice(0, Q).load(across)
                dt_j = f.slice(Q, Q).load(across)
                xt, scaled, enters = walk_inputs(x_s.index(s * HEADS + K), a_j, dt_j, whole.load(across), Q, P)
            out = warpgroup_mma(xt, matrix.permute((1, 0)), out * enters[None, :], is_async=True)
            left = gl.convert_layout(scaled, operand(PART))
            state = ()
            for part in gl.static_range(PARTS):
                right = b_tile.slice(part * PART, PART, dim=1)
                state = state + (warpgroup_mma(left, right, passed[part], is_async=True),)
            tma.store_wait(0)
            out = warpgroup_mma_wait(PARTS, deps=(out,))
            if HAS_D:
                out = out + gl.convert_layout(xt, narrow, assert_trivial=True).to(gl.float32) * skip
            out_tile.reshape([Q, P]).permute((1, 0)).store(out.to(dtype))
            fence_async_shared()
            barrier()
            store_tile(y, [row, (first + i) * Q, h * P], out_tile)
            done = ()
            for part in gl.static_range(PARTS):
                done = done + (warpgroup_mma_wait(PARTS - 1 - part, deps=(state[part],)),)
            state = done
            mbarrier.arrive(empty.index(s), count=1)
        async_copy.wait_group(0)
        if ends >= 0:
            for part in gl.static_range(PARTS):
                gl.store(final + (ends.to(gl.int64) * H + h) * (P * N) + part * PART + inside, state[part])
        tma.store_wait(0)
    else:
        idle(bars, count, STAGES)


@gluon.jit(do_not_specialize=["per_row", "per_segment"])
def walk_kernel(x, B, C, y, steps, D, entry, final, H, per_row, per_segment,
                PER_GROUP: gl.constexpr, PIECES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
                HEADS: gl.constexpr, STAGES: gl.constexpr, HAS_D: gl.constexpr, HAS_ENTRY: gl.constexpr,
                REGISTERS: gl.constexpr, num_warps: gl.constexpr):  # fmt: skip
    """``y`` of one segment and ``HEADS`` heads of a group; the state after a sequence goes to ``final``.

    ``x, y``: tiles ``(1, Q, P)`` of ``(B, T, H P)``; ``B, C``: tiles ``(1, Q, N)`` of ``(B, T, G N)``.
    ``entry (segments, H, P, N)``, ``final (B, H, P, N)``.
    """
    blocks: gl.constexpr = (PER_GROUP + HEADS - 1) // HEADS
    groups = H // PER_GROUP
    pid = gl.program_id(0)
    g = pid // blocks % groups
    segment = pid // (blocks * groups)
    segments = gl.cdiv(per_row, per_segment)
    row = segment // segments
    first = segment % segments * per_segment
    count = gl.minimum(per_segment, per_row - first)
    ends = gl.where(first + count == per_row, row, -1)
    dtype: gl.constexpr = x.dtype
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([Q, Q], dtype)
    x_s = gl.allocate_shared_memory(dtype, [STAGES * HEADS, 1, Q, P], x.layout)
    b_s = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, N], B.layout)
    c_s = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, N], C.layout)
    p_s = gl.allocate_shared_memory(dtype, [HEADS, Q, Q], square)
    y_s = gl.allocate_shared_memory(dtype, [HEADS, 1, Q, P], y.layout)
    f_s = gl.allocate_shared_memory(gl.float32, [2 * HEADS, 2 * Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = pipeline(STAGES, HEADS)
    shared = (x_s, b_s, c_s)
    own = (p_s, y_s, f_s)
    place = (row, g, g * PER_GROUP + pid % blocks * HEADS, first)
    chunk = row * per_row + first
    if HEADS == 1:
        gl.warp_specialize([
            (walk_consumer, (y, steps, D, entry, final, shared, own, bars, place, count, chunk, H, PER_GROUP, segment,
                             ends, PIECES, 0, Q, P, N, HEADS, STAGES, HAS_D, HAS_ENTRY)),
            (walk_producer, ((x, B, C), shared, bars, place, count, Q, P, N, HEADS, STAGES)),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (walk_consumer, (y, steps, D, entry, final, shared, own, bars, place, count, chunk, H, PER_GROUP, segment,
                             ends, PIECES, 0, Q, P, N, HEADS, STAGES, HAS_D, HAS_ENTRY)),
            (walk_consumer, (y, steps, D, entry, final, shared, own, bars, place, count, chunk, H, PER_GROUP, segment,
                             ends, PIECES, 1, Q, P, N, HEADS, STAGES, HAS_D, HAS_ENTRY)),
            (walk_producer, ((x, B, C), shared, bars, place, count, Q, P, N, HEADS, STAGES)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip


# States at chunk boundaries


@gluon.jit
def state_producer(tiles, shared, bars, place, count, reverse, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
                   HEADS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Copies the maps (B or C) and the heads' inputs (x or dy) of one chunk after the other."""
    x, B, dy, C = tiles
    in_s, map_s = shared
    ready, empty = bars
    row, g, h0, first = place
    for i in range(count):
        s = i % STAGES
        mbarrier.wait(empty.index(s), i // STAGES & 1 ^ 1)
        bar = ready.index(s)
        mbarrier.expect(bar, B.block_type.nbytes + HEADS * x.block_type.nbytes)
        if reverse:
            t = (first + count - 1 - i) * Q
            load_tile(C, [row, t, g * N], bar, map_s.index(s))
            for k in gl.static_range(HEADS):
                load_tile(dy, [row, t, (h0 + k) * P], bar, in_s.index(s * HEADS + k))
        else:
            t = (first + i) * Q
            load_tile(B, [row, t, g * N], bar, map_s.index(s))
            for k in gl.static_range(HEADS):
                load_tile(x, [row, t, (h0 + k) * P], bar, in_s.index(s * HEADS + k))


@gluon.jit
def state_consumer(states, steps, entries, results, shared, own, bars, place, count, chunk, reverse, H, per_group,
                   segment, target, PIECES: gl.constexpr, K: gl.constexpr, Q: gl.constexpr, P: gl.constexpr,
                   N: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, SUMMARY: gl.constexpr,
                   HAS_ENTRY: gl.constexpr, HAS_DENTRY: gl.constexpr):  # fmt: skip
    """One head. ``target`` is where in ``results`` what comes out goes, or -1."""
    S, dS = states
    entry, dentry = entries
    after, dafter, decay = results
    in_s, map_s = shared
    st_s, f_s = own
    ready, empty = bars
    _, g, h0, _ = place
    h = h0 + K
    if h < (g + 1) * per_group:
        narrow: gl.constexpr = product(Q)
        wide: gl.constexpr = product(N)
        across: gl.constexpr = gl.SliceLayout(0, narrow)
        dtype: gl.constexpr = in_s.dtype
        p = gl.arange(0, P, layout=gl.SliceLayout(1, wide))
        n = gl.arange(0, N, layout=gl.SliceLayout(0, wide))
        inside = p[:, None] * N + n[None, :]
        at = (segment.to(gl.int64) * H + h) * (P * N) + inside
        state = gl.zeros([P, N], gl.float32, layout=wide)
        if HAS_ENTRY:
            if not reverse:
                state = gl.load(entry + at).to(gl.float32)
        if HAS_DENTRY:
            if reverse:
                state = gl.load(dentry + at).to(gl.float32)
        total = 0.0
        heads = H // PIECES
        index = chunk.to(gl.int64) * heads + h // PIECES
        begin = gl.where(reverse, gl.maximum(count - 1, 0), 0)
        fetch_steps(f_s.index(2 * K), steps, index + begin.to(gl.int64) * heads, Q)
        for i in range(count):
            s = i % STAGES
            c = gl.where(reverse, count - 1 - i, i)
            after_c = gl.where(reverse, gl.maximum(c - 1, 0), gl.minimum(c + 1, count - 1))
            async_copy.wait_group(0)
            f = f_s.index(2 * K + i % 2)
            a_j = f.slice(0, Q).load(across)
            dt_j = f.slice(Q, Q).load(across)
            whole = f.slice(Q - 1, 1)
            weight = gl.where(reverse, gl.exp2(a_j), gl.exp2(whole.load(across) - a_j) * dt_j)
            last = whole.load(gl.SliceLayout(0, wide))
            fetch_steps(f_s.index(2 * K + (i + 1) % 2), steps, index + after_c.to(gl.int64) * heads, Q)
            mbarrier.wait(ready.index(s), i // STAGES & 1)
            tile = in_s.index(s * HEADS + K).reshape([Q, P]).permute((1, 0)).load(operand(N))  # (P, j)
            scaled = gl.convert_layout(tile, narrow, assert_trivial=True).to(gl.float32) * weight[None, :]
            if not SUMMARY:
                tma.store_wait(0)
                st_s.index(K).reshape([P, N]).store(state.to(dtype))
                fence_async_shared()
                barrier()
                if reverse:
                    store_tile(dS, [(chunk + c) * H + h, 0, 0], st_s.index(K))
                else:
                    store_tile(S, [(chunk + c) * H + h, 0, 0], st_s.index(K))
            state = state * gl.exp2(last)[None, :]
            maps = map_s.index(s).reshape([Q, N])
            rounded = scaled.to(dtype)
            rest = gl.convert_layout((scaled - rounded.to(gl.float32)).to(dtype), operand(N), assert_trivial=True)
            rounded = gl.convert_layout(rounded, operand(N), assert_trivial=True)
            state = warpgroup_mma(rounded, maps, state, is_async=True)
            if not SUMMARY:  # also what rounding took away: of all gradients, dA sums it up
                state = warpgroup_mma(rest, maps, state, is_async=True)
            if SUMMARY:
                total += gl.sum(last, 0)
            state = warpgroup_mma_wait(0, deps=(state,))
            fence_async_shared()
            mbarrier.arrive(empty.index(s), count=1)
        async_copy.wait_group(0)
        if target >= 0:
            to = (target.to(gl.int64) * H + h) * (P * N) + inside
            if reverse:
                gl.store(dafter + to, state)
            else:
                gl.store(after + to, state)
            if SUMMARY:
                gl.store(decay + target.to(gl.int64) * H + h, gl.exp2(total))
        if not SUMMARY:
            tma.store_wait(0)
    else:
        idle(bars, count, STAGES)


@gluon.jit(do_not_specialize=["per_row", "per_segment"])
def state_kernel(x, B, dy, C, S, dS, steps, entry, dentry, after, dafter, decay, H, per_row, per_segment,
                 PER_GROUP: gl.constexpr, PIECES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
                 HEADS: gl.constexpr, STAGES: gl.constexpr, FORWARD: gl.constexpr, REVERSE: gl.constexpr,
                 SUMMARY: gl.constexpr, OPEN: gl.constexpr, HAS_ENTRY: gl.constexpr, HAS_DENTRY: gl.constexpr,
                 REGISTERS: gl.constexpr,
                 num_warps: gl.constexpr):  # fmt: skip
    """Walks a segment passing the state only: ``S <- passes S + (inputs * weight)^T maps``.

    ``FORWARD``: inputs x, maps B, weight ``leaves * dt``. ``REVERSE``, from the end, with the gradient of the state:
    inputs dy, maps C, weight ``enters``. With both, the second half of the programs takes the reverse.

    ``SUMMARY``: starts from zero and leaves the segment's own state in ``after (segments, H, P, N)`` (``dafter``) and
    its decay in ``decay (segments, H)``; the segment that nothing follows is skipped, unless the sequence goes on
    elsewhere (``OPEN``). Otherwise every chunk's state on entering it (seen in walking direction) goes to
    ``S (chunks H, P, N)`` (``dS``), and what comes out of the sequence to ``after (B, H, P, N)`` (``dafter``).
    """
    blocks: gl.constexpr = (PER_GROUP + HEADS - 1) // HEADS
    groups = H // PER_GROUP
    pid = gl.program_id(0)
    if FORWARD and REVERSE:
        half = gl.num_programs(0) // 2
        reverse = pid >= half
        pid = pid % half
    else:
        reverse = pid < 0 if FORWARD else pid >= 0
    g = pid // blocks % groups
    segment = pid // (blocks * groups)
    segments = gl.cdiv(per_row, per_segment)
    row = segment // segments
    first = segment % segments * per_segment
    count = gl.minimum(per_segment, per_row - first)
    ends = gl.where(reverse, first == 0, first + count == per_row)
    if SUMMARY:
        target = segment
        if not OPEN:
            count = gl.where(ends, 0, count)
            target = gl.where(ends, -1, segment)
    else:
        target = gl.where(ends, row, -1)
    dtype: gl.constexpr = x.dtype
    in_s = gl.allocate_shared_memory(dtype, [STAGES * HEADS, 1, Q, P], x.layout)
    map_s = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, N], B.layout)
    if SUMMARY:
        st_s = in_s
    else:
        st_s = gl.allocate_shared_memory(dtype, [HEADS, 1, P, N], S.layout)
    f_s = gl.allocate_shared_memory(gl.float32, [2 * HEADS, 2 * Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = pipeline(STAGES, HEADS)
    shared = (in_s, map_s)
    own = (st_s, f_s)
    place = (row, g, g * PER_GROUP + pid % blocks * HEADS, first)
    chunk = row * per_row + first
    states = (S, dS)
    entries = (entry, dentry)
    results = (after, dafter, decay)
    tiles = (x, B, dy, C)
    if HEADS == 1:
        gl.warp_specialize([
            (state_consumer, (states, steps, entries, results, shared, own, bars, place, count, chunk, reverse, H,
                              PER_GROUP, segment, target, PIECES, 0, Q, P, N, HEADS, STAGES, SUMMARY, HAS_ENTRY,
                              HAS_DENTRY)),
            (state_producer, (tiles, shared, bars, place, count, reverse, Q, P, N, HEADS, STAGES)),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (state_consumer, (states, steps, entries, results, shared, own, bars, place, count, chunk, reverse, H,
                              PER_GROUP, segment, target, PIECES, 0, Q, P, N, HEADS, STAGES, SUMMARY, HAS_ENTRY,
                              HAS_DENTRY)),
            (state_consumer, (states, steps, entries, results, shared, own, bars, place, count, chunk, reverse, H,
                              PER_GROUP, segment, target, PIECES, 1, Q, P, N, HEADS, STAGES, SUMMARY, HAS_ENTRY,
                              HAS_DENTRY)),
            (state_producer, (tiles, shared, bars, place, count, reverse, Q, P, N, HEADS, STAGES)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip


# Gradients of a chunk


@gluon.jit
def chunk_producer(tiles, shared, bars, place, H, P: gl.constexpr, N: gl.constexpr, HEADS: gl.constexpr,
                   STAGES: gl.constexpr):  # fmt: skip
    """Copies B and C once, then x, dy, S and dS of one head after the other."""
    B, C, x, dy, S, dS = tiles
    b_s, c_s, x_s, dy_s, s_s, ds_s = shared
    ready, empty, maps, _ = bars
    row, g, h0, t, chunk = place
    mbarrier.expect(maps, B.block_type.nbytes + C.block_type.nbytes)
    load_tile(B, [row, t, g * N], maps, b_s)
    load_tile(C, [row, t, g * N], maps, c_s)
    for k in range(HEADS):
        s = k % STAGES
        mbarrier.wait(empty.index(s), k // STAGES & 1 ^ 1)
        bar = ready.index(s)
        mbarrier.expect(bar, 2 * x.block_type.nbytes + 2 * S.block_type.nbytes)
        load_tile(dy, [row, t, (h0 + k) * P], bar, dy_s.index(s))
        load_tile(S, [chunk * H + h0 + k, 0, 0], bar, s_s.index(s))
        load_tile(x, [row, t, (h0 + k) * P], bar, x_s.index(s))
        load_tile(dS, [chunk * H + h0 + k, 0, 0], bar, ds_s.index(s))


@gluon.jit
def store_map_gradient(target, tile, t, T, stride_token, Q: gl.constexpr, N: gl.constexpr):
    """Stores ``(Q, N)`` into a row of tokens, from ``t`` on and as far as the row goes."""
    wide: gl.constexpr = product(N)
    q = gl.arange(0, Q, layout=gl.SliceLayout(1, wide))
    n = gl.arange(0, N, layout=gl.SliceLayout(0, wide))
    at = (t + q).to(gl.int64)[:, None] * stride_token + n[None, :]
    gl.store(target + at, tile.to(target.dtype.element_ty), mask=(t + q < T)[:, None])


@gluon.jit
def row_consumer(steps, dots, ends, dC, shared, dscores_s, scores_s, f_s, bars, place, H, T, stride_token,
                 PIECES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr, HEADS: gl.constexpr,
                 STAGES: gl.constexpr):  # fmt: skip
    """What sums over j <= i: dC, the row sums of the log decays' gradient, and the part that crosses the chunk."""
    b_s, c_s, x_s, dy_s, s_s, ds_s = shared
    ready, empty, maps, handed = bars
    _, _, h0, t, chunk = place
    narrow: gl.constexpr = product(Q)
    wide: gl.constexpr = product(N)
    down: gl.constexpr = gl.SliceLayout(1, narrow)
    across: gl.constexpr = gl.SliceLayout(0, narrow)
    dtype: gl.constexpr = x_s.dtype
    i_at = gl.arange(0, Q, layout=down)
    j_at = gl.arange(0, Q, layout=across)
    zero = gl.zeros([Q, Q], gl.float32, layout=narrow)
    AHEAD: gl.constexpr = N <= 128  # registers for two products at a time
    PART: gl.constexpr = N if AHEAD else 64
    index = chunk.to(gl.int64) * H + h0
    first = chunk.to(gl.int64) * (H // PIECES)  # of the chunk, among heads that are not in pieces
    fetch_steps(f_s.index(0), steps, first + h0 // PIECES, Q)
    mbarrier.wait(maps, 0)
    b_tile = b_s.reshape([Q, N])
    c_tile = c_s.reshape([Q, N])
    scores = warpgroup_mma(c_tile, b_tile.permute((1, 0)), zero, use_acc=False)  # (i, j)
    if not AHEAD:
        scores_s.index(1).store(scores)
    total = gl.zeros([Q, N], gl.float32, layout=wide)
    for k in range(HEADS):
        s = k % STAGES
        async_copy.wait_group(0)
        f = f_s.index(k % 2)
        a_i = f.slice(0, Q).load(down)
        a_j = f.slice(0, Q).load(across)
        dt_j = f.slice(Q, Q).load(across)
        passes = gl.exp2(gl.sum(f.slice(Q - 1, 1).load(down), 0))
        fetch_steps(f_s.index((k + 1) % 2), steps, first + (h0 + gl.minimum(k + 1, HEADS - 1)) // PIECES, Q)
        mbarrier.wait(ready.index(s), k // STAGES & 1)
        state = s_s.index(s).reshape([P, N])
        dy = dy_s.index(s).reshape([Q, P])
        products = warpgroup_mma(dy, x_s.index(s).reshape([Q, P]).permute((1, 0)), zero, use_acc=False, is_async=True)
        if AHEAD:
            out = warpgroup_mma(c_tile, state.permute((1, 0)), zero, use_acc=False, is_async=True)  # (i, P)
        if not AHEAD:
            scores = scores_s.index(1).load(narrow)
        weights = scores * (gl.exp2(a_i[:, None] - a_j[None, :]) * dt_j[None, :])
        weights = gl.where(i_at[:, None] >= j_at[None, :], weights, 0.0)
        products = warpgroup_mma_wait(1 if AHEAD else 0, deps=(products,))
        sums = gl.sum(products * weights, 1)
        if not AHEAD:
            out = warpgroup_mma(c_tile, state.permute((1, 0)), zero, use_acc=False, is_async=True)
        enters = gl.exp2(a_i)
        values = dy.load(narrow).to(gl.float32)
        scaled = gl.convert_layout((values * enters[:, None]).to(dtype), operand(N))
        out = warpgroup_mma_wait(0, deps=(out,))
        total = warpgroup_mma(scaled, state, total, is_async=True)
        sums += enters * gl.sum(out * values, 1)
        gl.store(dots + (index + k) * (4 * Q) + i_at, sums)
        dstate = ds_s.index(s).reshape([P, N])
        crossing = 0.0
        for part in gl.static_range(N // PART):
            tile = state.slice(part * PART, PART, dim=1).load(product(PART)).to(gl.float32)
            dtile = dstate.slice(part * PART, PART, dim=1).load(product(PART)).to(gl.float32)
            crossing += gl.sum(gl.sum(tile * dtile, 1), 0)
        gl.store(ends + index + k, passes * crossing)
        total = warpgroup_mma_wait(0, deps=(total,))
        fence_async_shared()
        mbarrier.arrive(empty.index(s), count=1)
    async_copy.wait_group(0)
    mbarrier.wait(handed, 0)
    total = warpgroup_mma(dscores_s.permute((1, 0)), b_tile, total)
    store_map_gradient(dC, total, t, T, stride_token, Q, N)


@gluon.jit
def column_consumer(dx, steps, D, dots, dB, shared, dscores_s, scores_s, f_s, out_s, bars, place, H, T, stride_token,
                    PIECES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr, HEADS: gl.constexpr,
                    STAGES: gl.constexpr, HAS_D: gl.constexpr):  # fmt: skip
    """What sums over i >= j: dx, dB, the column sums of the log decays' gradient, and the gradient of ``C B^T``."""
    b_s, c_s, x_s, dy_s, _, ds_s = shared
    ready, empty, maps, handed = bars
    row, _, h0, t, chunk = place
    narrow: gl.constexpr = product(Q)
    wide: gl.constexpr = product(N)
    down: gl.constexpr = gl.SliceLayout(1, narrow)
    across: gl.constexpr = gl.SliceLayout(0, narrow)
    dtype: gl.constexpr = x_s.dtype
    j_at = gl.arange(0, Q, layout=down)
    i_at = gl.arange(0, Q, layout=across)
    causal = i_at[None, :] >= j_at[:, None]
    zero = gl.zeros([Q, Q], gl.float32, layout=narrow)
    AHEAD: gl.constexpr = N <= 128
    index = chunk.to(gl.int64) * H + h0
    first = chunk.to(gl.int64) * (H // PIECES)  # of the chunk, among heads that are not in pieces
    fetch_steps(f_s.index(2), steps, first + h0 // PIECES, Q)
    mbarrier.wait(maps, 0)
    b_tile = b_s.reshape([Q, N])
    c_tile = c_s.reshape([Q, N])
    scores = warpgroup_mma(b_tile, c_tile.permute((1, 0)), zero, use_acc=False)  # (j, i)
    if not AHEAD:
        scores_s.index(0).store(scores)
    total = gl.zeros([Q, N], gl.float32, layout=wide)
    dscores = gl.zeros([Q, Q], gl.float32, layout=narrow)  # above the diagonal anything, infinities too
    for k in range(HEADS):
        s = k % STAGES
        async_copy.wait_group(0)
        f = f_s.index(2 + k % 2)
        a_j = f.slice(0, Q).load(down)
        a_i = f.slice(0, Q).load(across)
        dt_j = f.slice(Q, Q).load(down)
        last = f.slice(Q - 1, 1).load(down)
        fetch_steps(f_s.index(2 + (k + 1) % 2), steps, first + (h0 + gl.minimum(k + 1, HEADS - 1)) // PIECES, Q)
        mbarrier.wait(ready.index(s), k // STAGES & 1)
        dstate = ds_s.index(s).reshape([P, N])
        x = x_s.index(s).reshape([Q, P])
        dy = dy_s.index(s).reshape([Q, P])
        products = warpgroup_mma(x, dy.permute((1, 0)), zero, use_acc=False, is_async=True)  # (j, i)
        if AHEAD:
            grad = warpgroup_mma(b_tile, dstate.permute((1, 0)), zero, use_acc=False, is_async=True)  # (j, P)
        decay = gl.exp2(a_i[None, :] - a_j[:, None]) * dt_j[:, None]
        products = warpgroup_mma_wait(1 if AHEAD else 0, deps=(products,))
        dscores += products * decay
        if not AHEAD:
            scores = scores_s.index(0).load(narrow)
        weights = gl.where(causal, scores * decay, 0.0)
        sums = gl.sum(products * weights, 1)
        weights = weights.to(dtype)
        if not AHEAD:
            grad = warpgroup_mma(b_tile, dstate.permute((1, 0)), zero, use_acc=False, is_async=True)
        grad = warpgroup_mma_wait(0, deps=(grad,))
        leaves = gl.exp2(last - a_j) * dt_j
        values = x.load(narrow).to(gl.float32)
        scaled = gl.convert_layout((values * leaves[:, None]).to(dtype), operand(N))
        total = warpgroup_mma(scaled, dstate, total, is_async=True)
        grad = grad * leaves[:, None]
        inter = gl.sum(grad * values, 1)
        grad = warpgroup_mma(gl.convert_layout(weights, operand(Q)), dy, grad, is_async=True)
        to = dots + (index + k) * (4 * Q) + j_at
        gl.store(to + Q, sums + inter)
        gl.store(to + 2 * Q, inter)
        grad = warpgroup_mma_wait(0, deps=(grad,))
        if HAS_D:
            outer = dy.load(narrow).to(gl.float32)
            gl.store(to + 3 * Q, gl.sum(outer * x.load(narrow).to(gl.float32), 1))
            grad += outer * gl.load(D + (h0 + k) // PIECES).to(gl.float32)
        tma.store_wait(0)
        out_s.reshape([Q, P]).store(grad.to(dtype))
        fence_async_shared()
        barrier()
        store_tile(dx, [row, t, (h0 + k) * P], out_s)
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index(s), count=1)
    async_copy.wait_group(0)
    dscores_s.store(gl.where(causal, dscores, 0.0).to(dtype))
    fence_async_shared()
    mbarrier.arrive(handed, count=1)
    total = warpgroup_mma(dscores_s, c_tile, total)
    store_map_gradient(dB, total, t, T, stride_token, Q, N)
    tma.store_wait(0)


@gluon.jit
def chunk_backward_kernel(B, C, x, dy, S, dS, dx, steps, D, dots, ends, dB, dC, H, T, per_row, stride_block, stride_row,
                          stride_token,
                          PER_GROUP: gl.constexpr, PIECES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr,
                          N: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, HAS_D: gl.constexpr,
                          REGISTERS: gl.constexpr, num_warps: gl.constexpr):  # fmt: skip
    """Gradients from one chunk and ``HEADS`` heads of a group, given the states S and their gradients dS around it.

    ``dots (chunks, H, 4, Q)`` takes, with the formulas of ``ssd_backward.py``: the row sums, the column sums, the
    column sums' share ``w_j`` that leaves the chunk, and ``<x, dy>``. ``ends (chunks, H)``: ``exp(a_last) <dS, S>``.
    ``dB, dC``: ``(B, T, G N)`` for each block of heads, blocks, rows and tokens as far apart as the strides say.
    """
    pid = gl.program_id(0)
    blocks = H // HEADS
    chunk = pid // blocks
    h0 = pid % blocks * HEADS
    block = h0 % PER_GROUP // HEADS
    row = chunk // per_row
    dtype: gl.constexpr = x.dtype
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([Q, Q], dtype)
    b_s = gl.allocate_shared_memory(dtype, [1, Q, N], B.layout)
    c_s = gl.allocate_shared_memory(dtype, [1, Q, N], C.layout)
    x_s = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, P], x.layout)
    dy_s = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, P], dy.layout)
    s_s = gl.allocate_shared_memory(dtype, [STAGES, 1, P, N], S.layout)
    ds_s = gl.allocate_shared_memory(dtype, [STAGES, 1, P, N], dS.layout)
    out_s = gl.allocate_shared_memory(dtype, [1, Q, P], dx.layout)
    dscores_s = gl.allocate_shared_memory(dtype, [Q, Q], square)
    f_s = gl.allocate_shared_memory(gl.float32, [4, 2 * Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    scores_s = f_s
    if N > 128:  # consumers have no registers to keep theirs
        scores_s = gl.allocate_shared_memory(gl.float32, [2, Q, Q], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    ready, empty = pipeline(STAGES, 2)
    maps = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    handed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(maps, count=1)
    mbarrier.init(handed, count=1)
    bars = (ready, empty, maps, handed)
    shared = (b_s, c_s, x_s, dy_s, s_s, ds_s)
    g = h0 // PER_GROUP
    place = (row, g, h0, chunk % per_row * Q, chunk)
    offset = block.to(gl.int64) * stride_block + row.to(gl.int64) * stride_row + g * N
    gl.warp_specialize([
        (column_consumer, (dx, steps, D, dots, dB + offset, shared, dscores_s, scores_s, f_s, out_s, bars, place, H, T,
                           stride_token, PIECES, Q, P, N, HEADS, STAGES, HAS_D)),
        (row_consumer, (steps, dots, ends, dC + offset, shared, dscores_s, scores_s, f_s, bars, place, H, T,
                        stride_token, PIECES, Q, P, N, HEADS, STAGES)),
        (chunk_producer, ((B, C, x, dy, S, dS), shared, bars, place, H, P, N, HEADS, STAGES)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
