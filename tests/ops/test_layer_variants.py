"""What published hybrids do to a layer, as part of the layer's op: multipliers, gates without a norm, a residual of its
own, states; beside the layer written out in fp64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peers import two_devices, words_sent
from slices import in_slices
from torch import Tensor

from mamba2_hf import ops
from mamba2_hf.distributed import Group
from mamba2_hf.distributed.packed import Cut, LayerPartners, Part
from mamba2_hf.errors import ArgumentError
from mamba2_hf.ops import LayerStep, LayerWeights, Linear, MixerSpec, MixerWeights, Packing
from mamba2_hf.ops.runtime import tables

pytestmark = pytest.mark.usefixtures("poison", "triton_serves")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
d, H, P, G, N, K = 12, 4, 8, 2, 16, 4
INNER, MAPS = H * P, G * N
CHANNELS = INNER + 2 * MAPS
SIZES = [INNER, INNER, MAPS, MAPS, H]


class Variant(NamedTuple):
    """How a layer differs from a plain Mamba-2's."""

    spec: dict[str, Any]
    norm: bool = True
    bias: bool = False
    residual: bool = False


VARIANTS = {
    "granite": Variant({"output_multiplier": 0.22}),
    "falcon": Variant(
        {"multipliers": (0.5, 1.3, 0.7, 1.9, 1.1), "input_multiplier": 1.25, "output_multiplier": 0.35},
        norm=False,
        residual=True,
    ),
    "falcon with norm and biases": Variant(
        {
            "multipliers": (0.5, 1.3, 0.7, 1.9, 1.1),
            "input_multiplier": 0.8,
            "output_multiplier": 0.35,
            "norm_before_gate": True,
        },
        bias=True,
    ),
    "zamba": Variant({}, residual=True),
    "input only": Variant({"input_multiplier": 0.6}, bias=True),
    "gate only": Variant({}, norm=False),
    "one group normed": Variant({"group_size": INNER, "output_multiplier": 2.0}),
}


BACKENDS = [("torch", torch.float64, 1e-12), ("triton", torch.float32, 5e-5)]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    return VARIANTS[request.param]


def make(variant: Variant, batch: int, tokens: int) -> dict[str, Tensor]:
    """Everything that is differentiable, fp64."""
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=source, dtype=torch.float64)

    given = {
        "stream": draw(batch, tokens, d),
        "residual": draw(batch, tokens, d),
        "norm": draw(d),
        "into": draw(2 * INNER + 2 * MAPS + H, d, scale=d**-0.5),
        "in_bias": draw(2 * INNER + 2 * MAPS + H),
        "conv": draw(CHANNELS, K, scale=0.5),
        "conv_bias": draw(CHANNELS),
        "dt_bias": draw(H),
        "A_log": draw(H, scale=0.5),
        "D": draw(H),
        "gated_norm": draw(INNER),
        "out": draw(d, INNER, scale=INNER**-0.5),
        "out_bias": draw(d),
        "conv_state": draw(batch, CHANNELS, K - 1),
        "ssm_state": draw(batch, H, P, N),
    }
    absent = {"residual": variant.residual, "gated_norm": variant.norm, "in_bias": variant.bias}
    absent["out_bias"] = variant.bias
    return {name: t for name, t in given.items() if absent.get(name, True)}


def spec_of(variant: Variant) -> MixerSpec:
    return MixerSpec(P, G, **{"group_size": INNER // G, **variant.spec})


def weights_of(given: dict[str, Tensor]) -> LayerWeights:
    get = given.get
    mixer = (given["conv"], given["conv_bias"], given["dt_bias"], None, given["A_log"], given["D"], get("gated_norm"))
    into, out = Linear(given["into"], get("in_bias")), Linear(given["out"], get("out_bias"))
    return LayerWeights(given["norm"], into, MixerWeights(*mixer), out)


def written_out(given: dict[str, Tensor], spec: MixerSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The layer as a recurrence; returns the final states too."""
    x, get = given["stream"], given.get
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.norm_eps) * given["norm"]
    u = F.linear(normed * spec.input_multiplier, given["into"], get("in_bias"))
    parts = [part * factor for part, factor in zip(u.split(SIZES, -1), spec.multipliers or (1,) * 5, strict=True)]
    z, dt = parts[0], F.softplus(parts[4] + given["dt_bias"])
    inputs = torch.cat([given["conv_state"], torch.cat(parts[1:4], -1).mT], -1)
    xbc = F.silu(F.conv1d(inputs, given["conv"][:, None], given["conv_bias"], groups=CHANNELS)).mT
    values, B, C = xbc.split([INNER, MAPS, MAPS], -1)
    values = values.unflatten(-1, (H, P))
    B, C = (t.unflatten(-1, (G, N)).repeat_interleave(H // G, 2) for t in (B, C))
    state, ys = given["ssm_state"], []
    for t in range(x.shape[1]):
        decay = torch.exp(-dt[:, t] * given["A_log"].exp())[..., None, None]
        state = state * decay + (dt[:, t, :, None] * values[:, t])[..., None] * B[:, t, :, None]
        ys.append((state @ C[:, t, :, :, None])[..., 0] + values[:, t] * given["D"][:, None])
    y, gate = torch.stack(ys, 1).flatten(-2), F.silu(z)
    if "gated_norm" in given:
        y = y if spec.norm_before_gate else y * gate
        groups = y.unflatten(-1, (-1, spec.group_size))
        y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + spec.gated_norm_eps)).flatten(-2)
        y = y * given["gated_norm"] * (gate if spec.norm_before_gate else 1)
    else:
        y = y * gate
    out = spec.output_multiplier * F.linear(y, given["out"], get("out_bias"))
    return given.get("residual", x) + out, inputs[..., inputs.shape[-1] - K + 1 :], state


def cast(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(DEVICE, dtype, copy=True) for name, t in given.items()}


def errors(actual: Any, expected: Any) -> list[float]:
    pairs = ((a.detach().double().cpu(), e.detach().cpu()) for a, e in zip(actual, expected, strict=True))
    return [float((a - e).norm() / e.norm()) for a, e in pairs]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tokens", [1, 21])
def test_a_prompt_and_its_gradients(variant: Variant, tokens: int, backend: str) -> None:
    """Output, final states, and the gradient of everything, initial states among it."""
    spec, tensors = spec_of(variant), make(variant, 2, tokens)

    def results(given: dict[str, Tensor], run: Any) -> list[Tensor]:
        for tensor in given.values():
            tensor.requires_grad_()
        found = run(given)
        source = torch.Generator().manual_seed(1)
        probes = [torch.randn(t.shape, generator=source, dtype=torch.float64).to(t) for t in found]
        return [*found, *torch.autograd.grad(found, list(given.values()), probes)]

    def layer(given: dict[str, Tensor]) -> Any:
        states = given["conv_state"], given["ssm_state"]
        return ops.layer(
            *(given["stream"], weights_of(given), spec, Packing(), states, given.get("residual")), backend=backend
        )

    expected = results(cast(tensors, torch.float64), lambda given: written_out(given, spec))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-5)):
        if backend == "torch" or dtype == torch.float32:
            assert max(errors(results(cast(tensors, dtype), layer), expected)) <= tolerance


@pytest.mark.parametrize(("rows", "limits"), [(1, (d, 64)), (1, (0, 64)), (3, (0, 64)), (3, (0, 1))])
def test_steps(variant: Variant, rows: int, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence in two launches and in three, several, and more than kernels of a whole layer take."""
    monkeypatch.setattr(tables, "NARROW_LAYER", limits[0])
    monkeypatch.setattr(tables, "step_rows", lambda chip: limits[1])
    spec, tensors = spec_of(variant), make(variant, rows, 1)
    expected = written_out(tensors, spec)
    for backend, dtype, tolerance in (("torch", torch.float64, 1e-12), ("triton", torch.float32, 1e-5)):
        given = cast(tensors, dtype)
        call = LayerStep(
            *(given["stream"], given["conv_state"], given["ssm_state"], weights_of(given), spec),
            residual=given.get("residual"),
        )
        y = ops.layer_step(call, backend)
        assert max(errors((y, call.conv_state, call.ssm_state), expected)) <= tolerance


def heads_of(given: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Of two devices, the half that one has."""
    inner, maps, heads = Part(INNER, 2), Part(MAPS, 2), Part(H, 2)
    channels, entering = (inner, maps, maps), (inner, inner, maps, maps, heads)
    cuts = {name: Cut(0, (heads,)) for name in ("dt_bias", "A_log", "D")}
    cuts |= {name: Cut(0, channels) for name in ("conv", "conv_bias")} | {"gated_norm": Cut(0, (inner,))}
    cuts |= {name: Cut(0, entering) for name in ("into", "in_bias")} | {"out": Cut(1, (inner,))}
    cuts |= {"conv_state": Cut(1, channels), "ssm_state": Cut(1, (heads,))}
    return {name: cuts[name].piece(t, rank, 2) if name in cuts else t for name, t in given.items()}


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("sums", [1, 3])
def test_a_prompt_of_a_layer_that_devices_share(
    variant: Variant, sums: int, backend: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, final states and every gradient; the sum over the devices in one piece, and in several."""
    monkeypatch.setattr(tables, "rows_at_once", lambda rows, width: -(-rows // sums))
    spec, tensors = spec_of(variant), make(variant, 2, 10)
    shapes = [t.shape for t in (tensors["stream"], tensors["conv_state"], tensors["ssm_state"])]
    source = torch.Generator().manual_seed(1)
    probes = dict(
        zip(("y", "conv_state", "ssm_state"), (torch.randn(s, generator=source) for s in shapes), strict=True)
    )

    def results(given: dict[str, Tensor], probes: dict[str, Tensor], run: Any) -> dict[str, Tensor]:
        given = {name: tensor.requires_grad_() for name, tensor in given.items()}
        found = run(given)
        gradients = torch.autograd.grad(found, list(given.values()), list(probes.values()))
        return dict(zip(probes, found, strict=True)) | {f"d{n}": g for n, g in zip(given, gradients, strict=True)}

    def run(group: Group) -> dict[str, Tensor]:
        partners = LayerPartners(group, Cut(0, ()), Cut(0, ()))

        def layer(given: dict[str, Tensor]) -> Any:
            weights, states = weights_of(given), (given["conv_state"], given["ssm_state"])
            call = (given["stream"], weights, spec._replace(n_groups=G // 2), Packing(), states, given.get("residual"))
            return ops.layer(*call, backend=backend, partners=partners)

        own = cast(heads_of(tensors, group.rank), dtype)
        return results(own, cast(heads_of(probes, group.rank), dtype), layer)

    expected = results(
        cast(tensors, torch.float64), cast(probes, torch.float64), lambda given: written_out(given, spec)
    )
    for rank, found in enumerate(in_slices(2, run)):
        known = heads_of({name[1:]: t for name, t in expected.items() if name[0] == "d"}, rank)
        known = {f"d{name}": t for name, t in known.items()}
        known |= heads_of({name: expected[name] for name in probes}, rank)
        for name, value in found.items():
            assert errors([value], [known[name]])[0] <= tolerance, name


@pytest.mark.parametrize(("rows", "limits"), [(1, (d, 64)), (1, (0, 64)), (3, (0, 64)), (3, (0, 1))])
def test_steps_of_a_layer_that_devices_share(
    variant: Variant, rows: int, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm of one group over both takes one number more in the only sum. Kernels that send find what the other would
    have sent.
    """
    monkeypatch.setattr(tables, "NARROW_LAYER", limits[0])
    monkeypatch.setattr(tables, "step_rows", lambda chip: limits[1])
    spec, tensors = spec_of(variant)._replace(n_groups=G // 2), make(variant, rows, 1)
    expected = written_out(tensors, spec_of(variant))

    def run(
        rank: int, total: Any, backend: str, dtype: torch.dtype, peers: ops.Peers | None = None
    ) -> tuple[Tensor, ...]:
        own = cast(heads_of(tensors, rank), dtype)
        states = own["conv_state"], own["ssm_state"]
        call = LayerStep(own["stream"], *states, weights_of(own), spec, residual=own.get("residual"))
        call = call if peers is None else call._replace(peers=peers)
        return ops.layer_step(call, backend, total), *states

    def keep(sent: list[Tensor]) -> Any:
        return lambda part: sent.append(part.clone()) or part

    def never(part: Tensor) -> Tensor:
        raise AssertionError("what a kernel sends is sent again")

    for backend, dtype, tolerance in (("torch", torch.float64, 1e-12), ("triton", torch.float32, 1e-5)):
        sent: list[Tensor] = []
        for rank in range(2):
            run(rank, keep(sent), backend, dtype)
        assert sent[0].shape == (rows, 1, d + ("group_size" in variant.spec))
        for rank in range(2):
            found = run(rank, lambda _, both=sent[0] + sent[1]: both.clone(), backend, dtype)
            own = heads_of({"conv_state": expected[1], "ssm_state": expected[2]}, rank)
            assert max(errors(found, (expected[0], own["conv_state"], own["ssm_state"]))) <= tolerance
            if backend == "triton" and rows <= limits[1]:
                memory = two_devices(rank, sent[1 - rank])
                pushed = run(rank, never, backend, dtype, memory.peers)
                assert max(errors(pushed, (expected[0], own["conv_state"], own["ssm_state"]))) <= tolerance
                assert torch.equal(words_sent(memory), sent[rank].flatten())
                assert not memory.failed.item()


def test_without_gradients_nothing_else_comes_out(variant: Variant) -> None:
    """The same bits as with them, and without states as with states of zeros."""
    spec = spec_of(variant)
    given = cast(make(variant, 1, 20), torch.float32)
    zeros = tuple(torch.zeros_like(given[name]) for name in ("conv_state", "ssm_state"))
    for backend in ("torch", "triton"):
        arguments = (given["stream"], weights_of(given), spec, Packing())
        stateless, *_ = ops.layer(*arguments, None, given.get("residual"), backend)
        started, *_ = ops.layer(*arguments, zeros, given.get("residual"), backend)
        fresh, *_ = ops.layer(*arguments, (None, None), given.get("residual"), backend)
        assert torch.equal(stateless, fresh)
        assert errors([started], [stateless.double()])[0] < 1e-6


def test_what_does_not_fit_is_named() -> None:
    given = make(VARIANTS["zamba"], 1, 3)
    call = (given["stream"], weights_of(given))
    with pytest.raises(ArgumentError, match=r"residual has shape \(1, 2, 12\)"):
        ops.layer(*call, spec_of(VARIANTS["zamba"]), residual=given["residual"][:, 1:])
    with pytest.raises(ArgumentError, match="residual"):
        ops.layer(*call, spec_of(VARIANTS["zamba"]), residual=given["residual"].float())
    with pytest.raises(ArgumentError, match="expected one for each of z, x, B, C and dt"):
        ops.layer(*call, spec_of(VARIANTS["zamba"])._replace(multipliers=(1.0, 2.0)))
