"""Decoding and prefill of whole models through ``generate``, beside transformers' and mamba_ssm's own, on a GPU.

    python benchmarks/bench_generate.py --out benchmarks/results/generate.csv

Random weights, bf16, the same for all. mamba_ssm's own model runs, and transformers' takes its fast path, where
mamba_ssm and causal_conv1d are importable: then the last column names them. Before a time is printed, logits of the
timed path have to agree with one forward of the whole sequence. Columns: ``replay`` is the captured step alone,
``replay, writing`` the same with states written at every step where otherwise they are not, ``generate`` a token of
``model.generate`` (from two lengths, so that the prompt does not count), ``loop`` the same with steps that do nothing,
``prefill`` a forward of the prompt. ``speculate`` cases: 16 sequences by steps, and with drafts of ``DRAFT`` tokens
that are looked up in the text (``lookup``), which repeats itself, or goes on otherwise so that drafts are wrong.
``error`` is then the share of tokens in bf16 that are others than by steps; in fp32 none may be.

    python benchmarks/bench_generate.py --cases speculate --no-peer
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peers import OURS, STOCK, installed, peer, peers
from table import write_csv

from mamba2_hf import Mamba2Cache, Mamba2Config, Mamba2ForCausalLM
from mamba2_hf.models.graphs import DecodeGraph

FIELDS = ["case", "impl", "what", "ms", "floor_ms", "over_floor", "memory_gib", "error", "device", "versions"]
TOLERANCE = 0.03  # of logits in bf16 against another order of the same sums
SHAPES = {"130m": (768, 24, 24), "780m": (1536, 48, 48), "2.7b": (2560, 64, 80)}  # width, layers, heads
SHORT, LONG = 16, 112  # tokens generated
DRAFT, PERIOD = 8, 40  # tokens of a draft, and of a text that repeats


class Case(NamedTuple):
    """One model, batch and dtype of the state."""

    shape: str
    batch: int
    state: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"decode_{self.shape}_b{self.batch}" + ("" if self.state == torch.float32 else "_bf16_state")


CASES = [Case("130m", 1), Case("2.7b", 1), Case("2.7b", 4), Case("2.7b", 16), Case("2.7b", 64)]
CASES += [Case("2.7b", 64, torch.bfloat16), Case("780m", 1), Case("2.7b", 8), Case("2.7b", 16, torch.bfloat16)]
CASES += [Case("2.7b", 256), Case("2.7b", 256, torch.bfloat16)]


def new_model(shape: str, dtype: torch.dtype = torch.bfloat16, tied: bool = True) -> Mamba2ForCausalLM:
    width, layers, heads = SHAPES[shape]
    config = Mamba2Config(
        hidden_size=width, num_hidden_layers=layers, num_heads=heads, n_groups=1, vocab_size=50288,
        tie_word_embeddings=tied, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return Mamba2ForCausalLM(config).to(dtype).eval()


def floor_ms(model: Mamba2ForCausalLM, case: Case, bandwidth: float) -> float:
    """Weights once, states in and out, as if they were written at every step."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states = config.num_hidden_layers * config.num_heads * config.head_dim * config.state_size * case.batch
    return (weights + 2 * states * case.state.itemsize) / bandwidth * 1e3


def measure_bandwidth() -> float:
    """Bytes a second of a copy, both ways counted."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source), 20) * 1e3


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds on the GPU."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def wall(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def per_token(generate: Callable[[int], Any], short: int = SHORT, long: int = LONG) -> float:
    """Milliseconds of a further token."""
    generate(short)
    times = [(wall(lambda: generate(long)) - wall(lambda: generate(short))) / (long - short) for _ in range(3)]
    return statistics.median(times)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.no_grad()
def decode(case: Case, bandwidth: float, impls: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of one case."""
    model = new_model(case.shape)
    ids = torch.randint(1, model.config.vocab_size, (case.batch, 24), device="cuda")
    floor = floor_ms(model, case, bandwidth)

    def cache(**options: Any) -> Mamba2Cache:
        return Mamba2Cache(model.config, state_dtype=case.state, captured=True, **options)

    def generate(tokens: int, held: Mamba2Cache | None = None, **options: Any) -> Any:
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        return model.generate(ids, do_sample=False, past_key_values=held or cache(), **lengths, **options)

    out = generate(8, return_dict_in_generate=True, output_logits=True)
    whole = model(out.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    error = relative(torch.stack(out.logits, 1), whole)
    if not (error < TOLERANCE and out.past_key_values.graph.is_captured):
        raise ArithmeticError(f"{case.name}: logits are off by {error:.3f}, {out.past_key_values.graph.reason}")
    del whole
    torch.cuda.reset_peak_memory_stats()
    held, token = out.past_key_values, ids[:, :1]
    row = {"case": case.name, "impl": OURS, "floor_ms": floor, "error": error}
    held.graph.step(lambda _: None, token, held)
    yield row | {"what": "replay", "ms": timed(held.graph._graph.replay, 30), "memory_gib": peak()}
    if held.layers[0].clock is not None:
        del held, out
        held = cache(defer_writes=False)
        generate(4, held)
        yield row | {"what": "replay, writing", "ms": timed(held.graph._graph.replay, 30), "memory_gib": peak()}
    held = out = None
    yield row | {"what": "generate", "ms": per_token(generate), "memory_gib": peak()}
    yield row | {"what": "first 8 tokens", "ms": wall(lambda: generate(8)), "memory_gib": peak()}
    step = DecodeGraph.step

    def still(self: DecodeGraph, run: Any, ids: torch.Tensor, held: Mamba2Cache) -> tuple[torch.Tensor, ...]:
        if not self.is_captured:
            return step(self, run, ids, held)
        held.advance(1)
        return self._outputs

    try:
        DecodeGraph.step = still
        yield row | {"what": "loop", "ms": per_token(generate), "memory_gib": peak()}
    finally:
        DecodeGraph.step = step
    for impl in impls:
        other, row = peer(impl, model).eval(), row | {"impl": impl, "what": "generate"}
        lengths = (4, 10) if impl == STOCK else (SHORT, LONG)  # stock steps are slow
        try:
            agree = relative(other(ids).logits.float(), model(ids).logits)
            if not agree < TOLERANCE:
                raise ArithmeticError(f"{case.name}: {impl}'s logits are off by {agree:.3f}")
            torch.cuda.reset_peak_memory_stats()
            ms = per_token(
                lambda n, other=other: other.generate(ids, do_sample=False, max_new_tokens=n, min_new_tokens=n),
                *lengths,
            )
        except torch.OutOfMemoryError:
            agree = ms = None
        yield row | {"ms": ms, "memory_gib": peak(), "error": agree}


@torch.no_grad()
def prefill(shape: str, tokens: int, impls: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of one long prompt."""
    model = new_model(shape)
    ids = torch.randint(1, model.config.vocab_size, (1, tokens), device="cuda")
    models = {OURS: model} | {impl: peer(impl, model).eval() for impl in impls}
    expected = model(ids[:, :2048], logits_to_keep=1).logits
    for impl, tried in models.items():
        row = {"case": f"prefill_{shape}_1x{tokens}", "impl": impl, "what": "prefill", "floor_ms": None}
        error = relative(tried(ids[:, :2048], logits_to_keep=1).logits, expected)
        if not error < TOLERANCE:
            raise ArithmeticError(f"prefill: {impl}'s logits are off by {error:.3f}")
        torch.cuda.reset_peak_memory_stats()
        try:
            ms = timed(lambda tried=tried: tried(ids, logits_to_keep=1, use_cache=True), 5)
        except torch.OutOfMemoryError:
            ms = None
        yield row | {"ms": ms, "memory_gib": peak(), "error": error}


def repeat(model: Mamba2ForCausalLM) -> None:
    """Makes a model write texts that repeat every ``PERIOD`` tokens: each token has another as its successor, whose
    output row is its embedding, and embeddings weigh half as much in the last hidden state as what the layers add.
    """
    embeddings, vocabulary = model.backbone.embeddings.weight, model.config.vocab_size
    ids = torch.randint(1, vocabulary, (1, 64), device="cuda")
    streams = model.backbone(ids, use_cache=False, output_hidden_states=True).hidden_states
    last = model.backbone.layers[-1](streams[-1])
    added = (last - streams[0]).float().norm() / streams[0].float().norm()
    cycles = torch.randperm(vocabulary, device="cuda")[: vocabulary // PERIOD * PERIOD].view(-1, PERIOD)
    head = torch.empty_like(embeddings).normal_(std=float(embeddings.float().std()))
    head[cycles.roll(-1, 1)] = embeddings[cycles]
    embeddings.mul_(added / 2)
    model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)


@torch.no_grad()
def prompts(model: Mamba2ForCausalLM, rows: int, repeats: bool) -> torch.Tensor:
    """Texts ``(rows, T)`` of the same tokens twice, with which the model goes on, or does not."""
    torch.manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (rows, PERIOD), device="cuda")
    if repeats:
        repeat(model)
        ids = model.generate(ids[:, :1], do_sample=False, max_new_tokens=PERIOD - 1)
    return torch.cat([ids, ids], 1)


@torch.no_grad()
def speculate(shape: str, rows: int) -> Iterator[dict[str, Any]]:
    """Rows of one batch by steps and with drafts."""
    look = {"prompt_lookup_num_tokens": DRAFT}
    for repeats in (True, False):
        model = new_model(shape, torch.float32, tied=False)
        others = share_of_others(model, prompts(model, rows, repeats), look)
        if others:
            raise ArithmeticError(f"{others:.3f} of the tokens are others with drafts, in fp32")
        del model
        torch.cuda.empty_cache()
        model = new_model(shape, tied=False)
        ids = prompts(model, rows, repeats)

        def generate(tokens: int, model: Any = model, ids: torch.Tensor = ids, **options: Any) -> Any:
            return model.generate(ids, do_sample=False, max_new_tokens=tokens, **options)

        name = f"speculate_{shape}_b{rows}" + ("" if repeats else ", drafts wrong")
        row = {"case": name, "impl": OURS, "floor_ms": None, "error": share_of_others(model, ids, look)}
        torch.cuda.reset_peak_memory_stats()
        yield row | {"what": "generate", "ms": per_token(generate), "memory_gib": peak()}
        torch.cuda.reset_peak_memory_stats()
        a_block = LONG / blocks(lambda run=generate: run(LONG, **look))
        lengths = (4 * LONG, 12 * LONG) if repeats else (LONG, 3 * LONG)  # captures take as long as many right blocks
        ms = per_token(lambda tokens, run=generate: run(tokens, **look), *lengths)
        yield row | {"what": f"lookup, {a_block:.1f} a block", "ms": ms, "memory_gib": peak()}
        del model, generate
        torch.cuda.empty_cache()


def share_of_others(model: Mamba2ForCausalLM, ids: torch.Tensor, options: dict[str, Any], tokens: int = 48) -> float:
    """How many of the tokens are others with these options."""
    plain, other = (model.generate(ids, do_sample=False, max_new_tokens=tokens, **more) for more in ({}, options))
    return float((plain != other).sum() / (len(ids) * tokens))


def blocks(run: Callable[[], Any]) -> int:
    """How many blocks it verifies."""
    crop, counted = Mamba2Cache.crop, []
    Mamba2Cache.crop = lambda self, tokens: counted.append(1) or crop(self, tokens)
    try:
        run()
    finally:
        Mamba2Cache.crop = crop
    return len(counted)


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="part of the names of the cases to time")
    parser.add_argument("--no-peer", action="store_true", help="leave the others out")
    parser.add_argument("--out", type=Path, help="CSV to write")
    options = parser.parse_args()
    bandwidth, impls = measure_bandwidth(), [] if options.no_peer else peers()
    about = {
        "device": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}"
        + "".join(f", {name}" for name in installed()),
    }
    print(f"copy {bandwidth / 1e12:.2f} TB/s; {about}", flush=True)
    jobs = [(case.name, lambda case=case: decode(case, bandwidth, impls)) for case in CASES]
    jobs.append(("speculate_2.7b_b16", lambda: speculate("2.7b", 16)))
    jobs.append(("prefill_130m_1x131072", lambda: prefill("130m", 131072, impls)))
    rows = []
    for name, job in jobs:
        if options.cases not in name:
            continue
        for row in job():
            ms, floor = row["ms"], row["floor_ms"]
            rows.append(row | {"over_floor": ms / floor if ms and floor else None} | about)
            print(*(rows[-1].get(field) for field in FIELDS[:8]), flush=True)
            write_csv(options.out, FIELDS, rows)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
