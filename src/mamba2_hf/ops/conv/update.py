"""The convolution's update on Triton, for a short block or the one token of a step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.op import op
from ..runtime.rows import channels_last, dense
from ..runtime.tables import cdiv
from ..scan.prep import _silu
from ..spec import UNPACKED
from .op import Conv, ConvUpdate
from .triton import SILU, conv_forward, convolve, documents, load_taps
from .triton import supports as supports_conv

LONGEST_BLOCK = 16  # tokens of a convolution update that are unrolled
CHANNELS = 128  # of a program of the convolution's update
NO_GRADIENT = "a step that updates its states in place has no gradient here"


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


def supports(
    *, taps: int, dtype: torch.dtype, activation: str | None = None, differentiable: bool = False
) -> tuple[bool, str]:
    """Whether a convolution's update can be served, and why (not)."""
    return (False, NO_GRADIENT) if differentiable else supports_conv(taps=taps, dtype=dtype, activation=activation)


@op("causal_conv1d_update", fake=lambda call: call.x.new_empty(call.x.shape))
def update(call: ConvUpdate) -> Tensor:
    """Launches the convolution of a short block ``(B, T, C)``; ``conv_state (B, C, L)`` is moved on in place."""
    x, conv_state, weight, bias, activation = call
    batch, tokens, channels = x.shape
    if tokens > LONGEST_BLOCK:
        history = conv_state[..., conv_state.shape[2] - weight.shape[1] + 1 :]
        y, _ = conv_forward(Conv(x, weight, bias, history, UNPACKED, activation), documents(x, UNPACKED))
        conv_state.copy_(torch.cat([conv_state, x.mT.to(conv_state.dtype)], -1)[..., tokens:])
        return y
    x = channels_last(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        conv_update_kernel,
        (batch * cdiv(channels, CHANNELS),),
        *(x, conv_state, weight.contiguous(), dense(bias), y, channels),
        *(*x.stride()[:2], *conv_state.stride()),
        SILU=SILU[activation],
        T=tokens,
        L=conv_state.shape[2],
        K=weight.shape[1],
        BLOCK=CHANNELS,
        num_warps=1,
    )
    return y


def causal_conv1d_update(call: ConvUpdate) -> Tensor:
    """See :func:`mamba2_hf.ops.causal_conv1d_update`."""
    if call.x.dim() == 3:
        y: Tensor = update(call)
        return y
    return update(call._replace(x=call.x[:, None]))[:, 0]
