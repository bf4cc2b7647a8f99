"""The Triton backend's ops as PyTorch sees them: schemas, fake kernels and autograd, under ``torch.ops.mamba2_hf``.

Registered ops are opaque to ``torch.compile``, which so keeps whole graphs, and plain launches to CUDA graphs. A
backward is an op of its own. Tensors that an op may leave out of its results are empty there (``(0,)``), because a
schema has no optional results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..conv import triton as conv
from ..cross_entropy import triton as loss
from ..layer import inner
from ..layer import one_row as layer_step
from ..layer import step as decode
from ..layer import train as layer
from ..norm import triton as norm
from ..scan import triton as ssd
from .op import NAMESPACE, autograd_parts, set_differentiable, set_direct

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _register(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op for every device; ``launch`` runs on the device of the op's first tensor."""
    short = schema[: schema.index("(")]
    name = f"{NAMESPACE}::{short}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", set_direct(short, launch), lib=_LIBRARY)
    torch.library.register_fake(name, fake, lib=_LIBRARY)


def _differentiate(
    name: str,
    backward: Callable[..., Any],
    tensors: int,
    saved: int,
    *,
    options: int = 0,
    kept: int = 0,
) -> None:
    """Registers the autograd of an op whose backward is the op ``name_backward``.

    Args:
        name: of the op.
        backward: runs its backward; takes the gradients of the results (the first one is always
            there), then ``kept`` results, then the arguments, without the last ``options`` of them; returns ``tensors``
            gradients or Nones.
        tensors: how many arguments, the first ones, are differentiable.
        saved: how many, the first ones, are tensors that the backward needs.
        options: how many arguments, the last ones, the backward does not take.
        kept: how many results, the last ones, are for the backward only.
    """
    op = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward")

    def cut(run: Callable[..., Any]) -> Callable[..., Any]:
        return (lambda *args: run(*args[:-options])) if options else run

    setup_context, run = autograd_parts(name, cut(op), tensors, saved, kept)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", run, setup_context=setup_context, lib=_LIBRARY)
    set_differentiable(name, cut(backward), tensors, saved, kept)


def _filled(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """``backward`` with an empty tensor for every gradient that there is none of."""

    def run(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(dy.new_empty(0) if gradient is None else gradient for gradient in backward(dy, *args))

    return run


def _like(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The fake of a gradient of ``tensor``."""
    return like.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


# Convolution


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    return conv.conv_forward(x, weight, bias, initial, conv.documents(x, seq_idx, cu_seqlens), silu)


def _conv_fake(
    x: Tensor, weight: Tensor, bias: Any, initial: Any, seq_idx: Any, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    states = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(states, x.shape[2], weight.shape[1] - 1)


def _conv_backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, weight: Tensor, bias: Any, initial: Any, *rest: Any
) -> tuple[Tensor | None, ...]:
    seq_idx, cu_seqlens, silu = rest
    packing = conv.documents(x, seq_idx, cu_seqlens)
    return conv.conv_backward(dy, dfinal, x, weight, bias, initial, packing, silu)


def _conv_backward_fake(
    dy: Tensor, dfinal: Any, x: Tensor, weight: Tensor, bias: Any, initial: Any, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(_like(tensor, x) for tensor in (x, weight, bias, initial))


_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial, Tensor? seq_idx, Tensor? cu_seqlens, bool silu"
_register(f"causal_conv1d({_CONV}) -> (Tensor, Tensor)", _conv, _conv_fake)
_register(
    f"causal_conv1d_backward(Tensor dy, Tensor? dfinal, {_CONV}) -> (Tensor, Tensor, Tensor, Tensor)",
    _filled(_conv_backward),
    _conv_backward_fake,
)
_differentiate("causal_conv1d", _conv_backward, 4, 6)


# Norms


def _norm_fake(x: Tensor, z: Any, weight: Any, eps: Any, group_size: Any, order: Any, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _norm_backward_fake(dy: Tensor, x: Tensor, z: Any, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_like(tensor, x) for tensor in (x, z, weight))


_NORM = "Tensor x, Tensor? z, Tensor weight, float eps, int group_size, bool norm_before_gate"
_register(f"rms_norm({_NORM}, ScalarType dtype) -> Tensor", norm.norm_forward, _norm_fake)
_register(
    f"rms_norm_backward(Tensor dy, {_NORM}) -> (Tensor, Tensor, Tensor)",
    _filled(norm.norm_backward),
    _norm_backward_fake,
)
_differentiate("rms_norm", norm.norm_backward, 3, 3, options=1)


# Loss: logits become gradients in place

_register(
    "cross_entropy_rows(Tensor(a!) logits, Tensor labels, float scale, int ignore_index, bool gradient) -> Tensor",
    loss.rows,
    lambda logits, *rest: logits.new_empty(logits.shape[0], dtype=torch.float32),
)


# Scan


def _final_fake(x: Tensor, heads: int, P: int, N: int, cu_seqlens: Tensor | None) -> Tensor:
    states = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(states, heads, P, N, dtype=torch.float32)


def _scan_fake(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, heads, P = x.shape
    return x.new_empty(x.shape), _final_fake(x, heads, P, B.shape[3], rest[5])


def _scan_backward_fake(dy: Tensor, dfinal: Any, *args: Any) -> tuple[Tensor, ...]:
    return tuple(_like(tensor, dy) for tensor in args[:9])


_SCAN = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float low, float high"
)
_register(f"ssd_chunk_scan({_SCAN}) -> (Tensor, Tensor)", ssd.scan_forward, _scan_fake)
_register(
    f"ssd_chunk_scan_backward(Tensor dy, Tensor? dfinal, {_SCAN}) -> ({', '.join(['Tensor'] * 9)})",
    _filled(ssd.scan_backward),
    _scan_backward_fake,
)
_differentiate("ssd_chunk_scan", ssd.scan_backward, 9, 11)


# The mixer between its projections


def _inner_fake(*args: Any) -> tuple[Tensor, ...]:
    call = inner.Arguments(*args)
    width, maps, heads = call.widths
    u, channels = call.zxbcdt, call.conv_weight
    y = u.new_empty(*u.shape[:2], width)
    if not call.states:
        return y, u.new_empty(0), u.new_empty(0)
    final = _final_fake(u, heads, call.head_dim, maps // call.n_groups, call.cu_seqlens)
    conv_state = u.new_empty(final.shape[0], channels.shape[0], channels.shape[1] - 1)
    return y, conv_state, final


def _inner_backward_fake(dy: Tensor, dconv: Any, dssm: Any, *args: Any) -> tuple[Tensor, ...]:
    return tuple(_like(tensor, dy) for tensor in args[:9])


_INNER = (
    "Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor? dt_bias, Tensor A, Tensor? D, Tensor? norm_weight, "
    "Tensor? conv_initial_states, Tensor? ssm_initial_states, Tensor? seq_idx, Tensor? cu_seqlens, int head_dim, "
    "int n_groups, bool silu, float eps, int group_size, bool norm_before_gate, bool states, float low, float high"
)
_register(f"mamba2_inner({_INNER}) -> (Tensor, Tensor, Tensor)", inner.inner_forward, _inner_fake)
_register(
    f"mamba2_inner_backward(Tensor dy, Tensor? dconv_state, Tensor? dssm_state, {_INNER})"
    f" -> ({', '.join(['Tensor'] * 9)})",
    _filled(inner.inner_backward),
    _inner_backward_fake,
)
_differentiate("mamba2_inner", inner.inner_backward, 9, 11)


# A whole layer for training


def _layer_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = layer.Arguments(*args)
    rows, heads = call.stream.shape[:2], call.A_log.shape[0]
    products = call.stream.new_empty(0, dtype=call.dtype)
    return (
        call.stream.new_empty(call.stream.shape),
        products.new_empty(*rows, call.in_weight.shape[0]),
        products.new_empty(*rows, heads * call.head_dim),
        products.new_empty(heads, dtype=torch.float32),
    )


def _layer_backward_fake(dstream: Tensor, zxbcdt: Tensor, y: Tensor, A: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = layer.Arguments(*args)
    weights = () if call.trains else (call.in_weight, call.out_weight)
    return tuple(_like(None if any(t is w for w in weights) else t, dstream) for t in args[:16])


_LAYER = (
    "Tensor stream, Tensor norm_weight, Tensor in_weight, Tensor? in_bias, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor? dt_bias, Tensor A_log, Tensor? D, Tensor gated_norm_weight, Tensor out_weight, Tensor? out_bias, "
    "Tensor? in_down, Tensor? in_up, Tensor? out_down, Tensor? out_up, "
    "Tensor? seq_idx, Tensor? cu_seqlens, int head_dim, int n_groups, bool silu, float norm_eps, float gated_norm_eps, "
    "int group_size, bool norm_before_gate, float low, float high, ScalarType dtype, bool trains, "
    "float in_scale, float out_scale"
)
_register(f"mamba2_layer({_LAYER}) -> (Tensor, Tensor, Tensor, Tensor)", layer.layer_forward, _layer_fake)
_register(
    f"mamba2_layer_backward(Tensor dstream, Tensor zxbcdt, Tensor y, Tensor A, {_LAYER})"
    f" -> ({', '.join(['Tensor'] * 16)})",
    _filled(layer.layer_backward),
    _layer_backward_fake,
)
_differentiate("mamba2_layer", layer.layer_backward, 16, 18, kept=3)


# Decoding: states are updated in place


def _step_fake(zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor, *rest: Any) -> Tensor:
    return zxbcdt.new_empty(*zxbcdt.shape[:2], ssm_state.shape[1] * ssm_state.shape[2])


_register(
    "ssd_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, float low, float high) -> Tensor",
    decode.state_update,
    lambda state, x, *rest: x.new_empty(x.shape),
)
_register(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu) -> Tensor",
    decode.conv_update,
    lambda x, *rest: x.new_empty(x.shape),
)
_register(
    "mamba2_step(Tensor zxbcdt, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor conv_weight, "
    "Tensor? conv_bias, Tensor? dt_bias, Tensor A, Tensor? D, Tensor? norm_weight, int n_groups, bool silu, "
    "float eps, int group_size, bool norm_before_gate, float low, float high, bool log_rates) -> Tensor",
    decode.mixer_step,
    _step_fake,
)
_register(
    "mamba2_layer_step(Tensor stream, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor norm_weight, "
    "Tensor in_weight, Tensor? in_bias, Tensor conv_weight, Tensor? conv_bias, Tensor? dt_bias, Tensor A_log, "
    "Tensor? D, Tensor gated_norm_weight, Tensor out_weight, Tensor? out_bias, int n_groups, bool silu, "
    "float norm_eps, float gated_norm_eps, int group_size, bool norm_before_gate, float low, float high, "
    "Tensor(c!)? ready) -> Tensor",
    layer_step.layer_step,
    lambda stream, *rest: stream.new_empty(stream.shape),
)
