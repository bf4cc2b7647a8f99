"""Convolution, norm and the fused mixer body, against PyTorch's own layers and against each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ssd_cases import inner_arguments, relative_error

from mamba2_hf import ops


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 40])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolution_is_pytorchs(taps, tokens, activation):
    x, weight, bias, initial = draw(2, tokens, 5), draw(5, taps), draw(5), draw(2, 5, taps - 1)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias, initial)]
    y, final = ops.causal_conv1d(
        x, weight, bias, activation=activation, initial_states=initial, return_final_states=True
    )
    window = torch.cat([initial, x.mT], -1)
    expected = F.conv1d(window, weight[:, None], bias, groups=5).mT
    expected = F.silu(expected) if activation else expected
    assert relative_error(y, expected) < 1e-12
    assert torch.equal(final, window[..., tokens:])
    cotangents = draw(*y.shape), draw(*final.shape)
    ours = torch.autograd.grad((y, final), leaves, cotangents)
    theirs = torch.autograd.grad((expected, window[..., tokens:]), leaves, cotangents)
    for left, right in zip(ours, theirs, strict=True):
        assert relative_error(left, right) < 1e-12


@pytest.mark.parametrize("held", [3, 4, 6])
@pytest.mark.parametrize("block", [1, 2, 5])
def test_convolution_updates_continue_the_convolution(held, block):
    x, weight, bias, state = draw(2, 3 * block, 5), draw(5, 4), draw(5), draw(2, 5, held)
    expected, _ = ops.causal_conv1d(
        x, weight, bias, activation="silu", initial_states=state[..., held - 3 :], return_final_states=True
    )
    history = torch.cat([state, x.mT], -1)
    parts = []
    for part in x.split(block, 1):
        one = block == 1
        out = ops.causal_conv1d_update(part[:, 0] if one else part, state, weight, bias, activation="silu")
        parts.append(out[:, None] if one else out)
    assert relative_error(torch.cat(parts, 1), expected) < 1e-12
    assert torch.equal(state, history[..., -held:])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("gate", ["none", "before", "after"])
def test_norm_is_the_mean_square_of_each_group(groups, gate):
    x, z, weight = draw(3, 4, 16), draw(3, 4, 16), draw(16)
    y = ops.gated_rms_norm(
        x, None if gate == "none" else z, weight, group_size=16 // groups, norm_before_gate=gate == "after"
    )
    value = x * F.silu(z) if gate == "before" else x
    expected = F.rms_norm(value.unflatten(-1, (groups, -1)), (16 // groups,), eps=1e-5).flatten(-2) * weight
    expected = expected * F.silu(z) if gate == "after" else expected
    assert relative_error(y, expected) < 1e-12


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [50, 150], ids=["one segment", "segments"])
def test_the_fused_body_is_the_ops_one_by_one(norm, dtype, tokens, monkeypatch):
    monkeypatch.setattr("mamba2_hf.ops.mixer.torch.SEGMENT_TOKENS", 64)
    arguments = inner_arguments(3, tokens)
    arguments = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    if not norm:
        arguments["norm_weight"] = None
    leaves = [v.requires_grad_() for v in arguments.values() if isinstance(v, torch.Tensor)]
    y = ops.mamba2_inner(**arguments)
    z, xbc, dt = arguments["zxbcdt"].split([24, 44, 4], -1)
    xbc = ops.causal_conv1d(xbc, arguments["conv_weight"], arguments["conv_bias"], activation="silu")
    x, B, C = xbc.split([24, 10, 10], -1)
    expected = ops.ssd_chunk_scan(
        *(x.unflatten(-1, (4, 6)), dt, arguments["A"], B.unflatten(-1, (2, 5)), C.unflatten(-1, (2, 5))),
        D=arguments["D"],
        z=None if norm else z.unflatten(-1, (4, 6)),
        dt_bias=arguments["dt_bias"],
        dt_softplus=True,
    ).flatten(-2)
    if norm:
        expected = ops.gated_rms_norm(expected, z, arguments["norm_weight"], group_size=12)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative_error(y, expected) < tolerance
    cotangent = draw(*y.shape).to(dtype)
    ours = torch.autograd.grad(y, leaves, cotangent)
    theirs = torch.autograd.grad(expected, leaves, cotangent)
    for left, right in zip(ours, theirs, strict=True):
        assert relative_error(left, right) < tolerance


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_does_not_reach_inside(grad):
    arguments = inner_arguments(5, 60)
    arguments = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    zxbcdt = arguments.pop("zxbcdt").requires_grad_(grad)
    expected = ops.mamba2_inner(zxbcdt, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.mamba2_inner(zxbcdt, **arguments)
    assert relative_error(y, expected) < 1e-6
    if grad:
        left, right = (torch.autograd.grad(out.square().sum(), zxbcdt)[0] for out in (y, expected))
        assert relative_error(left, right) < 1e-5
