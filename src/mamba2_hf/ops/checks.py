"""One contract per op, shared by every backend: shapes, dtypes, devices, ranges.

Shape checks read only metadata, so they cost nothing on a GPU and disappear under ``torch.compile``. Values are checked
where reading them is free: ``cu_seqlens`` on the CPU, outside of tracing.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError

ACTIVATIONS = (None, "silu", "swish")


class SSDShape(NamedTuple):
    """Sizes of one scan: see ``NOTATION.md``. ``states`` counts the states in and out (``B``, or ``S`` if packed)."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    groups: int
    state: int
    states: int


class LowRank(NamedTuple):
    """What is added to a projection ``x @ weight.T``: ``scale * (x @ down.T) @ up.T`` (LoRA, Hu et al. 2021).

    ``down`` is ``(r, d)`` and ``up`` ``(d', r)`` where the weight is ``(d', d)``.
    """

    down: Tensor
    up: Tensor
    scale: float


def _fail(message: str) -> None:
    raise ArgumentError(message)


def _shape(name: str, tensor: Tensor, expected: tuple[int, ...], dims: str) -> None:
    if tuple(tensor.shape) != expected:
        _fail(f"{name} has shape {tuple(tensor.shape)}, expected {expected} = {dims}")


def _rank(name: str, tensor: Tensor, rank: int, dims: str) -> None:
    if tensor.dim() != rank:
        _fail(f"{name} has {tensor.dim()} dimensions {tuple(tensor.shape)}, expected {rank}: {dims}")


def _floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        _fail(f"{name} has dtype {tensor.dtype}, expected a floating point dtype")


def _same_device(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            _fail(f"{name} is on {tensor.device}, but the input is on {device}: move one of them with .to(...)")


def check_dt_limit(dt_limit: tuple[float, float]) -> None:
    """Raises unless ``dt_limit`` is a pair ``0 <= low < high`` (a NaN fails too)."""
    if len(dt_limit) != 2 or not 0.0 <= dt_limit[0] < dt_limit[1]:
        _fail(f"dt_limit is {tuple(dt_limit)}, expected (low, high) with 0 <= low < high, such as (0.0, inf)")


def check_packing(batch: int, tokens: int, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Checks the two ways to name documents and returns how many states go in and out (``B``, or ``S`` if packed)."""
    if seq_idx is not None and cu_seqlens is not None:
        _fail("seq_idx and cu_seqlens were both given: name the documents in one way only")
    if seq_idx is not None:
        if seq_idx.is_floating_point() or seq_idx.dtype == torch.bool:
            _fail(f"seq_idx has dtype {seq_idx.dtype}, expected an integer dtype")
        _shape("seq_idx", seq_idx, (batch, tokens), "(B, T)")
    if cu_seqlens is None:
        return batch
    _rank("cu_seqlens", cu_seqlens, 1, "(S + 1,)")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] < 2:
        _fail(f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected int32 or int64 (S + 1,), S >= 1")
    if batch != 1:
        _fail(f"cu_seqlens was given with batch {batch}: lay the documents end to end in one row, (1, T, ...)")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] > tokens or any(b > c for b, c in pairwise(bounds)):
            _fail(f"cu_seqlens is {bounds}: it has to start at 0, never fall, and end at or before T = {tokens}")
    return cu_seqlens.shape[0] - 1


def check_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
) -> SSDShape:
    """Contract of ``ssd_chunk_scan``; returns the sizes, raises :class:`ArgumentError`."""
    _rank("x", x, 4, "(B, T, H, P)")
    _floating("x", x)
    batch, tokens, heads, head_dim = x.shape
    if min(batch, tokens, heads, head_dim) < 1:
        _fail(f"x has shape {tuple(x.shape)}: every size has to be at least 1")
    _shape("dt", dt, (batch, tokens, heads), "(B, T, H)")
    _rank("B", B, 4, "(B, T, G, N)")
    groups, state = B.shape[2:]
    _shape("B", B, (batch, tokens, groups, state), "(B, T, G, N)")
    _shape("C", C, (batch, tokens, groups, state), "(B, T, G, N), as B")
    _check_heads(heads, head_dim, groups, A, D, dt_bias)
    for name, tensor in (("dt", dt), ("B", B), ("C", C)):
        _floating(name, tensor)
    if z is not None:
        _shape("z", z, tuple(x.shape), "(B, T, H, P), as x")
    check_dt_limit(dt_limit)
    if chunk_size is not None and chunk_size < 1:
        _fail(f"chunk_size is {chunk_size}, expected a positive number, or None to leave the tiling to the backend")
    states = check_packing(batch, tokens, seq_idx, cu_seqlens)
    if initial_states is not None:
        _shape("initial_states", initial_states, (states, heads, head_dim, state), "(B or S, H, P, N)")
    _same_device(
        x.device, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx
    )
    return SSDShape(batch, tokens, heads, head_dim, groups, state, states)


def check_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
) -> SSDShape:
    """Contract of ``ssd_state_update``; returns the sizes, raises :class:`ArgumentError`."""
    _rank("state", state, 4, "(B, H, P, N)")
    _floating("state", state)
    batch, heads, head_dim, n = state.shape
    _shape("x", x, (batch, heads, head_dim), "(B, H, P)")
    _shape("dt", dt, (batch, heads), "(B, H)")
    _rank("B", B, 3, "(B, G, N)")
    groups = B.shape[1]
    _shape("B", B, (batch, groups, n), "(B, G, N)")
    _shape("C", C, (batch, groups, n), "(B, G, N), as B")
    _check_heads(heads, head_dim, groups, A, D, dt_bias)
    if z is not None:
        _shape("z", z, tuple(x.shape), "(B, H, P), as x")
    check_dt_limit(dt_limit)
    _same_device(state.device, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    return SSDShape(batch, 1, heads, head_dim, groups, n, batch)


def _check_heads(heads: int, head_dim: int, groups: int, A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> None:
    if groups < 1 or heads % groups:
        _fail(f"B and C have {groups} groups, which does not divide the {heads} heads of x")
    _shape("A", A, (heads,), "(H,)")
    # Compared one by one: a compiled graph that leaves the sizes open does not find one tuple among several.
    if D is not None and tuple(D.shape) != (heads,) and tuple(D.shape) != (heads, head_dim):
        _fail(f"D has shape {tuple(D.shape)}, expected {(heads,)} = (H,) or {(heads, head_dim)} = (H, P)")
    if dt_bias is not None:
        _shape("dt_bias", dt_bias, (heads,), "(H,)")


def check_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
) -> int:
    """Contract of ``causal_conv1d``; returns the number of states in and out, raises :class:`ArgumentError`."""
    _rank("x", x, 3, "(B, T, C)")
    _floating("x", x)
    batch, tokens, channels = x.shape
    if min(batch, tokens, channels) < 1:
        _fail(f"x has shape {tuple(x.shape)}: every size has to be at least 1")
    taps = _check_taps(channels, weight, bias, activation)
    states = check_packing(batch, tokens, seq_idx, cu_seqlens)
    if initial_states is not None:
        _shape("initial_states", initial_states, (states, channels, taps - 1), "(B or S, C, K - 1)")
    _same_device(x.device, weight=weight, bias=bias, initial_states=initial_states, seq_idx=seq_idx)
    return states


def check_conv_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    """Contract of ``causal_conv1d_update``; raises :class:`ArgumentError`."""
    if x.dim() not in (2, 3):
        _fail(f"x has shape {tuple(x.shape)}, expected (B, C), or (B, T, C) for a short block")
    taps = _check_taps(x.shape[-1], weight, bias, activation)
    _rank("conv_state", conv_state, 3, "(B, C, L)")
    if tuple(conv_state.shape[:2]) != (x.shape[0], x.shape[-1]) or conv_state.shape[2] < taps - 1:
        _fail(
            f"conv_state has shape {tuple(conv_state.shape)}, expected (B, C, L) with "
            f"B = {x.shape[0]}, C = {x.shape[-1]} and L >= K - 1 = {taps - 1}"
        )
    _same_device(x.device, conv_state=conv_state, weight=weight, bias=bias)


def _check_taps(channels: int, weight: Tensor, bias: Tensor | None, activation: str | None) -> int:
    _rank("weight", weight, 2, "(C, K)")
    _shape("weight", weight, (channels, weight.shape[1]), "(C, K)")
    if bias is not None:
        _shape("bias", bias, (channels,), "(C,)")
    if activation not in ACTIVATIONS:
        _fail(f"activation is {activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    return weight.shape[1]


def check_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int | None,
    dtype: torch.dtype | None = None,
) -> int:
    """Contract of ``gated_rms_norm``; returns the group size, raises :class:`ArgumentError`."""
    _floating("x", x)
    width = x.shape[-1]
    _shape("weight", weight, (width,), "(d,), the last size of x")
    if z is not None:
        _shape("z", z, tuple(x.shape), "as x")
    if not 0.0 <= eps < float("inf"):
        _fail(f"eps is {eps}, expected a small number >= 0, such as 1e-5")
    if dtype is not None and not dtype.is_floating_point:
        _fail(f"dtype is {dtype}, expected a floating point dtype, or None for that of x")
    size = width if group_size is None else group_size
    if size < 1 or width % size:
        _fail(f"group_size is {group_size}, which does not divide the width {width}")
    _same_device(x.device, z=z, weight=weight)
    return size


def check_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> None:
    """Contract of ``linear_cross_entropy``; raises :class:`ArgumentError`."""
    _floating("hidden", hidden)
    _rank("hidden", hidden, 2, "(R, d)")
    _rank("weight", weight, 2, "(V, d)")
    _shape("weight", weight, (weight.shape[0], hidden.shape[1]), "(V, d), with the d of hidden")
    _shape("labels", labels, (hidden.shape[0],), "(R,), one per row of hidden")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        _fail(f"labels have dtype {labels.dtype}, expected integers")
    if not -float("inf") < scale < float("inf"):
        _fail(f"scale is {scale}, expected a finite number")
    _same_device(hidden.device, weight=weight, labels=labels)


def check_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    n_groups: int,
    activation: str | None,
    dt_limit: tuple[float, float],
) -> SSDShape:
    """Contract of ``mamba2_step``, its norm aside; returns the sizes, raises :class:`ArgumentError`."""
    _rank("zxbcdt", zxbcdt, 3, "(B, T, 2 H P + 2 G N + H)")
    _floating("zxbcdt", zxbcdt)
    _rank("ssm_state", ssm_state, 4, "(B, H, P, N)")
    _floating("ssm_state", ssm_state)
    batch, tokens, width = zxbcdt.shape
    heads, head_dim = ssm_state.shape[1:3]
    if min(batch, tokens) < 1:
        _fail(f"zxbcdt has shape {tuple(zxbcdt.shape)}: every size has to be at least 1")
    inner, state = split_widths(width, heads, head_dim, n_groups)
    _shape("ssm_state", ssm_state, (batch, heads, head_dim, state), "(B, H, P, N)")
    check_conv_update(zxbcdt[..., inner : width - heads], conv_state, conv_weight, conv_bias, activation)
    _check_heads(heads, head_dim, n_groups, A, D, dt_bias)
    check_dt_limit(dt_limit)
    _same_device(zxbcdt.device, ssm_state=ssm_state, A=A, D=D, dt_bias=dt_bias)
    return SSDShape(batch, tokens, heads, head_dim, n_groups, state, batch)


def check_inner(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor | None,
    head_dim: int,
    n_groups: int,
    activation: str | None,
    eps: float,
    group_size: int | None,
    dt_limit: tuple[float, float],
    conv_initial_states: Tensor | None,
    ssm_initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[SSDShape, int]:
    """Contract of ``mamba2_inner``; returns the sizes and the norm's group, raises :class:`ArgumentError`."""
    _rank("zxbcdt", zxbcdt, 3, "(B, T, 2 H P + 2 G N + H)")
    batch, tokens, width = zxbcdt.shape
    heads = A.shape[0]
    inner, state = split_widths(width, heads, head_dim, n_groups)
    check_dt_limit(dt_limit)
    xbc = zxbcdt[..., inner : width - heads]
    states = check_conv(xbc, conv_weight, conv_bias, activation, conv_initial_states, seq_idx, cu_seqlens)
    _check_heads(heads, head_dim, n_groups, A, D, dt_bias)
    if ssm_initial_states is not None:
        expected = (states, heads, head_dim, state)
        _shape("ssm_initial_states", ssm_initial_states, expected, "(B or S, H, P, N)")
    if norm_weight is not None:
        group_size = check_norm(zxbcdt[..., :inner], None, norm_weight, eps, group_size)
    return SSDShape(batch, tokens, heads, head_dim, n_groups, state, states), group_size or inner


def check_layer(
    stream: Tensor,
    norm_weight: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    norm_eps: float,
    in_lora: LowRank | None,
    out_lora: LowRank | None,
) -> Tensor:
    """Contract of what ``mamba2_layer`` has around ``mamba2_inner``; returns something shaped as the output of in_proj,
    raises :class:`ArgumentError`.
    """
    _rank("stream", stream, 3, "(B, T, d)")
    zxbcdt = _projected(stream, in_weight, in_bias)
    _rank("out_weight", out_weight, 2, "(d, H P)")
    size = stream.shape[2]
    _shape("out_weight", out_weight, (size, out_weight.shape[1]), "(d, H P)")
    if out_bias is not None:
        _shape("out_bias", out_bias, (size,), "(d,)")
    if in_weight.dtype != out_weight.dtype:
        _fail(f"in_weight has dtype {in_weight.dtype}, out_weight {out_weight.dtype}: convert one of them")
    check_norm(stream, None, norm_weight, norm_eps, None)
    _same_device(stream.device, in_weight=in_weight, out_weight=out_weight)
    for name, lora, weight in (("in_lora", in_lora, in_weight), ("out_lora", out_lora, out_weight)):
        if lora is not None:
            _rank(f"{name}.down", lora.down, 2, "(r, d)")
            rank = lora.down.shape[0]
            _shape(f"{name}.down", lora.down, (rank, weight.shape[1]), "(r, d), with the d of the weight (d', d)")
            _shape(f"{name}.up", lora.up, (weight.shape[0], rank), "(d', r), with the d' of the weight (d', d)")
            _same_device(stream.device, **{f"{name}.down": lora.down, f"{name}.up": lora.up})
    return zxbcdt


def _projected(stream: Tensor, in_weight: Tensor, in_bias: Tensor | None) -> Tensor:
    """Something of the shape and dtype that in_proj's output ``(B, T, 2 H P + 2 G N + H)`` will have."""
    _rank("in_weight", in_weight, 2, "(2 H P + 2 G N + H, d)")
    batch, tokens, size = stream.shape
    entering = in_weight.shape[0]
    _shape("in_weight", in_weight, (entering, size), "(2 H P + 2 G N + H, d)")
    if in_bias is not None:
        _shape("in_bias", in_bias, (entering,), "(2 H P + 2 G N + H,)")
    return in_weight[:, 0].expand(batch, tokens, entering)


def check_layer_step(
    stream: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    norm_weight: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    gated_norm_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    n_groups: int,
    activation: str | None,
    gated_norm_eps: float,
    group_size: int | None,
    dt_limit: tuple[float, float],
    ready: Tensor | None,
) -> tuple[SSDShape, int]:
    """Contract of ``mamba2_layer_step``; returns the sizes and the gated norm's, raises :class:`ArgumentError`."""
    _rank("stream", stream, 3, "(B, 1, d)")
    _, tokens, size = stream.shape
    if tokens != 1:
        _fail(f"stream has {tokens} tokens, expected one of each sequence")
    zxbcdt = _projected(stream, in_weight, in_bias)
    shape = check_step(
        *(zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A_log, D),
        *(n_groups, activation, dt_limit),
    )
    width = shape.heads * shape.head_dim
    _shape("norm_weight", norm_weight, (size,), "(d,)")
    _shape("out_weight", out_weight, (size, width), "(d, H P)")
    if out_bias is not None:
        _shape("out_bias", out_bias, (size,), "(d,)")
    if ready is not None:
        _shape("ready", ready, (1,), "(1,)")
        if ready.dtype != torch.int32:
            _fail(f"ready has dtype {ready.dtype}, expected torch.int32")
    _same_device(stream.device, in_weight=in_weight, out_weight=out_weight, norm_weight=norm_weight, ready=ready)
    return shape, check_norm(zxbcdt[..., :width], None, gated_norm_weight, gated_norm_eps, group_size)


def split_widths(width: int, heads: int, head_dim: int, n_groups: int) -> tuple[int, int]:
    """Inner width and state size behind an in_proj output of ``width`` = 2 H P + 2 G N + H channels."""
    inner = heads * head_dim
    rest = width - 2 * inner - heads
    if n_groups < 1 or rest <= 0 or rest % (2 * n_groups):
        _fail(
            f"zxbcdt has {width} channels, which is not 2 H P + 2 G N + H for H = {heads} heads, "
            f"P = head_dim = {head_dim} and G = n_groups = {n_groups} with any whole N"
        )
    return inner, rest // (2 * n_groups)
