"""Which backend serves, and what is said where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ssd_cases import inner_arguments, scan_inputs, step_arguments
from torch import Tensor

from mamba2_hf import ops
from mamba2_hf.errors import BackendError
from mamba2_hf.ops import dispatch
from mamba2_hf.ops.spec import SSDShape

CPU = torch.device("cpu")


X, CONV_STATE, WEIGHT = torch.ones(2, 3, 4), torch.zeros(2, 4, 3), torch.ones(4, 4)
ONE_TOKEN = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in scan_inputs().items()}
STATE = ONE_TOKEN.pop("initial_states")
CALLS: dict[str, Callable[..., Any]] = {
    "ssd_chunk_scan": lambda **o: ops.ssd_chunk_scan(**scan_inputs(), **o),
    "ssd_state_update": lambda **o: ops.ssd_state_update(STATE, **ONE_TOKEN, **o),
    "causal_conv1d": lambda **o: ops.causal_conv1d(X, WEIGHT, **o),
    "causal_conv1d_update": lambda **o: ops.causal_conv1d_update(X, CONV_STATE, WEIGHT, **o),
    "gated_rms_norm": lambda **o: ops.gated_rms_norm(X, None, X[0, 0], **o),
    "linear_cross_entropy": lambda **o: ops.linear_cross_entropy(X[0], WEIGHT, torch.zeros(3).long(), **o),
    "mamba2_inner": lambda **o: ops.mamba2_inner(**inner_arguments(0, 5), **o),
    "mamba2_layer": lambda **o: ops.mamba2_layer(**training_arguments(), **o),
    "mamba2_layer_step": lambda **o: ops.mamba2_layer_step(**layer_arguments(), **o),
    "mamba2_step": lambda **o: ops.mamba2_step(**step_arguments(0), **o),
    "attend_one": lambda **o: ops.attend_one(*[torch.ones(1, 2, 1, 4)] * 3, None, 1.0, **o),
    "attention_step": lambda **o: ops.attention_step(attention_arguments(), **o),
    "experts_step": lambda **o: ops.experts_step(ops.ExpertsStep(*experts_arguments(), 1, "silu"), **o),
    "gated_activation": lambda **o: ops.gated_activation(torch.ones(2), torch.ones(2), **o),
    "mlp_step": lambda **o: ops.mlp_step(ops.MLPStep(*mlp_arguments(), "silu"), **o),
    "rotary": lambda **o: ops.rotary(*[torch.ones(1, 2, 1, 4)] * 2, *[torch.ones(1, 2, 4)] * 2, **o),
}


def experts_arguments() -> list[Tensor]:
    shapes = ((1, 1, 4), (4,), (2, 4), (2, 6, 4), (2, 4, 3))
    return [torch.ones(shape) for shape in shapes]


def attention_arguments() -> ops.AttentionStep:
    keys, linear = torch.ones(1, 1, 3, 4), ops.Linear(torch.ones(4, 4))
    lengths = torch.ones(1, dtype=torch.long)
    return ops.AttentionStep(
        torch.ones(1, 1, 4), keys, keys.clone(), torch.ones(4), *[linear] * 4, lengths, None, None, 1.0
    )


def mlp_arguments() -> tuple[Any, ...]:
    stream, norm = torch.ones(1, 1, 4), torch.ones(4)
    return stream, norm, torch.ones(3, 4), None, ops.Linear(torch.ones(3, 4)), ops.Linear(torch.ones(4, 3))


def layer_arguments() -> dict[str, Any]:
    arguments = step_arguments(0)
    inside, norm_weight = arguments.pop("zxbcdt"), arguments["norm_weight"]
    arguments |= {"stream": inside.new_ones(2, 1, 3), "norm_weight": inside.new_ones(3), "in_bias": None}
    arguments |= {"in_weight": inside.new_ones(inside.shape[2], 3), "out_weight": inside.new_ones(3, len(norm_weight))}
    return arguments | {"gated_norm_weight": norm_weight, "A_log": arguments.pop("A"), "out_bias": None}


def training_arguments() -> dict[str, Any]:
    return {name: value for name, value in layer_arguments().items() if name not in ("conv_state", "ssm_state")}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """PyTorch says that there is a GPU; returns what may change its answers."""
    dispatch._usable_gpu.cache_clear()
    answers = {"is_available": True, "current_device": 0, "get_device_name": "Chip", "get_device_capability": (9, 0)}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    yield monkeypatch
    dispatch._usable_gpu.cache_clear()


def test_pytorch_serves_the_cpu_and_says_why_nothing_faster_does():
    choice = dispatch.choose("ssd_chunk_scan", CPU)
    assert choice.name == "torch"
    assert "not on a GPU" in choice.reason


@pytest.mark.parametrize("op", dispatch.OPS)
def test_a_forced_backend_that_cannot_serve_raises_its_reason(op):
    CALLS[op]()
    with pytest.raises(BackendError, match=rf"'triton' was asked for by backend=.*serve {op}: .*not on a GPU"):
        CALLS[op](backend="triton")


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


class TestTriton:
    """What is said of a GPU, on machines with and without one."""

    CUDA = torch.device("cuda", 0)

    def test_is_chosen_there_and_names_its_limits(self, gpu):
        for op in dispatch.OPS:
            name, reason = dispatch.choose(op, self.CUDA)
            assert name == "triton"
            assert "bfloat16" in reason
        assert "state size up to 256" in dispatch.choose("ssd_chunk_scan", self.CUDA).reason
        assert {status.name: status for status in dispatch.report()}["triton"].reason == "GPU Chip"

    def test_steps_aside_with_its_reason(self, gpu):
        wide = {"shape": SSDShape(1, 8, 2, 64, 1, 512, 1), "dtype": torch.bfloat16}
        name, reason = dispatch.choose("ssd_chunk_scan", self.CUDA, **wide)
        assert name == "torch"
        assert reason.startswith("triton: state size 512 is above 256")
        with pytest.raises(BackendError, match="state size 512"):
            dispatch.choose("ssd_chunk_scan", self.CUDA, "triton", **wide)

    def test_leaves_steps_with_a_gradient_to_pytorch(self, gpu):
        call = {"taps": 4, "dtype": torch.float32}
        assert dispatch.choose("causal_conv1d_update", self.CUDA, **call, differentiable=False).name == "triton"
        name, reason = dispatch.choose("causal_conv1d_update", self.CUDA, **call, differentiable=True)
        assert name == "torch"
        assert "no gradient" in reason
        gpu.setattr(dispatch, "_usable", lambda device: (True, "by test"))
        assert ops.causal_conv1d_update(X.clone().requires_grad_(), CONV_STATE, WEIGHT).requires_grad

    def test_is_not_for_old_gpus(self, gpu):
        gpu.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        name, reason = dispatch.choose("gated_rms_norm", self.CUDA, group_size=8, dtype=torch.float32)
        assert name == "torch"
        assert "Chip has compute capability 7.5, below 8.0" in reason

    def test_says_why_its_kernels_cannot_be_imported(self, gpu):
        def fail(name: str) -> None:
            raise ImportError("no TensorDescriptor")

        gpu.setattr(dispatch, "backend_module", fail)
        assert "no TensorDescriptor" in dispatch.choose("mamba2_inner", self.CUDA).reason
