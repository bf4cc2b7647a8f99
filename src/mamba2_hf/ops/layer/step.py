"""Decoding: the state update, the convolution's update, and both fused with step size, skip, gate and norm.

The SSM state is read and written once per call, however many tokens the call has, and stays in registers in between.
In the fused step every head recomputes the convolution of the B and C it shares with others, so the convolution's state
may change only when all of them have read it: a second launch, which the norm needs anyway, writes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import SSDShape
from ..conv.triton import DTYPES, MAX_TAPS, conv_forward, convolve, documents, load_taps
from ..conv.triton import supports as supports_conv
from ..runtime.launch import cdiv, launch, power_of_two
from ..runtime.op import call
from ..runtime.overlap import follow
from ..runtime.rows import channels_last
from ..scan.prep import clamp, softplus

LARGEST = 256  # head dim and state size
NO_GRADIENT = "a step that updates its states in place has no gradient here"
LONGEST_BLOCK = 16  # tokens of a convolution update that are unrolled
CHANNELS = 128  # of a program of the convolution's update
WIDE, NARROW = (64, 2), (16, 2)  # channels of a head and warps per program: to fill memory, or to fill the chip
WIDE_BLOCK, NARROW_BLOCK = (64, 8), (16, 4)  # for several tokens, which keep the taps in registers, too
FEW_ROWS = 8  # batch up to which programs are narrow
FINISH_BLOCK = 1024  # channels of a program of the fused step's second launch


@triton.jit
def _silu(value):
    return value * tl.sigmoid(value)


@triton.jit
def _step_size(dt, dt_bias, low, high, SOFTPLUS: tl.constexpr):
    """``clamp(softplus(dt + dt_bias))`` of one head, fp32."""
    dt = dt.to(tl.float32) + dt_bias
    if SOFTPLUS:
        dt = softplus(dt)
    return clamp(dt, low, high)


@triton.jit
def state_update_kernel(state, x, dt, A, B, C, D, z, dt_bias, y, low, high, H,
                        ss_b, ss_h, ss_p, ss_n, sx_b, sx_h, sx_p, sdt_b, sdt_h, sb_b, sb_g, sb_n, sc_b, sc_g, sc_n,
                        sz_b, sz_h, sz_p,
                        D_RANK: tl.constexpr, SOFTPLUS: tl.constexpr, PER_GROUP: tl.constexpr,
                        P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One step of one block of a head's channels; every stride is free."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (P + BP - 1) // BP
    row, head = (pid // blocks // H).to(tl.int64), pid // blocks % H
    p, n = (pid % blocks) * BP + tl.arange(0, BP), tl.arange(0, BN)
    mask_p, mask_n = p < P, n < N
    mask = mask_p[:, None] & mask_n[None, :]
    at = state + row * ss_b + head.to(tl.int64) * ss_h + p[:, None] * ss_p + n[None, :] * ss_n
    s = tl.load(at, mask=mask, other=0.0)
    group = head // PER_GROUP
    b = tl.load(B + row * sb_b + group * sb_g + n * sb_n, mask=mask_n, other=0.0).to(tl.float32)
    c = tl.load(C + row * sc_b + group * sc_g + n * sc_n, mask=mask_n, other=0.0).to(tl.float32)
    value = tl.load(x + row * sx_b + head * sx_h + p * sx_p, mask=mask_p, other=0.0).to(tl.float32)
    bias = 0.0 if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    step = _step_size(tl.load(dt + row * sdt_b + head * sdt_h), bias, low, high, SOFTPLUS)
    decay = tl.exp(step * tl.load(A + head).to(tl.float32))
    s = s.to(tl.float32) * decay + (value * step)[:, None] * b[None, :]
    tl.store(at, s.to(state.dtype.element_ty), mask=mask)
    out = tl.sum(s * c[None, :], 1)
    if D_RANK > 0:
        out += value * tl.load(D + (head * P + p if D_RANK == 2 else head + p * 0), mask=mask_p, other=0.0)
    if z is not None:
        out *= _silu(tl.load(z + row * sz_b + head * sz_h + p * sz_p, mask=mask_p, other=0.0).to(tl.float32))
    tl.store(y + (row * H + head) * P + p, out.to(y.dtype.element_ty), mask=mask_p)


@triton.jit
def _advance(window, value, taps, offset, SILU: tl.constexpr, K: tl.constexpr):
    """Output of the convolution for one token, and the window moved on by it."""
    total = convolve(window, value, taps, offset, K)
    if SILU:
        total = _silu(total)
    return total, (window + (value,))[1:]


@triton.jit
def conv_update_kernel(x, state, weight, bias, y, C, sx_b, sx_t, ss_b, ss_c, ss_l,
                       SILU: tl.constexpr, T: tl.constexpr, L: tl.constexpr, K: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    """A block of channels of one row: outputs of T new tokens, and the state ``(C, L)`` moved on by T."""
    blocks = tl.cdiv(C, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    at = state + row * ss_b + channel.to(tl.int64) * ss_c
    inputs = ()
    for i in tl.static_range(L):
        inputs = inputs + (tl.load(at + i * ss_l, mask=inside, other=0.0).to(x.dtype.element_ty),)
    for t in tl.static_range(T):
        inputs = inputs + (tl.load(x + row * sx_b + t * sx_t + channel, mask=inside, other=0.0),)
    tl.debug_barrier()  # threads store to columns that others have loaded
    for i in tl.static_range(L):
        tl.store(at + i * ss_l, inputs[T + i].to(state.dtype.element_ty), mask=inside)
    taps, offset = load_taps(weight, bias, channel, inside, K)
    window = ()
    for i in tl.static_range(K - 1):
        window = window + (inputs[L - (K - 1) + i].to(tl.float32),)
    for t in tl.static_range(T):
        total, window = _advance(window, inputs[L + t].to(tl.float32), taps, offset, SILU, K)
        tl.store(y + (row * T + t) * C + channel, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def columns_of(conv, channel, mask, sc_c, sc_l, L: tl.constexpr):
    """The convolution's last ``L`` inputs, oldest first."""
    columns = ()
    for i in tl.static_range(L):
        columns = columns + (tl.load(conv + channel * sc_c + i * sc_l, mask=mask, other=0.0),)
    return columns


@triton.jit
def convolve_columns(columns, new, taps, offset, dtype, SILU: tl.constexpr, L: tl.constexpr, K: tl.constexpr):
    """The convolution's output for the input ``new``."""
    window = ()
    for i in tl.static_range(K - 1):
        window = window + (columns[L - (K - 1) + i].to(dtype).to(tl.float32),)
    out = convolve(window, new, taps, offset, K)
    if SILU:
        out = _silu(out)
    return out


@triton.jit
def move_columns(conv, columns, new, channel, mask, sc_c, sc_l, L: tl.constexpr):
    """Moves the convolution's state on; all of the program has read it before."""
    for i in tl.static_range(L):
        value = new if i == L - 1 else columns[i + 1]
        tl.store(conv + channel * sc_c + i * sc_l, value.to(conv.dtype.element_ty), mask=mask)


@triton.jit
def _window(conv, channel, mask, dtype, sc_c, sc_l, L, K: tl.constexpr):
    """The K - 1 inputs before the new tokens, oldest first, rounded to the dtype of those."""
    window = ()
    for i in tl.static_range(K - 1):
        value = tl.load(conv + channel * sc_c + (L - (K - 1) + i) * sc_l, mask=mask, other=0.0)
        window = window + (value.to(dtype).to(tl.float32),)
    return window


@triton.jit
def step_kernel(u, conv, state, weight, bias, dt_bias, A, D, scale, y, squares, low, high, H, T, L,
                su_b, su_t, sc_b, sc_c, sc_l, ss_b, ss_h, ss_p, ss_n,
                LOG_RATES: tl.constexpr, SILU: tl.constexpr, D_RANK: tl.constexpr, GATE: tl.constexpr,
                PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                BP: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """All T tokens of one block of a head's channels, from the in_proj output ``u`` (z, x, B, C, dt) to ``y``.

    ``A (H,)`` holds decay rates, or with ``LOG_RATES`` the logarithms of their negatives. ``conv (B, C, L)`` is only
    read. Where a norm follows, ``squares (B T, H, blocks)`` receives the sum of squares of the block's outputs;
    ``scale (H P,)`` is multiplied to these after that.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = (P + BP - 1) // BP
    row, head, block = (pid // blocks // H).to(tl.int64), pid // blocks % H, pid % blocks
    p, n = block * BP + tl.arange(0, BP), tl.arange(0, BN)
    mask_p, mask_n = p < P, n < N
    at = state + row * ss_b + head.to(tl.int64) * ss_h + p[:, None] * ss_p + n[None, :] * ss_n
    mask = mask_p[:, None] & mask_n[None, :]
    s = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    inner = H * P
    group, groups = head // PER_GROUP, H // PER_GROUP
    of_x, of_b = head * P + p, inner + group * N + n
    of_c = of_b + groups * N
    u += row * su_b
    conv += row * sc_b
    taps_x, bias_x = load_taps(weight, bias, of_x, mask_p, K)
    taps_b, bias_b = load_taps(weight, bias, of_b, mask_n, K)
    taps_c, bias_c = load_taps(weight, bias, of_c, mask_n, K)
    window_x = _window(conv, of_x, mask_p, u.dtype.element_ty, sc_c, sc_l, L, K)
    window_b = _window(conv, of_b, mask_n, u.dtype.element_ty, sc_c, sc_l, L, K)
    window_c = _window(conv, of_c, mask_n, u.dtype.element_ty, sc_c, sc_l, L, K)
    rate = tl.load(A + head).to(tl.float32)
    if LOG_RATES:
        rate = -tl.exp(rate)
    offset = 0.0 if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    if D_RANK > 0:
        skip = tl.load(D + (head * P + p if D_RANK == 2 else head + p * 0), mask=mask_p, other=0.0).to(tl.float32)
    follow(OVERLAP)
    for t in range(0, T):
        token = u + t * su_t
        new_x = tl.load(token + inner + of_x, mask=mask_p, other=0.0).to(tl.float32)
        new_b = tl.load(token + inner + of_b, mask=mask_n, other=0.0).to(tl.float32)
        new_c = tl.load(token + inner + of_c, mask=mask_n, other=0.0).to(tl.float32)
        dt = tl.load(token + 2 * inner + 2 * groups * N + head)
        x, window_x = _advance(window_x, new_x, taps_x, bias_x, SILU, K)
        b, window_b = _advance(window_b, new_b, taps_b, bias_b, SILU, K)
        c, window_c = _advance(window_c, new_c, taps_c, bias_c, SILU, K)
        step = _step_size(dt, offset, low, high, True)
        s = s * tl.exp(step * rate) + (x * step)[:, None] * b[None, :]
        out = tl.sum(s * c[None, :], 1)
        if D_RANK > 0:
            out += x * skip
        if GATE:
            out *= _silu(tl.load(token + of_x, mask=mask_p, other=0.0).to(tl.float32))
        line = (row * T + t) * H + head
        if squares is not None:
            tl.store(squares + line * blocks + block, tl.sum(tl.where(mask_p, out * out, 0.0), 0))
        if scale is not None:
            out *= tl.load(scale + of_x, mask=mask_p, other=0.0).to(tl.float32)
        tl.store(y + line * P + p, out.to(y.dtype.element_ty), mask=mask_p)
    tl.store(at, s.to(state.dtype.element_ty), mask=mask)


@triton.jit
def _scale(pid, raw, squares, u, weight, y, T, width, parts, eps, su_b, su_t,
           SIZE: tl.constexpr, GATE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The rest of the norm for one block of one group, given the ``parts`` sums of squares of the group."""
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    groups = width // SIZE
    line, group = (pid // blocks // groups).to(tl.int64), pid // blocks % groups
    inside = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    channel, mask = group * SIZE + inside, inside < SIZE
    part = tl.arange(0, PARTS)
    total = tl.sum(tl.load(squares + (line * groups + group) * parts + part, mask=part < parts, other=0.0), 0)
    value = tl.load(raw + line * width + channel, mask=mask, other=0.0) * tl.rsqrt(total / SIZE + eps)
    value *= tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    if GATE:
        z = tl.load(u + line // T * su_b + line % T * su_t + channel, mask=mask, other=0.0)
        value *= _silu(z.to(tl.float32))
    tl.store(y + line * width + channel, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _shift(pid, u, conv, T, width, C, su_b, su_t, sc_b, sc_c, sc_l, L: tl.constexpr, BLOCK: tl.constexpr):
    """Moves a block of channels of one row's ``conv (C, L)`` on by the T new inputs, in place."""
    blocks = tl.cdiv(C, BLOCK)
    row, channel = (pid // blocks).to(tl.int64), pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    at = conv + row * sc_b + channel * sc_c
    columns = ()
    for i in tl.static_range(L):
        new = T + i - L  # the token that column i will hold, or one from before
        kept = tl.load(at + (T + i) * sc_l, mask=channel < tl.where(new < 0, C, 0), other=0.0)
        token = u + row * su_b + new * su_t + width + channel
        value = tl.load(token, mask=channel < tl.where(new < 0, 0, C), other=0.0)
        columns = columns + (tl.where(new < 0, kept, value.to(conv.dtype.element_ty)),)
    tl.debug_barrier()  # threads store to columns that others have loaded
    for i in tl.static_range(L):
        tl.store(at + i * sc_l, columns[i], mask=inside)


@triton.jit
def finish_kernel(raw, squares, u, weight, y, conv, T, width, parts, eps, C, scales,
                  su_b, su_t, sc_b, sc_c, sc_l,
                  SIZE: tl.constexpr, GATE: tl.constexpr, PARTS: tl.constexpr, L: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """What waits for all of ``step_kernel``: the first ``scales`` programs norm, the others move the conv state on."""
    pid = tl.program_id(0)
    if pid < scales:
        if squares is not None:
            _scale(pid, raw, squares, u, weight, y, T, width, parts, eps, su_b, su_t, SIZE, GATE, PARTS, BLOCK)
    else:
        _shift(pid - scales, u, conv, T, width, C, su_b, su_t, sc_b, sc_c, sc_l, L, BLOCK)


def supports_update(*, shape: SSDShape, dtype: torch.dtype, differentiable: bool = False) -> tuple[bool, str]:
    """Whether a state update can be served, and why (not)."""
    if differentiable:
        return False, NO_GRADIENT
    if dtype not in DTYPES:
        return False, f"dtype {dtype} is not bfloat16, float16 or float32"
    if max(shape.head_dim, shape.state) > LARGEST:
        return False, f"head_dim {shape.head_dim} or state size {shape.state} is above {LARGEST}"
    return True, "the Triton update serves it"


def supports_conv_update(*, taps: int, dtype: torch.dtype, differentiable: bool = False) -> tuple[bool, str]:
    """Whether a convolution's update can be served, and why (not)."""
    return (False, NO_GRADIENT) if differentiable else supports_conv(taps=taps, dtype=dtype)


def supports_step(
    *, shape: SSDShape, dtype: torch.dtype, taps: int, group_size: int, differentiable: bool = False
) -> tuple[bool, str]:
    """Whether a fused step can be served, and why (not)."""
    if taps > MAX_TAPS:
        return False, f"{taps} taps are more than {MAX_TAPS}"
    if group_size % shape.head_dim:
        return False, f"group_size {group_size} is no multiple of head_dim {shape.head_dim}"
    return supports_update(shape=shape, dtype=dtype, differentiable=differentiable)


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    shape: SSDShape,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> Tensor:
    """See :func:`mamba2_hf.ops.ssd_state_update`."""
    return call("ssd_state_update", state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *map(float, dt_limit))


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None
) -> Tensor:
    """See :func:`mamba2_hf.ops.causal_conv1d_update`."""
    block = x[:, None] if x.dim() == 2 else x
    y = call("causal_conv1d_update", block, conv_state, weight, bias, activation is not None)
    return y[:, 0] if x.dim() == 2 else y


def mamba2_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    *,
    norm_weight: Tensor | None,
    shape: SSDShape,
    activation: str | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    dt_limit: tuple[float, float],
    log_rates: bool = False,
) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_step`."""
    return call(
        "mamba2_step",
        *(zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D, norm_weight),
        *(shape.groups, activation is not None, eps, group_size, norm_before_gate, *map(float, dt_limit), log_rates),
    )


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    """Launches one step of the recurrence; ``state`` is updated in place."""
    batch, heads, P, N = state.shape
    y = torch.empty(batch, heads, P, dtype=x.dtype, device=x.device)
    bp, warps = _tile(batch, P)
    launch(
        state_update_kernel,
        (batch * heads * cdiv(P, bp),),
        *(state, x, dt, A.contiguous(), B, C, _dense(D), z, _dense(dt_bias), y, low, high, heads),
        *(*state.stride(), *x.stride(), *dt.stride(), *B.stride(), *C.stride()),
        *((0, 0, 0) if z is None else z.stride()),
        D_RANK=0 if D is None else D.dim(),
        SOFTPLUS=dt_softplus,
        PER_GROUP=heads // B.shape[1],
        P=P,
        N=N,
        BP=bp,
        BN=power_of_two(N),
        num_warps=warps,
    )
    return y


def conv_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Launches the convolution of a short block ``(B, T, C)``; ``conv_state (B, C, L)`` is moved on in place."""
    batch, tokens, channels = x.shape
    if tokens > LONGEST_BLOCK:
        history = conv_state[..., conv_state.shape[2] - weight.shape[1] + 1 :]
        y, _ = conv_forward(x, weight, bias, history, documents(x, None, None), silu)
        conv_state.copy_(torch.cat([conv_state, x.mT.to(conv_state.dtype)], -1)[..., tokens:])
        return y
    x = channels_last(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        conv_update_kernel,
        (batch * cdiv(channels, CHANNELS),),
        *(x, conv_state, weight.contiguous(), _dense(bias), y, channels),
        *(*x.stride()[:2], *conv_state.stride()),
        SILU=silu,
        T=tokens,
        L=conv_state.shape[2],
        K=weight.shape[1],
        BLOCK=CHANNELS,
        num_warps=1,
    )
    return y


def mixer_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor | None,
    n_groups: int,
    silu: bool,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    low: float,
    high: float,
    log_rates: bool,
) -> Tensor:
    """Launches the fused step of ``(B, T, ...)`` new tokens; both states are updated in place."""
    batch, tokens, _ = zxbcdt.shape
    heads, P, N = ssm_state.shape[1:]
    channels, taps = conv_weight.shape
    width = heads * P
    u = channels_last(zxbcdt)
    y = torch.empty(batch, tokens, width, dtype=u.dtype, device=u.device)
    bp, warps = _tile(batch, P, tokens)
    blocks = cdiv(P, bp)
    raw, squares = y, None
    if norm_weight is not None:
        raw = torch.empty(y.shape, dtype=torch.float32, device=u.device)
        squares = torch.empty(batch * tokens, heads * blocks, dtype=torch.float32, device=u.device)
    launch(
        step_kernel,
        (batch * heads * blocks,),
        *(u, conv_state, ssm_state, conv_weight.contiguous(), _dense(conv_bias), _dense(dt_bias), A.contiguous()),
        *(_dense(D), None, raw, squares, low, high, heads, tokens, conv_state.shape[2]),
        *(*u.stride()[:2], *conv_state.stride(), *ssm_state.stride()),
        LOG_RATES=log_rates,
        SILU=silu,
        D_RANK=0 if D is None else D.dim(),
        GATE=norm_weight is None or not norm_before_gate,
        PER_GROUP=heads // n_groups,
        P=P,
        N=N,
        K=taps,
        BP=bp,
        BN=power_of_two(N),
        OVERLAP=False,
        num_warps=warps,
    )
    scales = 0 if squares is None else batch * tokens * (width // group_size) * cdiv(group_size, FINISH_BLOCK)
    parts = group_size // P * blocks
    launch(
        finish_kernel,
        (scales + batch * cdiv(channels, FINISH_BLOCK),),
        *(raw, squares, u, _dense(norm_weight), y, conv_state, tokens, width, parts, eps, channels, scales),
        *(*u.stride()[:2], *conv_state.stride()),
        SIZE=group_size,
        GATE=norm_before_gate,
        PARTS=power_of_two(parts),
        L=conv_state.shape[2],
        BLOCK=FINISH_BLOCK,
    )
    return y


def _tile(batch: int, P: int, tokens: int = 1) -> tuple[int, int]:
    """Channels and warps of a program."""
    few, many = (NARROW, WIDE) if tokens == 1 else (NARROW_BLOCK, WIDE_BLOCK)
    channels, warps = few if batch <= FEW_ROWS else many
    return min(channels, power_of_two(P)), warps


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
