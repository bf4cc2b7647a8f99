"""Continuous batching on a GPU: many requests of mixed lengths through one captured step, through the same step called
from Python, and through ``generate`` one after the other.

    python benchmarks/bench_batching.py --out benchmarks/results/batching.csv
    python benchmarks/bench_batching.py --tiny                                # toy sizes on a CPU, shared prefixes only

Random weights, bf16, 16 slots. ``prefix`` cases have requests that begin alike, with a ``PrefixCache`` and without, and
count the tokens of prompts that were read (``read``); they have no ``generate``, so ``over_generate`` is how many times
the tokens per second without a cache. Before a time is printed, a batch of fp32 weights has to write the tokens that
``generate`` writes for each request alone, and captured and uncaptured batches the same in bf16. ``tokens_per_s``
counts new tokens over the whole time, reading the prompts and capturing included; ``step_ms`` is the median of a step
while all slots are taken and nobody joins. ``generate`` gets a part of the requests.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from bench_generate import new_model
from table import write_csv

from mamba2_hf import ContinuousBatch, Mamba2Config, Mamba2ForCausalLM, PrefixCache, Request

FIELDS = ["case", "impl", "requests", "tokens_per_s", "step_ms", "over_generate", "read", "device", "versions"]
SLOTS = 16
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.95},
}
CASES = [("130m", "greedy", 48), ("130m", "sampled", 48), ("2.7b", "greedy", 48), ("2.7b", "sampled", 48)]


class Prefix(NamedTuple):
    """Requests that begin with the same ``shared`` tokens; ``own`` and ``new`` are the most that one adds and asks for.
    ``held`` is the budget of the states, in those of a slot.
    """

    shape: str
    requests: int
    slots: int
    shared: int
    own: int
    new: int
    held: int

    @property
    def name(self) -> str:
        return f"{self.shape}_prefix_{self.slots}_slots"

    def draw(self, vocabulary: int) -> list[Request]:
        draw = torch.Generator().manual_seed(2)

        def number(most: int) -> int:
            return 1 + int(torch.randint(most, (), generator=draw))

        shared = torch.randint(1, vocabulary, (self.shared,), generator=draw)
        found = []
        for _ in range(self.requests):
            ids = torch.cat([shared, torch.randint(1, vocabulary, (number(self.own),), generator=draw)])
            found.append(Request(ids, {**WAYS["greedy"], "max_new_tokens": number(self.new)}))
        return found


PREFIXES = [Prefix("130m", 256, 16, 1024, 128, 128, 32), Prefix("2.7b", 512, 64, 1024, 128, 128, 32)]
TINY = Prefix("tiny", 40, 4, 192, 24, 12, 8)


def requests_of(count: int, way: str, most: int = 160) -> list[Request]:
    """Prompts of 8 to 512 tokens, and about as much spread in what is asked for."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        length = int(2 ** (3 + 6 * torch.rand((), generator=draw)))
        new = int(most * (0.25 + 0.75 * torch.rand((), generator=draw)))
        ids = torch.randint(1, 50288, (length,), generator=draw)
        found.append(Request(ids, {**WAYS[way], "max_new_tokens": new}, seed=number))
    return found


def alone(model: Mamba2ForCausalLM, request: Request) -> list[int]:
    torch.manual_seed(request.seed or 0)
    ids = torch.as_tensor(request.input_ids)[None].to(model.device)
    return model.generate(ids, **request.settings)[0, ids.shape[1] :].tolist()


def run(
    model: Mamba2ForCausalLM,
    requests: list[Request],
    captured: bool,
    slots: int = SLOTS,
    prefix_cache: PrefixCache | None = None,
) -> tuple[list[list[int]], float, float]:
    """What each got, seconds for all, and median milliseconds of a step of full rows that nobody joins."""
    batch, steps = ContinuousBatch(model, slots=slots, captured=captured, prefix_cache=prefix_cache), []
    for request in requests:
        batch.add(request)
    ended, start = [], time.perf_counter()
    while not batch.idle:
        plain, before = batch.running == slots, time.perf_counter()
        ended += batch.step()
        if plain:
            steps.append(time.perf_counter() - before)
    taken = time.perf_counter() - start
    if captured and batch.why_not_captured is not None:
        raise RuntimeError(f"not captured: {batch.why_not_captured}")
    tokens = [each.tokens for each in sorted(ended, key=lambda each: each.request)]
    return tokens, taken, statistics.median(steps[4:] or steps or [float("nan")]) * 1e3


def check(shape: str, way: str) -> None:
    """fp32 weights, in which few logits are so close that another order of the sums decides."""
    model, requests = new_model(shape, torch.float32), requests_of(SLOTS + 2, way, most=24)
    found = run(model, requests, True)[0]
    wrong = [number for number, request in enumerate(requests) if found[number] != alone(model, request)]
    if wrong:
        raise ArithmeticError(f"{shape}, {way}: requests {wrong} got other tokens than alone")


def measure(shape: str, way: str, count: int) -> Iterator[dict[str, Any]]:
    """Rows of one case."""
    model, requests = new_model(shape, torch.bfloat16), requests_of(count, way)
    run(model, requests_of(SLOTS, way, most=8), True)  # compiles
    part = requests[:: max(count // 8, 1)]
    alone(model, part[0])
    start = time.perf_counter()
    new = sum(len(alone(model, request)) for request in part)
    single = new / (time.perf_counter() - start)
    row: dict[str, Any] = {"case": f"{shape}_{way}_{SLOTS}_slots"}
    yield row | {"impl": "generate", "requests": len(part), "tokens_per_s": single, "over_generate": 1.0}
    texts = []
    for impl, captured, given in (("captured", True, requests), ("uncaptured", False, requests[: count // 2])):
        found, taken, step = run(model, given, captured)
        texts.append(found)
        rate = sum(map(len, found)) / taken
        row |= {"impl": impl, "requests": len(given), "tokens_per_s": rate, "step_ms": step}
        yield row | {"over_generate": rate / single}
    if texts[0][: len(texts[1])] != texts[1]:
        raise ArithmeticError(f"{shape}, {way}: a captured batch writes other tokens")


def tiny_model() -> Mamba2ForCausalLM:
    config = Mamba2Config(
        hidden_size=64, num_hidden_layers=4, num_heads=8, head_dim=16, state_size=16, n_groups=1, vocab_size=512,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return Mamba2ForCausalLM(config).eval()


def measure_prefix(case: Prefix) -> Iterator[dict[str, Any]]:
    """Rows of one case, once a few of its requests have got in fp32 what they get alone."""
    tiny = case.shape == "tiny"
    model = tiny_model() if tiny else new_model(case.shape, torch.float32)
    requests = case.draw(model.config.vocab_size)
    some = [Request(request.input_ids, {**request.settings, "max_new_tokens": 8}) for request in requests[:10]]
    expected = [alone(model, request) for request in some]
    for kept in (None, PrefixCache(2**34)):
        if run(model, some, not tiny, 4, kept)[0] != expected:
            raise ArithmeticError(
                f"{case.name}: other tokens than alone, {'with' if kept else 'without'} a prefix cache"
            )
    model = model if tiny else model.to(torch.bfloat16)
    slot = ContinuousBatch(model, slots=1).cache.nbytes
    plain = 0.0
    for impl in ("no_cache", "prefix_cache"):
        held = case.held * slot if impl == "prefix_cache" else 0
        run(model, requests, not tiny, case.slots, PrefixCache(held))  # compiles, for prompts of all lengths
        kept = PrefixCache(held)
        found, taken, step = run(model, requests, not tiny, case.slots, kept)
        rate = sum(map(len, found)) / taken
        plain = plain or rate
        yield {
            **{"case": case.name, "impl": impl, "requests": len(requests), "tokens_per_s": rate, "step_ms": step},
            **{"over_generate": rate / plain, "read": kept.stats.tokens_read},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="part of the names of the cases to time")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        raise SystemExit("no GPU: --tiny runs toy sizes on the CPU")
    about = {
        "device": "cpu" if options.tiny else torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    rows = []

    def write(found: Iterator[dict[str, Any]]) -> None:
        for row in found:
            rows.append(row | about)
            print(*(rows[-1].get(field) for field in FIELDS[:7]), flush=True)
            write_csv(options.out, FIELDS, rows)
        gc.collect()
        torch.cuda.empty_cache()

    for shape, way, count in () if options.tiny else CASES:
        if options.cases in f"{shape}_{way}":
            check(shape, way)
            gc.collect()
            torch.cuda.empty_cache()
            write(measure(shape, way, count))
    for case in [TINY] if options.tiny else PREFIXES:
        if options.cases in case.name:
            write(measure_prefix(case))


if __name__ == "__main__":
    main()
