"""Rows of bench_distributed.py: reading a prompt and decoding with a model that all GPUs share, beside one GPU.

Two layers in fp32 have to write the same tokens first, else the script stops.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from mamba2_hf import Mamba2Config, Mamba2ForCausalLM
from mamba2_hf.distributed import tensor_parallel

SIZES = {"vocab_size": 50288, "hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80}
TINY = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16}
SHORT, LONG = 8, 72  # new tokens, of which the first ones are no steps
REPLAYS = 50  # of a captured step, one after another


def tensor_rows(run: Any, tiny: bool, limit: float) -> Iterator[dict[str, Any]]:
    """A row for each batch of one GPU, then of all of them.

    Args:
        run: the processes: device, rank, world, ``say``, ``sync``, ``largest`` and ``release``.
        tiny: whether to run toy sizes.
        limit: seconds since ``run.started`` after which no row is begun.
    """
    sizes = TINY if tiny else SIZES
    name, prompt = ("tiny", 64) if tiny else ("2.7B", 32768)
    check_tokens(run, sizes)
    alone: dict[str, float] = {}
    for impl in ("one", "tp") if run.world > 1 else ("one",):
        model = build(run, sizes).to(torch.bfloat16)
        model = share(run, model) if impl == "tp" else model
        for case, batch, length in (
            (f"{name} decode", 1, 128),
            (f"{name} decode", 64, 128),
            (f"{name} prompt", 1, prompt),
        ):
            if run.largest(time.perf_counter() - run.started) > limit:
                return
            ids = tokens(run, sizes, batch, length)
            times, note = decode(run, model, ids) if case.endswith("decode") else read(run, model, ids)
            p20, _, _, p80 = statistics.quantiles(times, n=5)
            p20, p50, p80 = (run.largest(value) for value in (p20, statistics.median(times), p80))
            key = f"{case} {batch}"
            alone.setdefault(key, p50)
            new = batch if case.endswith("decode") else batch * length
            yield {
                **{"gpus": run.world if impl == "tp" else 1, "case": case, "impl": impl, "batch": batch},
                **{"length": length, "ms_p20": f"{p20:.3f}", "ms_p50": f"{p50:.3f}", "ms_p80": f"{p80:.3f}"},
                **{"tokens_per_s": f"{1e3 * new / p50:.0f}", "to_one_gpu": f"{p50 / alone[key]:.3f}", "note": note},
            }
        del model
        run.release()


def build(run: Any, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    shared = {"head_dim": 64, "n_groups": 1, "state_size": 128, "tie_word_embeddings": True}
    with run.device:
        return Mamba2ForCausalLM(Mamba2Config(**{**shared, **sizes})).eval()


def share(run: Any, model: Any) -> Any:
    return tensor_parallel(model, init_device_mesh(run.device.type, (run.world,), mesh_dim_names=("tp",)))


def tokens(run: Any, sizes: dict[str, Any], batch: int, length: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.randint(3, sizes["vocab_size"], (batch, length), generator=source).to(run.device)


def check_tokens(run: Any, sizes: dict[str, Any]) -> None:
    """Stops unless all processes together write what one does, in fp32."""
    torch.set_float32_matmul_precision("highest")
    model = build(run, {**sizes, "num_hidden_layers": 2})
    ids = tokens(run, sizes, 3, 50)
    expected = generate(model, ids, 64)[0]
    found = generate(share(run, model), ids, 64)[0]
    if not torch.equal(found, expected):
        different = int((found != expected).sum())
        raise SystemExit(f"tokens of a shared model: {different} are not those of one process; nothing is timed")
    run.say("tokens of a shared model in fp32: those of one process")
    run.release()


def generate(model: Any, ids: torch.Tensor, new: int) -> tuple[torch.Tensor, Any]:
    """Tokens, and the cache, which a graph of the steps writes."""
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return out.sequences, out.past_key_values


def decode(run: Any, model: Any, ids: torch.Tensor) -> tuple[list[float], str]:
    """Milliseconds of a further token, and how it was run: with the GPU's part of it, if that is a graph."""
    cache, times = generate(model, ids, SHORT)[1], []
    for _ in range(3):
        long, short = (wall(run, lambda new=new: generate(model, ids, new)) for new in (LONG, SHORT))
        times.append((long - short) / (LONG - SHORT))
    graph = cache.graph
    if graph is None or not graph.is_captured:
        return times, "called" if graph is None else f"called: {graph.reason}"
    replays = wall(run, lambda: [graph._graph.replay() for _ in range(REPLAYS)]) / REPLAYS
    return times, f"captured, {run.largest(replays):.3f} ms a replay"


def read(run: Any, model: Any, ids: torch.Tensor) -> tuple[list[float], str]:
    """Milliseconds of a prompt."""

    def once() -> None:
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)

    once()
    return [wall(run, once) for _ in range(5)], ""


def wall(run: Any, once: Callable[[], Any]) -> float:
    run.sync()
    start = time.perf_counter()
    once()
    run.sync()
    return 1e3 * (time.perf_counter() - start)
