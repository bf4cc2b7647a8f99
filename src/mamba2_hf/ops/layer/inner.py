"""A mixer between its two projections for training: convolution, scan and gated norm as one op.

Only the inputs are kept. The backward runs the convolution and the scan once more, then the three backwards, each of
which writes its part of the gradient of the in_proj output where it belongs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import SSDShape
from ..conv import triton as conv
from ..conv.triton import Documents, conv_backward, conv_forward, documents
from ..norm import triton as norm
from ..norm.triton import norm_backward, norm_forward
from ..runtime.op import call
from ..scan import triton as ssd
from ..scan.problem import Into
from ..scan.triton import Scan


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
    states: bool
    low: float
    high: float

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of x (and of z), of B (and of C), and of dt."""
        heads = self.A.shape[0]
        inner = heads * self.head_dim
        return inner, (self.zxbcdt.shape[-1] - 2 * inner - heads) // 2, heads

    def heads_and_groups(self, x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, T, H, P)`` and twice ``(B, T, G, N)``."""
        groups = (self.n_groups, -1)
        return x.unflatten(-1, (-1, self.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def scan(self, convolved: Tensor, packing: Documents) -> tuple[Any, ...]:
        """Arguments of the scan. Without a norm the gate is the scan's own."""
        inner, maps, heads = self.widths
        x, B, C = self.heads_and_groups(*convolved.split([inner, maps, maps], -1))
        z, dt = self.zxbcdt[..., :inner], self.zxbcdt[..., -heads:]
        seq_idx, cu_seqlens = self.seq_idx, self.cu_seqlens
        if packing.ids is not None and cu_seqlens is not None and self.ssm_initial_states is None and not self.states:
            # Documents without states of their own need no chunks of their own. Past the last one the convolution has
            # left zeros.
            seq_idx, cu_seqlens = packing.ids[None], None
            dt = dt.masked_fill((seq_idx == packing.states)[..., None], 0.0)
        return (
            *(x, dt, self.A, B, C, self.D),
            z.unflatten(-1, (heads, -1)) if self.norm_weight is None else None,
            *(self.dt_bias, self.ssm_initial_states, seq_idx, cu_seqlens, True, self.low, self.high),
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
    return_final_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.mamba2_inner`; states that are not asked for are empty."""
    y, conv_state, ssm_state = call(
        "mamba2_inner",
        *(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, conv_initial_states, ssm_initial_states),
        *(seq_idx, cu_seqlens, shape.head_dim, shape.groups, activation is not None, eps, group_size),
        *(norm_before_gate, return_final_states, *map(float, dt_limit)),
    )
    return y, conv_state, ssm_state


class Mixer:
    """One call: what its forward and its backward have in common is computed once.

    Args:
        call: the arguments.
    """

    def __init__(self, call: Arguments) -> None:
        self.call = call
        inner, _, heads = call.widths
        self.z, self.xbc = call.zxbcdt[..., :inner], call.zxbcdt[..., inner:-heads]
        self.packing = documents(call.zxbcdt, call.seq_idx, call.cu_seqlens)
        self.convolved, self.conv_state = conv_forward(
            *(self.xbc, call.conv_weight, call.conv_bias, call.conv_initial_states, self.packing, call.silu),
            states=call.states,
        )
        self.scan = Scan(*call.scan(self.convolved, self.packing))

    def scanned(self) -> tuple[Tensor, Tensor]:
        """The scan's output ``(B, T, H P)`` and final states."""
        y, states = self.scan.forward()
        return y.flatten(-2), states

    def normed(self, y: Tensor, weight: Tensor) -> Tensor:
        """The gated norm of the scan's output."""
        call = self.call
        return norm_forward(y, self.z, weight, call.eps, call.group_size, call.norm_before_gate, y.dtype)

    def norm_backward(
        self, dy: Tensor, y: Tensor, weight: Tensor, du: Tensor, again: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """From the gradient of :meth:`normed` to those of ``y`` and the weight; that of z goes to its place in ``du``,
        what the forward returned to ``again``.
        """
        call = self.call
        dz = du[..., : self.z.shape[-1]]
        options = call.eps, call.group_size, call.norm_before_gate
        found = norm_backward(dy, y, self.z, weight, *options, dz=dz, y=again)
        return found.x, found.weight

    def backward(
        self, dy: Tensor, dconv_state: Tensor | None, dssm_state: Tensor | None, du: Tensor
    ) -> tuple[Tensor | None, ...]:
        """From the gradient of the scan's output to those of conv_weight, conv_bias, dt_bias, A, D and both initial
        states. That of ``zxbcdt`` goes to ``du``, but for z's where there is a norm. Called once.
        """
        call = self.call
        inner, maps, heads = call.widths
        dconvolved = torch.empty_like(self.convolved)
        dx, dB, dC = dconvolved.split([inner, maps, maps], -1)
        into = Into(*call.heads_and_groups(dx, dB, dC), du[..., -heads:])
        found: tuple[Any, ...] = self.scan.backward(dy.unflatten(-1, (heads, -1)), dssm_state, into)
        _, _, dA, _, _, dD, dz, dbias, dssm = found
        del self.convolved, self.scan, found  # what follows wants their memory
        if dz is not None:
            du[..., :inner] = dz.flatten(-2)
        _, dweight, dconv_bias, dconv = conv_backward(
            *(dconvolved, dconv_state, self.xbc, call.conv_weight, call.conv_bias, call.conv_initial_states),
            *(self.packing, call.silu),
            dx=du[..., inner:-heads],
        )
        return dweight, dconv_bias, dbias, dA, dD, dconv, dssm


def inner_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``y (B, T, H P)`` and both final states (empty unless wanted), given the fields of :class:`Arguments`."""
    call = Arguments(*args)
    mixer = Mixer(call)
    y, ssm_state = mixer.scanned()
    if call.norm_weight is not None:
        y = mixer.normed(y, call.norm_weight)
    return y, mixer.conv_state, ssm_state if call.states else y.new_empty(0)


def inner_backward(
    dy: Tensor, dconv_state: Tensor | None, dssm_state: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of the nine tensors that open :class:`Arguments`, given those of what :func:`inner_forward` returns."""
    call = Arguments(*args)
    u = call.zxbcdt
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    mixer = Mixer(call)
    dnorm = None
    if call.norm_weight is not None:
        dy, dnorm = mixer.norm_backward(dy, mixer.scanned()[0], call.norm_weight, du)
    dweight, dconv_bias, dbias, dA, dD, dconv, dssm = mixer.backward(dy, dconv_state, dssm_state, du)
    return du, dweight, dconv_bias, dbias, dA, dD, dnorm, dconv, dssm
