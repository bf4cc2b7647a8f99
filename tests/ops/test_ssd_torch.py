"""The PyTorch backend against the fp64 recurrence: forward, states and every gradient."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from ssd_cases import DIFFERENTIABLE, documents, relative_error, scan_inputs, slice_tokens
from torch.utils.flop_counter import FlopCounterMode

from mamba2_hf import ops
from mamba2_hf.ops.scan.reference import ssd_recurrent

Q = 16
SIZES = [
    {"tokens": 1},
    {"tokens": Q - 1},
    {"tokens": Q},
    {"tokens": Q + 1},
    {"tokens": 75, "groups": 4, "head_dim": 3, "state": 8},
    {"tokens": 40, "groups": 1, "d_per_channel": True},
    {"tokens": 20 * Q + 3, "batch": 1, "heads": 2, "groups": 1},  # states pass through two levels
]


@pytest.fixture(params=[True, False], ids=["in steps", "in blocks"])
def _both_ways_to_pass_states(request, monkeypatch):
    """A loop on CPUs, matrix products on GPUs and in graphs."""
    monkeypatch.setattr("mamba2_hf.ops.scan.chunks.in_steps", lambda device: request.param)


def with_gradients(function, inputs, **options):
    """Outputs and the gradient of every input, for one fixed random cotangent of both outputs."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y, state = function(**leaves, **options)
    generator = torch.Generator().manual_seed(7)
    loss = sum((out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum() for out in (y, state))
    loss.backward()
    return [y, state, *(leaves[name].grad for name in DIFFERENTIABLE)]


def scan(**arguments):
    return ops.ssd_chunk_scan(**arguments, return_final_states=True)


@pytest.mark.usefixtures("_both_ways_to_pass_states")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_outputs_and_gradients(size, packed):
    inputs = scan_inputs(**size)
    batch, tokens = inputs["dt"].shape[:2]
    options = {"dt_softplus": True, "dt_limit": (0.05, 4.0), "seq_idx": documents(batch, tokens) if packed else None}
    expected = with_gradients(ssd_recurrent, inputs, **options)
    for name, out, reference in zip(
        ("y", "state", *DIFFERENTIABLE), with_gradients(scan, inputs, **options, chunk_size=Q), expected, strict=True
    ):
        assert relative_error(out, reference) < 1e-10, name


@pytest.mark.usefixtures("_both_ways_to_pass_states")
def test_what_decays_slowly_reaches_far(monkeypatch):
    monkeypatch.setattr("mamba2_hf.ops.scan.chunks.SCAN_BLOCK", 2)  # blocks of blocks of blocks
    inputs = scan_inputs(tokens=150)
    inputs["A"] = 1e-3 * inputs["A"]
    ours, expected = (
        with_gradients(run, inputs, dt_softplus=True, **more)
        for run, more in ((scan, {"chunk_size": Q}), (ssd_recurrent, {}))
    )
    for name, out, reference in zip(("y", "state", *DIFFERENTIABLE), ours, expected, strict=True):
        assert relative_error(out, reference) < 1e-10, name


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str
)
def test_lower_precisions_lose_only_the_rounding_of_inputs_and_output(dtype, tolerance):
    inputs = scan_inputs(tokens=200, dtype=dtype)
    y, state = scan(**inputs, dt_softplus=True)
    reference, last = ssd_recurrent(**{name: value.double() for name, value in inputs.items()}, dt_softplus=True)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert relative_error(y, reference) < tolerance
    assert relative_error(state, last) < 1e-5  # decays and states are fp32 whatever the inputs are


def test_autocast_does_not_reach_inside():
    inputs = scan_inputs(tokens=100, dtype=torch.float32)
    expected = scan(**inputs, dt_softplus=True)
    with torch.autocast("cpu", torch.bfloat16):
        for out, reference in zip(scan(**inputs, dt_softplus=True), expected, strict=True):
            assert relative_error(out, reference) < 1e-6


def test_views_need_not_be_contiguous():
    inputs = scan_inputs(tokens=30)
    wide = torch.cat([inputs["x"].flatten(2), inputs["z"].flatten(2)], -1)
    views = dict(inputs)
    views["x"], views["z"] = (part.unflatten(-1, (4, 6)) for part in wide.chunk(2, -1))
    views["B"] = inputs["B"].transpose(1, 2).contiguous().transpose(1, 2)
    assert relative_error(scan(**views)[0], scan(**inputs)[0]) < 1e-13


@pytest.mark.usefixtures("_both_ways_to_pass_states")
@pytest.mark.parametrize("bounds", [[0, 5, 5, 21, 22, 54], [0, 60], [0, 0, 3, 60, 60], [0, 16, 32, 48]], ids=str)
def test_packed_documents_are_separate_documents(bounds):
    count = len(bounds) - 1
    inputs = scan_inputs(1, 60, states=count)
    cu_seqlens = torch.tensor(bounds)
    packed = with_gradients(scan, inputs, dt_softplus=True, cu_seqlens=cu_seqlens, chunk_size=Q)

    def separately(**leaves):
        initial = leaves.pop("initial_states")
        ys, states = [], []
        for i, (start, end) in enumerate(pairwise(bounds)):
            if start == end:
                states.append(initial[i : i + 1])
                continue
            part = slice_tokens(leaves, slice(start, end))
            y, state = ssd_recurrent(**part, initial_states=initial[i : i + 1], dt_softplus=True)
            ys.append(y)
            states.append(state)
        tail = leaves["x"][:, bounds[-1] :] * 0  # belongs to no document
        return torch.cat([*ys, tail], 1), torch.cat(states)

    for name, out, reference in zip(
        ("y", "states", *DIFFERENTIABLE), packed, with_gradients(separately, inputs), strict=True
    ):
        assert relative_error(out, reference if reference is not None else torch.zeros_like(out)) < 1e-10, name


@pytest.mark.parametrize("dt", [0.0, 1e-7, 40.0, 1e4])
def test_extreme_steps_stay_finite(dt):
    inputs = scan_inputs(tokens=50, dtype=torch.float32)
    inputs["dt"] = torch.full_like(inputs["dt"], dt)
    inputs["dt_bias"] = torch.zeros_like(inputs["dt_bias"])
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    y, state = scan(**leaves)
    (y.sum() + state.sum()).backward()
    assert y.isfinite().all()
    assert all(value.grad.isfinite().all() for value in leaves.values())


def scan_of(inputs):
    """The scan as a function of tensors alone, and the tensors."""

    def run(*tensors):
        return scan(**dict(zip(inputs, tensors, strict=True)), dt_softplus=True, chunk_size=2)

    return run, list(inputs.values())


@pytest.mark.usefixtures("_both_ways_to_pass_states")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of forward differentiation itself
def test_gradcheck():
    run, tensors = scan_of(scan_inputs(1, 5, 2, 2, 1, 2))
    for tensor in tensors:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradcheck(run, tensors, check_forward_ad=True, check_backward_ad=False)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_function_transforms_batch_any_input():
    """Also one that the results are larger than, which an operation in place would not fit."""
    inputs = scan_inputs(1, 5, 4, 2, 2, 2)
    run, tensors = scan_of(inputs)
    with torch.no_grad():
        for place in range(len(tensors)):
            several = torch.stack([tensors[place], 2 * tensors[place]])
            found = torch.func.vmap(lambda one, at=place: run(*tensors[:at], one, *tensors[at + 1 :]))(several)
            for out, reference in zip(found, run(*tensors), strict=True):
                assert relative_error(out[0], reference) < 1e-12


def test_work_grows_linearly_with_length_and_not_with_heads_for_the_scores():
    def flops(tokens, heads):
        inputs = scan_inputs(1, tokens, heads, 4, 1, 64, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            scan(**inputs)
        return counter.get_total_flops()

    assert flops(8192, 2) < 2.1 * flops(4096, 2)
    per_head = (flops(1024, 8) - flops(1024, 4)) / 4
    assert flops(1024, 4) - 4 * per_head > 2 * 1024 * 64 * 60  # C B^T is what does not grow with heads


def test_backward_keeps_no_more_than_inputs():
    inputs = scan_inputs(1, 512, 4, 16, 1, 16, dtype=torch.float32)
    given = sum(value.numel() for value in inputs.values())
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = scan(**leaves, dt_softplus=True)
    assert y.requires_grad
    assert sum(kept.values()) <= 1.1 * given


def test_step_by_step_is_the_scan():
    inputs = scan_inputs(tokens=9)
    y, last = scan(**inputs, dt_softplus=True, dt_limit=(0.1, 2.0))
    state = inputs.pop("initial_states")
    shared = {name: inputs.pop(name) for name in ("A", "D", "dt_bias")}
    for t in range(9):
        step = {name: value[:, t] for name, value in inputs.items()}
        out = ops.ssd_state_update(state, **step, **shared, dt_softplus=True, dt_limit=(0.1, 2.0))
        assert relative_error(out, y[:, t]) < 1e-12
    assert relative_error(state, last) < 1e-12


def test_a_bf16_state_is_rounded_once_a_step():
    inputs = scan_inputs(tokens=1, dtype=torch.float32)
    exact, rounded = inputs["initial_states"].clone(), inputs["initial_states"].bfloat16()
    exact.copy_(rounded)
    step = {name: inputs[name][:, 0] for name in ("x", "dt", "B", "C", "z")}
    y = ops.ssd_state_update(exact, **step, A=inputs["A"], dt_softplus=True)
    assert relative_error(ops.ssd_state_update(rounded, **step, A=inputs["A"], dt_softplus=True), y) < 1e-6
    assert torch.equal(rounded, exact.bfloat16())
