"""Every broken contract is an error that names the argument, what it is and what it should be."""

from __future__ import annotations

import math

import pytest
import torch
from ssd_cases import inner_arguments, scan_inputs, step_arguments

from mamba2_hf import ops
from mamba2_hf.errors import ArgumentError

BROKEN_SCANS = {
    "x has 3 dimensions": {"x": torch.zeros(2, 8, 6)},
    "x has dtype torch.int64": {"x": torch.zeros(2, 8, 4, 6, dtype=torch.long)},
    r"x has shape \(2, 0, 4, 6\)": {"x": torch.zeros(2, 0, 4, 6)},
    r"dt has shape \(2, 8, 3\)": {"dt": torch.zeros(2, 8, 3)},
    r"A has shape \(5,\)": {"A": torch.zeros(5)},
    "3 groups": {"B": torch.zeros(2, 8, 3, 5), "C": torch.zeros(2, 8, 3, 5)},
    r"C has shape \(2, 8, 2, 4\)": {"C": torch.zeros(2, 8, 2, 4)},
    r"D has shape \(4, 5\)": {"D": torch.zeros(4, 5)},
    r"z has shape \(2, 8, 4, 5\)": {"z": torch.zeros(2, 8, 4, 5)},
    r"dt_bias has shape \(1,\)": {"dt_bias": torch.zeros(1)},
    r"initial_states has shape \(3, 4, 6, 5\)": {"initial_states": torch.zeros(3, 4, 6, 5)},
    r"dt_limit is \(1.0, 0.5\)": {"dt_limit": (1.0, 0.5)},
    r"dt_limit is \(nan, 1.0\)": {"dt_limit": (math.nan, 1.0)},
    "chunk_size is 0": {"chunk_size": 0},
    "seq_idx has dtype torch.float32": {"seq_idx": torch.zeros(2, 8)},
    r"seq_idx has shape \(2, 7\)": {"seq_idx": torch.zeros(2, 7, dtype=torch.long)},
    "both given": {"seq_idx": torch.zeros(2, 8, dtype=torch.long), "cu_seqlens": torch.tensor([0, 8])},
    "cu_seqlens was given with batch 2": {"cu_seqlens": torch.tensor([0, 8])},
    "A is on meta": {"A": torch.zeros(4, device="meta")},
}


@pytest.mark.parametrize("message", BROKEN_SCANS)
def test_scan(message):
    inputs = scan_inputs(tokens=8, dtype=torch.float32)
    with pytest.raises(ArgumentError, match=message):
        ops.ssd_chunk_scan(**{**inputs, **BROKEN_SCANS[message]})


@pytest.mark.parametrize("bounds", [[1, 8], [0, 9], [0, 5, 3], [0]], ids=str)
def test_document_bounds(bounds):
    inputs = scan_inputs(1, 8)
    inputs.pop("initial_states")
    with pytest.raises(ArgumentError, match="cu_seqlens is"):
        ops.ssd_chunk_scan(**inputs, cu_seqlens=torch.tensor(bounds))


def test_steps_and_states():
    state = torch.zeros(2, 4, 6, 5)
    good = {"x": torch.zeros(2, 4, 6), "dt": torch.zeros(2, 4), "A": torch.zeros(4)}
    maps = {"B": torch.zeros(2, 2, 5), "C": torch.zeros(2, 2, 5)}
    ops.ssd_state_update(state, **good, **maps)
    for name, value in {"x": torch.zeros(2, 4, 7), "dt": torch.zeros(2, 1), "C": torch.zeros(2, 2, 6)}.items():
        with pytest.raises(ArgumentError, match=f"{name} has shape"):
            ops.ssd_state_update(state, **{**good, **maps, name: value})
    dense = {"dt": torch.zeros(2, 4, 5), "A": torch.zeros(4, 6, 4), "dt_bias": torch.zeros(4, 7)}
    for name, value in {**dense, "slots": torch.zeros(3, dtype=torch.int32)}.items():
        with pytest.raises(ArgumentError, match=f"{name} has shape"):
            ops.ssd_state_update(state, **{**good, **maps, name: value})
    with pytest.raises(ArgumentError, match=r"slots has dtype torch.float32"):
        ops.ssd_state_update(state, **good, **maps, slots=torch.zeros(2))


BROKEN_STEPS = {
    "zxbcdt has 2 dimensions": {"zxbcdt": torch.zeros(2, 72)},
    r"zxbcdt has shape \(2, 0, 72\)": {"zxbcdt": torch.zeros(2, 0, 72)},
    "zxbcdt has 71 channels": {"zxbcdt": torch.zeros(2, 1, 71)},
    r"conv_state has shape \(2, 44, 2\).*L >= K - 1 = 3": {"conv_state": torch.zeros(2, 44, 2)},
    r"ssm_state has shape \(3, 4, 6, 5\)": {"ssm_state": torch.zeros(3, 4, 6, 5)},
    r"ssm_state has shape \(2, 4, 6, 6\)": {"ssm_state": torch.zeros(2, 4, 6, 6)},
    "ssm_state is on meta": {"ssm_state": torch.zeros(2, 4, 6, 5, device="meta")},
    r"weight has shape \(43, 4\)": {"conv_weight": torch.zeros(43, 4)},
    r"A has shape \(3,\)": {"A": torch.zeros(3)},
    "group_size is 7": {"group_size": 7},
    r"dt_limit is \(1.0, 0.5\)": {"dt_limit": (1.0, 0.5)},
}


@pytest.mark.parametrize("message", BROKEN_STEPS)
def test_mixer_step(message):
    arguments = step_arguments(0)
    ops.mamba2_step(**arguments)
    with pytest.raises(ArgumentError, match=message):
        ops.mamba2_step(**{**arguments, **BROKEN_STEPS[message]})


def test_convolution_and_norm():
    x = torch.zeros(2, 8, 5)
    with pytest.raises(ArgumentError, match="activation is 'relu'"):
        ops.causal_conv1d(x, torch.zeros(5, 4), activation="relu")
    with pytest.raises(ArgumentError, match="weight has shape"):
        ops.causal_conv1d(x, torch.zeros(6, 4))
    with pytest.raises(ArgumentError, match="L >= K - 1 = 3"):
        ops.causal_conv1d_update(x[:, 0], torch.zeros(2, 5, 2), torch.zeros(5, 4))
    with pytest.raises(ArgumentError, match="group_size is 2"):
        ops.gated_rms_norm(x, None, torch.ones(5), group_size=2)
    with pytest.raises(ArgumentError, match="eps is nan"):
        ops.gated_rms_norm(x, None, torch.ones(5), eps=math.nan)
    with pytest.raises(ArgumentError, match=r"dtype is torch.int32"):
        ops.gated_rms_norm(x, None, torch.ones(5), dtype=torch.int32)
    with pytest.raises(ArgumentError, match="zxbcdt has 5 channels"):
        ops.mamba2_inner(
            x, torch.zeros(5, 4), None, None, torch.zeros(4), None, norm_weight=None, head_dim=6, n_groups=1
        )


@pytest.mark.parametrize("backend", [None, "torch"])
def test_unknown_activations_are_refused_at_every_level(backend):
    inner, step = inner_arguments(0, 3), step_arguments(0)
    calls = {
        "activate": lambda: ops.activate(torch.ones(2), "gelu"),
        "conv": lambda: ops.causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 4), activation="gelu", backend=backend),
        "inner": lambda: ops.mamba2_inner(**inner, activation="gelu", backend=backend),
        "step": lambda: ops.mamba2_step(**step, activation="gelu", backend=backend),
    }
    for call in calls.values():
        with pytest.raises(ArgumentError, match="activation is 'gelu', expected one of None, 'silu', 'swish'"):
            call()
