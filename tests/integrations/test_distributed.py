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


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pp": ({"pp_size": 2}, "pp_size=2: {} has no pipeline parallelism.* tp_size or fsdp_size"),
    "ep": ({"ep_size": 2, "tp_size": 2}, "ep_size=2: {} does not deal out whole experts. Use tp_size alone"),
    "ep, fsdp": ({"ep_size": 2, "fsdp_size": 2}, "ep_size=2: {} does not deal out whole experts. Use tp_size alone"),
    "sp": ({"tp_size": 2, "enable_sequence_parallel": True}, "enable_sequence_parallel=True: norms of {} .* Leave it"),
}


@pytest.mark.parametrize("make", [dict, DistributedConfig], ids=["dict", "object"])
@pytest.mark.parametrize("asked", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("cls", [Mamba2ForCausalLM, Mamba2HybridForCausalLM, Mamba2Model])
def test_what_models_have_not_is_refused_before_processes_meet(
    cls: Any, asked: tuple[dict[str, Any], str], make: Any, tmp_path: Path
) -> None:
    """By every process: it needs no other to say so."""
    sizes, message = asked
    with torch.device("meta"):
        cls(cls.config_class(num_hidden_layers=1)).config.save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=message.format(cls.__name__)):
        cls.from_pretrained(tmp_path, distributed_config=make(**sizes))
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return once(tmp_path_factory, "sharded", lambda folder: run(WORKER, 2, folder))


@pytest.mark.parametrize("name", checks(WORKER))
def test_in_two_processes(name: str, results: dict[str, list[str]]) -> None:
    for rank, result in enumerate(results[name]):
        assert result == "passed", f"process {rank}: {result}"
