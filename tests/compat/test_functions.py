"""The functions of mamba_ssm and causal_conv1d: against the recurrence and PyTorch's own layers, in fp64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_hf import compat
from mamba2_hf.errors import ArgumentError
from mamba2_hf.ops.scan.reference import ssd_recurrent

B, T, H, P, G, N, K = 2, 13, 4, 6, 2, 5, 4
INNER, CHANNELS = H * P, H * P + 2 * G * N
EXACT = {"rtol": 1e-9, "atol": 1e-9}
REQUIRED = inspect.Parameter.empty
SIGNATURES: dict[str, dict[str, Any]] = {
    "causal_conv1d_fn": {
        **dict.fromkeys(["x", "weight"], REQUIRED),
        **dict.fromkeys(["bias", "seq_idx", "initial_states"]),
        **{"return_final_states": False, "final_states_out": None, "activation": None},
    },
    "causal_conv1d_update": {
        **dict.fromkeys(["x", "conv_state", "weight"], REQUIRED),
        **dict.fromkeys(["bias", "activation", "cache_seqlens", "conv_state_indices"]),
    },
    "causal_conv1d_varlen_states": dict.fromkeys(["x", "cu_seqlens", "state_len"], REQUIRED),
    "mamba_chunk_scan_combined": {
        **dict.fromkeys(["x", "dt", "A", "B", "C", "chunk_size"], REQUIRED),
        **dict.fromkeys(["D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens"]),
        **{"dt_softplus": False, "dt_limit": (0.0, math.inf), "return_final_states": False},
        **{"return_varlen_states": False, "state_dtype": None},
    },
    "mamba_split_conv1d_scan_combined": {
        **dict.fromkeys(["zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D", "chunk_size"], REQUIRED),
        **{"initial_states": None, "seq_idx": None, "dt_limit": (0.0, math.inf), "return_final_states": False},
        **{"activation": "silu", "rmsnorm_weight": None, "rmsnorm_eps": 1e-6, "outproj_weight": None},
        **{"outproj_bias": None, "headdim": None, "ngroups": 1, "norm_before_gate": True, "state_dtype": None},
    },
    "selective_state_update": {
        **dict.fromkeys(["state", "x", "dt", "A", "B", "C"], REQUIRED),
        **{"D": None, "z": None, "dt_bias": None, "dt_softplus": False, "state_batch_indices": None},
    },
    "rmsnorm_fn": {
        **dict.fromkeys(["x", "weight", "bias"], REQUIRED),
        **{"z": None, "eps": 1e-6, "group_size": None, "norm_before_gate": True},
    },
    "layernorm_fn": {
        **dict.fromkeys(["x", "weight", "bias"], REQUIRED),
        **{"z": None, "eps": 1e-6, "group_size": None, "norm_before_gate": True, "is_rms_norm": False},
    },
    "layer_norm_fn": {
        **dict.fromkeys(["x", "weight", "bias"], REQUIRED),
        **dict.fromkeys(["residual", "x1", "weight1", "bias1"]),
        **{"eps": 1e-6, "dropout_p": 0.0, "rowscale": None, "prenorm": False, "residual_in_fp32": False},
        **{"is_rms_norm": False, "return_dropout_mask": False},
    },
    "rms_norm_fn": {
        **dict.fromkeys(["x", "weight", "bias"], REQUIRED),
        **dict.fromkeys(["residual", "x1", "weight1", "bias1"]),
        **{"eps": 1e-6, "dropout_p": 0.0, "rowscale": None, "prenorm": False, "residual_in_fp32": False},
        **{"return_dropout_mask": False},
    },
}


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_have_their_names_order_and_defaults(name: str) -> None:
    """Callers pass by position and by name, and some look a name up in the signature."""
    parameters = inspect.signature(getattr(compat, name)).parameters
    assert {key: parameter.default for key, parameter in parameters.items()} == SIGNATURES[name]
    assert list(parameters) == list(SIGNATURES[name])


# Convolution


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolution(draw: Callable[..., Tensor], channels_last: bool, activation: str | None) -> None:
    x, weight, bias, initial = draw(B, T, CHANNELS).mT, draw(CHANNELS, K), draw(CHANNELS), draw(B, CHANNELS, K - 1)
    x = x if channels_last else x.contiguous()
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias, initial)]
    out = torch.empty(B, CHANNELS, K - 1, dtype=torch.float64)
    y, states = compat.causal_conv1d_fn(
        x, weight, bias, None, initial, return_final_states=True, final_states_out=out, activation=activation
    )
    window = torch.cat([initial, x], -1)
    expected = F.conv1d(window, weight[:, None], bias, groups=CHANNELS)
    expected = F.silu(expected) if activation else expected
    torch.testing.assert_close(y, expected, **EXACT)
    assert states is out
    torch.testing.assert_close(out, window[..., T:], **EXACT)
    assert y.stride(1) == 1
    given = draw(*y.shape)
    for ours, theirs in zip(
        torch.autograd.grad((y * given).sum(), leaves),
        torch.autograd.grad((expected * given).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_convolution_of_documents(draw: Callable[..., Tensor]) -> None:
    x, weight, bias = draw(1, CHANNELS, T), draw(CHANNELS, K), draw(CHANNELS)
    seq_idx = torch.tensor([[0] * 4 + [1] * 2 + [-1] * 3 + [2] * 4], dtype=torch.int32)
    y = compat.causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    for start, end in ((0, 4), (4, 6), (9, 13)):
        alone = compat.causal_conv1d_fn(x[..., start:end], weight, bias, activation="silu")
        torch.testing.assert_close(y[..., start:end], alone, **EXACT)
    assert not y[..., 6:9].any()


@pytest.mark.parametrize("slots", [None, [4, 0], [-1, 2]])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("length", [3, 5])
def test_convolution_steps(draw: Callable[..., Tensor], slots: list[int] | None, ring: bool, length: int) -> None:
    """Single tokens and blocks continue a convolution, from states anywhere in a larger tensor, rings or not."""
    x, weight, bias = draw(B, CHANNELS, T), draw(CHANNELS, K), draw(CHANNELS)
    expected = compat.causal_conv1d_fn(x, weight, bias, activation="silu")
    states = draw(B if slots is None else 6, CHANNELS, length)
    rows = list(range(B)) if slots is None else slots
    for row in rows:
        if row >= 0:
            states[row] = 0
    others = [row for row in range(len(states)) if row not in rows]
    kept = states[others].clone()
    ys, seen = [], 0
    for block in x.split([1, 3, 1, 7, 1], -1):
        tokens = block.shape[-1]
        y = compat.causal_conv1d_update(
            *(block if tokens > 1 else block[..., 0], states, weight, bias, "silu"),
            torch.full((B,), seen, dtype=torch.int32) if ring else None,
            None if slots is None else torch.tensor(slots, dtype=torch.int32),
        )
        ys.append(y if tokens > 1 else y[..., None])
        seen += tokens
    found = torch.cat(ys, -1)
    for row, slot in enumerate(rows):
        torch.testing.assert_close(found[row], expected[row] if slot >= 0 else torch.zeros_like(found[row]), **EXACT)
    assert torch.equal(states[others], kept)


def test_last_inputs_of_documents(draw: Callable[..., Tensor]) -> None:
    x = draw(T, CHANNELS)
    states = compat.causal_conv1d_varlen_states(x, torch.tensor([0, 2, 2, 9, T]), 4)
    for found, part in zip(states, x.split([2, 0, 7, 4]), strict=True):
        assert torch.equal(found, F.pad(part.T, (4 - len(part), 0)))


# Scan


def scan_arguments(draw: Callable[..., Tensor], batch: int = B) -> dict[str, Tensor]:
    return {
        "x": draw(batch, T, H, P),
        "dt": draw(batch, T, H),
        "A": -draw(H).exp(),
        "B": draw(batch, T, G, N),
        "C": draw(batch, T, G, N),
        "D": draw(H, P),
        "z": draw(batch, T, H, P),
        "dt_bias": draw(H),
    }


def test_scan(draw: Callable[..., Tensor]) -> None:
    given, initial = scan_arguments(draw), draw(B, H, P, N)
    seq_idx = torch.tensor([[0] * 5 + [1] * 8, [3] * 13])
    options = {"seq_idx": seq_idx, "initial_states": initial, "dt_softplus": True, "dt_limit": (0.1, 2.0)}
    y, states = compat.mamba_chunk_scan_combined(**given, chunk_size=4, return_final_states=True, **options)
    expected, last = ssd_recurrent(**given, **options)
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(states, last, **EXACT)
    assert y.is_contiguous()
    half = compat.mamba_chunk_scan_combined(
        **given, chunk_size=4, return_final_states=True, state_dtype=torch.bfloat16, **options
    )[1]
    assert torch.equal(half, states.bfloat16())


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("initial", [0, 1, 4])
def test_scan_of_documents(draw: Callable[..., Tensor], final: bool, initial: int) -> None:
    """With bounds alone documents are kept apart; each has its own state, and the row that of the last with tokens."""
    given, states = scan_arguments(draw, 1), draw(initial, H, P, N) if initial else None
    bounds = [0, 3, 3, 9, 9]
    y, *found = compat.mamba_chunk_scan_combined(
        **given,
        chunk_size=4,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        initial_states=states,
        dt_softplus=True,
        return_final_states=final,
        return_varlen_states=True,
    )
    for document, (start, end) in enumerate(pairwise(bounds)):
        before = states[document : document + 1] if states is not None and document < initial else None
        if start == end:
            expected = torch.zeros(1, H, P, N, dtype=torch.float64) if before is None else before
        else:
            part = {k: v[:, start:end] if k in ("x", "dt", "B", "C", "z") else v for k, v in given.items()}
            alone, expected = ssd_recurrent(**part, dt_softplus=True, initial_states=before)
            torch.testing.assert_close(y[:, start:end], alone, **EXACT)
        torch.testing.assert_close(found[-1][document], expected[0], **EXACT)
    if final:
        torch.testing.assert_close(found[0], found[1][2:3], **EXACT)


def test_scan_says_what_is_missing(draw: Callable[..., Tensor]) -> None:
    with pytest.raises(ArgumentError, match="without cu_seqlens"):
        compat.mamba_chunk_scan_combined(**scan_arguments(draw), chunk_size=4, return_varlen_states=True)


# Mixer


@pytest.mark.parametrize("mlp", [0, 3])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_mixer(draw: Callable[..., Tensor], mlp: int, normed: bool, before: bool, wide: bool) -> None:
    entering, weight, bias, dt_bias = (
        draw(B, T, 2 * mlp + INNER + CHANNELS + H),
        draw(CHANNELS, K),
        draw(CHANNELS),
        draw(H),
    )
    A, D, initial = -draw(H).exp(), draw(H, P) if wide else draw(H), draw(B, H, P, N)
    norm_weight, out_weight, out_bias = draw(INNER), draw(7, mlp + INNER), draw(7)
    y, states = compat.mamba_split_conv1d_scan_combined(
        *(entering, weight, bias, dt_bias, A, D, 4),
        initial_states=initial,
        return_final_states=True,
        rmsnorm_weight=norm_weight if normed else None,
        outproj_weight=out_weight,
        outproj_bias=out_bias,
        headdim=None if wide else P,
        ngroups=G,
        norm_before_gate=before,
    )
    gate, value, z, xbc, dt = entering.split([mlp, mlp, INNER, CHANNELS, H], -1)
    xbc = F.silu(F.conv1d(F.pad(xbc.mT, (K - 1, 0)), weight[:, None], bias, groups=CHANNELS)).mT
    x, b, c = xbc.split([INNER, G * N, G * N], -1)
    heads = {"x": x.unflatten(-1, (H, P)), "B": b.unflatten(-1, (G, N)), "C": c.unflatten(-1, (G, N))}
    mixed, last = ssd_recurrent(**heads, dt=dt, A=A, D=D, dt_bias=dt_bias, dt_softplus=True, initial_states=initial)
    mixed = mixed.flatten(-2)

    def norm(tensor: Tensor) -> Tensor:
        return F.rms_norm(tensor.unflatten(-1, (G, -1)), (INNER // G,), eps=1e-6).flatten(-2) * norm_weight

    if not normed:
        mixed = mixed * F.silu(z)
    else:
        mixed = norm(mixed) * F.silu(z) if before else norm(mixed * F.silu(z))
    expected = F.linear(torch.cat([F.silu(gate) * value, mixed], -1), out_weight, out_bias)
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(states, last, **EXACT)


def test_mixer_needs_the_channels_of_a_head(draw: Callable[..., Tensor]) -> None:
    given = (draw(B, T, INNER + CHANNELS + H), draw(CHANNELS, K), None, None, -draw(H).exp(), draw(H), 4)
    with pytest.raises(ArgumentError, match="headdim is None"):
        compat.mamba_split_conv1d_scan_combined(*given)


# Step


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("slots", [None, [3, 1], [-1, 0]])
def test_step(draw: Callable[..., Tensor], tied: bool, slots: list[int] | None) -> None:
    """Expanded numbers and dense ones, which are the same function."""
    states, x, b, c = draw(B if slots is None else 5, H, P, N), draw(B, H, P), draw(B, G, N), draw(B, G, N)
    dt, A, D, dt_bias, z = draw(B, H), -draw(H).exp(), draw(H), draw(H), draw(B, H, P)
    dense = [dt[..., None].expand(-1, -1, P), A[:, None, None].expand(-1, P, N)]
    dense += [tensor[:, None].expand(-1, P) for tensor in (D, dt_bias)]
    wide_dt, wide_A, wide_D, wide_bias = dense if tied else [tensor.contiguous() for tensor in dense]
    rows = list(range(B)) if slots is None else slots
    before = states.clone()
    y = compat.selective_state_update(
        *(states, x, wide_dt, wide_A, b, c, wide_D, z, wide_bias, True),
        None if slots is None else torch.tensor(slots),
    )
    for row, slot in enumerate(rows):
        if slot < 0:
            assert not y[row].any()
            continue
        given = {"x": x, "dt": dt, "B": b, "C": c, "z": z}
        expected, last = ssd_recurrent(
            **{name: tensor[row, None, None] for name, tensor in given.items()},
            **{"A": A, "D": D, "dt_bias": dt_bias, "dt_softplus": True, "initial_states": before[slot, None]},
        )
        torch.testing.assert_close(y[row], expected[0, 0], **EXACT)
        torch.testing.assert_close(states[slot], last[0], **EXACT)
    others = [row for row in range(len(states)) if row not in rows]
    assert torch.equal(states[others], before[others])


@pytest.mark.parametrize("width", [6, 128])
def test_step_without_heads(draw: Callable[..., Tensor], width: int) -> None:
    """Mamba-1's, with a decay rate of every element of the state."""
    state, x, dt, b, c = draw(B, width, N), draw(B, width), draw(B, width), draw(B, N), draw(B, N)
    A, D, z, dt_bias = -draw(width, N).exp(), draw(width), draw(B, width), draw(width)
    steps = F.softplus(dt + dt_bias)
    expected = state * torch.exp(steps[..., None] * A) + (steps * x)[..., None] * b[:, None]
    y = compat.selective_state_update(state, x, dt, A, b, c, D, z, dt_bias, True)
    torch.testing.assert_close(state, expected, **EXACT)
    torch.testing.assert_close(y, ((expected * c[:, None]).sum(-1) + D * x) * F.silu(z), **EXACT)


# Norms


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("gate", ["none", "before", "after"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [None, 6])
def test_gated_norms(draw: Callable[..., Tensor], rms: bool, gate: str, bias: bool, size: int | None) -> None:
    x, z, weight, shift = draw(B, T, INNER), draw(B, T, INNER), draw(INNER), draw(INNER) if bias else None
    entering = x * F.silu(z) if gate == "before" else x
    groups = entering.unflatten(-1, (-1, size or INNER))
    groups = groups if rms else groups - groups.mean(-1, keepdim=True)
    expected = (groups / (groups.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2) * weight
    expected = expected if shift is None else expected + shift
    expected = expected * F.silu(z) if gate == "after" else expected
    norm = compat.rmsnorm_fn if rms else compat.layernorm_fn
    y = norm(x, weight, shift, None if gate == "none" else z, group_size=size, norm_before_gate=gate != "before")
    torch.testing.assert_close(y, expected, **EXACT)


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", ["none", "residual", "scaled", "two", "all"])
def test_residual_norms(draw: Callable[..., Tensor], rms: bool, bias: bool, given: str) -> None:
    x, weight, weight1 = draw(B, T, INNER), draw(INNER), draw(INNER)
    shift, shift1 = (draw(INNER), draw(INNER)) if bias else (None, None)
    residual = draw(B, T, INNER) if given in ("residual", "all") else None
    x1 = draw(B, T, INNER) if given in ("two", "all") else None
    rowscale = draw(B, T) if given == "scaled" else None
    total = sum(part for part in (x if rowscale is None else x * rowscale[..., None], x1, residual) if part is not None)

    def norm(weight: Tensor, shift: Tensor | None) -> Tensor:
        centered = total if rms else total - total.mean(-1, keepdim=True)
        y = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        return y if shift is None else y + shift

    function = compat.rms_norm_fn if rms else compat.layer_norm_fn
    y, second, after = function(*(x, weight, shift, residual, x1, weight1, shift1), rowscale=rowscale, prenorm=True)
    torch.testing.assert_close(y, norm(weight, shift), **EXACT)
    torch.testing.assert_close(second, norm(weight1, shift1), **EXACT)
    torch.testing.assert_close(after, total, **EXACT)
    torch.testing.assert_close(function(x, weight, shift, residual, x1, rowscale=rowscale), y, **EXACT)


def test_residual_norms_round_once(draw: Callable[..., Tensor]) -> None:
    """Sums are those of fp32, kept in the dtype that is asked for."""
    x, residual, weight = draw(B, T, INNER).bfloat16(), draw(B, T, INNER).float(), draw(INNER).bfloat16()
    y, after = compat.rms_norm_fn(x, weight, None, residual, prenorm=True)
    assert y.dtype == torch.bfloat16
    assert torch.equal(after, residual + x.float())
    _, first = compat.rms_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)
    assert torch.equal(first, x.float())
    assert compat.rms_norm_fn(x, weight, None, x, prenorm=True)[1].dtype == torch.bfloat16


def test_residual_norms_drop_and_refuse(draw: Callable[..., Tensor]) -> None:
    x, weight = draw(B, T, INNER), draw(INNER)
    _, dropped = compat.rms_norm_fn(x, weight, None, dropout_p=0.5, prenorm=True)
    assert ((dropped == 0) | torch.isclose(dropped, 2 * x)).all()
    assert (dropped == 0).any()
    with pytest.raises(ArgumentError, match="return_dropout_mask"):
        compat.layer_norm_fn(x, weight, None, return_dropout_mask=True)
    with pytest.raises(ArgumentError, match="rowscale was given with x1"):
        compat.layer_norm_fn(x, weight, None, x1=x, rowscale=x[..., 0])
