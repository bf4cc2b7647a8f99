"""Writes the tables of README.md and docs/ from the CSVs in benchmarks/results.

    python benchmarks/render_numbers.py            # rewrites what stands between <!-- table: NAME --> and <!-- end -->
    python benchmarks/render_numbers.py --check    # exits with 1 and names the tables that differ

Nothing is typed by hand there: a number is a cell of a result file, or a ratio of two.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS, GRAPH, PEER, STOCK = "mamba2_hf", "mamba2_hf, graph", "mamba_ssm", "transformers"
DROP_IN = "transformers on mamba2_hf"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@cache
def results(name: str) -> list[dict[str, str]]:
    """Rows of a result file."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def cell(name: str, column: str, **where: str) -> float | None:
    """The number in the first row whose columns have these values; None if there is none."""
    for row in results(name):
        if all(row[key] == value for key, value in where.items()) and row[column]:
            return float(row[column])
    return None


def number(value: float | None, digits: int = 3) -> str:
    """A number in so many digits, empty for None."""
    if value is None:
        return ""
    if value >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}"


def times(slower: float | None, faster: float | None) -> str:
    """How many times as long, ``2.1x``."""
    return "" if slower is None or faster is None else f"{slower / faster:.1f}x"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines) + "\n"


def ops() -> str:
    """Scans beside mamba_ssm's, and our other ops."""
    cases = {
        "ssd_fwd_H80_8x4096": "SSD forward, 80 heads, P 64, N 128, 8 x 4096 tokens",
        "ssd_fwd_H80_1x131072": "SSD forward, 1 x 131072",
        "ssd_fwd_H128_G8_4x8192": "SSD forward, 128 heads in 8 groups, 4 x 8192",
        "ssd_fwd_H80_1x2048": "SSD forward, 80 heads, 1 x 2048",
        "ssd_fwdbwd_H80_8x4096": "SSD forward and backward, 8 x 4096",
        "ssd_fwdbwd_H80_1x131072": "SSD forward and backward, 1 x 131072",
        "ssd_fwdbwd_H128_G8_4x8192": "SSD forward and backward, 128 heads in 8 groups, 4 x 8192",
        "ssd_fwdbwd_H24_16x2048": "SSD forward and backward, 24 heads, 16 x 2048",
        "mixer_fwdbwd_H80_8x2048": "Convolution, SSD and norm, forward and backward, 80 heads, 8 x 2048",
        "mixer_fwdbwd_H24_16x2048": "the same, 24 heads, 16 x 2048",
        "ssd_fwd_N256_4x4096": "SSD forward, 48 heads, N 256, 4 x 4096",
        "ssd_fwdbwd_P128_4x4096": "SSD forward and backward, 32 heads, P 128, 4 x 4096",
        "step_256_float32": "One step of 256 sequences, 80 heads, fp32 state",
    }
    rows = []
    for case, title in cases.items():
        found = [cell("ops", "ms_p50", case=case, impl=impl) for impl in (OURS, GRAPH, PEER)]
        rows.append((title, *(number(value, 4) for value in found), times(found[2], found[0])))
    return table(("median ms", "mamba2-hf", "as a CUDA graph", "mamba_ssm", ""), rows)


def decode() -> str:
    """Milliseconds a token."""
    sizes = {"130m_b1": "130M, one sequence", "2.7b_b1": "2.7B, one sequence"}
    for batch in (4, 8, 16, 64, 256):
        sizes[f"2.7b_b{batch}"] = f"2.7B, {batch} sequences"
        if batch >= 16:
            sizes[f"2.7b_b{batch}_bf16_state"] = f"2.7B, {batch} sequences, states in bf16"
    rows = []
    for size, title in sizes.items():
        where = {"case": f"decode_{size}"}
        ways = ("replay", "replay, writing", "generate", "loop")
        ours = [cell("generate", "ms", impl=OURS, what=what, **where) for what in ways]
        peers = [cell("generate", "ms", impl=impl, what="generate", **where) for impl in (PEER, STOCK)]
        floor = cell("generate", "floor_ms", impl=OURS, what="replay", **where)
        rows.append((title, *(number(value) for value in (*ours, *peers, floor))))
    header = ("ms a token", "the captured step", "with states written every time", "through `generate`")
    return table((*header, "of that, transformers' loop", "mamba_ssm's model", "transformers' model", "floor"), rows)


def state_dtypes() -> str:
    """Losses of the shipped models by the dtype of their states, far into a text."""
    titles = {
        "fp32": "fp32",
        "bf16": "bf16, written at every step",
        "bf16, deferred": "bf16, written once in 16 tokens",
    }
    rows = []
    for model in dict.fromkeys(row["model"] for row in results("state_losses")):
        last = max((row for row in results("state_losses") if row["model"] == model), key=lambda row: int(row["to"]))[
            "to"
        ]
        for states, title in titles.items():
            found = [
                cell("state_losses", column, model=model, states=states, to=last)
                for column in ("loss", "more", "kl", "state_error")
            ]
            more = ["" if states == "fp32" else f"{value:.1e}" for value in found[1:] if value is not None]
            rows.append((f"{model}, {title}", number(found[0], 4), *more))
    return table(("states", "loss", "more than in fp32", "KL from fp32", "error of the states"), rows)


def prefill() -> str:
    """A long prompt."""
    names = {
        OURS: "mamba2-hf",
        PEER: "mamba_ssm's model",
        STOCK: "transformers' model, with the kernels of both packages",
    }
    where = {"case": "prefill_130m_1x131072", "what": "prefill"}
    ours = cell("generate", "ms", impl=OURS, **where)
    rows = []
    for impl, title in names.items():
        ms, memory = (cell("generate", column, impl=impl, **where) for column in ("ms", "memory_gib"))
        rate = None if ms is None else 131.072 / ms
        rows.append((title, number(ms), times(ms, ours), number(rate), number(memory)))
    return table(("", "ms", "", "million tokens a second", "GiB at the peak"), rows)


def training() -> str:
    """A training step."""
    cases = {
        "step_130M_16x2048": "130M, 16 x 2048 tokens",
        "step_780M_4x2048": "780M, 4 x 2048",
        "lora_780M_4x2048": "780M, LoRA of rank 16 on every linear layer, packed documents",
    }
    rows = []
    for case, title in cases.items():
        cells = []
        for impl in (OURS, f"{OURS}, checkpointing", STOCK, PEER):
            ms, memory = (cell("training", column, case=case, impl=impl) for column in ("ms_p50", "peak_gib"))
            cells.append("" if ms is None else f"{number(ms)} ms, {number(memory)} GiB")
        ours = cell("training", "ms_p50", case=case, impl=OURS)
        found = [cell("training", "ms_p50", case=case, impl=impl) for impl in (STOCK, PEER)]
        peers = [value for value in found if value is not None]
        floor = cell("training", "floor_ms", case=case, impl=OURS)
        rows.append((title, *cells, times(min(peers), ours), number(floor)))
    header = ("", "mamba2-hf", "with checkpointing", "transformers", "mamba_ssm", "faster than either")
    return table((*header, "products alone, ms"), rows)


def batching() -> str:
    """Tokens a second of continuous batches."""
    rows = []
    for case, title in {
        "130m_greedy": "130M, greedy",
        "130m_sampled": "130M, sampled (temperature, top-k, top-p)",
        "2.7b_greedy": "2.7B, greedy",
        "2.7b_sampled": "2.7B, sampled",
    }.items():
        where = {"case": f"{case}_16_slots"}
        found = [
            cell("batching", "tokens_per_s", impl=impl, **where) for impl in ("captured", "uncaptured", "generate")
        ]
        step = cell("batching", "step_ms", impl="captured", **where)
        captured = f"{number(found[0])} ({times(found[0], found[2])})"
        rows.append((title, captured, number(found[1]), number(found[2]), number(step)))
    header = ("tokens a second", "captured", "called from Python", "`generate`, one request after the other")
    return table((*header, "ms a step"), rows)


def prefixes() -> str:
    """Tokens a second of requests that begin alike."""
    rows = []
    for impl, title in {"no_cache": "none", "prefix_cache": "of 32 states"}.items():
        found = [cell("batching_prefix", column, impl=impl) for column in ("tokens_per_s", "over_generate", "read")]
        rows.append((title, f"{number(found[0])} ({float(found[1]):.2f}x)", f"{int(found[2]):,}"))
    return table(("prefix cache", "tokens a second", "tokens read"), rows)


def hybrids() -> str:
    """Published hybrids' shapes."""
    titles = {
        "bamba_1.9b": "Bamba 1.9B, 24 layers, 2 of attention",
        "nemotron_h_2.4b": "Nemotron-H 2.4B, 11 SSD, 10 MLP, 2 attention",
        "granite_4_h_3.7b": "Granite 4 H 3.7B, 64 experts, 6 used",
        "falcon_h1_1.5b": "Falcon-H1 1.5B, SSD beside attention, N 256",
        "zamba2_1.2b": "Zamba2 1.2B, a shared block",
    }
    rows = []
    for name, title in titles.items():
        parts = (("training_4x2048", OURS), ("prefill_1x32768", OURS), ("decode_b1", GRAPH), ("decode_b16", GRAPH))
        found = [cell("hybrid_families", "ms_p50", case=f"{name}_{part}", impl=impl) for part, impl in parts]
        if any(value is not None for value in found):
            rows.append((title, *map(number, found)))
    header = ("ms", "training step, 4 x 2048", "prefill, 1 x 32768", "a token, one sequence", "a token, 16 sequences")
    return table(header, rows)


def drop_in() -> str:
    """transformers' hybrids on whoever's kernels, and ours."""
    titles = {"bamba_1.9b": "Bamba 1.9B", "granite_4_h_3.7b": "Granite 4 H 3.7B", "falcon_h1_1.5b": "Falcon-H1 1.5B"}
    parts = {
        "training_4x2048": ("training step, 4 x 2048", OURS),
        "prefill_1x32768": ("prefill, 1 x 32768", OURS),
        "decode_b1": ("a token", GRAPH),
        "decode_b16": ("a token, 16 sequences", GRAPH),
    }
    rows = []
    for name, title in titles.items():
        for part, (what, own) in parts.items():
            impls = (STOCK, DROP_IN, own)
            found = [cell("drop_in", "ms_p50", case=f"{name}_{part}", impl=impl) for impl in impls]
            if found[0] is not None:
                rows.append((f"{title}, {what}", *map(number, found)))
    header = ["ms", "mamba_ssm and causal_conv1d", "`use_with_transformers()`", "this package's class"]
    filled = [column for column in range(4) if any(row[column] for row in rows)]  # what has been measured
    return table([header[column] for column in filled], [[row[column] for column in filled] for row in rows])


def caches() -> str:
    """What caches of one sequence hold."""
    rows = []
    for tokens in ("2048", "32768", "131072"):
        kinds = ("pure", "hybrid", "attention")
        rows.append(
            (tokens, *(number(cell("hybrid", "cache_mib", case=f"cache_{tokens}_{kind}"), 4) for kind in kinds))
        )
    return table(("MiB at so many tokens", "pure", "hybrid, 6 of 64 layers attention", "64 layers of attention"), rows)


def distributed() -> str:
    """Training steps of one process, in DDP and under FSDP2."""
    rows = []
    for row in results("distributed"):
        shape = f"{row['case']}, {row['batch']} x {row['length']} a GPU"
        if row["peak_gib"] and row["to_one_gpu"]:
            values = (number(float(row[column])) for column in ("ms_p50", "to_one_gpu", "peak_gib"))
            rows.append((shape, row["impl"], row["gpus"], *values))
    return table(("", "", "GPUs", "ms a step", "to one GPU", "GiB at the peak"), rows)


def shared() -> str:
    """Prompts and tokens of a model that several GPUs share."""
    rows = []
    for row in results("distributed"):
        if row["impl"] in ("one", "tp") and not row["peak_gib"] and row["ms_p50"]:
            what = "a token" if row["case"].endswith("decode") else f"a prompt of {row['length']}"
            values = (number(float(row[column])) for column in ("ms_p50", "to_one_gpu"))
            rows.append((f"{row['case'].split()[0]}, {what}", row["batch"], row["gpus"], *values))
    return table(("", "sequences", "GPUs", "ms", "to one GPU"), rows)


def context() -> str:
    """Training on one long sequence."""
    rows = []
    for row in results("context"):
        values = (number(float(row[column])) for column in ("ms", "times_faster", "peak_gib"))
        rows.append((row["case"].split(",")[0], row["tokens"], row["processes"], *values))
    return table(("", "tokens", "GPUs", "ms a step", "times as fast a token", "GiB at the peak"), rows)


def scaling() -> str:
    """What more GPUs are predicted to take."""
    rows = []
    for row in results("scaling"):
        values = (number(float(row[name])) for name in ("mb_a_gpu", "communication_ms", "compute_ms", "predicted_ms"))
        rows.append((row["what"], row["gpus"], *values, row["efficiency"], row["measured_ms"]))
    header = ("", "GPUs", "MB a GPU", "communication, ms", "compute, ms", "predicted, ms", "of ideal", "measured, ms")
    return table(header, rows)


def cpu() -> str:
    """A CPU."""
    rows = []
    for case, title in {
        "prefill, 1024 tokens": "Prefill, 1024 tokens",
        "decode, per token after 64": "Decode, a token",
        "training step, 512 tokens": "Training step, 512 tokens",
    }.items():
        found = [cell("cpu_vs_transformers", "p50_ms", case=case, implementation=impl) for impl in (STOCK, "mamba2-hf")]
        memory = cell("cpu_vs_transformers", "memory_ratio", case=case, implementation="mamba2-hf")
        rows.append((title, *(number(value) for value in found), times(*found), f"{number(memory, 2)}x"))
    return table(("ms", "transformers", "mamba2-hf", "faster", "memory over the weights"), rows)


def tiny() -> str:
    """The models that ship, and a Transformer."""
    rows = [
        (f"`--kind {row['kind']}`: {row['title']}", row["nats_per_token"], row["bits_per_byte"], row["minutes"])
        for row in results("tiny_models")
    ]
    return table(("", "nats per token", "bits per byte", "minutes"), rows)


def front() -> str:
    """The front page's rows."""

    def row(title: str, ours: float | None, peer: float | None, stock: float | None) -> tuple[str, ...]:
        return title, number(ours), times(peer, ours), times(stock, ours)

    def generate(case: str, impl: str, what: str) -> float | None:
        return cell("generate", "ms", case=case, impl=impl, what=what)

    scan, step = "ssd_fwd_H80_8x4096", "step_780M_4x2048"
    long, one = ("prefill_130m_1x131072", "prefill"), ("decode_2.7b_b1", "generate")
    found = {
        "SSD scan, 80 heads, 8 x 4096 tokens": [cell("ops", "ms_p50", case=scan, impl=i) for i in (OURS, PEER)]
        + [None],
        "Decoding 2.7B, a token": [generate(one[0], i, one[1]) for i in (OURS, PEER, STOCK)],
        "Training step, 780M, 4 x 2048": [cell("training", "ms_p50", case=step, impl=i) for i in (OURS, PEER, STOCK)],
        "Prefill, 130M, 131072 tokens": [generate(long[0], i, long[1]) for i in (OURS, PEER, STOCK)],
    }
    rows = [row(title, *values) for title, values in found.items()]
    two = {"case": "1.3B, over 2"}
    gain = number(cell("context", "times_faster", **two))
    title = f"Training step, 1.3B, 131072 tokens in a row, on two GPUs ({gain}x one)"
    rows.append((title, number(cell("context", "ms", **two)), "", ""))
    return table(("", "ms", "faster than mamba_ssm", "than transformers with its kernels"), rows)


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        *(front, ops, decode, state_dtypes, prefill, training, batching, prefixes, hybrids, drop_in, caches),
        *(distributed, shared, context, scaling, cpu, tiny),
    )
}  # fmt: skip


def pages() -> list[Path]:
    """Files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rendered(text: str) -> str:
    """``text`` with every table anew."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table differs")
    options = parser.parse_args()
    stale = []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            stale.append(str(page.relative_to(ROOT)))
            if not options.check:
                page.write_text(after, encoding="utf-8")
    if options.check and stale:
        sys.exit(
            f"tables differ from benchmarks/results in {', '.join(stale)}: run python benchmarks/render_numbers.py"
        )


if __name__ == "__main__":
    main()
