"""Sequences spread over two processes by accelerate's ``cp_size``; the checks are in ``context_trainer_worker.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from processes import TIMEOUT, checks, once, run, start

WORKER = Path(__file__).with_name("context_trainer_worker.py")

pytestmark = [
    pytest.mark.slow,
    TIMEOUT,
    pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed"),
]


def both(folder: Path) -> dict[str, list[str]]:
    """After one process, in which accelerate is told nothing."""
    expected = folder / "expected.json"
    well, said = start(WORKER, 1, folder, "alone", expected)
    assert well, said
    return run(WORKER, 2, folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return once(tmp_path_factory, "trainer", both)


@pytest.mark.parametrize("name", checks(WORKER))
def test_context(name: str, results: dict[str, list[str]]) -> None:
    for rank, result in enumerate(results[name]):
        assert result == "passed", f"process {rank}: {result}"
