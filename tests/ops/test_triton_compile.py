"""The scan's kernels compile for every GPU family, fit its shared memory, and do not spill where it matters.

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

# Sizes of a 2.7B model's layer, then every option, packed rows, wide heads and states, fp32.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"dtype": "float16", "z": True, "D": 2, "documents": True},
    "documents": {"documents": True, "dtype": "float16"},
    "small state": {"N": 16, "H": 3},
    "own maps": {"G": 4, "N": 64},
    "packed": {"packed": True},
    "long": {"T": 16384},
    "wide": {"P": 256, "N": 256},
    "odd": {"P": 48, "N": 24, "T": 100, "G": 2},
    "fp32": {"dtype": "float32"},
}
MADE_FOR_HOPPER = {"plain", "documents", "long", "small state", "own maps"}
TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": 0}


def compile_scan(
    target: str,
    T: int = 256,
    H: int = 4,
    P: int = 64,
    G: int = 1,
    N: int = 128,
    dtype: str = "bfloat16",
    D: int = 1,
    z: bool = False,
    documents: bool = False,
    packed: bool = False,
) -> list[dict[str, Any]]:
    """Forward and backward of one scan, compiled and not run."""
    import torch
    from compiling import compile_only

    from mamba2_hf.ops.checks import SSDShape
    from mamba2_hf.ops.triton import configs, ssd

    capability = TARGETS[target]
    configs.current_chip = lambda: configs.Chip("cuda" if capability else "hip", capability, 132)
    kind = getattr(torch, dtype)
    x = torch.zeros(1, T, H, P, dtype=kind, requires_grad=True)
    maps = torch.zeros(1, T, G, N, dtype=kind)
    per_head = torch.zeros(H)
    with compile_only(target) as kernels:
        y, _ = ssd.ssd_chunk_scan(
            *(x, torch.zeros(1, T, H, dtype=kind), per_head, maps, maps),
            shape=SSDShape(1, T, H, P, G, N, 1),
            D=per_head if D == 1 else torch.zeros(H, P),
            z=torch.zeros_like(x) if z else None,
            dt_bias=per_head,
            dt_softplus=True,
            dt_limit=(0.0, math.inf),
            chunk_size=None,
            initial_states=None,
            seq_idx=torch.zeros(1, T, dtype=torch.int32) if documents else None,
            cu_seqlens=torch.tensor([0, 10, T]) if packed else None,
        )
        y.sum().backward()
    return [kernel._asdict() for kernel in kernels]


def compiled(target: str, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    source = Path(__file__).resolve().parents[2] / "src"
    environment["PYTHONPATH"] = os.pathsep.join([str(source), environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, target, *names]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", TARGETS)
def test_a_layer_compiles_everywhere(target: str) -> None:
    check_sizes(target, compiled(target, ["plain"]))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_option_compiles_everywhere(target: str) -> None:
    check_sizes(target, compiled(target, list(CASES)))


def check_sizes(target: str, cases: dict[str, list[dict[str, Any]]]) -> None:
    limit = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}[target] * 1024
    for case, kernels in cases.items():
        names = {kernel["name"] for kernel in kernels}
        backward = {"inputs_backward_kernel", "maps_backward_kernel"}
        if target == "sm_90" and case in MADE_FOR_HOPPER:
            backward = {"chunk_backward_kernel"}
        assert {"walk_kernel", "state_kernel"} | backward <= names, case
        for kernel in kernels:
            assert kernel["shared"] <= limit, (case, kernel)


def test_hopper_kernels_hold_what_they_need_in_registers() -> None:
    """At the size they are tuned for; the backward, which uses every register there is, parks a few words."""
    for kernel in compiled("sm_90", ["long"])["long"]:
        assert kernel["stack"] <= (256 if kernel["name"] == "chunk_backward_kernel" else 0), kernel


if __name__ == "__main__":
    found = {name: compile_scan(sys.argv[1], **CASES[name]) for name in sys.argv[2:]}
    print(json.dumps(found))
