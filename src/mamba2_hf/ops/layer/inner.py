"""A mixer between its two projections for training: convolution, scan and gated norm as one op.

Only the inputs are kept. The backward runs the convolution and the scan once more, then the three backwards, each of
which writes its part of the gradient of the in_proj output where it belongs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..conv import triton as conv
from ..conv.op import Conv
from ..conv.triton import conv_backward, conv_forward, documents
from ..norm import triton as norm
from ..norm.op import Norm
from ..norm.triton import norm_backward, norm_forward
from ..runtime.op import op
from ..scan import triton as scan
from ..scan.op import Scan
from ..scan.problem import Into
from ..scan.triton import ScanPasses
from ..spec import MixerWeights, Packing, SSDShape
from .op import Inner


def supports(
    *, shape: SSDShape, dtype: torch.dtype, taps: int, group_size: int, activation: str | None = None
) -> tuple[bool, str]:
    """Whether all parts of a mixer can be served, and why (not)."""
    parts = (
        conv.supports(taps=taps, dtype=dtype, activation=activation),
        norm.supports(group_size=group_size, dtype=dtype),
        scan.supports(shape=shape, dtype=dtype),
    )
    return next((part for part in parts if not part[0]), (True, "the Triton mixer serves it"))


class Mixer:
    """One call: what its forward and its backward have in common is computed once.

    Args:
        call: the arguments.
    """

    def __init__(self, call: Inner) -> None:
        self.call, self.shape = call, call.shape
        weights, heads, inner = call.weights, self.shape.heads, self.shape.heads * self.shape.head_dim
        self.widths = inner, self.shape.groups * self.shape.state, heads
        self.z = call.zxbcdt[..., :inner]
        self.conv = Conv(
            *(call.zxbcdt[..., inner:-heads], weights.conv_weight, weights.conv_bias, call.conv_initial_states),
            *(call.packing, call.spec.activation),
        )
        self.packing = documents(call.zxbcdt, call.packing)
        self.convolved, self.conv_state = conv_forward(self.conv, self.packing, states=call.states)
        self.scan = ScanPasses(self._scan())

    def _scan(self) -> Scan:
        """Arguments of the scan. Without a norm the gate is the scan's own."""
        call, weights, (inner, maps, heads) = self.call, self.call.weights, self.widths
        x, B, C = self._heads_and_groups(*self.convolved.split([inner, maps, maps], -1))
        dt, packing, documents = call.zxbcdt[..., -heads:], call.packing, self.packing
        stateless = call.ssm_initial_states is None and not call.states
        if documents.ids is not None and packing.cu_seqlens is not None and stateless:
            # Documents without states of their own need no chunks of their own. Past the last one the convolution has
            # left zeros.
            packing = Packing(documents.ids[None])
            dt = dt.masked_fill((documents.ids[None] == documents.states)[..., None], 0.0)
        return Scan(
            *(x, dt, weights.rates, B, C, weights.D),
            self.z.unflatten(-1, (heads, -1)) if weights.gated_norm_weight is None else None,
            *(weights.dt_bias, call.ssm_initial_states, packing, True, call.spec.dt_limit),
        )

    def _heads_and_groups(self, x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, T, H, P)`` and twice ``(B, T, G, N)``."""
        groups = (self.shape.groups, -1)
        return x.unflatten(-1, (-1, self.shape.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def scanned(self) -> tuple[Tensor, Tensor]:
        """The scan's output ``(B, T, H P)`` and final states."""
        y, states = self.scan.forward()
        return y.flatten(-2), states

    def norm(self, y: Tensor) -> Norm:
        """Arguments of the gated norm of the scan's output."""
        weight, spec = self.call.weights.gated_norm_weight, self.call.spec
        assert weight is not None  # asked for where there is one
        return Norm(y, self.z, weight, spec.gated_norm_eps, spec.group_size, spec.norm_before_gate, y.dtype)

    def norm_backward(self, dy: Tensor, y: Tensor, du: Tensor, again: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From the gradient of the gated norm of ``y`` to those of ``y`` and the weight; that of z goes to its place in
        ``du``, what the forward returned to ``again``.
        """
        found = norm_backward(dy, self.norm(y), dz=du[..., : self.z.shape[-1]], y=again)
        return found.x, found.weight

    def backward(
        self, dy: Tensor, dconv_state: Tensor | None, dssm_state: Tensor | None, du: Tensor, dnorm: Tensor | None
    ) -> tuple[MixerWeights, Tensor | None, Tensor | None]:
        """From the gradients of the scan's output and of the gated norm's weight to those of all weights and of both
        initial states. That of ``zxbcdt`` goes to ``du``, but for z's where there is a norm. Called once.
        """
        inner, maps, heads = self.widths
        dconvolved = torch.empty_like(self.convolved)
        into = Into(*self._heads_and_groups(*dconvolved.split([inner, maps, maps], -1)), du[..., -heads:])
        found: tuple[Any, ...] = self.scan.backward(dy.unflatten(-1, (heads, -1)), dssm_state, into)
        _, _, dA, _, _, dD, dz, dbias, dssm = found
        del self.convolved, self.scan, found  # what follows wants their memory
        if dz is not None:
            du[..., :inner] = dz.flatten(-2)
        conv = conv_backward(dconvolved, dconv_state, self.conv, self.packing, dx=du[..., inner:-heads])
        return MixerWeights(conv.weight, conv.bias, dbias, dA, None, dD, dnorm), conv.initial, dssm


def _fake(call: Inner) -> tuple[Tensor, Tensor, Tensor]:
    u, (_, _, heads, P, _, N, states), weight = call.zxbcdt, call.shape, call.weights.conv_weight
    y = u.new_empty(*u.shape[:2], heads * P)
    if not call.states:
        return y, u.new_empty(0), u.new_empty(0)
    final = u.new_empty(states, heads, P, N, dtype=torch.float32)
    return y, u.new_empty(states, weight.shape[0], weight.shape[1] - 1), final


@op("mamba2_inner", fake=_fake)
def mamba2_inner(call: Inner) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.mamba2_inner`; states that are not asked for are empty."""
    mixer = Mixer(call)
    y, ssm_state = mixer.scanned()
    if call.weights.gated_norm_weight is not None:
        y = norm_forward(mixer.norm(y))
    return y, mixer.conv_state, ssm_state if call.states else y.new_empty(0)


@mamba2_inner.backward
def _backward(
    call: Inner, dy: Tensor, dconv_state: Tensor | None, dssm_state: Tensor | None
) -> tuple[Tensor, MixerWeights, Tensor | None, Tensor | None]:
    u = call.zxbcdt
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    mixer = Mixer(call)
    dnorm = None
    if call.weights.gated_norm_weight is not None:
        dy, dnorm = mixer.norm_backward(dy, mixer.scanned()[0], du)
    return du, *mixer.backward(dy, dconv_state, dssm_state, du, dnorm)
