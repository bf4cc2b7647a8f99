"""The operations that PyTorch's counter finds in every op, on both backends: those of a formula written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mamba2_hf import ops
from mamba2_hf.ops import LowRank, dispatch, flops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, P, G, N, K, d, V = 2, 66, 2, 16, 1, 16, 4, 8, 12
Q, CHUNKS = 64, 2  # tokens of a chunk, and chunks of a row
INNER, C = H * P, H * P + 2 * G * N
WIDE = INNER + C + H  # what in_proj gives
SCORES, OWN, STATE = 2 * Q * Q * G * N, 2 * Q * Q * H * P, 2 * Q * H * P * N
SCAN = CHUNKS * (SCORES + OWN + 2 * STATE)  # of a row
TRAINED = 4 * SCAN  # forward, the forward again, two products for each of its products
STEP = 2 * H * P * N  # of a token


@pytest.fixture(autouse=True, params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Triton serves the CPU too: in its interpreter, where there is no GPU. PyTorch passes states as on a CPU."""
    monkeypatch.setattr("mamba2_hf.ops.scan.chunks.in_steps", lambda device: True)
    if request.param == "triton":
        monkeypatch.setattr(dispatch, "_usable", lambda device: (True, "by test"))
    return request.param


def count(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def draw(*shape: int) -> Tensor:
    source = torch.Generator().manual_seed(sum(shape))
    return (0.3 * torch.randn(shape, generator=source)).to(DEVICE).requires_grad_()


def scan(backend: str, rows: int = B, **packing: Any) -> Tensor:
    tensors = (draw(rows, T, H, P), draw(rows, T, H), draw(H), draw(rows, T, G, N), draw(rows, T, G, N))
    return ops.ssd_chunk_scan(*tensors, D=draw(H), dt_softplus=True, backend=backend, **packing)


def inner(backend: str) -> Tensor:
    return ops.mamba2_inner(
        *(draw(B, T, WIDE), draw(C, K), draw(C), draw(H), draw(H), draw(H)),
        **{"norm_weight": draw(INNER), "head_dim": P, "n_groups": G, "backend": backend},
    )


def weights() -> dict[str, Any]:
    return {
        "norm_weight": draw(d),
        "in_weight": draw(WIDE, d),
        "in_bias": draw(WIDE),
        "conv_weight": draw(C, K),
        "conv_bias": draw(C),
        "dt_bias": draw(H),
        "A_log": draw(H),
        "D": draw(H),
        "gated_norm_weight": draw(INNER),
        "out_weight": draw(d, INNER),
        "out_bias": None,
        "n_groups": G,
    }


def layer(backend: str, **changes: Any) -> Tensor:
    return ops.mamba2_layer(draw(B, T, d), **weights() | changes, backend=backend)


PROJECTIONS = 2 * (WIDE * d + d * INNER)  # of a token
LORA = 2 * 3 * (d + WIDE)  # of rank 3, on in_proj


def adapted(backend: str) -> Tensor:
    frozen = {name: draw(*shape).detach() for name, shape in (("in_weight", (WIDE, d)), ("out_weight", (d, INNER)))}
    return layer(backend, in_lora=LowRank(draw(3, d), draw(WIDE, 3), 0.5), **frozen)


def loss(backend: str) -> Tensor:
    return ops.linear_cross_entropy(draw(B, d), draw(V, d), torch.tensor([3, 5], device=DEVICE), backend=backend)


FORWARD: dict[str, tuple[Callable[[str], Tensor], int]] = {
    "scan": (scan, B * SCAN),
    "packed scan": (
        lambda backend: scan(backend, 1, cu_seqlens=torch.tensor([0, 10, T], device=DEVICE)),
        (T // Q + 2) * SCAN // CHUNKS,
    ),
    "inner": (inner, B * SCAN),
    "layer": (layer, B * SCAN + B * T * PROJECTIONS),
    "layer with LoRA": (adapted, B * SCAN + B * T * (PROJECTIONS + LORA)),
    "convolution": (lambda backend: ops.causal_conv1d(draw(B, T, C), draw(C, K), backend=backend), 0),
    "norm": (lambda backend: ops.gated_rms_norm(draw(B, T, INNER), None, draw(INNER), backend=backend), 0),
}
TRAINING: dict[str, tuple[Callable[[str], Tensor], int]] = {
    "scan": (scan, B * TRAINED),
    "inner": (inner, B * TRAINED),
    "layer": (layer, B * TRAINED + 3 * B * T * PROJECTIONS),
    "layer with LoRA": (adapted, B * TRAINED + B * T * (2 * PROJECTIONS + 3 * LORA)),  # frozen weights need no gradient
    "loss": (loss, 3 * 2 * B * V * d),
    "convolution": FORWARD["convolution"],
    "norm": FORWARD["norm"],
}


@pytest.mark.parametrize("op", FORWARD)
def test_forward_with_and_without_gradients(op: str, backend: str) -> None:
    run, expected = FORWARD[op]
    assert count(lambda: run(backend)) == expected
    with torch.no_grad():
        assert count(lambda: run(backend)) == expected


@pytest.mark.parametrize("op", TRAINING)
def test_forward_and_backward(op: str, backend: str) -> None:
    run, expected = TRAINING[op]
    assert count(lambda: run(backend).sum().backward()) == expected


@pytest.mark.parametrize("op", FORWARD)
def test_backward_of_what_nobody_counted(op: str, backend: str) -> None:
    run, forward = FORWARD[op]
    total = TRAINING[op][1] if op in TRAINING else count(lambda: run(backend).sum().backward())
    assert count(run(backend).sum().backward) == total - forward


def test_loss_without_gradients(backend: str) -> None:
    with torch.no_grad():
        assert count(lambda: loss(backend)) == 2 * B * V * d


@torch.no_grad()
def test_steps(backend: str) -> None:
    states = {"conv_state": draw(B, C, K - 1), "ssm_state": draw(B, H, P, N)}
    one = (draw(B, H, P), draw(B, H), draw(H), draw(B, G, N), draw(B, G, N))
    assert count(lambda: ops.ssd_state_update(states["ssm_state"], *one, backend=backend)) == B * STEP
    assert count(lambda: ops.causal_conv1d_update(draw(B, C), states["conv_state"], draw(C, K), backend=backend)) == 0

    def step(tokens: int) -> Tensor:
        given = (draw(B, tokens, WIDE), *states.values(), draw(C, K), None, draw(H), draw(H), draw(H))
        return ops.mamba2_step(*given, norm_weight=draw(INNER), n_groups=G, backend=backend)

    assert [count(lambda t=tokens: step(t)) for tokens in (1, 3)] == [B * STEP, 3 * B * STEP]
    whole = weights()
    found = count(lambda: ops.mamba2_layer_step(draw(B, 1, d), **states, **whole, backend=backend))
    assert found == B * (STEP + PROJECTIONS)


def test_counts_an_op_that_is_registered_while_somebody_counts(backend: str) -> None:
    """As a backend that is first used then."""
    library = torch.library.Library(f"counted_{backend}", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    with FlopCounterMode(display=False) as counter:
        flops.register(f"counted_{backend}", "twice", lambda x: x[0])
        getattr(torch.ops, f"counted_{backend}").twice(torch.ones(7))
    assert counter.get_total_flops() == 7
