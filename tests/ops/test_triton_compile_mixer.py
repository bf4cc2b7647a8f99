"""Convolution, norm and decode kernels compile for every GPU family, and do not spill on Hopper.

Run as a script, this file compiles for the target it is given and prints what the kernels need: the tests run it in a
process of its own, since Triton decides at import whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
KERNELS = {
    "conv_forward_kernel",
    "conv_state_kernel",
    "conv_backward_kernel",
    "conv_initial_gradient_kernel",
    "conv_update_kernel",
    "norm_forward_kernel",
    "norm_backward_kernel",
    "state_update_kernel",
    "step_kernel",
    "finish_kernel",
}


def compile_mixer(target: str) -> list[dict[str, Any]]:
    """The kernels around the scan at the sizes of a 2.7B model's layer, bf16, in every packing; nothing runs."""
    import torch
    from compiling import compile_only

    from mamba2_hf.ops.triton import conv, decode, norm

    H, P, N, K, T = 80, 64, 128, 4, 16
    inner = H * P
    channels = inner + 2 * N

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    rows, weight, bias = zeros(1, T, 2 * inner + 2 * N + H), zeros(channels, K), zeros(channels)
    z, xbc = rows[..., :inner], rows[..., inner : inner + channels]
    dy, state = zeros(1, T, channels), zeros(1, channels, K - 1)
    per_head = zeros(H, dtype=torch.float32)
    with compile_only(target) as kernels:
        for seq_idx, cu_seqlens in ((None, None), (zeros(1, T, dtype=torch.int32), None), (None, torch.tensor([0, T]))):
            packing = conv.documents(xbc, seq_idx, cu_seqlens)
            initial = None if seq_idx is None and cu_seqlens is None else state
            conv.conv_forward(xbc, weight, bias, initial, packing, True)
            conv.conv_backward(dy, initial, xbc, weight, bias, initial, packing, True)
        y, norm_weight = zeros(1, T, inner), zeros(inner)
        for group_size, norm_before_gate in ((inner, False), (inner // 8, True), (P, False)):
            norm.norm_forward(y, z, norm_weight, 1e-5, group_size, norm_before_gate, y.dtype)
            norm.norm_backward(y, y, z, norm_weight, 1e-5, group_size, norm_before_gate)
        norm.norm_forward(y.float(), None, norm_weight, 1e-5, inner, False, y.dtype)
        norm.norm_backward(y, y.float(), None, norm_weight, 1e-5, inner, False)
        limits = (0.0, math.inf)
        for batch in (1, 64):
            ssm_state = zeros(batch, H, P, N, dtype=torch.float32)
            x, step, maps = zeros(batch, H, P), zeros(batch, H), zeros(batch, 1, N)
            decode.state_update(ssm_state, x, step, per_head, maps, maps, per_head, x, per_head, True, *limits)
            decode.conv_update(zeros(batch, 1, channels), zeros(batch, channels, K), weight, bias, True)
            decode.mixer_step(
                *(zeros(batch, 2, rows.shape[-1]), zeros(batch, channels, K - 1), ssm_state),
                *(weight, bias, per_head, per_head, per_head, norm_weight, 1, True, 1e-5, inner, False, *limits),
            )
    return [kernel._asdict() for kernel in kernels]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_everywhere(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    source = Path(__file__).resolve().parents[2] / "src"
    environment["PYTHONPATH"] = os.pathsep.join([str(source), environment.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, __file__, target], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = json.loads(result.stdout.splitlines()[-1])
    assert {kernel["name"] for kernel in kernels} == KERNELS
    if target == "sm_90":
        assert not [kernel for kernel in kernels if kernel["stack"]]


if __name__ == "__main__":
    print(json.dumps(compile_mixer(sys.argv[1])))
