"""The SSD step on Triton. The SSM state is read and written once and stays in registers in between."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import flops
from ..runtime.launch import launch
from ..runtime.op import op
from ..runtime.rows import dense
from ..runtime.tables import cdiv, power_of_two, state_programs
from .op import Update
from .prep import _silu, _step_size


@triton.jit
def state_update_kernel(state, x, dt, A, B, C, D, z, dt_bias, y, low, high, H,
                        slots, ss_b, ss_h, ss_p, ss_n, sx_b, sx_h, sx_p, sdt_b, sdt_h, sdt_p, sa_h, sa_p, sa_n,
                        sb_b, sb_g, sb_n, sc_b, sc_g, sc_n, sz_b, sz_h, sz_p,
                        D_RANK: tl.constexpr, SOFTPLUS: tl.constexpr, PER_GROUP: tl.constexpr, DENSE: tl.constexpr,
                        P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One step of one block of a head's channels; every stride is free.

    ``DENSE``: ``dt``, ``dt_bias (H, P)`` and ``A`` have numbers of their own for every channel, and ``A`` for every
    element of the state.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = (P + BP - 1) // BP
    row, head = (pid // blocks // H).to(tl.int64), pid // blocks % H
    p, n = (pid % blocks) * BP + tl.arange(0, BP), tl.arange(0, BN)
    mask_p, mask_n = p < P, n < N
    mask = mask_p[:, None] & mask_n[None, :]
    slot = row
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
        mask = tl.where(slot >= 0, mask, False)
    at = state + slot * ss_b + head.to(tl.int64) * ss_h + p[:, None] * ss_p + n[None, :] * ss_n
    s = tl.load(at, mask=mask, other=0.0)
    group = head // PER_GROUP
    b = tl.load(B + row * sb_b + group * sb_g + n * sb_n, mask=mask_n, other=0.0).to(tl.float32)
    c = tl.load(C + row * sc_b + group * sc_g + n * sc_n, mask=mask_n, other=0.0).to(tl.float32)
    value = tl.load(x + row * sx_b + head * sx_h + p * sx_p, mask=mask_p, other=0.0).to(tl.float32)
    if DENSE:
        bias = 0.0 if dt_bias is None else tl.load(dt_bias + head * P + p, mask=mask_p, other=0.0).to(tl.float32)
        raw = tl.load(dt + row * sdt_b + head * sdt_h + p * sdt_p, mask=mask_p, other=0.0)
        step = _step_size(raw, bias, low, high, SOFTPLUS)
        rate = tl.load(A + head * sa_h + p[:, None] * sa_p + n[None, :] * sa_n, mask=mask, other=0.0).to(tl.float32)
        decay = tl.exp(step[:, None] * rate)
    else:
        bias = 0.0 if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
        step = _step_size(tl.load(dt + row * sdt_b + head * sdt_h), bias, low, high, SOFTPLUS)
        decay = tl.exp(step * tl.load(A + head * sa_h).to(tl.float32))
    s = s.to(tl.float32) * decay + (value * step)[:, None] * b[None, :]
    tl.store(at, s.to(state.dtype.element_ty), mask=mask)
    out = tl.sum(s * c[None, :], 1)
    if D_RANK > 0:
        out += value * tl.load(D + (head * P + p if D_RANK == 2 else head + p * 0), mask=mask_p, other=0.0)
    if z is not None:
        out *= _silu(tl.load(z + row * sz_b + head * sz_h + p * sz_p, mask=mask_p, other=0.0).to(tl.float32))
    if slots is not None:
        out = tl.where(slot >= 0, out, 0.0)
    tl.store(y + (row * H + head) * P + p, out.to(y.dtype.element_ty), mask=mask_p)


@op(
    "ssd_state_update",
    fake=lambda call: call.x.new_empty(call.x.shape),
    flops=(lambda call: flops.step((*call.x, call.state[-1])),),
)
def ssd_state_update(call: Update) -> Tensor:
    """See :func:`mamba2_hf.ops.ssd_state_update`."""
    state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, slots = call
    (batch, heads, P), N = x.shape, state.shape[3]
    if call.is_dense:
        dt = dt if dt.dim() == 3 else dt[..., None].expand(-1, -1, P)
        A = A if A.dim() == 3 else A[:, None, None].expand(-1, P, N)
        dt_bias = dt_bias[:, None].expand(-1, P) if dt_bias is not None and dt_bias.dim() == 1 else dt_bias
    y = torch.empty(batch, heads, P, dtype=x.dtype, device=x.device)
    bp, warps = state_programs(batch, P, dense=call.is_dense)
    launch(
        state_update_kernel,
        (batch * heads * cdiv(P, bp),),
        *(state, x, dt, A, B, C, dense(D), z, dense(dt_bias), y, *dt_limit, heads, slots),
        *(*state.stride(), *x.stride(), *_three(dt), *_three(A), *B.stride(), *C.stride()),
        *((0, 0, 0) if z is None else z.stride()),
        D_RANK=0 if D is None else D.dim(),
        SOFTPLUS=dt_softplus,
        PER_GROUP=heads // B.shape[1],
        DENSE=call.is_dense,
        P=P,
        N=N,
        BP=bp,
        BN=power_of_two(N),
        num_warps=warps,
    )
    return y


def _three(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's strides, with zeros for dimensions that it lacks."""
    return (*tensor.stride(), 0, 0)[:3]
