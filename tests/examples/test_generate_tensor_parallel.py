"""The example that continues a text with a model that processes share: alone, and under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")


def run(repository: Path, *launcher: str, sample: bool = False) -> str:
    """What the first process prints."""
    script = [str(repository / "examples" / "generate_tensor_parallel.py"), "--max-new-tokens", "12"]
    environment = {**os.environ, "PYTHONPATH": str(repository / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *script, *(("--sample",) if sample else ())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_processes_write_what_one_writes(repository: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    alone, together = run(repository), run(repository, *torchrun)
    assert alone.rpartition("[12 tokens")[0] == together.rpartition("[12 tokens")[0] != ""
    assert "[12 tokens" in run(repository, *torchrun, sample=True)
