"""A whole layer as one op, on both backends: the parts one by one in fp64 say what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_hf.errors import ArgumentError, BackendError
from mamba2_hf.ops import LowRank, dispatch, gated_rms_norm, mamba2_inner, mamba2_layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
d, H, P, G, N, K, T = 12, 4, 8, 2, 16, 4, 37
INNER, C = H * P, H * P + 2 * G * N
FP32 = ("stream", "dt_bias", "A_log", "D")  # whatever the weights are
BIASES = ("in_bias", "out_bias", "conv_bias", "dt_bias", "D")
PACKING = {
    "rows": {},
    "seq_idx": {"seq_idx": torch.arange(T).div(6, rounding_mode="floor").expand(2, T)},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 10, 10, 33])},
}


@pytest.fixture(autouse=True, params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Triton serves the CPU too: in its interpreter, where there is no GPU."""
    if request.param == "triton":
        monkeypatch.setattr(dispatch, "_usable", lambda device: (True, "by test"))
        request.getfixturevalue("poison")
    return request.param


def inputs(batch: int = 2) -> dict[str, Tensor]:
    """fp64, all arguments that are differentiable."""
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=source, dtype=torch.float64)

    return {
        "stream": draw(batch, T, d),
        "norm_weight": draw(d),
        "in_weight": draw(INNER + C + H, d, scale=d**-0.5),
        "in_bias": draw(INNER + C + H),
        "conv_weight": draw(C, K, scale=0.5),
        "conv_bias": draw(C),
        "dt_bias": draw(H),
        "A_log": draw(H, scale=0.5),
        "D": draw(H),
        "gated_norm_weight": draw(INNER),
        "out_weight": draw(d, INNER, scale=INNER**-0.5),
        "out_bias": draw(d),
    }


def parts(given: dict[str, Tensor], **packing: Any) -> Tensor:
    """The same layer, a part at a time, in PyTorch."""
    get = given.get
    normed = gated_rms_norm(given["stream"], None, given["norm_weight"], backend="torch")
    y = mamba2_inner(
        F.linear(normed, given["in_weight"], get("in_bias")),
        *(given["conv_weight"], get("conv_bias"), get("dt_bias"), -given["A_log"].exp(), get("D")),
        norm_weight=given["gated_norm_weight"],
        head_dim=P,
        n_groups=G,
        group_size=INNER // G,
        backend="torch",
        **packing,
    )
    return given["stream"] + F.linear(y, given["out_weight"], get("out_bias"))


def whole(given: dict[str, Tensor], backend: str, **packing: Any) -> Tensor:
    absent = {name: None for name in BIASES if name not in given}
    return mamba2_layer(**given, **absent, n_groups=G, group_size=INNER // G, backend=backend, **packing)


def results(run: Callable[[dict[str, Tensor]], Tensor], given: dict[str, Tensor]) -> list[Tensor]:
    """The output and every gradient."""
    out = run(given)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, list(given.values()), gradient)]


def cast(tensors: dict[str, Tensor], weights: torch.dtype, others: torch.dtype | None = None) -> dict[str, Tensor]:
    kinds = {name: others if others is not None and name in FP32 else weights for name in tensors}
    return {name: t.to(DEVICE, kinds[name]).clone().requires_grad_() for name, t in tensors.items()}


def close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize(("packing", "absent"), [*((p, ()) for p in PACKING), ("rows", BIASES)])
def test_is_its_parts(packing: str, absent: tuple[str, ...], backend: str) -> None:
    tensors = inputs(1 if packing == "cu_seqlens" else 2)
    tensors = {name: t for name, t in tensors.items() if name not in absent}
    options = {name: t.to(DEVICE) for name, t in PACKING[packing].items()}
    expected = results(lambda given: parts(given, **options), cast(tensors, torch.float64))
    actual = results(lambda given: whole(given, backend, **options), cast(tensors, torch.float32))
    close(actual, expected, 5e-5)  # dt_bias: sums that cancel, 2e-5 off in PyTorch too


def test_a_stream_in_fp32_beside_half_precision(backend: str) -> None:
    """Every gradient has its tensor's dtype, and what passes by the layer is not rounded."""
    tensors = {name: t.to(torch.float16) for name, t in inputs().items()}
    given = cast(tensors, torch.float16, torch.float32)
    actual = results(lambda given: whole(given, backend), given)
    assert [t.dtype for t in actual] == [torch.float32, *(t.dtype for t in given.values())]
    close(actual, results(parts, cast(tensors, torch.float64)), 1e-2)


def test_autocast_is_of_the_products(backend: str) -> None:
    """Weights in fp32, as they are trained: the op is what its weights in the lower precision give."""
    low = {name: t.to(torch.float16) for name, t in inputs().items()}
    given = cast(low, torch.float32)
    with torch.autocast(DEVICE, torch.float16):
        actual = results(lambda given: whole(given, backend), given)
    assert {t.dtype for t in actual} == {torch.float32}
    close(actual, results(parts, cast(low, torch.float64)), 1e-2)


def low_rank(rank: int = 3) -> dict[str, Tensor]:
    """Factors of what LoRA adds to both projections, fp64."""
    source = torch.Generator().manual_seed(2)
    sizes = {"in_lora": (INNER + C + H, d), "out_lora": (d, INNER)}
    shapes = {f"{n}.down": (rank, inputs) for n, (_, inputs) in sizes.items()}
    shapes |= {f"{n}.up": (outputs, rank) for n, (outputs, _) in sizes.items()}
    return {name: 0.2 * torch.randn(shape, generator=source, dtype=torch.float64) for name, shape in shapes.items()}


def adapted(given: dict[str, Tensor], backend: str, projections: tuple[str, ...], **packing: Any) -> Tensor:
    """Through the op."""
    loras = {f"{p}_lora": LowRank(given[f"{p}_lora.down"], given[f"{p}_lora.up"], 0.7) for p in projections}
    return whole({name: t for name, t in given.items() if "lora" not in name}, backend, **loras, **packing)


def merged(given: dict[str, Tensor], projections: tuple[str, ...], **packing: Any) -> Tensor:
    """With weights that include it."""
    plain = {name: t for name, t in given.items() if "lora" not in name}
    for p in projections:
        plain[f"{p}_weight"] = plain[f"{p}_weight"] + 0.7 * given[f"{p}_lora.up"] @ given[f"{p}_lora.down"]
    return parts(plain, **packing)


@pytest.mark.parametrize("projections", [("in", "out"), ("in",), ("out",)])
@pytest.mark.parametrize("frozen", [True, False])
def test_lora(projections: tuple[str, ...], frozen: bool, backend: str) -> None:
    """What it adds is what it would be in the weights, and its gradients come with or without theirs."""
    factors = {name: t for name, t in low_rank().items() if name.partition("_")[0] in projections}

    def of(run: Callable[[dict[str, Tensor]], Tensor], dtype: torch.dtype) -> list[Tensor]:
        given = cast(inputs() | factors, dtype)
        for name in ("in_weight", "out_weight") if frozen else ():
            given[name].requires_grad_(False)
        out = run(given)
        trained = [t for t in given.values() if t.requires_grad]
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return [out, *torch.autograd.grad(out, trained, gradient)]

    expected = of(lambda given: merged(given, projections), torch.float64)
    close(of(lambda given: adapted(given, backend, projections), torch.float32), expected, 5e-5)


def test_lora_under_autocast(backend: str) -> None:
    """Factors in fp32 beside weights in half precision, as PEFT makes them: their gradients are in fp32 too."""
    both = ("in", "out")
    tensors = {name: t.to(torch.float16) for name, t in (inputs() | low_rank()).items()}
    given = cast(tensors, torch.float16, torch.float32)
    given |= {name: given[name].detach().float().requires_grad_() for name in low_rank()}
    with torch.autocast(DEVICE, torch.float16):
        actual = results(lambda given: adapted(given, backend, both), given)
    assert [t.dtype for t in actual[1:]] == [t.dtype for t in given.values()]
    close(actual, results(lambda given: merged(given, both), cast(tensors, torch.float64)), 1e-2)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # autograd's thread begins with a product
@pytest.mark.parametrize("packing", ["rows", "seq_idx"])
def test_lora_on_a_gpu(packing: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that have kernels of their own, in bf16: errors as those of the same call on PyTorch."""
    sizes = {"d": 128, "H": 4, "P": 64, "G": 1, "N": 64, "T": 300, "INNER": 256, "C": 384}
    for name, size in sizes.items():
        monkeypatch.setitem(globals(), name, size)
    documents = torch.arange(300, device=DEVICE).div(70, rounding_mode="floor").expand(2, 300)
    options = {"seq_idx": documents} if packing == "seq_idx" else {}
    tensors = {name: t.bfloat16() for name, t in (inputs() | low_rank(16)).items()}
    both = ("in", "out")
    expected = results(lambda given: merged(given, both, **options), cast(tensors, torch.float64))

    def errors(backend: str) -> list[float]:
        given = cast(tensors, torch.bfloat16, torch.float32)
        found = results(lambda given: adapted(given, backend, both, **options), given)
        with torch.no_grad():
            return [float((a.double() - e).norm() / e.norm()) for a, e in zip(found, expected, strict=True)]

    usual = errors("torch")
    for _ in range(3):  # the third is carried out from a plan
        assert all(error <= 2 * max(other, 2**-8) for error, other in zip(errors(backend), usual, strict=True))


@pytest.mark.parametrize("frozen", ["projections", "all but one"])
def test_frozen_weights(frozen: str, backend: str) -> None:
    """What needs no gradient gets none, and the others' are the same."""
    tensors = inputs()
    trained = {"all but one": ["dt_bias"], "projections": [name for name in tensors if name[-6:] != "weight"]}[frozen]

    def gradients(given: dict[str, Tensor], run: Callable[[dict[str, Tensor]], Tensor]) -> list[Tensor]:
        for name, tensor in given.items():
            tensor.requires_grad_(name in trained)
        run(given).square().sum().backward()
        assert [name for name, tensor in given.items() if tensor.grad is not None] == trained
        return [given[name].grad for name in trained]

    expected = gradients(cast(tensors, torch.float64), parts)
    close(gradients(cast(tensors, torch.float32), lambda given: whole(given, backend)), expected, 2e-5)


def test_the_same_bits_twice(backend: str) -> None:
    first, second = (results(lambda given: whole(given, backend), cast(inputs(), torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_checkpointed_layers_are_the_same(backend: str) -> None:
    given = cast(inputs(), torch.float32)
    names = list(given)

    def checkpointed(given: dict[str, Tensor]) -> Tensor:
        def run(*tensors: Tensor) -> Tensor:
            return whole(dict(zip(names, tensors, strict=True)), backend)

        return torch.utils.checkpoint.checkpoint(run, *given.values(), use_reentrant=False)

    kept = results(lambda given: whole(given, backend), given)
    assert all(torch.equal(a, b) for a, b in zip(results(checkpointed, given), kept, strict=True))


def test_what_is_kept(backend: str) -> None:
    """On Triton: beside the weights, the stream, the outputs of in_proj and of the scan, and A."""
    given = cast({name: t for name, t in inputs().items() if name not in BIASES}, torch.float32)
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        whole(given, backend)
    weights = {t.data_ptr() for name, t in given.items() if name != "stream"}
    kept = sum(numel for at, numel in held.items() if at not in weights)
    if backend == "triton":
        assert kept == 2 * T * (d + (INNER + C + H) + INNER) + H


def test_contradictions_are_refused(backend: str) -> None:
    given = cast(inputs(), torch.float32)
    with pytest.raises(ArgumentError, match="out_weight"):
        whole(given | {"out_weight": given["out_weight"][:-1]}, backend)
    with pytest.raises(ArgumentError, match="in_bias"):
        whole(given | {"in_bias": given["in_bias"][:-1]}, backend)
    for name in ("down", "up"):
        wrong = {"down": torch.zeros(3, INNER), "up": torch.zeros(d, 3)}
        lora = LowRank(**{**wrong, name: wrong[name][:, 1:]}, scale=1.0)
        with pytest.raises(ArgumentError, match=r"out_lora\."):
            whole(given, backend, out_lora=lora)
    with pytest.raises(ArgumentError, match="dtype"):
        whole(given | {"in_weight": given["in_weight"].double()}, backend)


def test_a_second_derivative(backend: str) -> None:
    given = cast(inputs(), torch.float32)
    out = whole(given, backend)
    if backend == "triton":
        with pytest.raises(BackendError, match="second derivative"):
            torch.autograd.grad(out.sum(), given["stream"], create_graph=True)
    else:
        (first,) = torch.autograd.grad(out.square().sum(), given["stream"], create_graph=True)
        assert first.requires_grad
