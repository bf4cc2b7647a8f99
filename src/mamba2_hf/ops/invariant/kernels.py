"""Kernels whose programs know one sequence each, in one shape for all numbers of sequences and tokens.

Triton would compile a kernel of its own for a size of 1, for multiples of 16 and for aligned addresses, and a compiler
may contract products and sums in another way there: what differs from call to call is no reason for that here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.op import here
from ..runtime.rows import dense
from ..runtime.tables import ATTEND_EACH, RECUR, cdiv, power_of_two


@triton.jit(do_not_specialize=["L"])
def recur_kernel(x, dt, A, B, C, D, state, lengths, y, L, H,
                 D_RANK: tl.constexpr, PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                 BP: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """All tokens of one document, for a block of a head's channels; what the next token needs is under way meanwhile.

    All tensors are dense, ``(S, L, ...)``.
    """
    blocks: tl.constexpr = (P + BP - 1) // BP
    document, head, block = tl.program_id(1).to(tl.int64), tl.program_id(0) // blocks, tl.program_id(0) % blocks
    p, n = block * BP + tl.arange(0, BP), tl.arange(0, BN)
    mask_p, mask_n = p < P, n < N
    count = tl.load(lengths + document).to(tl.int32)
    at = state + ((document * H + head) * P + p[:, None]) * N + n[None, :]
    mask = mask_p[:, None] & mask_n[None, :]
    s = tl.load(at, mask=mask, other=0.0)
    rate = tl.load(A + head).to(tl.float32)
    if D_RANK > 0:
        skip = tl.load(D + (head * P + p if D_RANK == 2 else head + p * 0), mask=mask_p, other=0.0).to(tl.float32)
    groups, group, first = H // PER_GROUP, head // PER_GROUP, document * L
    value = tl.load(x + (first * H + head) * P + p, mask=mask_p, other=0.0)
    step = tl.load(dt + first * H + head)
    b = tl.load(B + (first * groups + group) * N + n, mask=mask_n, other=0.0)
    c = tl.load(C + (first * groups + group) * N + n, mask=mask_n, other=0.0)
    for t in range(0, count):
        ahead = first + tl.minimum(t + 1, L - 1)
        value_now, step_now = value.to(tl.float32), step
        b_now, c_now = b.to(tl.float32), c.to(tl.float32)
        value = tl.load(x + (ahead * H + head) * P + p, mask=mask_p, other=0.0)
        step = tl.load(dt + ahead * H + head)
        b = tl.load(B + (ahead * groups + group) * N + n, mask=mask_n, other=0.0)
        c = tl.load(C + (ahead * groups + group) * N + n, mask=mask_n, other=0.0)
        s = s * tl.exp(step_now * rate) + (value_now * step_now)[:, None] * b_now[None, :]
        out = tl.sum(s * c_now[None, :], 1)
        if D_RANK > 0:
            out += value_now * skip
        tl.store(y + ((first + t) * H + head) * P + p, out.to(y.dtype.element_ty), mask=mask_p)
    tl.store(at, s, mask=mask)


@here
def recur(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    lengths: Tensor | None,
) -> Tensor:
    """Launches the recurrence; arguments as in ``mixer._Scan``."""
    (documents, tokens, heads, P), (groups, N) = x.shape, B.shape[2:]
    channels, warps = RECUR
    bp = min(channels, power_of_two(P))
    y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if lengths is None:
        lengths = torch.full((documents,), tokens, device=x.device)
    x, B, C = (each.clone(memory_format=torch.contiguous_format) for each in (x, B, C))  # a view may not be aligned
    launch(
        recur_kernel,
        (heads * cdiv(P, bp), documents),
        *(x, dt.contiguous(), A.contiguous(), B, C, dense(D), state, lengths, y, tokens, heads),
        D_RANK=0 if D is None else D.dim(),
        PER_GROUP=heads // groups,
        P=P,
        N=N,
        BP=bp,
        BN=power_of_two(N),
        num_warps=warps,
    )
    return y


_VARIES = ("scale", "T", "sk_b", "sk_h", "sk_s", "sv_b", "sv_h", "sv_s")


@triton.jit(do_not_specialize=_VARIES, do_not_specialize_on_alignment=("k", "v"))
def attend_kernel(q, k, v, begin, end, origin, y, scale, T, H, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s,
                  PER_GROUP: tl.constexpr, SIZE: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One head of one query over its keys, in blocks from the first token of its sequence on, one after another.

    ``q`` and ``y`` are dense, ``(B, T, H, SIZE)``.
    """
    query, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, group = query // T, head // PER_GROUP
    d, place = tl.arange(0, BD), tl.arange(0, BLOCK)
    mask_d = d < SIZE
    at = (query * H + head) * SIZE + d
    value = tl.load(q + at, mask=mask_d, other=0.0).to(tl.float32) * scale
    first, last = tl.load(begin + query).to(tl.int32), tl.load(end + query).to(tl.int32)
    start = tl.load(origin + query).to(tl.int32)
    k += row * sk_b + group * sk_h
    v += row * sv_b + group * sv_h
    largest, total, out = (
        tl.full([], -float("inf"), tl.float32),
        tl.full([], 0.0, tl.float32),
        tl.zeros([BD], tl.float32),
    )
    for block in range((first - start) // BLOCK, (last - start + BLOCK - 1) // BLOCK):
        key = start + block * BLOCK + place
        seen = (key >= first) & (key < last)
        mask = seen[:, None] & mask_d[None, :]
        key = key.to(tl.int64)
        keys = tl.load(k + key[:, None] * sk_s + d[None, :], mask=mask, other=0.0).to(tl.float32)
        values = tl.load(v + key[:, None] * sv_s + d[None, :], mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(keys * value[None, :], 1), -float("inf"))
        before, largest = largest, tl.maximum(largest, tl.max(scores, 0))
        weights, kept = tl.exp(scores - largest), tl.exp(before - largest)
        total = total * kept + tl.sum(weights, 0)
        out = out * kept + tl.sum(weights[:, None] * values, 0)
    out = tl.where(first < last, out / total, 0.0)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask_d)


@here
def attend_each(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, origin: Tensor, scale: float) -> Tensor:
    """Launches :func:`mamba2_hf.ops.invariant.attention.attend`; arguments as in ``attention.Queries``."""
    batch, heads, tokens, size = q.shape
    k, v = (each if each.stride(3) == 1 else each.contiguous() for each in (k, v))
    queries = q.transpose(1, 2).contiguous()
    y = torch.empty_like(queries)
    launch(
        attend_kernel,
        (batch * tokens, heads),
        *(queries, k, v, begin.contiguous(), end.contiguous(), origin.contiguous(), y, scale, tokens, heads),
        *(*k.stride()[:3], *v.stride()[:3]),
        PER_GROUP=heads // k.shape[1],
        SIZE=size,
        BD=power_of_two(size),
        BLOCK=ATTEND_EACH[0],
        num_warps=ATTEND_EACH[1],
    )
    return y
