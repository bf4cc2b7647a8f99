"""The example that continues a text with a model that processes share: alone, and under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import TIMEOUT, start

pytestmark = [
    TIMEOUT,
    pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed"),
]

LENGTH = ("--max-new-tokens", "12")


def test_processes_write_what_one_writes(repository: Path, tmp_path: Path) -> None:
    script = repository / "examples" / "generate_tensor_parallel.py"
    together = subprocess.run(
        [
            sys.executable,
            *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"),
            str(script),
            *LENGTH,
        ],
        env={**os.environ, "PYTHONPATH": str(repository / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert together.returncode == 0, together.stderr
    well, (alone,) = start(script, 1, tmp_path, *LENGTH)
    assert well, alone
    written = together.stdout.rpartition("[12 tokens")[0]
    assert written
    assert alone.rpartition("[12 tokens")[0].endswith(written)
    well, (first, _) = start(script, 2, tmp_path, *LENGTH, "--sample")
    assert well, first
    assert "[12 tokens" in first
