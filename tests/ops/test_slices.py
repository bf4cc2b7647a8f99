"""A sequence cut into slices gives what it gives whole: the scan, a mixer and a layer, in threads of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slices import in_slices
from ssd_cases import inner_arguments, relative_error, scan_inputs
from torch import Tensor

from mamba2_hf import ops
from mamba2_hf.distributed import Group
from mamba2_hf.distributed.context_parallel import Slice
from mamba2_hf.ops.mixer.op import Inner, inner, layer
from mamba2_hf.ops.runtime import tables
from mamba2_hf.ops.scan.op import Scan, scan

Op = Callable[[dict[str, Any], Tensor | None, Any, str], Tensor]
"""Of tensors by name, ``seq_idx``, neighbors and a backend."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of Triton, whose interpreter runs on a CPU
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def mixed(tensors: dict[str, Any], seq_idx: Tensor | None, neighbors: Any, backend: str) -> Tensor:
    """A mixer between its projections."""
    call = Inner(tensors["zxbcdt"], mixer_weights(tensors), SPEC, ops.Packing(seq_idx))
    return inner(call, backend, neighbors)[0]


def layered(tensors: dict[str, Any], seq_idx: Tensor | None, neighbors: Any, backend: str) -> Tensor:
    """A whole layer."""
    weights = ops.LayerWeights(
        tensors["norm_before"],
        ops.Linear(tensors["in_weight"]),
        mixer_weights(tensors)._replace(A=None, A_log=tensors["A_log"]),
        ops.Linear(tensors["out_weight"]),
    )
    return layer(tensors["stream"], weights, SPEC, ops.Packing(seq_idx), backend=backend, neighbors=neighbors)[0]


def scanned(tensors: dict[str, Any], seq_idx: Tensor | None, neighbors: Any, backend: str) -> Tensor:
    """The scan, with a gate of its own."""
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    call = Scan(*(tensors[name] for name in names), packing=ops.Packing(seq_idx), dt_softplus=True)
    return scan(call, backend, neighbors)[0].flatten(2)


def mixer_weights(tensors: dict[str, Any]) -> ops.MixerWeights:
    names = ("conv_weight", "conv_bias", "dt_bias", "A")
    return ops.MixerWeights(*(tensors.get(name) for name in names), None, tensors["D"], tensors["norm_weight"])


SPEC = ops.MixerSpec(head_dim=6, n_groups=2, group_size=12)
OF_TOKENS = {"zxbcdt", "stream", "x", "dt", "B", "C", "z"}


def arguments(op: Op, tokens: int, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    if op is scanned:
        drawn: dict[str, Any] = scan_inputs(rows, tokens)
        del drawn["initial_states"]
    else:
        drawn = inner_arguments(0, tokens, rows)
    if op is layered:
        generator = torch.Generator().manual_seed(1)
        wide = drawn.pop("zxbcdt").shape[2]
        drawn["A_log"] = (-drawn.pop("A")).log()
        shapes = {"stream": (rows, tokens, 8), "norm_before": (8,), "in_weight": (wide, 8), "out_weight": (8, 24)}
        drawn |= {n: torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        drawn["in_weight"] /= 8**0.5  # as large as what it projects, or rounding of the step sizes grows with it
    return {name: value.to(dtype) for name, value in drawn.items() if isinstance(value, Tensor)}


def outputs_and_gradients(op: Op, tensors: dict[str, Tensor], dy: Tensor, *more: Any) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    y = op(leaves, *more)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}


def assert_slices_make_the_whole(
    op: Op,
    size: int,
    length: int,
    starts: list[tuple[int, int]],
    *,
    rows: int = 2,
    dtype: torch.dtype = torch.float64,
    backend: str = "torch",
) -> None:
    """``size`` slices of ``length`` tokens; documents start at ``(row, token)``."""
    tokens = size * length
    tensors = arguments(op, tokens, rows, dtype)
    seq_idx = None
    if starts:
        seq_idx = torch.zeros(rows, tokens, dtype=torch.long)
        for row, token in starts:
            seq_idx[row, token:] += 1
    width = tensors["stream"].shape[2] if op is layered else 24
    dy = torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    expected = outputs_and_gradients(op, exact, dy, seq_idx, None, "torch")

    def run(group: Group) -> dict[str, Tensor]:
        own = slice(group.rank * length, (group.rank + 1) * length)
        cut = {name: tensor[:, own] if name in OF_TOKENS else tensor for name, tensor in tensors.items()}
        ids = None if seq_idx is None else seq_idx[:, own]
        neighbors = Slice(group, rows, length, 3, seq_idx)
        return outputs_and_gradients(op, cut, dy[:, own].to(dtype), ids, neighbors, backend)

    if backend == "triton":
        tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
        dy, seq_idx = dy.to(DEVICE), None if seq_idx is None else seq_idx.to(DEVICE)
    found = in_slices(size, run)
    for name, known in expected.items():
        parts = [slice_[name] for slice_ in found]
        whole = torch.cat(parts, 1) if name in {"y", *OF_TOKENS} else torch.stack(parts).sum(0)
        whole = whole.cpu()
        assert relative_error(whole, known) < TOLERANCE[dtype], (name, relative_error(whole, known))


OPS = {"scan": scanned, "mixer": mixed, "layer": layered}
BORDERS = {
    "one document": [],
    "at a border": [(0, 8), (1, 16)],
    "before a border": [(0, 7), (1, 6), (1, 15)],
    "after a border": [(0, 9), (1, 10), (1, 17)],
    "shorter than the convolution": [(0, 6), (0, 7), (0, 8), (1, 5), (1, 7)],
    "of one token": [(1, t) for t in range(1, 24)],
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("starts", BORDERS.values(), ids=BORDERS)
def test_documents_at_borders(op: Op, starts: list[tuple[int, int]]) -> None:
    assert_slices_make_the_whole(op, 3, 8, starts)


@settings(max_examples=25)
@given(
    size=st.integers(1, 5),
    length=st.integers(3, 70),
    starts=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 200)), max_size=6),
)
def test_any_cut_gives_the_same(size: int, length: int, starts: list[tuple[int, int]]) -> None:
    within = [(row, token) for row, token in starts if token < size * length]
    assert_slices_make_the_whole(mixed, size, length, within)


@pytest.mark.usefixtures("triton_serves", "poison")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("starts", [[], [(0, 19), (0, 20), (0, 70)]], ids=["one document", "several"])
def test_triton(op: Op, starts: list[tuple[int, int]]) -> None:
    assert_slices_make_the_whole(op, 2, 40, starts, rows=1, dtype=torch.float32, backend="triton")


@pytest.mark.usefixtures("triton_serves", "poison")
def test_triton_walks_a_slice_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own states make that of the slice, in either direction."""
    monkeypatch.setattr(tables, "segment_tokens", lambda *_: 64)
    assert_slices_make_the_whole(scanned, 2, 150, [(0, 40), (0, 200)], rows=2, dtype=torch.float32, backend="triton")


def test_nothing_is_scanned_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slice asks twice in a forward, for columns and for a state, and answers twice in a backward."""
    asked: list[str] = []
    for name in ("columns_before", "columns_after", "state_before", "gradient_after"):
        original = getattr(Slice, name)

        def count(*args: Any, name: str = name, original: Any = original) -> Tensor:
            asked.append(name)
            return original(*args)

        monkeypatch.setattr(Slice, name, count)
    monkeypatch.setattr(ops.dispatch, "_usable", lambda device: (True, "by test"))
    assert_slices_make_the_whole(layered, 2, 8, [], rows=1, dtype=torch.float32, backend="triton")
    assert sorted(asked) == sorted(2 * ["columns_before", "columns_after", "state_before", "gradient_after"])
