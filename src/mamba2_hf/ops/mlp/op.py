"""Feed-forward layers: arguments, contracts, and the choice of a backend.

The products of many tokens are PyTorch's. What is an op is the gated activation between them, and the whole layer for
one token of one sequence, where reading weights once is all that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_devices, check_floating, check_rank, check_same_dtype, check_shape, fail
from ..partners import Joined
from ..runtime.modes import needs_grad
from ..spec import Linear, Peers

ACTIVATIONS = ("silu", "gelu", "relu2")
"""By name: SiLU, the exact GELU, and ``max(x, 0) ** 2``."""


EXPERTS_ROWS = 16
"""Sequences up to which a step of experts reads them for each of its choices."""


class Gated(NamedTuple):
    """Arguments of :func:`gated_activation`."""

    gate: Tensor
    up: Tensor | None
    activation: str
    multiplier: float = 1.0
    packed: bool = False
    """Whether ``gate (..., 2 I)`` holds what would be ``up`` behind itself."""

    @property
    def halves(self) -> tuple[Tensor, Tensor | None]:
        """Gate and up."""
        gate, up = self.gate.chunk(2, -1) if self.packed else (self.gate, self.up)
        return gate, up


class MLPStep(NamedTuple):
    """Arguments of :func:`mlp_step`: ``residual + m' down(activation(m gate(x)) * up(x))`` of ``x = norm(stream)``."""

    stream: Tensor
    """``(1, 1, d)``"""
    norm_weight: Tensor
    """``(d,)``"""
    gate_weight: Tensor | None
    """``(I, d)``; None without a gate, when the activation is that of ``up``."""
    gate_bias: Tensor | None
    """``(I,)``"""
    up: Linear
    """To I."""
    down: Linear
    """From I."""
    activation: str
    norm_eps: float = 1e-5
    multiplier: float = 1.0
    """m, of what the activation gets."""
    output_multiplier: float = 1.0
    """m', of the result."""
    residual: Tensor | None = None
    """``(1, 1, d)``; None for the stream."""
    peers: Peers = Peers()
    """Devices that have the other inner channels."""
    part: bool = False
    """Whether to find what is summed over devices, and no more: fp32 at least, without residual and bias of down."""

    @property
    def added_to(self) -> Tensor:
        """What the layer's result is added to."""
        return self.stream if self.residual is None else self.residual


class ExpertsStep(NamedTuple):
    """Arguments of :func:`experts_step`: a router and the experts that it chooses, for one token of each sequence."""

    stream: Tensor
    """``(B, 1, d)``"""
    norm_weight: Tensor
    """``(d,)``"""
    router: Tensor
    """``(E, d)``"""
    inner: Tensor
    """``(E, 2 I, d)``, gates before ups, or ``(E, I, d)`` without gates."""
    down: Tensor
    """``(E, d, I)``"""
    top_k: int
    activation: str
    gated: bool = True
    norm_eps: float = 1e-5
    output_multiplier: float = 1.0
    residual: Tensor | None = None
    """``(B, 1, d)``; None for the stream."""
    peers: Peers = Peers()
    """Devices that have the other inner channels of every expert."""
    part: bool = False
    """Whether to find what is summed over devices, and no more: fp32 at least, without residual."""

    @property
    def added_to(self) -> Tensor:
        """What the layer's result is added to."""
        return self.stream if self.residual is None else self.residual


def gated_activation(
    gate: Tensor,
    up: Tensor | None,
    activation: str = "silu",
    multiplier: float = 1.0,
    packed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``activation(multiplier * gate) * up`` (GLU variants, Shazeer 2020), differentiable in both; computed in fp32.

    Args:
        gate, up: ``(..., I)``; None for ``up`` leaves the product out.
        activation: one of ``ACTIVATIONS``.
        multiplier: of the gate.
        packed: whether ``gate (..., 2 I)`` holds both, the gate first, and ``up`` is None.
        backend: as in :func:`ssd_chunk_scan`.

    Returns:
        ``(..., I)`` in the dtype of ``gate``. On Triton the inputs are kept for the backward, and nothing else.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    check_floating(gate=gate)
    if up is not None:
        check_shape("up", up, tuple(gate.shape), "as gate")
        check_same_dtype(gate=gate, up=up)
        check_devices(gate.device, up=up)
    if packed and (up is not None or gate.shape[-1] % 2):
        fail(f"packed gate has {gate.shape[-1]} channels, expected an even number, and no up beside it")
    _check_activation(activation)
    backend = dispatch.choose("gated_activation", gate.device, backend, dtype=gate.dtype).name
    y: Tensor = dispatch.backend_module(backend).gated_activation(Gated(gate, up, activation, multiplier, packed))
    return y


def mlp_step(call: MLPStep, backend: str | None = None, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """A feed-forward layer for one token: ``(1, 1, d)`` in the dtype of the stream. ``total`` is as in
    :func:`layer_step`, of a layer of which every device has some of the inner channels, and the bias of ``down``.
    """
    stream, down = call.stream, call.down.weight
    check_shape("stream", stream, (1, 1, stream.shape[-1]), "(1, 1, d)")
    check_rank("down", down, 2, "(d, I)")
    sizes = (down.shape[1], stream.shape[-1])
    check_shape("up", call.up.weight, sizes, "(I, d)")
    check_shape("down", down, sizes[::-1], "(d, I)")
    if call.gate_weight is not None:
        check_shape("gate", call.gate_weight, sizes, "(I, d)")
        check_same_dtype(gate=call.gate_weight, up=call.up.weight)
    check_same_dtype(up=call.up.weight, down=down)
    check_devices(stream.device, up=call.up.weight, down=down, gate=call.gate_weight, residual=call.residual)
    _check_activation(call.activation)
    differentiable = needs_grad(stream, call.gate_weight, call.up.weight, down)
    backend = dispatch.choose("mlp_step", stream.device, backend, dtype=down.dtype, differentiable=differentiable).name
    module = dispatch.backend_module(backend)
    if total is None or module.sums_over_peers(call):
        y: Tensor = module.mlp_step(call)
        return y
    part = module.mlp_step(call._replace(part=True))
    y = module.joined(Joined(total(part), call.added_to, call.down.bias, call.output_multiplier))
    return y


def experts_step(
    call: ExpertsStep, backend: str | None = None, total: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """A layer of experts for one token a sequence: ``(B, 1, d)`` in the dtype of the stream, and the router's logits
    ``(B, E)`` in fp32. The weights of the chosen experts are a softmax over their logits alone. ``total`` is as in
    :func:`layer_step`, of experts of which every device has some of the inner channels.
    """
    stream, router, inner, down = call.stream, call.router, call.inner, call.down
    check_rank("stream", stream, 3, "(B, 1, d)")
    check_shape("stream", stream, (stream.shape[0], 1, stream.shape[2]), "(B, 1, d)")
    check_rank("router", router, 2, "(E, d)")
    check_rank("down", down, 3, "(E, d, I)")
    (experts, size), width = router.shape, down.shape[2]
    check_shape("router", router, (experts, stream.shape[-1]), "(E, d)")
    check_shape("down", down, (experts, size, width), "(E, d, I)")
    check_shape("inner", inner, (experts, (1 + call.gated) * width, size), "(E, 2 I, d), or (E, I, d) without gates")
    check_same_dtype(router=router, down=down)
    check_same_dtype(inner=inner, down=down)
    check_devices(stream.device, router=router, inner=inner, down=down, residual=call.residual)
    _check_activation(call.activation)
    if not 1 <= call.top_k <= experts:
        fail(f"top_k is {call.top_k}, expected 1 to {experts} experts")
    differentiable = needs_grad(stream, router, inner, down)
    options = {"dtype": down.dtype, "differentiable": differentiable}
    backend = dispatch.choose("experts_step", stream.device, backend, **options).name
    module = dispatch.backend_module(backend)
    if total is None or module.sums_over_peers(call):
        y, logits = module.experts_step(call)
        return y, logits
    part, logits = module.experts_step(call._replace(part=True))
    y = module.joined(Joined(total(part), call.added_to, None, call.output_multiplier))
    return y, logits


def step_serves(stream: Tensor, rows: int = 1) -> bool:
    """Whether the steps of this module are the quickest way for ``stream (B, T, d)``: one token of up to ``rows``
    sequences on a GPU that Triton serves, with no gradient and no autocast.
    """
    if stream.shape[0] > rows or stream.shape[1] != 1 or not stream.is_cuda or torch.is_grad_enabled():
        return False
    if dispatch.is_batch_invariant():
        return False
    return dispatch.usable(stream.device)[0] and not torch.is_autocast_enabled("cuda")


def _check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        fail(f"activation is {name!r}, expected one of {', '.join(ACTIVATIONS)}")
