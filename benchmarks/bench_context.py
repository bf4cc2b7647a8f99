"""Times training on one long sequence, whole and spread over processes that pass states.

    python benchmarks/bench_context.py --out benchmarks/results/context.csv             # one GPU
    torchrun --nproc_per_node 2 benchmarks/bench_context.py --out ...                   # the same sequence over two
    torchrun --nproc_per_node 2 benchmarks/bench_context.py --longest                   # and the longest that fits
    python benchmarks/bench_context.py --tiny                                           # a toy on a CPU: does it run?

A step is forward and backward of bf16 weights with gradient checkpointing, without an optimizer; over several processes
it ends with the sum of their gradients. The first step's loss and gradient norm are compared with those of the whole
sequence on one GPU; where they differ, the script stops.

On one GPU, "a slice of 2" is what one of two processes computes: its half of the sequence, with made-up numbers in the
place of those that the other would send. It says what passing states costs beside the time of messages.

The longest sequence follows from the peak of memory, of which weights and gradients do not grow with tokens, and is
then trained on for two steps.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # sequences that fill a GPU

import torch
import torch.distributed as dist
from table import write_csv
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM
from mamba2_hf.distributed import Group, context_parallel

SIZES: dict[str, dict[str, Any]] = {
    "130M": {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24},
    "1.3B": {"hidden_size": 2048, "num_hidden_layers": 48, "num_heads": 64},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "state_size": 16, "vocab_size": 512},
}
SHARED = {"vocab_size": 50288, "state_size": 128, "head_dim": 64, "n_groups": 1, "tie_word_embeddings": True}
FIELDS = ("case", "processes", "tokens", "tokens_here", "ms", "times_faster", "peak_gib", "loss", "norm", "device")
FILLED = 0.85  # of a GPU's memory, by the longest sequence
CLOSE = {"cuda": 1e-2, "cpu": 1e-2}  # of losses and gradient norms in bf16


class Echo(Group):
    """A process of a group whose others are not there: it gets what it sends."""

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.expand(self.size, *tensor.shape).contiguous()

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor * self.size

    def sum_of_parts(self, tensor: Tensor) -> Tensor:
        return tensor[self.rank] * self.size

    def exchange(self, tensor: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return tensor


def build(size: str, device: torch.device) -> Any:
    torch.manual_seed(0)
    with device:
        model = Mamba2ForCausalLM(Mamba2Config(**SHARED | SIZES[size])).bfloat16().train()
    model.gradient_checkpointing_enable()
    return model


def timed(model: Any, ids: Tensor, steps: int, after: Callable[[], None]) -> dict[str, Any]:
    """Time of a step, and loss and gradient norm of the first."""
    cuda, times, first = ids.is_cuda, [], {}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 1):
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        loss = model(ids, labels=ids).loss
        loss.backward()
        after()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        norm = torch.nn.utils.get_total_norm([p.grad.float() for p in model.parameters()])
        first = first or {"loss": round(loss.item(), 5), "norm": round(norm.item(), 5)}
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return {"ms": round(1e3 * min(times[1:]), 1), "peak_gib": round(peak, 1), **first}


def longest(model: Any, tokens: int, peak_gib: float, device: torch.device) -> int:
    """How many tokens fit, a multiple of 16384, given the peak of memory with ``tokens``."""
    fixed = 2 * sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    room = FILLED * torch.cuda.get_device_properties(device).total_memory / 2**30
    return int(tokens * (room - fixed) / (peak_gib - fixed)) // 16384 * 16384


def rows(size: str, tokens: int, steps: int, device: torch.device, most: bool) -> Iterator[dict[str, Any]]:
    """The whole sequence on the first GPU, then over all processes, or the slices of two on this one; with ``most``
    also the longest sequence that fits each time.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0

    def draw(count: int) -> Tensor:
        source = torch.Generator().manual_seed(0)
        return torch.randint(3, (SHARED | SIZES[size])["vocab_size"], (1, count), generator=source).to(device)

    ids = draw(tokens)
    where = torch.cuda.get_device_name() if ids.is_cuda else "CPU"
    model = build(size, device)
    shared = {"device": where}

    def row(case: str, processes: int, here: int, found: dict[str, Any], of: int = tokens) -> dict[str, Any]:
        faster = round(whole["ms"] / found["ms"] * of / tokens, 3)  # for a token
        counts = {"processes": processes, "tokens": of, "tokens_here": here}
        return {"case": case, **counts, "times_faster": faster, **shared, **found}

    whole = timed(model, ids, steps, lambda: None) if rank == 0 else {"ms": 1.0}
    if rank == 0:
        yield row(f"{size}, whole", 1, tokens, whole)
        if most:
            count = longest(model, tokens, whole["peak_gib"], device)
            yield row(f"{size}, whole, longest", 1, count, timed(model, draw(count), 1, lambda: None), count)
    gc.collect()
    if world == 1:
        for place in range(2):
            context_parallel(model, Echo(None, place, 2))
            found = timed(model, ids, steps, lambda: None)
            yield row(f"{size}, slice {place + 1} of 2", 1, tokens // 2, {**found, "loss": None, "norm": None})
        return

    def average() -> None:
        for p in model.parameters():
            dist.all_reduce(p.grad, dist.ReduceOp.AVG if ids.is_cuda else dist.ReduceOp.SUM)
            if not ids.is_cuda:
                p.grad /= world

    context_parallel(model, init_device_mesh(device.type, (world,), mesh_dim_names=("cp",)))
    dist.barrier()
    found = timed(model, ids, steps, average)
    for name in ("loss", "norm") if rank == 0 else ():
        if abs(found[name] - whole[name]) > CLOSE[device.type] * abs(whole[name]):
            raise SystemExit(f"{name}: {found[name]} is not {whole[name]}")
    if rank == 0:
        yield row(f"{size}, over {world}", world, tokens // world, found)
    if most:
        limit = torch.tensor(longest(model, tokens, found["peak_gib"], device), device=device)
        dist.all_reduce(limit, dist.ReduceOp.MIN)
        count = int(limit)
        found = timed(model, draw(count), 1, average)
        if rank == 0:
            yield row(f"{size}, over {world}, longest", world, count // world, found, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="1.3B", choices=SIZES)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--longest", action="store_true", help="also the longest sequence that fits, on a GPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a toy, on a CPU")
    given = parser.parse_args()
    size, tokens = ("tiny", 512) if given.tiny else (given.size, given.tokens)
    device = torch.device("cpu")
    if torch.cuda.is_available() and not given.tiny:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    done: list[dict[str, Any]] = []
    for row in rows(size, tokens, given.steps, device, given.longest):
        done.append(row)
        print(" | ".join(f"{name}={row[name]}" for name in FIELDS), flush=True)
        write_csv(given.out, FIELDS, done)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
