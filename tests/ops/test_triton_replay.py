"""Plans: an op of many launches gives the same bits when it is carried out from what an earlier call left."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM, batch_invariant, ops
from mamba2_hf.errors import ArgumentError, BackendError
from mamba2_hf.ops import (
    causal_conv1d,
    causal_conv1d_update,
    dispatch,
    gated_rms_norm,
    mamba2_inner,
    mamba2_layer,
    mamba2_step,
    ssd_chunk_scan,
    ssd_state_update,
    use_backend,
)
from mamba2_hf.ops.runtime import launch as launches
from mamba2_hf.ops.runtime import plan as replay
from mamba2_hf.ops.runtime.launch import launch
from mamba2_hf.ops.runtime.plan import Replayed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, P, G, N, K, d, TOKENS = 4, 8, 2, 16, 4, 12, 17
INNER, CONV = H * P, H * P + 2 * G * N


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch, poison: None) -> list[replay.Plan]:
    """The plans that ran. Triton serves the CPU, and plans are made in its interpreter too."""
    monkeypatch.setattr(dispatch, "_usable", lambda device: (True, "by test"))
    monkeypatch.setattr(replay, "enabled", lambda: True)
    found: list[replay.Plan] = []
    run = replay.Plan.run
    monkeypatch.setattr(replay.Plan, "run", lambda plan, args: (found.append(plan), run(plan, args))[1])
    return found


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE).requires_grad_()


def layer(seed: int, tokens: int = TOKENS, **packing: Any) -> Callable[[], Tensor]:
    given = {
        "stream": draw(seed, 2 if "cu_seqlens" not in packing else 1, tokens, d),
        "norm_weight": draw(seed, d),
        "in_weight": draw(seed, INNER + CONV + H, d),
        "conv_weight": draw(seed, CONV, K),
        "dt_bias": draw(seed, H),
        "A_log": draw(seed, H),
        "D": draw(seed, H),
        "gated_norm_weight": draw(seed, INNER),
        "out_weight": draw(seed, d, INNER),
    }
    absent = {"in_bias": None, "out_bias": None, "conv_bias": None}
    return SimpleNamespace(
        tensors=given, run=lambda: mamba2_layer(**given, **absent, n_groups=G, backend="triton", **packing)
    )


class Alone:
    """A partner of a device that has a part of a layer, without the devices that have the others."""

    def begin(self, part: Tensor) -> Callable[[], Tensor]:
        return lambda: part.mul_(2)

    def own(self, weights: ops.LayerWeights) -> ops.LayerWeights:
        return weights

    total = entering = None  # not called on Triton


def part_of_layer(seed: int, tokens: int = TOKENS, **packing: Any) -> Any:
    """With the half of a norm's group, and a stream in fp32 beside weights in fp16."""
    given = layer(seed, tokens, **packing).tensors
    low = {name: t.detach().mul(0.2).half().requires_grad_() for name, t in given.items() if "weight" in name}
    given.update(low)

    def run() -> Tensor:
        mixer = (given["conv_weight"], None, given["dt_bias"], None, given["A_log"], given["D"])
        weights = ops.LayerWeights(
            given["norm_weight"],
            ops.Linear(given["in_weight"]),
            ops.MixerWeights(*mixer, given["gated_norm_weight"]),
            ops.Linear(given["out_weight"]),
        )
        spec = ops.MixerSpec(P, G, group_size=2 * INNER)
        call = (given["stream"], weights, spec, ops.Packing(**packing))
        return ops.layer(*call, backend="triton", partners=Alone())[0]  # type: ignore[arg-type]

    return SimpleNamespace(tensors=given, run=run)


def inner(seed: int, tokens: int = TOKENS, **packing: Any) -> Any:
    rows, states = (1, 3) if packing else (2, 2)
    given = {
        "zxbcdt": draw(seed, rows, tokens, INNER + CONV + H),
        "conv_weight": draw(seed, CONV, K),
        "conv_bias": draw(seed, CONV),
        "dt_bias": draw(seed, H),
        "A": (-draw(seed, H).abs()).detach().requires_grad_(),
        "D": draw(seed, H),
        "norm_weight": draw(seed, INNER),
        "conv_initial_states": draw(seed, states, CONV, K - 1),
        "ssm_initial_states": draw(seed, states, H, P, N),
    }
    options = {"head_dim": P, "n_groups": G, "return_final_states": True, "backend": "triton"}
    return SimpleNamespace(tensors=given, run=lambda: mamba2_inner(**given, **options, **packing))


def scan(seed: int, tokens: int = TOKENS, **packing: Any) -> Any:
    given = {
        "x": draw(seed, 2, tokens, H, P),
        "dt": draw(seed, 2, tokens, H),
        "A": (-draw(seed, H).abs()).detach().requires_grad_(),
        "B": draw(seed, 2, tokens, G, N),
        "C": draw(seed, 2, tokens, G, N),
        "z": draw(seed, 2, tokens, H, P),
    }
    options = {"dt_softplus": True, "return_final_states": True, "backend": "triton"}
    return SimpleNamespace(tensors=given, run=lambda: ssd_chunk_scan(**given, **options, **packing))


def conv(seed: int, tokens: int = TOKENS) -> Any:
    given = {"x": draw(seed, 2, tokens, CONV), "weight": draw(seed, CONV, K), "bias": draw(seed, CONV)}
    return SimpleNamespace(tensors=given, run=lambda: causal_conv1d(**given, activation="silu", backend="triton"))


def norm(seed: int, tokens: int = TOKENS) -> Any:
    given = {"x": draw(seed, 2, tokens, INNER), "z": draw(seed, 2, tokens, INNER), "weight": draw(seed, INNER)}
    return SimpleNamespace(tensors=given, run=lambda: gated_rms_norm(*given.values(), group_size=P, backend="triton"))


CUT = {"cu_seqlens": torch.tensor([0, 10, 10, 15])}
DOCUMENTS = {"seq_idx": torch.arange(TOKENS).div(6, rounding_mode="floor").expand(2, TOKENS)}
CASES = {
    "layer": (layer, {}),
    "layer, documents": (layer, DOCUMENTS),
    "layer, bounds": (layer, CUT),
    "part of a layer": (part_of_layer, {}),
    "part of a layer, bounds": (part_of_layer, CUT),
    "inner": (inner, {}),
    "inner, bounds": (inner, CUT),
    "scan": (scan, {}),
    "scan, documents": (scan, DOCUMENTS),
    "conv": (conv, {}),
    "norm": (norm, {}),
}


def results(call: Any) -> list[Tensor]:
    """Outputs and gradients."""
    out = call.run()
    outs = (out,) if isinstance(out, Tensor) else out
    gradients = [draw(9, *o.shape).detach() for o in outs]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, list(call.tensors.values()), gradients)]


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits(case: str, monkeypatch: pytest.MonkeyPatch, runs: list[replay.Plan]) -> None:
    make, packing = CASES[case]
    packing = {name: t.to(DEVICE) for name, t in packing.items()}
    with monkeypatch.context() as without:
        without.setattr(replay, "enabled", lambda: False)
        expected = [results(make(seed, **packing)) for seed in (1, 2)]
    assert not runs
    _, *actual = (results(make(seed, **packing)) for seed in range(3))
    pieces = 5 if "part" in case else 2  # each with its plan
    assert len(runs) == pieces  # the first call is plain, the second writes the plan down
    for found, wanted in zip(actual, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_states_are_updated_in_place(monkeypatch: pytest.MonkeyPatch, runs: list[replay.Plan]) -> None:
    def steps() -> list[Tensor]:
        states = [draw(1, 2, CONV, K - 1).detach(), draw(2, 2, H, P, N).detach()]
        weights = [t.detach() for t in (draw(3, CONV, K), draw(4, CONV), draw(5, H), -draw(6, H).abs(), draw(7, H))]
        found = []
        with torch.no_grad():
            for seed in range(5):
                token = draw(seed, 2, 1, INNER + CONV + H).detach()
                options = {"norm_weight": draw(8, INNER).detach(), "n_groups": G, "backend": "triton"}
                found.append(mamba2_step(token, *states, *weights, **options))
        return [*found, *states]

    with monkeypatch.context() as without:
        without.setattr(replay, "enabled", lambda: False)
        expected = steps()
    actual = steps()
    assert len(runs) == 3
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_states_in_slots_are_updated_in_place(monkeypatch: pytest.MonkeyPatch, runs: list[replay.Plan]) -> None:
    """Other slots in every call, and step sizes of channels beside decay rates of heads."""

    def steps() -> list[Tensor]:
        states, columns = draw(1, 5, H, P, N).detach(), draw(2, 5, CONV, K).detach()
        A, weight = -draw(3, H).abs().detach(), draw(4, CONV, K).detach()
        found = []
        with torch.no_grad():
            for seed in range(5):
                slots = torch.tensor([seed, -1 if seed == 3 else (seed + 2) % 5], device=DEVICE)
                x, dt, b, c = (draw(seed, 2, *shape).detach() for shape in ((H, P), (H, P), (G, N), (G, N)))
                found.append(ssd_state_update(states, x, dt, A, b, c, dt_softplus=True, slots=slots, backend="triton"))
                for tokens in (1, 20):
                    block = draw(seed, 2, tokens, CONV).detach()
                    found.append(causal_conv1d_update(block, columns, weight, slots=slots, backend="triton"))
        return [*found, states, columns]

    with monkeypatch.context() as without:
        without.setattr(replay, "enabled", lambda: False)
        expected = steps()
    actual = steps()
    assert runs
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_steps_that_were_made_before_go_where_they_are_asked_to(runs: list[replay.Plan]) -> None:
    """A step like one before is not checked and routed again, but for what may have changed meanwhile."""
    x, dt, A, b = (
        draw(1, 2, H, P).detach(),
        draw(2, 2, H).detach(),
        -draw(3, H).abs().detach(),
        draw(4, 2, G, N).detach(),
    )

    def step(x: Tensor = x) -> Tensor:
        return ssd_state_update(torch.ones(2, H, P, N, device=DEVICE), x, dt, A, b, b.clone())

    with use_backend("triton"):
        for _ in range(3):
            expected = step()
        assert len(runs) == 1
        with use_backend("torch"):
            torch.testing.assert_close(step(), expected, atol=1e-5, rtol=1e-5)
        with batch_invariant():
            torch.testing.assert_close(step(), expected, atol=1e-5, rtol=1e-5)
        assert len(runs) == 1
        with pytest.raises(ArgumentError, match="x has shape"):
            step(x[:, :1])
        with pytest.raises(BackendError, match="triton"):
            step(x.clone().requires_grad_())
        assert torch.equal(step(), expected)
    assert len(runs) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[:, :3],
        lambda x: x.t().contiguous().t(),
        lambda x: x.double(),
        lambda x: torch.cat([x.flatten(), x.flatten()])[1 : x.numel() + 1].view(x.shape),  # not aligned
    ],
    ids=["shape", "strides", "dtype", "alignment"],
)
def test_a_call_of_another_kind_has_its_own_plan(other: Callable[[Tensor], Tensor], runs: list[replay.Plan]) -> None:
    double = Replayed(lambda x: x * 2)
    x = torch.arange(16.0, device=DEVICE).view(4, 4)
    for _ in range(3):
        double(x)
    (plan,) = runs
    changed = other(x)
    for _ in range(3):
        assert torch.equal(double(changed), changed * 2)
    assert len(runs) == 2
    assert runs[1] is not plan
    double(Parameter(x))
    assert runs[2] is plan


def test_options_and_autocast_are_part_of_the_kind(runs: list[replay.Plan]) -> None:
    product = Replayed(lambda x, factor: (x @ x) * factor)
    x = torch.eye(4, device=DEVICE)
    for _ in range(3):
        product(x, 2.0)
    assert torch.equal(product(x, 3.0), 3 * x)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert [product(x, 2.0).dtype for _ in range(3)] == [torch.bfloat16] * 3
    assert product(x, 2.0).dtype == torch.float32
    assert len(runs) == 3


def test_the_casts_of_autocast_are_not_made_twice(runs: list[replay.Plan]) -> None:
    """What an op computes in fp32 whatever the context stays so in its plan."""

    def product(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, enabled=False):
            return x @ x

    again = Replayed(product)
    x = torch.full((2, 2), 1.0 + 2**-12, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        for _ in range(3):
            assert torch.equal(again(x), product(x))
    assert len(runs) == 1


OUTSIDE = torch.ones(3, device=DEVICE)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (lambda x: x * x.sum().item(), lambda x: (x,)),
        (lambda x: x + OUTSIDE, lambda x: (x,)),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to(DEVICE), lambda x: (x,)),
        (lambda x, y: x[1:] * y[1:], lambda x: (x[:2], x[1:])),
        (lambda x, y: x + y, lambda x: (x, x)),
        (lambda x: x.view(torch.int32) + 0, lambda x: (x,)),
    ],
    ids=["value read", "from elsewhere", "made from a list", "part of shared memory", "given twice", "another dtype"],
)
def test_what_a_plan_cannot_say_is_called(
    function: Callable[..., Tensor], arguments: Callable[[Tensor], tuple[Tensor, ...]], runs: list[replay.Plan]
) -> None:
    again = Replayed(function)
    for seed in range(4):
        x = draw(seed, 3).detach()
        assert torch.equal(again(*arguments(x)), function(*arguments(x)))
    assert not runs


def test_arguments_may_share_memory(runs: list[replay.Plan]) -> None:
    """As slices of one projection do, which steps of others are called with; or not, by the same plan."""
    again = Replayed(lambda x, y, z: torch.cat([x.mul_(y), z]))
    for seed in range(5):
        expected = draw(seed, 12).detach()
        parts = expected.clone().split(4)
        found = again(*(part.clone() for part in parts) if seed == 3 else parts)
        assert torch.equal(found, torch.cat([expected[:4] * expected[4:8], expected[8:]]))
    assert len(runs) == 3


def test_results_of_every_form(runs: list[replay.Plan]) -> None:
    """Views, arguments, Nones and several tensors of one operation."""

    def function(x: Tensor) -> tuple[Tensor | None, ...]:
        total = torch.cat([x, 2 * x])
        largest, where = total.view(2, -1).max(1)
        total[0].fill_(7.0)
        return total[1:], None, x, largest, where, total.t()

    again = Replayed(function)
    for seed in range(3):
        x = draw(seed, 4, 5).detach()
        found, expected = again(x), function(x)
        assert [f is None or torch.equal(f, e) for f, e in zip(found, expected, strict=True)] == [True] * 6
        assert found[2] is x
    assert len(runs) == 1


def test_nothing_is_held(runs: list[replay.Plan]) -> None:
    """Neither by a plan nor by its writing."""

    def memory() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    function = layer(0).run
    function()
    before = memory()
    for _ in range(2):
        out = function()
        held = weakref.ref(out)
        del out
        assert held() is None
    assert memory() <= before  # what others have left behind may go meanwhile
    assert len(runs) == 1


def test_an_error_leaves_no_plan() -> None:
    def function(x: Tensor) -> Tensor:
        if wrong:
            raise ValueError("wrong")
        return x + 1

    again, x = Replayed(function), torch.zeros(2, device=DEVICE)
    wrong = False
    again(x)
    wrong = True
    with pytest.raises(ValueError, match="wrong"):
        again(x)
    wrong = False
    for _ in range(3):
        assert torch.equal(again(x), x + 1)


class Compiled:
    """Stands in for a compiled kernel, which is given addresses: remembers what it ran with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.ran: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.ran.append((grid, *args))

    def run(self, *args: Any) -> None:
        assert args[3:9] == (None, "function", "metadata", None, None, None)
        self.ran.append((args[:3], *args[9:]))


class Kernel:
    """Stands in for a kernel."""

    def __init__(self) -> None:
        self.params = [SimpleNamespace(name=name) for name in ("a", "b", "c", "e", "SIZE")]
        self.compiled = Compiled()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **constants: self.compiled


class Tile:
    """Stands in for a tile descriptor."""

    def __init__(self, base: Tensor) -> None:
        self.base, self.block_shape, self.shape = base, [1, 4], list(base.shape)


@pytest.mark.parametrize("known", [True, False])
def test_compiled_kernels_get_addresses(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Triton's way to run them is a known one or not."""
    monkeypatch.setattr(replay, "_KNOWN", known)
    monkeypatch.setattr(launches, "_compiled", {})
    kernel = Kernel()

    def function(x: Tensor) -> Tensor:
        first, out, second = (torch.empty(300, device=x.device) for _ in range(3))
        launch(kernel, (3,), x[2:], first, Tile(first[8:]), 5, SIZE=8, num_warps=2)
        launch(kernel, (4, 2), first, second, Tile(x), 5, SIZE=8, num_warps=2)
        launch(kernel, (1,), second, out, Tile(out), None, SIZE=8, num_warps=2)
        return out

    again = Replayed(function)
    for seed in range(4):
        x = draw(seed, 300).detach()
        out = again(x)
        if seed >= 2:
            (grid, a, first, tile, five, size), step, last = kernel.compiled.ran[-3:]
            assert (grid, a, five, size) == ((3, 1, 1), x.data_ptr() + 8, 5, 8)
            assert (tile.base.data_ptr(), tile.block_shape, tile.shape) == (first + 32, [1, 4], [292])
            assert (step[0], step[1], step[3].base.data_ptr()) == ((4, 2, 1), first, x.data_ptr())
            assert abs(step[2] - first) >= 1200
            assert last[1:3] == (step[2], out.data_ptr())
            assert last[4] is None
            assert first % 16 == step[2] % 16 == 0


def test_watched_launches_are_made_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(replay, "_INTERPRETED", False)
    assert replay.enabled()
    hook = SimpleNamespace(calls=[print])
    monkeypatch.setattr(replay.knobs.runtime, "launch_enter_hook", hook)
    assert not replay.enabled()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20), st.integers(0, 20)), max_size=12))
def test_what_is_used_at_once_lies_apart(slots: list[tuple[int, int, int]]) -> None:
    sizes = {i: 512 * size for i, (size, *_) in enumerate(slots)}
    spans = {i: (min(ends), max(ends)) for i, (_, *ends) in enumerate(slots)}
    placed, total = replay._packed(sizes, spans)
    for i, at in placed.items():
        assert at % 512 == 0
        assert at + sizes[i] <= total
        for j, other in placed.items():
            if i < j and spans[i][0] <= spans[j][1] and spans[j][0] <= spans[i][1]:
                assert at + sizes[i] <= other or other + sizes[j] <= at
    assert total <= sum(sizes.values())


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_trains_with_the_same_bits(
    packed: bool, monkeypatch: pytest.MonkeyPatch, runs: list[replay.Plan]
) -> None:
    """Kernels for Hopper, in bf16; the launches of a plan can be captured, too."""
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=256, hidden_size=256, num_hidden_layers=4, num_heads=8, head_dim=64, state_size=64, n_groups=1
    )
    model = Mamba2ForCausalLM(config).cuda().bfloat16().train()
    ids = torch.randint(256, (1, 700), device="cuda")
    positions = {"position_ids": torch.cat([torch.arange(n) for n in (300, 77, 323)])[None].cuda()} if packed else {}

    def step() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, **positions).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    with monkeypatch.context() as without:
        without.setattr(replay, "enabled", lambda: False)
        expected = step()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
    assert len(runs) > 20
    if packed:  # where documents start is read on the CPU
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
