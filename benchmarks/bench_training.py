"""Times training steps on a GPU, this package's models beside transformers' and mamba_ssm's with the same weights.

    python benchmarks/bench_training.py --out benchmarks/results/training.csv
    python benchmarks/bench_training.py --cases 130M                  # those whose name contains it
    python benchmarks/bench_training.py --tiny                        # toy sizes on a CPU: does all of it run?

A step is forward and backward of bf16 weights on random tokens, without an optimizer; the peak of memory is that of the
process, weights and gradients included. Before anything is timed, our model and transformers' compute loss and
gradients of a short input in fp32, and each the loss of the timed input in bf16; where they differ, the script stops.
Each implementation is measured alone, the other's weights off the device. One that runs out of memory is tried with
half the batch until it fits, and its row says so.

The floor is the time of the matrix products alone (6 FLOP per weight and token; 4 where the weights are frozen) at the
rate of a large product, measured in the same run. mamba_ssm's own model runs, and transformers' takes its fast path,
where mamba_ssm and causal_conv1d are importable: then the last column names them. The LoRA case has r=16 on every
linear layer and packed documents, checked against each document alone, with PEFT's modules called, in fp32. Stock
models can have neither: theirs is on `in_proj` alone, on full rows.
"""

from __future__ import annotations

import argparse
import functools
import gc
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers import ORIGINAL, OURS, STOCK, installed, peer, peers
from table import write_csv
from torch import Tensor, nn
from transformers.models.mamba2 import modeling_mamba2

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM

CHECKPOINTING = ", checkpointing"
SIZES: dict[str, dict[str, Any]] = {
    "130M": {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24},
    "780M": {"hidden_size": 1536, "num_hidden_layers": 48, "num_heads": 48},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "state_size": 16, "vocab_size": 512},
}
SHARED = {"vocab_size": 50288, "state_size": 128, "head_dim": 64, "n_groups": 1, "tie_word_embeddings": True}
FIELDS = (
    *("case", "impl", "batch", "length", "ms_p20", "ms_p50", "ms_p80", "floor_ms", "ratio_to_floor", "peak_gib"),
    *("tokens_per_s", "device", "versions"),
)
STEPS, WARMUP = 10, 3
CHECKED_TOKENS = 300
EXACT, CLOSE, ROUNDED = 1e-4, 1e-2, 5e-3  # relative errors: of the loss and of gradients in fp32, of the loss in bf16


class Case(NamedTuple):
    size: str
    batch: int
    length: int
    lora: bool = False

    @property
    def name(self) -> str:
        return f"{'lora' if self.lora else 'step'}_{self.size}_{self.batch}x{self.length}"


CASES = [Case("130M", 16, 2048), Case("780M", 4, 2048), Case("780M", 4, 2048, lora=True)]
TINY = [Case("tiny", 2, 64), Case("tiny", 2, 64, lora=True)]


# --- models and inputs ----------------------------------------------------------------------------------------------


def build(impl: str, size: str, device: str) -> Any:
    """A model with the weights that our initialization draws from one seed, fp32."""
    sizes = SHARED | SIZES[size]
    torch.manual_seed(0)
    with torch.device(device):
        ours = Mamba2ForCausalLM(Mamba2Config(**sizes))
    return ours if impl == OURS else peer(impl, ours)


def adapted(model: Any, impl: str) -> Any:
    """With LoRA in the dtype of the weights, its effect not zero."""
    from peft import LoraConfig, get_peft_model

    # PEFT refuses out_proj for stock models, whose fused kernel would not see its adapter.
    targets = "all-linear" if impl == OURS else ["in_proj"]
    config = LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    return model


def tokens(case: Case, batch: int, device: str) -> Tensor:
    source = torch.Generator().manual_seed(1)
    vocab = (SHARED | SIZES[case.size])["vocab_size"]
    return torch.randint(0, vocab, (batch, case.length), generator=source).to(device)


def bounds(total: int, length: int) -> list[int]:
    """Documents of uneven lengths, a few per row."""
    ends, step = [0], max(2, length // 7)
    while ends[-1] + 3 * step < total:
        ends.append(ends[-1] + step * (1 + len(ends) % 3))
    return [*ends, total]


def inputs(case: Case, impl: str, batch: int, device: str) -> dict[str, Tensor]:
    """Rows of one document each, or what TRL makes of packed ones: a single row whose positions start again."""
    ids = tokens(case, batch, device)
    if not case.lora or impl == STOCK:
        return {"input_ids": ids, "labels": ids}
    ids = ids.view(1, -1)  # (1, T)
    ends = bounds(ids.shape[1], case.length)
    starts = [torch.arange(b - a) for a, b in pairwise(ends)]
    return {"input_ids": ids, "labels": ids, "position_ids": torch.cat(starts)[None].to(device)}


# --- correctness ----------------------------------------------------------------------------------------------------


def checked(what: str, found: float, expected: float, tolerance: float) -> None:
    """Stops at a wrong result: nothing wrong is timed."""
    if not math.isclose(found, expected, rel_tol=tolerance):
        raise SystemExit(f"{what}: {found} is not {expected}; nothing is timed")


@contextmanager
def without_kernels() -> Iterator[None]:
    """Has stock models compute in PyTorch: mamba_ssm would search its kernels' options for fp32, for a minute."""
    found = {
        name: f for name, f in vars(modeling_mamba2).items() if hasattr(f, "__wrapped__") and inspect.isfunction(f)
    }
    for name, function in found.items():
        setattr(modeling_mamba2, name, function.__wrapped__)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name, function in found.items():
            setattr(modeling_mamba2, name, function)


def exact_results(impl: str, case: Case, device: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one short row in fp32."""
    model = build(impl, case.size, device).train()
    ids = tokens(case, 1, device)[:, :CHECKED_TOKENS]
    with without_kernels():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def check_agreement(case: Case, device: str) -> None:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    (ours, mine), (stock, theirs) = (exact_results(impl, case, device) for impl in (OURS, STOCK))
    checked(f"{case.name}, loss in fp32", ours, stock, EXACT)
    compare_gradients(case, mine, theirs)
    if case.lora:
        check_lora(case, device)
    torch.set_float32_matmul_precision(precision)


def compare_gradients(case: Case, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Stops where those of ``theirs`` are not found."""
    for name, expected in theirs.items():
        error = float((mine[name] - expected).norm() / expected.norm())
        if not error < CLOSE:
            raise SystemExit(f"{case.name}, gradient of {name} in fp32: relative error {error:.1e}; nothing is timed")


@functools.cache
@torch.no_grad()
def loss_of_ours(case: Case, batch: int, device: str) -> float:
    """In bf16, row by row."""
    model = build(OURS, case.size, device).to(torch.bfloat16).eval()
    ids = tokens(case, batch, device)
    return statistics.mean(model(row, labels=row, use_cache=False).loss.item() for row in ids.split(1))


def check_lora(case: Case, device: str) -> None:
    """Loss and gradients of short packed documents in fp32, against each alone in a model all of whose modules are
    called.
    """
    model = adapted(build(OURS, case.size, device), OURS).train()
    packed = inputs(case._replace(length=CHECKED_TOKENS), OURS, 1, device)
    ids, ends = packed["input_ids"], bounds(CHECKED_TOKENS, CHECKED_TOKENS)
    found = model(**packed, use_cache=False).loss
    found.backward()
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    for name, module in model.named_modules():
        if name.endswith(("in_proj", "out_proj")):
            module.register_forward_hook(lambda *_: None)
    total = 0.0
    for a, b in pairwise(ends):
        share = (b - a - 1) / (CHECKED_TOKENS - len(ends) + 1)
        loss = share * model(input_ids=ids[:, a:b], labels=ids[:, a:b], use_cache=False).loss
        loss.backward()
        total += loss.item()
    checked(f"{case.name}, loss in fp32", found.item(), total, EXACT)
    compare_gradients(case, mine, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def check_documents(model: Any, batch: dict[str, Tensor], case: Case) -> None:
    """The loss of packed documents against their own, one by one."""
    ids = batch["input_ids"]
    ends = bounds(ids.shape[1], case.length)
    packed = model(**batch, use_cache=False).loss.item()
    total = count = 0.0
    for a, b in pairwise(ends):
        total += model(input_ids=ids[:, a:b], labels=ids[:, a:b], use_cache=False).loss.item() * (b - a - 1)
        count += b - a - 1
    checked(f"{case.name}, packed", packed, total / count, ROUNDED)


# --- measuring ------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    batch: int
    ms: tuple[float, float, float]
    peak: int
    loss: float


def timed(call: Callable[[], Any], device: str, steps: int, warmup: int) -> tuple[float, float, float]:
    """Milliseconds of a call at 20, 50 and 80 %, the calls following each other without waiting for the device."""
    for _ in range(warmup):
        call()
    if device == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        for mark in marks[:-1]:
            mark.record()
            call()
        marks[-1].record()
        torch.cuda.synchronize()
        found = [a.elapsed_time(b) for a, b in pairwise(marks)]
    else:
        times = [time.perf_counter()]
        for _ in range(steps):
            call()
            times.append(time.perf_counter())
        found = [1e3 * (b - a) for a, b in pairwise(times)]
    p20, *_, p80 = statistics.quantiles(found, n=5)
    return p20, statistics.median(found), p80


def measure(case: Case, impl: str, batch: int, device: str, checkpointing: bool) -> Measured:
    model = build(impl, case.size, device).to(torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case.lora:
        model = adapted(model, impl)
    model.train()
    given = inputs(case, impl, batch, device)
    if case.lora and impl == OURS:
        check_documents(model, given, case)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(**given, use_cache=False).loss
        loss.backward()
        return loss.detach()

    loss = step().item()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms = timed(step, device, STEPS, WARMUP)
    return Measured(batch, ms, torch.cuda.max_memory_allocated() if device == "cuda" else 0, loss)


def fitting(case: Case, impl: str, device: str, checkpointing: bool) -> Measured | None:
    """:func:`measure` at the largest batch, halved as often as it takes, that fits; None if none does."""
    batch = case.batch
    while batch:
        try:
            return measure(case, impl, batch, device, checkpointing)
        except torch.OutOfMemoryError:
            print(f"{case.name} {impl}: out of memory at a batch of {batch}", flush=True)
        finally:
            release(device)
        batch //= 2
    return None


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def product_rate(device: str) -> float:
    """FLOP per second of a large product."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    m = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / (1e-3 * timed(lambda: m @ m, device, 20, 5)[1])


def products(case: Case) -> float:
    """FLOP of the matrix products of one token."""
    with torch.device("meta"):
        model = Mamba2ForCausalLM(Mamba2Config(**SHARED | SIZES[case.size]))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return (4 if case.lora else 6) * weights


def versions() -> str:
    return ", ".join([*(f"{name} {metadata.version(name)}" for name in ("torch", "transformers")), *installed()])


def rows(cases: list[Case], device: str, impls: list[str]) -> Iterator[dict[str, Any]]:
    rate = product_rate(device)
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"{where}: {rate / 1e12:.2f} TFLOP/s in a large product", flush=True)
    for case in cases:
        check_agreement(case, device)
        release(device)
        for impl in impls:
            if impl == ORIGINAL and case.lora:
                continue
            for checkpointing in [False] if impl == ORIGINAL else [False, True]:
                label = impl + (CHECKPOINTING if checkpointing else "")
                found = fitting(case, impl, device, checkpointing)
                if found is None:
                    print(f"{case.name} {label}: does not fit at any batch", flush=True)
                    continue
                if not case.lora:  # there the adapters differ, and documents were checked
                    expected = loss_of_ours(case, found.batch, device)
                    checked(f"{case.name} {label}, loss in bf16", found.loss, expected, ROUNDED)
                count = found.batch * case.length
                floor = 1e3 * products(case) * count / rate
                p20, p50, p80 = found.ms
                values = (
                    *(case.name, label, found.batch, case.length, f"{p20:.2f}", f"{p50:.2f}", f"{p80:.2f}"),
                    *(f"{floor:.2f}", f"{p50 / floor:.2f}", f"{found.peak / 2**30:.2f}", f"{1e3 * count / p50:.0f}"),
                    *(where, versions()),
                )
                yield dict(zip(FIELDS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="part of the names of the cases to time")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--no-peer", action="store_true", help="check against transformers' model, but time no other")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        raise SystemExit("no GPU: --tiny runs toy sizes on the CPU")
    done: list[dict[str, Any]] = []
    impls = [OURS] if options.no_peer else [OURS, *peers()]
    for row in rows([case for case in (TINY if options.tiny else CASES) if options.cases in case.name], device, impls):
        done.append(row)
        print(" ".join(f"{value}" for value in list(row.values())[:11]), flush=True)
        write_csv(options.out, FIELDS, done)


if __name__ == "__main__":
    main()
