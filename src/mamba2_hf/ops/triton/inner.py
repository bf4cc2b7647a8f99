"""A mixer between its two projections for training: convolution, scan and gated norm as one op.

Only the inputs are kept. The backward runs the convolution and the scan once more, then the three backwards, each of
which writes its part of the gradient of the in_proj output into one buffer. The convolution is depthwise, so its
backward takes x, B and C apart, as the scan's backward returns their gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import SSDShape
from . import conv, norm, ssd
from .conv import conv_backward, conv_forward, documents
from .norm import norm_backward, norm_forward
from .ssd import scan_backward, scan_forward


class Arguments(NamedTuple):
    """The op's arguments, in one order for forward, backward and autograd."""

    zxbcdt: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor | None
    A: Tensor
    D: Tensor | None
    norm_weight: Tensor | None
    conv_initial_states: Tensor | None
    ssm_initial_states: Tensor | None
    seq_idx: Tensor | None
    cu_seqlens: Tensor | None
    head_dim: int
    n_groups: int
    silu: bool
    eps: float
    group_size: int
    norm_before_gate: bool
    low: float
    high: float

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of x (and of z), of B (and of C), and of dt."""
        heads = self.A.shape[0]
        inner = heads * self.head_dim
        return inner, (self.zxbcdt.shape[-1] - 2 * inner - heads) // 2, heads

    def scan(self, convolved: Tensor) -> tuple[Any, ...]:
        """Arguments of the scan. Without a norm the gate is the scan's own."""
        inner, maps, heads = self.widths
        x, B, C = convolved.split([inner, maps, maps], -1)
        z, dt = self.zxbcdt[..., :inner], self.zxbcdt[..., -heads:]
        return (
            *(x.unflatten(-1, (heads, -1)), dt, self.A),
            *(B.unflatten(-1, (self.n_groups, -1)), C.unflatten(-1, (self.n_groups, -1)), self.D),
            z.unflatten(-1, (heads, -1)) if self.norm_weight is None else None,
            *(self.dt_bias, self.ssm_initial_states, self.seq_idx, self.cu_seqlens, True, self.low, self.high),
        )


def supports(*, shape: SSDShape, dtype: torch.dtype, taps: int, group_size: int) -> tuple[bool, str]:
    """Whether all parts of a mixer can be served, and why (not)."""
    parts = (
        conv.supports(taps=taps, dtype=dtype),
        norm.supports(group_size=group_size, dtype=dtype),
        ssd.supports(shape=shape, dtype=dtype),
    )
    return next((part for part in parts if not part[0]), (True, "the Triton mixer serves it"))


def mamba2_inner(
    zxbcdt: Tensor,
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
    chunk_size: int | None,
    conv_initial_states: Tensor | None,
    ssm_initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.mamba2_inner`."""
    y, conv_state, ssm_state = torch.ops.mamba2_hf.mamba2_inner(
        *(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, conv_initial_states, ssm_initial_states),
        *(seq_idx, cu_seqlens, shape.head_dim, shape.groups, activation is not None, eps, group_size),
        *(norm_before_gate, *map(float, dt_limit)),
    )
    return y, conv_state, ssm_state


def inner_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``y (B, T, H P)`` and both final states, given the fields of :class:`Arguments`."""
    call = Arguments(*args)
    convolved, conv_state = _convolve(call)
    y, ssm_state = scan_forward(*call.scan(convolved))
    y = y.flatten(-2)
    if call.norm_weight is not None:
        z = call.zxbcdt[..., : y.shape[-1]]
        y = norm_forward(y, z, call.norm_weight, call.eps, call.group_size, call.norm_before_gate, y.dtype)
    return y, conv_state, ssm_state


def inner_backward(
    dy: Tensor, dconv_state: Tensor | None, dssm_state: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of the nine tensors that open :class:`Arguments`, given those of what :func:`inner_forward` returns."""
    call = Arguments(*args)
    inner, maps, heads = call.widths
    u = call.zxbcdt
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    convolved, _ = _convolve(call)
    scan = call.scan(convolved)
    dnorm = None
    if call.norm_weight is not None:
        y = scan_forward(*scan)[0].flatten(-2)
        dy, _, dnorm = norm_backward(
            *(dy, y, u[..., :inner], call.norm_weight, call.eps, call.group_size, call.norm_before_gate),
            dz=du[..., :inner],
        )
        del y
    found: tuple[Any, ...] = scan_backward(dy.unflatten(-1, (heads, -1)), dssm_state, *scan)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dssm = found
    del convolved, scan, found
    if dz is not None:
        du[..., :inner] = dz.flatten(-2)
    du[..., -heads:] = ddt

    packing = documents(u, call.seq_idx, call.cu_seqlens)
    parts: list[Any] = []
    first = 0
    for gradient, width in ((dx, inner), (dB, maps), (dC, maps)):
        channels, last = slice(first, first + width), first + width
        parts.append(
            conv_backward(
                gradient.flatten(-2),
                None if dconv_state is None else dconv_state[:, channels],
                u[..., inner + first : inner + last],
                call.conv_weight[channels],
                None if call.conv_bias is None else call.conv_bias[channels],
                None if call.conv_initial_states is None else call.conv_initial_states[:, channels],
                packing,
                call.silu,
                dx=du[..., inner + first : inner + last],
            )
        )
        first = last
    dconv = None if call.conv_initial_states is None else torch.cat([p.initial for p in parts], 1)
    dconv_bias = None if call.conv_bias is None else torch.cat([p.bias for p in parts])
    return du, torch.cat([p.weight for p in parts]), dconv_bias, dbias, dA, dD, dnorm, dconv, dssm


def _convolve(call: Arguments) -> tuple[Tensor, Tensor]:
    inner, _, heads = call.widths
    xbc = call.zxbcdt[..., inner:-heads]
    packing = documents(xbc, call.seq_idx, call.cu_seqlens)
    return conv_forward(xbc, call.conv_weight, call.conv_bias, call.conv_initial_states, packing, call.silu)
