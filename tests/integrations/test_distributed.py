"""FSDP2, DDP and tensor parallelism, with two processes on the CPU; the checks are in ``distributed_worker.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import checks, run
from transformers.distributed import DistributedConfig

from mamba2_hf import Mamba2ForCausalLM, Mamba2HybridForCausalLM, Mamba2Model
from mamba2_hf.errors import ArgumentError

WORKER = Path(__file__).with_name("distributed_worker.py")
FSDP, TRANSFORMERS = (checks(WORKER, f"check('{suite}')") for suite in ("fsdp", "transformers"))

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")


@pytest.mark.parametrize("config", [{"pp_size": 2}, DistributedConfig(pp_size=2)], ids=["dict", "object"])
@pytest.mark.parametrize("cls", [Mamba2ForCausalLM, Mamba2HybridForCausalLM, Mamba2Model])
def test_pipeline_parallelism_is_refused_before_processes_meet(cls: Any, config: Any, tmp_path: Path) -> None:
    with torch.device("meta"):
        cls(cls.config_class(num_hidden_layers=1)).config.save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=f"pp_size=2: {cls.__name__} has no pipeline parallelism"):
        cls.from_pretrained(tmp_path, distributed_config=config)
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, list[str]]:
    return run(WORKER, 2, tmp_path_factory.mktemp("fsdp"), repository, only=FSDP)


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, list[str]]:
    return run(WORKER, 2, tmp_path_factory.mktemp("transformers"), repository, only=TRANSFORMERS)


@pytest.mark.parametrize("name", FSDP)
def test_fsdp(name: str, fsdp: dict[str, list[str]]) -> None:
    for rank, result in enumerate(fsdp[name]):
        assert result == "passed", f"process {rank}: {result}"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, transformers: dict[str, list[str]]) -> None:
    for rank, result in enumerate(transformers[name]):
        assert result == "passed", f"process {rank}: {result}"
