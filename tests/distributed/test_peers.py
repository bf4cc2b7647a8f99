"""Sums by kernels that store in each other's memory; the checks are in ``peers_worker.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import ON_GPUS, TIMEOUT, checks, once, run

WORKER = Path(__file__).with_name("peers_worker.py")

pytestmark = [
    TIMEOUT,
    pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # where there is a GPU, too
        return once(tmp_path_factory, "peers", lambda folder: run(WORKER, 2, folder))


@pytest.mark.parametrize("name", checks(WORKER))
def test_interpreted(name: str, results: dict[str, list[str]]) -> None:
    for rank, result in enumerate(results[name]):
        assert result == "passed", f"process {rank}: {result}"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ON_GPUS, "1")
    monkeypatch.setenv("MAMBA2_HF_PEER_MEMORY", "1")
    found = run(WORKER, 2, tmp_path)
    for name, results in found.items():
        assert results == ["passed"] * 2, name + "\n".join(results)
