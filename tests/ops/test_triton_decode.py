"""Single steps and short blocks on the Triton backend against the PyTorch one in fp64: outputs and updated states."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mamba2_hf.errors import ArgumentError
from mamba2_hf.ops import (
    NO_RING,
    BlockStep,
    LayerStep,
    LayerWeights,
    Linear,
    MixerSpec,
    MixerWeights,
    Ring,
    Step,
    block_step,
    causal_conv1d_update,
    fold,
    layer_step,
    mamba2_inner,
    mamba2_layer_step,
    mamba2_step,
    new_block,
    new_ring,
    settle,
    ssd_state_update,
    use_backend,
)
from mamba2_hf.ops import step as ops_step
from mamba2_hf.ops.dispatch import backend_module
from mamba2_hf.ops.runtime import tables
from mamba2_hf.ops.spec import SSDShape

pytestmark = pytest.mark.usefixtures("poison", "triton_serves")
supports = backend_module("triton").supports
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1, 4, 8, 2, 16), (9, 3, 5, 1, 7), (2, 2, 20, 1, 24)]  # B, H, P, G, N
LIMITS = [(0.0, math.inf), (0.1, 0.5)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (actual.double().cpu() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize(("D", "z", "softplus"), [(0, False, False), (1, True, True), (2, False, True)])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("sizes", SIZES)
def test_state_update(sizes: tuple[int, ...], limit: tuple[float, float], D: int, z: bool, softplus: bool) -> None:
    B, H, P, G, N = sizes
    source = generator()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    tensors = [draw(B, H, P, N), draw(B, H, P), draw(B, H), -draw(H).abs(), draw(B, G, N), draw(B, G, N)]
    optional = {"D": (None, draw(H), draw(H, P))[D], "z": draw(B, H, P) if z else None, "dt_bias": draw(H)}
    results = []
    for backend, device, kind in (("torch", "cpu", torch.float64), ("triton", DEVICE, torch.float32)):
        state, *given = (t.to(device, kind, copy=True) for t in tensors)
        y = ssd_state_update(
            *(state, *given),
            backend=backend,
            dt_softplus=softplus,
            dt_limit=limit,
            **{k: None if v is None else v.to(device, kind) for k, v in optional.items()},
        )
        results.append((y, state))
    for expected, actual in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("wide", ["dt", "A", "dt_bias", "all"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_steps_and_rates_of_channels(backend: str, wide: str) -> None:
    """As in Mamba-1: any of them may be those of channels, the others those of heads."""
    (B, H, P, G, N), source = SIZES[1], generator()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    state, x, b, c = draw(B, H, P, N), draw(B, H, P), draw(B, G, N), draw(B, G, N)
    dt = draw(B, H, P) if wide in ("dt", "all") else draw(B, H)
    A = -(draw(H, P, N) if wide in ("A", "all") else draw(H)).abs()
    dt_bias = draw(H, P) if wide in ("dt_bias", "all") else draw(H)
    steps = torch.nn.functional.softplus(dt.view(B, H, -1) + dt_bias.view(H, -1))
    decay = torch.exp(steps[..., None] * A.view(H, *A.shape[1:] or (1, 1)))
    expected = state * decay + (steps * x)[..., None] * b.repeat_interleave(H // G, 1)[:, :, None]
    device, kind = (DEVICE, torch.float32) if backend == "triton" else ("cpu", torch.float64)
    state, x, dt, A, b, c, dt_bias = (t.to(device, kind) for t in (state, x, dt, A, b, c, dt_bias))
    y = ssd_state_update(state, x, dt, A, b, c, dt_bias=dt_bias, dt_softplus=True, backend=backend)
    close(state, expected)
    close(y, (expected * c.double().cpu().repeat_interleave(H // G, 1)[:, :, None]).sum(-1))


@pytest.mark.parametrize("slots", [[3, 0], [-1, 4], [0, -1], [-1, -1]])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_states_in_slots(backend: str, slots: list[int], tokens: int) -> None:
    """Those of the batch move on as if they were alone, all others stay; rows without a state give zeros."""
    B, H, P, G, N, K = 2, 4, 8, 2, 16, 4
    device = DEVICE if backend == "triton" else "cpu"
    source = generator()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(device)

    states, x, dt, A = draw(5, H, P, N), draw(B, H, P), draw(B, H), -draw(H).abs()
    b, c = draw(B, G, N), draw(B, G, N)
    columns, block, weight = draw(5, P, K + 1), draw(B, tokens, P), draw(P, K)
    moved, moved_columns = states.clone(), columns.clone()
    expected, expected_columns = states.clone(), columns.clone()
    at = torch.tensor(slots, device=device, dtype=torch.int32)
    y = ssd_state_update(moved, x, dt, A, b, c, dt_softplus=True, slots=at, backend=backend)
    conv = causal_conv1d_update(block, moved_columns, weight, activation="silu", slots=at, backend=backend)
    for row, slot in enumerate(slots):
        one = slice(row, row + 1)
        if slot < 0:
            assert not y[one].any()
            assert not conv[one].any()
            continue
        mine = slice(slot, slot + 1)
        given = (x[one], dt[one], A, b[one], c[one])
        close(y[one], ssd_state_update(expected[mine], *given, dt_softplus=True, backend="torch").cpu())
        alone = causal_conv1d_update(block[one], expected_columns[mine], weight, activation="silu", backend="torch")
        close(conv[one], alone.cpu())
    close(moved, expected.cpu())
    close(moved_columns, expected_columns.cpu())


def step_inputs(B: int, T: int, H: int, P: int, G: int, N: int, K: int, L: int) -> list[Tensor]:
    source = generator()
    C = H * P + 2 * G * N
    shapes = [(B, T, 2 * H * P + 2 * G * N + H), (B, C, L), (B, H, P, N), (C, K), (C,), (H,), (H,), (H,), (H * P,)]
    tensors = [torch.randn(*shape, generator=source, dtype=torch.float64) for shape in shapes]
    tensors[6] = -tensors[6].abs()
    return tensors


def step(backend: str, tensors: list[Tensor], sizes: tuple[int, ...], **options: object) -> Tensor:
    _, _, H, P, G, _ = sizes
    *arguments, norm_weight = tensors
    defaults = {"norm_weight": norm_weight, "n_groups": G, "group_size": H * P // G}
    return mamba2_step(*arguments, **(defaults | options), backend=backend)


STEPS: list[tuple[tuple[int, ...], int, int, dict[str, object]]] = [  # sizes, T, L, options
    *((SIZES[0], T, L, {}) for T, L in [(1, 3), (1, 4), (2, 3), (3, 3), (2, 8), (6, 4)]),
    *((SIZES[1], T, L, {}) for T, L in [(1, 3), (2, 4)]),
    *(
        (SIZES[0], 2, 3, o)
        for o in ({"norm_before_gate": True}, {"log_rates": True}, {"norm_weight": None}, {"dt_limit": (0.1, 0.5)})
    ),
    *(((65, 2, 8, 1, 16), 1, L, o) for L, o in ((3, {}), (4, {"norm_before_gate": True, "log_rates": True}))),
    ((65, 1, 8, 1, 16), 1, 3, {"norm_weight": None}),
]


@pytest.mark.parametrize(("sizes", "T", "L", "options"), STEPS)
def test_step(sizes: tuple[int, ...], T: int, L: int, options: dict[str, object]) -> None:
    """Outputs and both states, whether the convolution's keeps some of its inputs or none."""
    B, H, P, G, N = sizes
    tensors = step_inputs(B, T, H, P, G, N, 4, L)
    results = []
    for backend, device, kind in (("torch", "cpu", torch.float64), ("triton", DEVICE, torch.float32)):
        given = [t.to(device, kind, copy=True) for t in tensors]
        y = step(backend, given, (B, T, H, P, G, N), **options)
        results.append((y, given[1], given[2]))
    for expected, actual in zip(*results, strict=True):
        close(actual, expected)


BLOCKS: list[tuple[tuple[int, ...], int, int, dict[str, object]]] = [  # sizes, L, most tokens, options
    (SIZES[0], 3, 5, {}),
    (SIZES[1], 4, 5, {"norm_before_gate": True, "dt_limit": (0.1, 0.5)}),
    (SIZES[2], 3, 5, {"norm": False}),
    ((2, 9, 1, 1, 2), 3, 5, {}),  # more step sizes than channels
    ((2, 4, 24, 2, 40), 3, 35, {}),  # more tokens and columns of a state than a program has at a time
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("sizes", "L", "room", "options"), BLOCKS)
def test_blocks_whose_tokens_may_go(
    sizes: tuple[int, ...], L: int, room: int, options: dict[str, object], backend: str
) -> None:
    """Rows that keep different numbers of tokens of blocks of several widths: outputs and states are those of stepping
    through what they keep, and nothing that went leaves a trace, not even numbers that are none.
    """
    B, H, P, G, N = sizes
    options = dict(options)
    *tensors, norm_weight = step_inputs(B, room, H, P, G, N, 4, L)
    weight = MixerWeights(
        *tensors[3:6], None, tensors[6], tensors[7], norm_weight if options.pop("norm", True) else None
    )
    spec = MixerSpec(P, G, group_size=H * P // G, **options)  # type: ignore[arg-type]
    device, kind = (DEVICE, torch.float32) if backend == "triton" else ("cpu", torch.float64)

    def here(*given: Tensor | None) -> list[Tensor | None]:
        return [None if each is None else each.to(device, kind, copy=True) for each in given]

    conv, ssm = here(*tensors[1:3])
    assert conv is not None
    assert ssm is not None
    block, weights = new_block(conv, ssm, G, room), MixerWeights(*here(*weight))
    source = generator()
    for tokens in (room, 1, room - 1, room):
        u = torch.randn(B, tokens, tensors[0].shape[2], generator=source, dtype=torch.float64)
        y = block_step(BlockStep(u.to(device, kind), conv, ssm, block, weights, spec), backend)
        assert block.kept.tolist() == [tokens] * B
        kept = torch.randint(0, tokens + 1, (B,), generator=source)
        block.kept.copy_(kept)
        for part in (block.inputs, block.convolved, block.steps):
            part[kept[:, None].to(device) <= torch.arange(room, device=device)] = torch.nan
        for row in range(B):
            one = slice(row, row + 1)
            states = [tensor[one].clone() for tensor in tensors[1:3]]
            close(y[one], ops_step(Step(u[one], *states, weight, spec), "torch"))
            if kept[row]:
                ops_step(Step(u[one, : kept[row]], tensors[1][one], tensors[2][one], weight, spec), "torch")
    fold(conv, ssm, block)
    assert not block.kept.any()
    close(conv, tensors[1])
    close(ssm, tensors[2])


def test_states_may_be_views() -> None:
    """Of caches that keep the states of several layers in one tensor, or with other strides."""
    B, T, H, P, G, N = 2, 2, 2, 8, 1, 16
    tensors = [t.float().to(DEVICE) for t in step_inputs(B, T, H, P, G, N, 4, 3)]
    views = [t.clone() for t in tensors]
    views[1] = tensors[1].mT.contiguous().mT
    views[2] = torch.stack([tensors[2], tensors[2]], -1)[..., 0]
    assert not views[1].is_contiguous()
    assert not views[2].is_contiguous()
    y, expected = step("triton", views, (B, T, H, P, G, N)), step("triton", tensors, (B, T, H, P, G, N))
    for found, wanted in ((y, expected), (views[1], tensors[1]), (views[2], tensors[2])):
        close(found, wanted.double().cpu(), 1e-6)


def test_steps_continue_a_sequence() -> None:
    """Token by token and in blocks, the steps give what the whole sequence gives at once."""
    B, T, H, P, G, N, K = 2, 11, 2, 8, 1, 16, 4
    u, conv, state, weight, bias, dt_bias, A, D, norm_weight = (
        t.float() for t in step_inputs(B, T, H, P, G, N, K, K - 1)
    )
    expected, *last = mamba2_inner(
        *(u, weight, bias, dt_bias, A, D),
        norm_weight=norm_weight,
        head_dim=P,
        n_groups=G,
        return_final_states=True,
        backend="torch",
    )
    for backend, device in (("torch", "cpu"), ("triton", DEVICE)):
        rest = [t.to(device) for t in (weight, bias, dt_bias, A, D, norm_weight)]
        states = [torch.zeros_like(conv, device=device), torch.zeros_like(state, device=device)]
        ys = [
            step(backend, [block.to(device), *states, *rest], (B, block.shape[1], H, P, G, N))
            for block in u.split([1, 3, 1, 5, 1], 1)
        ]
        close(torch.cat(ys, 1), expected)
        close(states[0], last[0])
        close(states[1], last[1])


def test_a_half_precision_state_is_rounded_once_a_call() -> None:
    B, T, H, P, G, N = 2, 3, 2, 8, 1, 16
    tensors = [t.float() for t in step_inputs(B, T, H, P, G, N, 4, 3)]
    tensors[2] = tensors[2].half()
    exact = [t.float().clone() for t in tensors]
    close(
        step("triton", [t.to(DEVICE) for t in tensors], (B, T, H, P, G, N)),
        step("torch", exact, (B, T, H, P, G, N)),
    )


def test_what_cannot_be_served_is_said() -> None:
    call = {"shape": SSDShape(1, 1, 2, 64, 1, 128, 1), "dtype": torch.bfloat16, "taps": 4}
    assert supports("mamba2_step", group_size=128, **call)[0]
    assert "group_size 32" in supports("mamba2_step", group_size=32, **call)[1]


LAYERS: list[tuple[tuple[int, ...], int, dict[str, object]]] = [  # B, H, P, G, N; d; options
    ((1, 4, 8, 2, 16), 24, {}),
    ((1, 3, 16, 1, 7), 17, {"norm_before_gate": True, "dt_limit": (0.1, 0.5)}),
    ((1, 2, 20, 2, 24), 1300, {"group_size": 20, "norm_eps": 1e-2, "gated_norm_eps": 1e-3, "activation": None}),
    ((1, 20, 32, 1, 16), 9, {"bare": True}),
]
SEVERAL: list[tuple[tuple[int, ...], int, dict[str, object]]] = [
    ((2, 4, 8, 2, 16), 24, {"columns": 4}),
    ((3, 3, 16, 1, 7), 17, {"norm_before_gate": True, "dt_limit": (0.1, 0.5)}),
    ((2, 2, 20, 2, 24), 1300, {"group_size": 20, "norm_eps": 1e-2, "gated_norm_eps": 1e-3, "activation": None}),
    ((5, 40, 32, 1, 16), 72, {"bare": True}),
    ((17, 16, 16, 2, 16), 136, {"norm_before_gate": True}),
    ((65, 2, 8, 1, 16), 24, {}),
]


def layer_inputs(
    sizes: tuple[int, ...], width: int, *, bare: bool = False, columns: int = 3
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Stream and states, and the weights by name."""
    B, H, P, G, N = sizes
    source = generator()
    channels, inner = H * P + 2 * G * N, H * P

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    positional = [draw(B, 2, width)[:, 1:], draw(B, channels, columns), draw(B, H, P, N)]
    named: dict[str, Tensor | None] = {
        "norm_weight": draw(width),
        "in_weight": draw(inner + channels + H, width) / width**0.5,
        "in_bias": draw(inner + channels + H),
        "conv_weight": draw(channels, 4),
        "conv_bias": draw(channels),
        "dt_bias": draw(H),
        "A_log": draw(H),
        "D": draw(H),
        "gated_norm_weight": draw(inner),
        "out_weight": draw(width, inner) / inner**0.5,
        "out_bias": draw(width),
    }
    if bare:
        named.update(in_bias=None, conv_bias=None, dt_bias=None, D=None, out_bias=None)
    return positional, named


def run_layer(
    backend: str,
    positional: list[Tensor],
    named: dict[str, Tensor | None],
    sizes: tuple[int, ...],
    **options: object,
) -> Tensor:
    """A layer's step; states are updated in place."""
    _, H, P, G, _ = sizes
    options = {"n_groups": G, "group_size": H * P // G} | options
    return mamba2_layer_step(*positional, **named, **options, backend=backend)


def check_layer(sizes: tuple[int, ...], width: int, options: dict[str, object], tokens: int) -> None:
    """The launches are norm, projection, step, norm, projection and sum, with both states, token after token."""
    given = {key: options[key] for key in ("bare", "columns") if key in options}
    options = {key: value for key, value in options.items() if key not in given}
    positional, named = layer_inputs(sizes, width, **given)
    results = []
    for backend, device, kind in (("torch", "cpu", torch.float64), ("triton", DEVICE, torch.float32)):
        tensors = [t.to(device, kind, copy=True) for t in positional]
        weights = {k: None if t is None else t.to(device, kind) for k, t in named.items()}
        ready = torch.zeros(1, dtype=torch.int32, device=device)
        outputs = [
            run_layer(backend, tensors, weights, sizes, **options, ready=counter)
            for counter in (ready, None, ready)[:tokens]
        ]
        assert ready.item() == 0
        results.append((*outputs, tensors[1], tensors[2]))
    for expected, actual in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("narrow", [True, False], ids=["two launches", "three launches"])
@pytest.mark.parametrize(("sizes", "width", "options"), LAYERS)
def test_layer_step(
    sizes: tuple[int, ...], width: int, options: dict[str, object], narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "NARROW_LAYER", width if narrow else 0)
    check_layer(sizes, width, options, tokens=3)


@pytest.mark.parametrize(("sizes", "width", "options"), SEVERAL)
def test_layer_step_of_several_sequences(sizes: tuple[int, ...], width: int, options: dict[str, object]) -> None:
    check_layer(sizes, width, options, tokens=1)


@pytest.mark.parametrize("rows", [1, 5])
def test_layer_step_in_16_bits_with_states_that_are_views(rows: int) -> None:
    """Of weights and states in fp16 beside a stream in fp32, twice with the same bits."""
    sizes = (rows, 8, 32, 2, 16)
    positional, named = layer_inputs(sizes, 40)
    fp32 = ("dt_bias", "A_log", "D")
    rounded = {k: t if t is None else t.to(torch.float32 if k in fp32 else torch.float16) for k, t in named.items()}
    stream, conv, state = positional[0].float(), positional[1].half(), positional[2].half()
    exact = [stream.double(), conv.double(), state.double()]
    expected = run_layer("torch", exact, {k: t if t is None else t.double() for k, t in rounded.items()}, sizes)
    results = []
    for _ in range(2):
        views = [torch.cat([stream, stream], 1).to(DEVICE)[:, 1:], conv.to(DEVICE).mT.contiguous().mT]
        views.append(torch.stack([state, state], -1).to(DEVICE)[..., 0])
        y = run_layer("triton", views, {k: t if t is None else t.to(DEVICE) for k, t in rounded.items()}, sizes)
        results.append((y, views[1], views[2]))
    for first, second, wanted in zip(*results, (expected, exact[1], exact[2]), strict=True):
        assert torch.equal(first, second)
        close(first, wanted, 1e-3)


def test_layer_step_names_what_does_not_fit() -> None:
    d = torch.zeros
    named = {"norm_weight": d(8), "in_weight": d(2 * 8 + 2 * 4 + 2, 8), "in_bias": None, "conv_weight": d(16, 4)}
    named |= {"conv_bias": None, "dt_bias": None, "A_log": d(2), "D": None, "gated_norm_weight": d(8)}
    named |= {"out_weight": d(8, 8), "out_bias": None}
    states = (d(1, 16, 3), d(1, 2, 4, 4))
    mamba2_layer_step(d(1, 1, 8), *states, **named, n_groups=1)
    with pytest.raises(ArgumentError, match="stream has 2 tokens"):
        mamba2_layer_step(d(1, 2, 8), *states, **named, n_groups=1)
    with pytest.raises(ArgumentError, match=r"out_weight has shape \(7, 8\)"):
        mamba2_layer_step(d(1, 1, 8), *states, **{**named, "out_weight": d(7, 8)}, n_groups=1)
    with pytest.raises(ArgumentError, match=r"in_weight has shape"):
        mamba2_layer_step(d(1, 1, 9), *states, **named, n_groups=1)


RINGS: list[tuple[tuple[int, ...], int, dict[str, object]]] = [  # B, H, P, G, N; rows of a launch of its own; options
    ((2, 3, 16, 1, 32), 64, {}),
    ((3, 2, 32, 2, 16), 64, {"norm_before_gate": True, "dt_limit": (0.1, 0.5)}),
    ((2, 3, 16, 1, 32), 1, {"bare": True, "columns": 4}),
    ((2, 2, 16, 2, 16), 1, {"norm_before_gate": True}),
]


@pytest.fixture
def short_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences have a ring, and few steps go around it several times."""
    monkeypatch.setattr(tables, "RING", 16 if torch.cuda.is_available() else 4)
    monkeypatch.setattr(tables, "RING_ROWS", {4: 2, 2: 2})


def layer_call(
    positional: list[Tensor], named: dict[str, Tensor | None], sizes: tuple[int, ...], ring: Ring, **options: object
) -> LayerStep:
    """A layer's step as a record."""
    _, H, P, G, _ = sizes
    w = SimpleNamespace(**named)
    mixer = MixerWeights(w.conv_weight, w.conv_bias, w.dt_bias, None, w.A_log, w.D, w.gated_norm_weight)
    weights = LayerWeights(w.norm_weight, Linear(w.in_weight, w.in_bias), mixer, Linear(w.out_weight, w.out_bias))
    return LayerStep(*positional, weights, MixerSpec(P, G, group_size=H * P // G, **options), ring=ring)


@pytest.mark.usefixtures("short_ring")
@pytest.mark.parametrize(("sizes", "rows", "options"), RINGS)
def test_states_written_once_in_a_ring(
    sizes: tuple[int, ...], rows: int, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and states are no further from fp64 than those of states written at every step, whatever the phase of a
    row: some are replaced on the way, and all are settled once. What was never written is NaN.
    """
    monkeypatch.setattr(tables, "step_rows", lambda chip: rows)
    given = {key: options[key] for key in ("bare", "columns") if key in options}
    options = {key: value for key, value in options.items() if key not in given}
    positional, named = layer_inputs(sizes, 24, **given)
    exact = [t.clone() for t in positional[1:]]
    plain, kept = ([t.to(DEVICE, torch.float32) for t in positional[1:]] for _ in range(2))
    weights = {k: None if t is None else t.to(DEVICE, torch.float32) for k, t in named.items()}
    ring = new_ring(*kept)
    assert ring.clock is not None
    source, steps = generator(), 3 * tables.RING + 2
    far, near = [], []
    for t in range(steps):
        if t in (3, steps // 2):
            for states in (exact, plain, kept):
                states[1][t % 2] = positional[2][1 - t % 2]
            ring.clock[t % 2] = 0
        if t == steps - 5:
            settle(kept[1], ring)
            assert not ring.clock.any()
        stream = torch.randn(sizes[0], 1, 24, generator=source, dtype=torch.float64)
        expected = layer_step(layer_call([stream, *exact], named, sizes, NO_RING, **options), "torch")
        ours = stream.to(DEVICE, torch.float32)
        for states, found, of in ((plain, far, NO_RING), (kept, near, ring)):
            y = layer_step(layer_call([ours, *states], weights, sizes, of, **options), "triton")
            found.append((y.double().cpu() - expected).norm() / expected.norm())
    assert int(ring.clock.max()) < 2 * tables.RING
    settle(kept[1], ring)
    close(kept[0], exact[0], 1e-6)
    close(kept[1], exact[1], 1e-6)
    assert torch.stack(near).mean() <= 1.2 * torch.stack(far).mean()
    off = [float((states[1].double().cpu() - exact[1]).norm()) for states in (kept, plain)]
    assert off[0] <= 1.5 * off[1]


@pytest.mark.usefixtures("short_ring")
def test_states_in_16_bits_drift_less_with_a_ring() -> None:
    """They are rounded once in a ring, not at every step, which counts where they decay slowly; PyTorch settles them
    before a step of its own.
    """
    sizes = (2, 1, 16, 1, 16)
    positional, named = layer_inputs(sizes, 24, bare=True)
    named |= {"dt_bias": torch.full((1,), -4.0), "A_log": torch.full((1,), -4.0)}
    named["in_weight"][-1] = 0.0  # steps of one size
    weights = {k: None if t is None else t.to(DEVICE, torch.float32) for k, t in named.items()}
    start = [positional[1].to(DEVICE, torch.float32), positional[2].to(DEVICE, torch.half)]
    exact, plain, kept = ([t.clone() for t in start] for _ in range(3))
    exact[1] = exact[1].float()
    ring, source = new_ring(*kept), generator()
    for t in range(10 * tables.RING):
        stream = torch.randn(2, 1, 24, generator=source).to(DEVICE)
        layer_step(layer_call([stream, *exact], weights, sizes, NO_RING), "torch")
        layer_step(layer_call([stream, *plain], weights, sizes, NO_RING), "triton")
        layer_step(layer_call([stream, *kept], weights, sizes, ring), "torch" if t == 13 else "triton")
    settle(kept[1], ring)
    off = [float((states[1].float() - exact[1]).norm()) for states in (kept, plain)]
    assert off[0] < 0.7 * off[1]


def test_where_a_ring_serves(short_ring: None) -> None:
    """Several sequences, on Hopper, with sizes that kernels have."""
    conv = torch.zeros(16, 2 * 16 + 2 * 16, 3, device=DEVICE)
    for rows, dtype, P, N, serves in (
        (2, torch.float32, 16, 16, True),
        (1, torch.float32, 16, 16, False),
        (2, torch.bfloat16, 16, 16, True),
        (2, torch.float32, 24, 16, False),
        (2, torch.float32, 16, 8, False),
    ):
        state = torch.zeros(rows, 2, P, N, dtype=dtype, device=DEVICE)
        assert (new_ring(conv[:rows], state).clock is not None) == serves
    with use_backend("torch"):
        assert new_ring(conv[:2], torch.zeros(2, 2, 16, 16, device=DEVICE)) == NO_RING
    assert not tables.keeps_ring(tables.Chip("cuda", 80, 108), torch.float32, 64, 64, 128)
