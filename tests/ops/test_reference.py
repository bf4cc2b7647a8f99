"""The three oracles are one function."""

from __future__ import annotations

import pytest
import torch
from ssd_cases import documents, relative_error, scan_inputs

from mamba2_hf.ops.scan.reference import ssd_attention_matrix, ssd_chunked, ssd_quadratic, ssd_recurrent

SIZES = [
    {"tokens": 1},
    {"tokens": 15},
    {"tokens": 16},
    {"tokens": 17},
    {"tokens": 50, "groups": 4},
    {"tokens": 33, "groups": 1, "head_dim": 3, "state": 7},
    {"tokens": 20, "d_per_channel": True},
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("dt_limit", [(0.0, float("inf")), (0.2, 0.9)], ids=["free", "clamped"])
def test_the_three_forms_agree(size, packed, dt_limit):
    inputs = scan_inputs(**size)
    seq_idx = documents(2, size["tokens"]) if packed else None
    options = {"dt_softplus": True, "dt_limit": dt_limit, "seq_idx": seq_idx}
    y, state = ssd_recurrent(**inputs, **options)
    for other in (ssd_quadratic(**inputs, **options), ssd_chunked(**inputs, **options, chunk_size=16)):
        assert relative_error(other[0], y) < 1e-10
        assert relative_error(other[1], state) < 1e-10


@pytest.mark.parametrize("form", [ssd_recurrent, ssd_quadratic, ssd_chunked])
def test_every_gradient_is_the_derivative(form):
    inputs = scan_inputs(1, 5, 2, 2, 1, 2)
    names = list(inputs)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1]])

    def run(*tensors):
        return form(**dict(zip(names, tensors, strict=True)), dt_softplus=True, seq_idx=seq_idx)

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in inputs.values()])


def test_the_matrix_times_the_input_is_the_scan():
    inputs = scan_inputs(tokens=19)
    seq_idx = documents(2, 19)
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    matrix = ssd_attention_matrix(dt, A, B, C, dt_bias=inputs["dt_bias"], dt_softplus=True, seq_idx=seq_idx)
    y, _ = ssd_recurrent(x, dt, A, B, C, dt_bias=inputs["dt_bias"], dt_softplus=True, seq_idx=seq_idx)
    assert matrix.shape == (2, 4, 19, 19)
    assert relative_error(torch.einsum("bhij,bjhp->bihp", matrix, x), y) < 1e-12
    assert not matrix.triu(1).any()
