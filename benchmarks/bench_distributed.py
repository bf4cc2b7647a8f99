"""Times training steps on any number of GPUs: a model alone, in DDP and sharded by FSDP2, each called from Python and
captured; then prompts and decoding with a model that all GPUs share (`tensor_rows.py`).

    python benchmarks/bench_distributed.py --out benchmarks/results/distributed.csv   # one GPU: what each costs there
    torchrun --nproc_per_node 2 benchmarks/bench_distributed.py --out benchmarks/results/distributed.csv
    python benchmarks/bench_distributed.py --fake 8           # the CPU's time of FSDP2 for 8 GPUs, without them
    python benchmarks/bench_distributed.py --tiny             # toy sizes on a CPU: does all of it run?

Every GPU has a batch of its own (weak scaling); a row without processes that talk is each GPU alone, all at the same
time. A step is forward, backward and a fused AdamW, and its time is that of the slowest process. `one` and `ddp` train
bf16 weights, `fsdp2` fp32 ones that are gathered in bf16 (`fully_shard_model`); A_log, D and dt_bias are fp32 in all.

Checked first, in fp32 on a model of two layers: gradients of DDP and FSDP2 are the mean of those of all processes.
Then, for every row: losses of 20 captured steps with an optimizer between them are those of eager steps, bit for bit;
of hybrids to 1e-3, since the gradients of attention's kernels are not twice the same.
Where either fails, the script stops. A capture that is refused is a row that says why.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from table import write_csv
from tensor_rows import tensor_rows
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM, Mamba2HybridConfig, Mamba2HybridForCausalLM
from mamba2_hf.training import CapturedStep, fully_shard_model

FIELDS = (
    *("case", "impl", "gpus", "batch", "length", "ms_p20", "ms_p50", "ms_p80", "issue_ms", "tokens_per_s"),
    *("to_one_gpu", "peak_gib", "note", "device", "versions"),
)
STEPS, TINY_STEPS = 20, 4  # as many for their losses, and again for their time
EXACT = 1e-4  # relative errors of gradients in fp32
DRAWN = 1e-3  # of losses, where kernels add up in any order
CAPTURED = ", captured"


class Case(NamedTuple):
    """A model and the batch of each GPU."""

    name: str
    config: Callable[[], Any]
    batch: int
    length: int


def pure(width: int, layers: int, **changes: Any) -> Callable[[], Any]:
    sizes = {"vocab_size": 50288, "hidden_size": width, "num_hidden_layers": layers, "num_heads": 2 * width // 64}
    shared = {"head_dim": 64, "n_groups": 1, "state_size": 128, "tie_word_embeddings": True}
    return lambda: Mamba2Config(**{**sizes, **shared, **changes})


def bamba(layers: int, **changes: Any) -> Callable[[], Any]:
    """Layers of Bamba 9B's shape, attention in the middle one; fewer of them, so that one GPU can train it."""
    kinds = ["ssd mlp"] * layers
    kinds[layers // 2] = "attention mlp"
    sizes: dict[str, Any] = {
        **{"vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": layers, "layer_blocks": kinds},
        **{"ssm_num_heads": 128, "ssm_head_dim": 64, "ssm_state_size": 128, "ssm_n_groups": 1},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": True},
    }
    return lambda: Mamba2HybridConfig(**{**sizes, **changes})


TINY_HYBRID = {
    **{"vocab_size": 512, "hidden_size": 64, "ssm_num_heads": 4, "ssm_head_dim": 16, "ssm_state_size": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96},
}
CASES = [
    Case("130M", pure(768, 24), 8, 2048),
    Case("1.3B", pure(2048, 48), 4, 2048),
    Case("bamba8", bamba(8), 2, 2048),
]
TINY = [
    Case("tiny", pure(64, 2, vocab_size=512, state_size=16), 2, 32),
    Case("tiny_hybrid", bamba(3, **TINY_HYBRID), 2, 32),
]


def build(config: Any, device: torch.device) -> Any:
    torch.manual_seed(0)
    cls = Mamba2HybridForCausalLM if isinstance(config, Mamba2HybridConfig) else Mamba2ForCausalLM
    with device:
        return cls(config).train()


def ddp(model: nn.Module, device: torch.device) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def fsdp2(model: nn.Module, device: torch.device, exact: bool = False) -> nn.Module:
    dtype = None if exact else torch.bfloat16
    return fully_shard_model(model, mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False))


WRAPS: dict[str, Callable[[Any, torch.device], nn.Module]] = {
    "one": lambda model, device: model.bfloat16(),
    "ddp": lambda model, device: ddp(model.bfloat16(), device),
    "fsdp2": fsdp2,
}


class Run:
    """The processes of one run."""

    def __init__(self, fake: int, tiny: bool) -> None:
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        if fake:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=fake)
        else:
            for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
                os.environ.setdefault(name, value)
            on_gpus = {"device_id": self.device} if self.device.type == "cuda" else {}
            dist.init_process_group("nccl" if on_gpus else "gloo", **on_gpus)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.steps = TINY_STEPS if tiny else STEPS
        self.started = time.perf_counter()

    def say(self, *words: object) -> None:
        if self.rank == 0:
            print(*words, flush=True)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def largest(self, value: float) -> float:
        """Of all processes."""
        if self.world == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    def release(self) -> None:
        gc.unfreeze()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def batches(self, case: Case, count: int = 4) -> list[Tensor]:
        vocab = case.config().vocab_size
        source = torch.Generator().manual_seed(self.rank)
        return [torch.randint(vocab, (case.batch, case.length), generator=source).to(self.device) for _ in range(count)]


# --- correctness ----------------------------------------------------------------------------------------------------


def check_gradients(run: Run, tiny: bool) -> None:
    """Stops unless wrapped models have the gradients of one process that sees every batch."""
    torch.set_float32_matmul_precision("highest")
    case = TINY[0] if tiny else Case("two layers", pure(768, 2), 2, 300)
    (ids,) = run.batches(case, 1)
    expected = build(case.config(), run.device)
    expected(input_ids=ids, labels=ids).loss.backward()
    for name, wrap in (("ddp", ddp), ("fsdp2", lambda model, device: fsdp2(model, device, exact=True))):
        model = wrap(build(case.config(), run.device), run.device)
        model(input_ids=ids, labels=ids).loss.backward()
        for (parameter, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            mean = q.grad.clone()
            dist.all_reduce(mean)
            mean /= run.world
            found = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            error = float((found - mean).norm() / mean.norm())
            if not error < EXACT:
                raise SystemExit(f"{name}, gradient of {parameter}: relative error {error:.1e}; nothing is timed")
    run.say("gradients of ddp and fsdp2 in fp32: those of one process")


# --- measuring ------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    losses: Tensor
    ms: tuple[float, float, float]
    issue_ms: float
    peak_gib: float
    note: str


def train(run: Run, case: Case, kind: str, captured: bool) -> Trained:
    """So many steps for their losses, and as many for their time."""
    stream = torch.cuda.Stream() if captured and run.device.type == "cuda" else None
    with torch.cuda.stream(stream):
        model = WRAPS[kind](build(case.config(), run.device), run.device)
    run.sync()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = run.batches(case)
    step = CapturedStep(model, stream=stream) if captured else None

    def once(index: int) -> Tensor:
        ids = batches[index % len(batches)]
        if step is not None:
            loss = step(input_ids=ids, labels=ids)
        else:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    losses = []
    for index in range(run.steps):
        losses.append(once(index))
        if index == 0:  # what the collector would look at in the middle of a step
            gc.collect()
            gc.freeze()
    run.sync()
    dist.barrier()
    marks, clocks = [mark(run)], [time.perf_counter()]
    for index in range(run.steps):
        once(index)
        marks.append(mark(run))
        clocks.append(time.perf_counter())
    run.sync()
    ms = [a.elapsed_time(b) for a, b in pairwise(marks)] if marks[0] else [1e3 * (b - a) for a, b in pairwise(clocks)]
    p20, *_, p80 = statistics.quantiles(ms, n=5)
    peak = torch.cuda.max_memory_allocated() / 2**30 if run.device.type == "cuda" else 0.0
    note = "" if step is None else (step.reason or f"{step.graphs} graph")
    times = (run.largest(p20), run.largest(statistics.median(ms)), run.largest(p80))
    return Trained(torch.stack(losses), times, 1e3 * (clocks[-1] - clocks[0]) / run.steps, run.largest(peak), note)


def mark(run: Run) -> Any:
    if run.device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def rows(run: Run, cases: list[Case], kinds: list[str], limit: float) -> Iterator[dict[str, Any]]:
    shared = {**provenance(), "gpus": run.world}
    alone: dict[str, float] = {}
    for case, kind in ((case, kind) for case in cases for kind in kinds):
        eager: Trained | None = None
        for captured in (False, True):
            if run.largest(time.perf_counter() - run.started) > limit:
                return
            try:
                found = train(run, case, kind, captured)
            except torch.OutOfMemoryError:
                run.say(f"{case.name} {kind}: out of memory")
                break
            finally:
                run.release()
            if eager is not None:
                error = float(((found.losses - eager.losses).abs() / eager.losses.abs()).max())
                if not run.largest(error) <= (DRAWN if "hybrid" in case.config().model_type else 0.0):
                    raise SystemExit(f"{case.name} {kind}: losses of captured steps are {error:.1e} off the eager ones")
            eager = found if eager is None else eager
            impl = kind + CAPTURED * captured
            p20, p50, p80 = found.ms
            if kind == "one":
                alone[case.name + CAPTURED * captured] = p50
            one = alone.get(case.name + CAPTURED * captured)
            yield {
                **shared,
                **{"case": case.name, "impl": impl, "batch": case.batch, "length": case.length},
                **{"ms_p20": f"{p20:.2f}", "ms_p50": f"{p50:.2f}", "ms_p80": f"{p80:.2f}"},
                "issue_ms": f"{found.issue_ms:.2f}",
                "tokens_per_s": f"{1e3 * run.world * case.batch * case.length / p50:.0f}",
                "to_one_gpu": "" if one is None else f"{p50 / one:.3f}",
                "peak_gib": f"{found.peak_gib:.2f}",
                "note": found.note,
            }


def host_rows(run: Run, cases: list[Case], limit: float) -> Iterator[dict[str, Any]]:
    """What the CPU takes for a layer's forward and backward: alone, and sharded for GPUs that are not there. Nothing
    of it is right, as nothing is gathered; a short batch leaves the GPU idle.
    """
    shared = {**provenance(), "gpus": run.world}
    for case in cases:
        layers = case.config().num_hidden_layers
        ids = run.batches(case._replace(batch=1, length=64), 1)[0]
        for impl, size in (("host, one", 0), ("host, fsdp2 a block", 1), ("host, fsdp2 groups", None)):
            if time.perf_counter() - run.started > limit:
                return
            model = build(case.config(), run.device)
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
            if size == 0:
                model.bfloat16()
            else:
                fully_shard_model(model, mp_policy=policy, group_size=size)
            found = []
            gc.collect()
            gc.freeze()
            for _ in range(8):
                run.sync()
                start = time.perf_counter()
                model(input_ids=ids, labels=ids).loss.backward()
                found.append(1e3 * (time.perf_counter() - start) / layers)
            del model
            run.release()
            yield {**shared, "case": case.name, "impl": impl, "note": f"issue_ms: of a layer, {layers} of them",
                   "batch": 1, "length": 64, "issue_ms": f"{statistics.median(found[3:]):.3f}"}  # fmt: skip


def provenance() -> dict[str, str]:
    names = ("torch", "transformers", "triton")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    nccl = f", nccl {'.'.join(map(str, torch.cuda.nccl.version()))}" if torch.cuda.is_available() else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "versions": versions + nccl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="part of the names of the cases to time")
    parser.add_argument("--kinds", default="one,ddp,fsdp2,tp", help="of processes, in this order")
    parser.add_argument("--fake", type=int, default=0, help="so many GPUs that are not there, for the CPU's time")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no row is begun")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        raise SystemExit("no GPU: --tiny runs toy sizes on the CPU")
    run = Run(options.fake, options.tiny)
    cases = [case for case in (TINY if options.tiny else CASES) if options.cases in case.name]
    if options.fake:
        found = host_rows(run, cases, options.limit)
    else:
        check_gradients(run, options.tiny)
        run.release()
        kinds = options.kinds.split(",")
        found = rows(run, cases, [kind for kind in kinds if kind in WRAPS], options.limit)
        if "tp" in kinds:
            shared = tensor_rows(run, options.tiny, options.limit)
            found = chain(found, ({**provenance(), **row} for row in shared))
    done: list[dict[str, Any]] = []
    for row in found:
        done.append(row)
        run.say(*(row.get(name, "") for name in FIELDS[: FIELDS.index("device")]))
        if run.rank == 0:
            write_csv(options.out, FIELDS, done)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
