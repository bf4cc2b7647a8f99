"""The recurrence, the attention matrix and the chunks of the one page are one function."""

from __future__ import annotations

import minimal_mamba2
import pytest
import torch
from ssd_cases import documents, relative_error, scan_inputs

from mamba2_hf.ops.scan.reference import ssd_attention_matrix, ssd_recurrent, step_size

SIZES = [
    {"tokens": 1},
    {"tokens": 15},
    {"tokens": 16},
    {"tokens": 17},
    {"tokens": 50, "groups": 4},
    {"tokens": 33, "groups": 1, "head_dim": 3, "state": 7},
    {"tokens": 20, "d_per_channel": True},
]
LIMITS = pytest.mark.parametrize("dt_limit", [(0.0, float("inf")), (0.2, 0.9)], ids=["free", "clamped"])


@pytest.mark.parametrize("size", SIZES, ids=str)
@LIMITS
def test_the_recurrence_is_the_chunks(size, dt_limit):
    inputs = scan_inputs(**size)
    y, state = ssd_recurrent(**inputs, dt_softplus=True, dt_limit=dt_limit)
    x, A, D, z = (inputs[name] for name in ("x", "A", "D", "z"))
    dt = step_size(inputs["dt"], inputs["dt_bias"], True, dt_limit, x.dtype)
    B, C = (inputs[name].repeat_interleave(4 // inputs[name].shape[2], 2) for name in ("B", "C"))
    chunks, last = minimal_mamba2.ssd_chunks(x, dt, A, B, C, inputs["initial_states"], 16)
    chunks = (chunks + x * (D if D.dim() == 2 else D[:, None])) * torch.nn.functional.silu(z)
    assert relative_error(chunks, y) < 1e-10
    assert relative_error(last, state) < 1e-10


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@LIMITS
def test_the_matrix_times_the_input_is_the_scan(size, packed, dt_limit):
    inputs = scan_inputs(**size)
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    options = {"dt_bias": inputs["dt_bias"], "dt_softplus": True, "dt_limit": dt_limit}
    options["seq_idx"] = documents(2, size["tokens"]) if packed else None
    matrix = ssd_attention_matrix(dt, A, B, C, **options)
    y, _ = ssd_recurrent(x, dt, A, B, C, **options)
    assert matrix.shape == (2, 4, size["tokens"], size["tokens"])
    assert relative_error(torch.einsum("bhij,bjhp->bihp", matrix, x), y) < 1e-12
    assert not matrix.triu(1).any()


def test_every_gradient_is_the_derivative():
    inputs = scan_inputs(1, 5, 2, 2, 1, 2)
    names = list(inputs)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1]])

    def run(*tensors):
        return ssd_recurrent(**dict(zip(names, tensors, strict=True)), dt_softplus=True, seq_idx=seq_idx)

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in inputs.values()])
