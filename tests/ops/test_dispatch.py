"""Which backend serves, and what is said where it cannot."""

from __future__ import annotations

import pytest
import torch
from ssd_cases import scan_inputs

from mamba2_hf import ops
from mamba2_hf.errors import BackendError
from mamba2_hf.ops import dispatch

CPU = torch.device("cpu")


def test_pytorch_serves_the_cpu_and_says_why_nothing_faster_does():
    choice = dispatch.choose("ssd_chunk_scan", CPU)
    assert choice.name == "torch"
    assert "not on a GPU" in choice.reason


def test_a_forced_backend_that_cannot_serve_raises_its_reason():
    with pytest.raises(BackendError, match=r"'triton' was asked for by backend=.*not on a GPU"):
        ops.ssd_chunk_scan(**scan_inputs(), backend="triton")


def test_the_environment_is_read_at_every_call(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(BackendError, match=dispatch.ENVIRONMENT_VARIABLE):
        ops.ssd_chunk_scan(**scan_inputs())
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "torch")
    assert dispatch.choose("ssd_chunk_scan", CPU).reason.endswith(dispatch.ENVIRONMENT_VARIABLE)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "auto")
    ops.ssd_chunk_scan(**scan_inputs())


def test_use_backend_nests_and_survives_errors():
    with ops.use_backend("triton"):
        with ops.use_backend("torch"):
            ops.ssd_chunk_scan(**scan_inputs())
        with pytest.raises(BackendError, match="use_backend"):
            ops.ssd_chunk_scan(**scan_inputs())
        ops.ssd_chunk_scan(**scan_inputs(), backend="torch")  # the call itself has the first word
    ops.ssd_chunk_scan(**scan_inputs())


@pytest.mark.parametrize("name", ["cuda", "Torch", "pallas"])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(BackendError, match=rf"'{name}'.*torch"):
        ops.ssd_chunk_scan(**scan_inputs(), backend=name)
    with pytest.raises(BackendError, match=name), ops.use_backend(name):
        pass


def test_the_report_names_every_backend_once():
    report = {status.name: status for status in dispatch.report()}
    assert set(report) == set(dispatch.BACKENDS)
    assert report["torch"].available
    assert all(status.reason for status in report.values())
