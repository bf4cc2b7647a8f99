"""FSDP2, DDP and tensor parallelism, with two processes on the CPU; the checks are in ``distributed_worker.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import TIMEOUT, checks, once, run
from transformers.distributed import DistributedConfig

from mamba2_hf import Mamba2ForCausalLM, Mamba2HybridForCausalLM, Mamba2Model
from mamba2_hf.errors import ArgumentError

WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = [
    TIMEOUT,
    pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed"),
]


@pytest.mark.parametrize("config", [{"pp_size": 2}, DistributedConfig(pp_size=2)], ids=["dict", "object"])
@pytest.mark.parametrize("cls", [Mamba2ForCausalLM, Mamba2HybridForCausalLM, Mamba2Model])
def test_pipeline_parallelism_is_refused_before_processes_meet(cls: Any, config: Any, tmp_path: Path) -> None:
    with torch.device("meta"):
        cls(cls.config_class(num_hidden_layers=1)).config.save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=f"pp_size=2: {cls.__name__} has no pipeline parallelism"):
        cls.from_pretrained(tmp_path, distributed_config=config)
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return once(tmp_path_factory, "sharded", lambda folder: run(WORKER, 2, folder))


@pytest.mark.parametrize("name", checks(WORKER))
def test_in_two_processes(name: str, results: dict[str, list[str]]) -> None:
    for rank, result in enumerate(results[name]):
        assert result == "passed", f"process {rank}: {result}"
