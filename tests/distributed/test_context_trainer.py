"""Sequences spread over two processes by accelerate's ``cp_size``; the checks are in ``context_trainer_worker.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import checks, run

WORKER = Path(__file__).with_name("context_trainer_worker.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("trainer")
    paths = [repository / "src", repository / "examples", WORKER.parent, repository / "tests" / "integrations"]
    subprocess.run(  # a process of its own, in which accelerate is told nothing
        [sys.executable, str(WORKER), "alone", str(folder / "expected.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "RANK": "0", "WORLD_SIZE": "1"},
        check=True,
        timeout=100,
    )
    assert json.loads((folder / "expected.json").read_text())
    return run(WORKER, 2, folder, repository)


@pytest.mark.parametrize("name", checks(WORKER))
def test_context(name: str, results: dict[str, list[str]]) -> None:
    for rank, result in enumerate(results[name]):
        assert result == "passed", f"process {rank}: {result}"
