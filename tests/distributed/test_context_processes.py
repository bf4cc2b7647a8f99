"""Sequences spread over four processes on the CPU; the checks are in ``context_worker.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from processes import TIMEOUT, checks, once, run

WORKER = Path(__file__).with_name("context_worker.py")

pytestmark = [
    TIMEOUT,
    pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return once(tmp_path_factory, "context", lambda folder: run(WORKER, 4, folder))


@pytest.mark.parametrize("name", checks(WORKER))
def test_context(name: str, results: dict[str, list[str]]) -> None:
    for rank, result in enumerate(results[name]):
        assert result == "passed", f"process {rank}: {result}"
