"""One of the processes that ``test_peers.py`` starts; not collected by pytest.

They send by kernels, in Triton's interpreter and in memory that they share, or, where each has a GPU, on these.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_worker import make_hybrid
from interpreting import work_once
from processes import ON_GPUS, Check, work
from steps import ops_serve
from torch import Tensor

from mamba2_hf import Mamba2Cache, Mamba2Config, Mamba2ForCausalLM
from mamba2_hf.distributed import Group, tensor_parallel
from mamba2_hf.distributed.peer_memory import PeerMemory
from mamba2_hf.errors import ProcessError
from mamba2_hf.ops import dispatch

CHECKS: dict[str, Check] = {}
WORDS = 1024
IS_ON_GPU = ON_GPUS in os.environ
DEVICE = torch.device("cuda", int(os.environ["RANK"])) if IS_ON_GPU else torch.device("cpu")


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def connected(folder: Path, seconds: float = 100.0) -> Any:
    """The group of all processes; on a CPU with memory in files, and served by Triton."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = Group(dist.group.WORLD, rank, size)
    if not IS_ON_GPU:
        dispatch._usable = lambda device: (True, "by test")
        length = 2 * size * WORDS
        files = [str(folder / f"{other}.words") for other in range(size)]
        torch.from_file(files[rank], shared=True, size=length, dtype=torch.int64).zero_()
        dist.barrier()
        buffers = [torch.from_file(file, shared=True, size=length, dtype=torch.int64) for file in files]
        group.memory = PeerMemory(buffers, rank, WORDS, seconds)
    group.peers(torch.zeros(1, device=DEVICE))
    assert group.memory is not None
    group.memory.peers.table[3] = int(1e9 * seconds)
    return group


def parts(size: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Of all processes."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source).to(DEVICE, dtype) for _ in range(size)]


@check
def sums_and_columns(folder: Path) -> None:
    """Of many sizes, one after another: exact, the same bits in all processes."""
    group = connected(folder)
    for seed in range(6):
        for dtype in (torch.float32, torch.float16):
            shape = ((1, 1, 5), (3, 1, 130), (1, 1, 600))[seed % 3]
            given = parts(group.size, shape, seed, dtype)
            expected = torch.zeros(shape, device=DEVICE)
            for part in given:
                expected += part.float()
            assert torch.equal(group.total(given[group.rank].clone()), expected.to(dtype))
            assert torch.equal(group.gather_columns(given[group.rank]), torch.cat(given, -1))
    assert group.memory.peers.table[0].item() == 24 << 20


@check
def tensors_that_are_too_large_or_too_exact(folder: Path) -> None:
    """Go another way."""
    group = connected(folder)
    for shape, dtype in (((1, group.memory.peers.words + 1), torch.float32), ((1, 8), torch.float64)):
        given = parts(group.size, shape, 0, dtype)
        torch.testing.assert_close(group.total(given[group.rank].clone()), sum(given))
        assert torch.equal(group.gather_columns(given[group.rank]), torch.cat(given, -1))
    assert group.memory.peers.table[0].item() == 0


def pure(**changes: Any) -> Any:
    sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16}
    torch.manual_seed(0)
    return Mamba2ForCausalLM(Mamba2Config(**{**sizes, "vocab_size": 64, "num_hidden_layers": 2, **changes})).eval()


def steps(model: Any, ids: Tensor) -> Tensor:
    """Logits of a prompt's last token, and of tokens one by one."""
    cache = Mamba2Cache(model.config, static=True, max_length=ids.shape[1])
    with torch.no_grad():
        found = [model(ids[:, :-3], past_key_values=cache, logits_to_keep=1).logits]
        for i in range(3, 0, -1):
            found.append(model(ids[:, ids.shape[1] - i :][:, :1], past_key_values=cache).logits)
    return torch.cat(found, 1)


def assert_steps_like_one(folder: Path, model: Any, rows: int) -> None:
    ids = torch.randint(3, 60, (rows, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with dispatch.use_backend("torch"):
        expected = steps(copy.deepcopy(model).double().to(DEVICE), ids)
    group = connected(folder)
    shared = tensor_parallel(model.to(DEVICE), group)
    found = steps(shared, ids)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(group.gather(found), found.expand(group.size, *found.shape))
    before = group.memory.peers.table[0].item() >> 20
    with torch.no_grad():
        shared(ids[:, :1], past_key_values=Mamba2Cache(model.config))
    assert group.memory.peers.table[0].item() >> 20 > before  # by kernels


@check
def a_sequence(folder: Path) -> None:
    """With one norm over all heads."""
    assert_steps_like_one(folder, pure(), 1)


@check
def several_sequences(folder: Path) -> None:
    assert_steps_like_one(folder, pure(num_hidden_layers=1), 3)


@check
def attention_mlp_and_experts(folder: Path) -> None:
    """As modules, and as one op each, of one sequence and of several."""
    sizes: dict[str, Any] = {"layer_blocks": ["ssd mlp", "attention moe"], "num_hidden_layers": 2}
    assert_steps_like_one(folder, make_hybrid(**sizes, shared_adapter_rank=0).eval(), 1)
    with pytest.MonkeyPatch.context() as patch:
        ops_serve(patch)
        sizes |= {"moe_router": "softmax", "experts_implementation": "grouped_mm"}
        for rows in (1, 3):
            assert_steps_like_one(folder, make_hybrid(**sizes, shared_adapter_rank=0).eval(), rows)


@check
def a_process_that_does_not_answer(folder: Path) -> None:
    """The others stop waiting, and the next call says so; later ones do not wait at all."""
    group = connected(folder, seconds=1.0 if IS_ON_GPU else 1e-4)
    part = torch.ones(1, 1, 8, device=DEVICE)
    if group.rank > 0:
        group.total(part)
        if IS_ON_GPU:
            torch.cuda.synchronize()
        for call in (group.check, lambda: group.total(part)):
            with pytest.raises(ProcessError, match=r"did not answer within .* s: .* start all of them again"):
                call()


if __name__ == "__main__":
    if not IS_ON_GPU:
        work_once()
    work(CHECKS, Path(sys.argv[1]), *sys.argv[2:])
