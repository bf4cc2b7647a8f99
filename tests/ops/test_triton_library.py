"""The Triton ops as PyTorch sees them: registration, fake kernels, whole graphs; and the fused mixer's gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2_hf.errors import BackendError
from mamba2_hf.ops import causal_conv1d, gated_rms_norm, mamba2_inner, mamba2_step
from mamba2_hf.ops.conv import triton as conv
from mamba2_hf.ops.conv.op import Conv, ConvUpdate
from mamba2_hf.ops.mixer.block import mamba2_block_step
from mamba2_hf.ops.mixer.op import BlockStep, Layer, new_block
from mamba2_hf.ops.mixer.triton import layer
from mamba2_hf.ops.norm.op import Norm
from mamba2_hf.ops.norm.triton import gated_rms_norm as norm
from mamba2_hf.ops.spec import UNPACKED, LayerWeights, Linear, MixerSpec, MixerWeights

pytestmark = pytest.mark.usefixtures("triton_serves")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, P, G, N, K = 2, 37, 4, 8, 2, 16, 4
C = H * P + 2 * G * N
OPTIONAL = ("conv_bias", "dt_bias", "D", "norm_weight", "conv_initial_states", "ssm_initial_states")


def inputs(batch: int = B, states: int = B) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    return {
        "zxbcdt": draw(batch, T, 2 * H * P + 2 * G * N + H),
        "conv_weight": draw(C, K),
        "conv_bias": draw(C),
        "dt_bias": draw(H),
        "A": -draw(H).abs(),
        "D": draw(H),
        "norm_weight": draw(H * P),
        "conv_initial_states": draw(states, C, K - 1),
        "ssm_initial_states": draw(states, H, P, N),
    }


def inner(backend: str, given: dict[str, Tensor], **packing: Any) -> Any:
    return mamba2_inner(
        **{name: given.get(name) for name in OPTIONAL} | given,
        head_dim=P,
        n_groups=G,
        group_size=H * P // 2,
        backend=backend,
        **({"return_final_states": True} | packing),
    )


PACKING = {
    "rows": {},
    "seq_idx": {"seq_idx": torch.arange(T).div(6, rounding_mode="floor").expand(B, T)},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 10, 10, 33])},
}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("packing", "absent"), [*((packing, ()) for packing in PACKING), ("rows", ("norm_weight",)), ("rows", OPTIONAL)]
)
def test_fused_mixer(packing: str, absent: tuple[str, ...]) -> None:
    """Outputs, both final states and the gradient of every input, against the PyTorch backend in fp64."""
    rows, states = (1, 3) if packing == "cu_seqlens" else (B, B)
    tensors = {k: v for k, v in inputs(rows, states).items() if k not in absent}
    results = []
    for backend, device, kind in (("torch", "cpu", torch.float64), ("triton", DEVICE, torch.float32)):
        given = {k: v.to(device, kind).clone().requires_grad_() for k, v in tensors.items()}
        found = inner(backend, given, **{k: v.to(device) for k, v in PACKING[packing].items()})
        source = torch.Generator().manual_seed(1)
        gradients = [torch.randn(o.shape, generator=source).to(device, kind) for o in found]
        results.append([*found, *torch.autograd.grad(found, list(given.values()), gradients)])
    for expected, actual in zip(*results, strict=True):
        assert (actual.double().cpu() - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("packing", PACKING)
def test_fused_mixer_in_training(packing: str) -> None:
    """No states in or out. What belongs to no document is read by nobody, whatever it is."""
    rows, states = (1, 3) if packing == "cu_seqlens" else (B, B)
    tensors = {k: v for k, v in inputs(rows, states).items() if "states" not in k}
    kept = slice(None)
    if packing == "cu_seqlens":
        kept = slice(PACKING[packing]["cu_seqlens"][-1])
        tensors["zxbcdt"][:, kept.stop :, H * P :] = 3.0
    results = []
    for backend, device, kind in (("torch", "cpu", torch.float64), ("triton", DEVICE, torch.float32)):
        given = {k: v.to(device, kind).clone().requires_grad_() for k, v in tensors.items()}
        options = {k: v.to(device) for k, v in PACKING[packing].items()}
        y = inner(backend, given, **options, return_final_states=False)
        gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device, kind)
        found = torch.autograd.grad(y, list(given.values()), gradient)
        assert (y[:, kept.stop or T :] == 0).all()
        assert (found[0][:, kept.stop or T :] == 0).all()
        results.append([y, *found])
    for expected, actual in zip(*results, strict=True):
        assert (actual.double().cpu() - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.slow
def test_whole_graphs() -> None:
    """Forward and backward through every differentiable op compile without a graph break and change nothing."""
    given = {k: v.to(DEVICE, torch.float32).requires_grad_() for k, v in inputs().items()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        y, conv_state, ssm_state = inner("triton", given)
        gated = gated_rms_norm(y * 2, y, given["norm_weight"], group_size=P, norm_before_gate=True, backend="triton")
        convolved = causal_conv1d(gated, given["conv_weight"][: H * P], backend="triton")
        return convolved.square().mean() + conv_state.square().mean() + ssm_state.square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(given), list(given.values()))
    actual = torch.autograd.grad(compiled(given), list(given.values()))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_step_updates_its_states() -> None:
    given = {k: v.to(DEVICE, torch.float32) for k, v in inputs().items()}
    names = ("conv_weight", "conv_bias", "dt_bias", "A", "D")

    def step(conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        return mamba2_step(
            *(given["zxbcdt"][:, :1], conv_state, ssm_state, *(given[name] for name in names)),
            norm_weight=given["norm_weight"],
            n_groups=G,
            backend="triton",
        )

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        states = given["conv_initial_states"].clone(), given["ssm_initial_states"].clone()
        results.append((run(*states), *states))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(2, 3, 4, device=DEVICE, requires_grad=True)
    y = gated_rms_norm(x, None, x[0, 0], backend="triton")
    with pytest.raises(BackendError, match=r"second derivative.*use_backend\('torch'\)"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_registrations_hold() -> None:
    """PyTorch's own checks: schema, fake kernels, autograd registration."""
    given = {k: v[:, :5] if k == "zxbcdt" else v for k, v in inputs().items()}
    u, weight, bias, *_, norm_weight, conv_state, ssm_state = (v.to(DEVICE, torch.float32) for v in given.values())
    x = u[..., :C].contiguous().requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    weights = LayerWeights(
        x[0, 0, :7],
        Linear(u[0, 0, :, None].expand(-1, 7).contiguous()),
        MixerWeights(weight, bias, x[0, 0, :H], None, x[0, 1, :H], None, norm_weight),
        Linear(
            *(norm_weight.expand(7, -1).contiguous(), None),
            *(x[0, :3, : H * P].contiguous(), x[0, :3, :7].mT.contiguous(), 0.5),
        ),
    )
    stream, spec = x[..., :7].contiguous(), MixerSpec(P, G, group_size=H * P)
    calls = {
        conv.causal_conv1d: Conv(x, weight, bias, conv_state, activation="silu"),
        norm: Norm(x[..., : H * P], u[..., : H * P], norm_weight, 1e-5, P, False, torch.float16),
        conv.causal_conv1d_update: ConvUpdate(x.detach(), conv_state, weight, bias, "silu"),
        layer: Layer(stream, weights, spec, UNPACKED, torch.float32, True),
        mamba2_block_step: BlockStep(
            *(u, conv_state, ssm_state, new_block(conv_state, ssm_state, G, 6)),
            *(
                MixerWeights(*(None if each is None else each.detach() for each in weights.mixer)),
                spec._replace(n_groups=G),
            ),
        ),
    }
    for op, call in calls.items():
        assert op.build(op.flatten(call)) == call
        torch.library.opcheck(op.registered.default, op.flatten(call), test_utils=tests)
