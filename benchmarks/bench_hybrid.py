"""Times decoding of a hybrid beside a pure Mamba-2 of its shape, and weighs their caches beside attention's.

    python benchmarks/bench_hybrid.py --out benchmarks/results/hybrid.csv    # on a GPU, a few minutes
    python benchmarks/bench_hybrid.py --tiny --device cpu                    # every part, with sizes for a CPU
    python benchmarks/bench_hybrid.py --families --out benchmarks/results/hybrid_families.csv
    python benchmarks/bench_hybrid.py --families falcon --steps decode       # one of them, and one thing

Models of the 2.7B shape with random bf16 weights: ``pure`` has 64 layers of SSD, ``hybrid`` six of attention among
them. A ``decode`` row is one token of one sequence behind ``--context`` others, over a static cache, called from Python
and as a CUDA graph; it is timed only after its logits were found finite and equal to those of a forward over the whole
sequence. What an SSD layer takes follows from differences: in the pure model from 64 layers and from six, in the hybrid
from all of it and from its six layers of attention alone, so that 58 layers of SSD are left in both.

A ``cache`` row is what the buffers of a cache hold for so many tokens of one sequence, made in fact and weighed by the
allocator too. ``attention`` has 64 layers of the hybrid's attention, 20 heads that share 4 heads of keys and values.
The shortest cache is also filled with tokens, growing, and has to come out as large.

``--families`` times the shapes of ``hybrid_families.py`` instead: a training step of 4 x 2048 tokens (forward and
backward, no optimizer), ours also as a CUDA graph, the prefill of 32768 tokens, and decoding of 1 and 16 sequences
behind ``--context`` tokens. Beside ours stands transformers' own class, on the kernels of mamba_ssm and causal_conv1d
where these are installed, and on ours (``use_with_transformers``); its decoding is timed through ``generate``. Whose
kernels are called is looked up while each runs, printed, and has to be as its row says. Before that, models of few
layers of both are compared in fp32, with the same weights, with transformers' PyTorch functions; ``--few`` times such
ones too. The floor is matrix products alone at the rate of a large one, or, in decoding, reading the weights that a
step uses at the rate of a copy, both measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import inspect
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from hybrid_families import FAMILIES, Family, matrix_products
from peers import KERNELS, OURS, STOCK, installed, versions
from table import write_csv
from torch import Tensor
from transformers import StoppingCriteria

from mamba2_hf import (
    Mamba2Cache,
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2HybridConfig,
    Mamba2HybridForCausalLM,
    ops,
    use_with_transformers,
)
from mamba2_hf.training import CapturedStep

FIELDS = ("case", "impl", "ms_p20", "ms_p50", "ms_p80", "cache_mib", "floor_ms", "device", "versions")
GRAPH = "mamba2_hf, graph"
DROP_IN = "transformers on mamba2_hf"
OURS_OPS = "mamba2_hf.ops"
KERNEL_FUNCTIONS = (  # of transformers' modules, which take them from the packages where these are installed
    *("causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan", "mamba2_selective_state_update"),
    "mamba2_split_conv1d_scan_combined",
)
STEPS = 100
TOLERANCE = 5e-2  # of bf16 logits behind 64 layers, whose sums one form takes in another order


def pure_config(layers: int, tiny: bool) -> Mamba2Config:
    if tiny:
        return Mamba2Config(
            vocab_size=64, hidden_size=64, num_hidden_layers=layers, num_heads=8, head_dim=16, state_size=16, n_groups=1
        )
    return Mamba2Config(
        vocab_size=50288, hidden_size=2560, num_hidden_layers=layers, num_heads=80, head_dim=64, state_size=128,
        n_groups=1, tie_word_embeddings=True,
    )  # fmt: skip


def hybrid_config(tiny: bool, **changes: Any) -> Mamba2HybridConfig:
    sizes = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **changes}
    if tiny:
        small = {"hidden_size": 64, "ssm_num_heads": 8, "ssm_head_dim": 16, "ssm_state_size": 16, "vocab_size": 64}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 8}
        sizes = {**small, "layer_blocks": ["ssd", "attention", *["ssd"] * 5, "attention"], **sizes}
    return Mamba2HybridConfig.preset("2.7b", **sizes)


class Bench:
    """One run: models are made, checked, timed and let go one after the other."""

    def __init__(self, device: str, context: int, tiny: bool, out: Path | None) -> None:
        self.device, self.context, self.tiny, self.out = torch.device(device), context, tiny, out
        self.rows: list[dict[str, str]] = []
        self.attention_layers = hybrid_config(tiny).layer_blocks.count("attention")
        self.layers = hybrid_config(tiny).num_hidden_layers

    def models(self) -> dict[str, Any]:
        few = self.attention_layers
        return {
            "pure": pure_config(self.layers, self.tiny),
            f"pure_{few}_layers": pure_config(few, self.tiny),
            "hybrid": hybrid_config(self.tiny),
            f"attention_{few}_layers": self.only_attention(few),
        }

    def only_attention(self, layers: int) -> Mamba2HybridConfig:
        return hybrid_config(self.tiny, num_hidden_layers=layers, layer_blocks=["attention"] * layers)

    def make(self, config: Any) -> Any:
        torch.manual_seed(0)
        cls = Mamba2ForCausalLM if isinstance(config, Mamba2Config) else Mamba2HybridForCausalLM
        with torch.device(self.device):
            return cls(config).to(torch.bfloat16).eval()

    @torch.no_grad()
    def decode(self) -> None:
        medians: dict[str, dict[str, float]] = {}
        for name, config in self.models().items():
            model = self.make(config)
            for impl, step in self.steps(name, model):
                times = self.timed(step)
                medians.setdefault(impl, {})[name] = times[1]
                self.row(f"decode_{name}", impl, times)
            del model, step
            self.tidy()
        few, rest = self.attention_layers, self.layers - self.attention_layers
        for impl, found in medians.items():
            for name, base in (("pure", f"pure_{few}_layers"), ("hybrid", f"attention_{few}_layers")):
                each = (found[name] - found[base]) / rest
                self.row(f"ssd_layer_of_{name}", impl, (None, each, None))

    def steps(self, name: str, model: Any, ids: Tensor | None = None) -> list[tuple[str, Callable[[], Any]]]:
        """Ways to decode one more token behind ``ids (B, context + 1)``, each found right."""
        room = self.context + 8 * STEPS
        if ids is None:
            ids = torch.randint(model.config.vocab_size, (1, self.context + 1), device=self.device)
        expected = model(ids, use_cache=False, logits_to_keep=1).logits
        cache = Mamba2Cache(model.config, static=True, max_length=room)
        model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
        token = ids[:, -1:].clone()

        def step() -> Tensor:
            return model(token, past_key_values=cache).logits

        self.check(name, OURS, step(), expected)
        found = [(OURS, step)]
        if self.device.type == "cuda":
            graphed = Mamba2Cache(model.config, captured=True, max_length=room)
            model(ids[:, :-1], past_key_values=graphed, logits_to_keep=1)
            before = copy.deepcopy(graphed)
            for _ in range(2):  # kernels are built, then the step is captured
                model(token, past_key_values=graphed)
            restore(graphed, before)
            self.check(name, GRAPH, model(token, past_key_values=graphed).logits, expected)
            found.append((GRAPH, lambda: model(token, past_key_values=graphed)))
        return found

    def check(self, name: str, impl: str, logits: Tensor, expected: Tensor) -> None:
        """Raises for a wrong result: nothing wrong is timed."""
        error = ((logits - expected).float().norm() / expected.float().norm()).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"{name} {impl}: relative error {error} of the logits")
        print(f"{name} {impl}: relative error of the logits {error:.1e}", flush=True)

    def timed(self, step: Callable[[], Any], steps: int = STEPS) -> tuple[float, float, float]:
        """Milliseconds at 20, 50 and 80 % of the steps."""
        times = []
        for _ in range(max(steps // 5, 2)):
            step()
        self.wait()
        for _ in range(steps):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                step()
                end.record()
                times.append((start, end))
            else:
                begun = time.perf_counter()
                step()
                times.append(1e3 * (time.perf_counter() - begun))
        self.wait()
        taken = [pair if isinstance(pair, float) else pair[0].elapsed_time(pair[1]) for pair in times]
        return quantiles(taken)

    @torch.no_grad()
    def memory(self, lengths: list[int]) -> None:
        configs = {
            "pure": pure_config(self.layers, self.tiny),
            "hybrid": hybrid_config(self.tiny),
            "attention": self.only_attention(self.layers),
        }
        for name, config in configs.items():
            model = self.make(config)
            token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            model(token)  # what is made once for all calls
            for tokens in lengths:
                self.tidy()
                before = self.allocated()
                cache = Mamba2Cache(config, static=True, max_length=tokens)
                model(token, past_key_values=cache, logits_to_keep=1)
                self.tidy()
                held = self.allocated() - before
                if self.device.type == "cuda" and not 0.98 * cache.nbytes < held < 1.02 * cache.nbytes + 2**20:
                    raise RuntimeError(f"{name}: the cache says {cache.nbytes} bytes, the allocator {held}")
                if tokens == lengths[0]:
                    filled = model(token.expand(1, tokens), logits_to_keep=1).past_key_values
                    if not 0.99 * filled.nbytes < cache.nbytes < 1.01 * filled.nbytes:
                        raise RuntimeError(f"{name}: {filled.nbytes} bytes when filled, {cache.nbytes} when made")
                    del filled
                self.row(f"cache_{tokens}_{name}", OURS, (None, None, None), cache.nbytes / 2**20)
                del cache
            del model
            self.tidy()

    def row(
        self,
        case: str,
        impl: str,
        times: tuple[float | None, float | None, float | None],
        mib: float | None = None,
        floor: float | None = None,
    ) -> None:
        rest = ("" if value is None else f"{value:.2f}" for value in (mib, floor))
        values = (*("" if t is None else f"{t:.4f}" for t in times), *rest)
        found = f"torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}"
        found += versions() if impl == STOCK else ""
        self.rows.append(dict(zip(FIELDS, (case, impl, *values, self.device_name(), found), strict=True)))
        print(*[value for value in list(self.rows[-1].values())[:7] if value], flush=True)
        write_csv(self.out, FIELDS, self.rows)

    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def tidy(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


class Families(Bench):
    """Training, prefill and decoding of published hybrids' shapes."""

    def run(self, names: list[str], parts: list[str], few: bool, peers_only: bool) -> None:
        rate, copy_rate = self.rates()
        for name, family in FAMILIES.items():
            if names and not any(part in name for part in names):
                continue
            changes = family.few if self.tiny or few else {}
            self.compare(name, family)
            models = {OURS: self.make(family.ours(**changes))}
            with torch.device(self.device):
                models[DROP_IN] = family.stock_model(**changes).to(torch.bfloat16).eval()
            if len(installed()) == 2 and not self.tiny:
                models = {OURS: models[OURS], STOCK: models[DROP_IN], DROP_IN: models[DROP_IN]}
            products = matrix_products(models[OURS])
            for impl, model in models.items():
                if peers_only and impl == OURS:
                    continue
                use_with_transformers(undo=impl != DROP_IN)
                if "training" in parts:
                    self.training(name, impl, model, 1e3 * products * self.tokens(4, 2048) / rate)
                if "prefill" in parts:
                    self.prefill(name, impl, model, 1e3 * products / 3 * self.tokens(1, 32768) / rate)
                for batch in (1, 16) if "decode" in parts else ():
                    self.decoding(name, impl, model, batch, 1e3 * products / 3 / copy_rate)
            use_with_transformers(undo=True)
            del models, model
            self.tidy()

    def tokens(self, batch: int, length: int) -> int:
        return batch * (64 if self.tiny else length)

    def rates(self) -> tuple[float, float]:
        """Operations a second of a large product, and bytes a second of a copy."""
        size = 256 if self.tiny else 8192
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        product = self.timed(lambda: a @ b, 20)[1]
        source = torch.empty(2**20 if self.tiny else 2**30, device=self.device, dtype=torch.uint8)
        to = torch.empty_like(source)
        copied = self.timed(lambda: to.copy_(source), 20)[1]
        return 2e3 * size**3 / product, 2e3 * source.numel() / copied

    def compare(self, name: str, family: Family) -> None:
        """Raises unless few layers of ours, loaded from transformers' checkpoint, give the logits and losses of its
        PyTorch functions, and so do stock's on our ops, in training too.
        """
        torch.manual_seed(0)
        stock = family.stock_model(**family.few).eval()
        with tempfile.TemporaryDirectory() as folder:
            stock.save_pretrained(folder)
            ours = Mamba2HybridForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        stock, ours = stock.to(self.device), ours.to(self.device)
        ids = torch.randint(ours.config.vocab_size, (2, 300), device=self.device)
        with torch.no_grad():
            with on_pytorch(stock):
                expected = stock(ids, labels=ids, use_cache=False)
            found = ours(ids, labels=ids, use_cache=False)
            use_with_transformers()
            dropped = stock(ids, labels=ids, use_cache=False)
            trained = stock.train()(ids, labels=ids, use_cache=False)
            use_with_transformers(undo=True)
        for impl, out in ((OURS, found), (DROP_IN, dropped), (f"{DROP_IN}, training", trained)):
            error = ((out.logits - expected.logits).norm() / expected.logits.norm()).item()
            if not error < 1e-3 or abs(out.loss - expected.loss) > 1e-3:
                raise RuntimeError(f"{name} {impl}: relative error {error}, loss {out.loss} and {expected.loss}")
            print(f"{name} {impl}: relative error of few layers {error:.1e}", flush=True)

    def route(self, case: str, impl: str, run: Callable[[], Any]) -> None:
        """Prints whose kernels ``run`` calls, and raises if they are not those that a row of ``impl`` says."""
        called = set()

        def note(frame: Any, event: str, _: Any) -> None:
            if event == "call":
                called.add(frame.f_globals.get("__name__", ""))

        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(None)
        found = [name for name in (*KERNELS, OURS_OPS) if any(f"{module}.".startswith(f"{name}.") for module in called)]
        print(f"{case} {impl}: through {' and '.join(found)}", flush=True)
        if found != (list(KERNELS) if impl == STOCK else [OURS_OPS]):
            raise RuntimeError(f"{case} {impl}: called {found}")

    def training(self, name: str, impl: str, model: Any, floor: float) -> None:
        batch, length = (2, 64) if self.tiny else (4, 2048)
        ids = torch.randint(model.config.vocab_size, (batch, length), device=self.device)
        model.train()

        def step() -> Any:
            model.zero_grad(set_to_none=True)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            return loss.detach()  # what is left of the graph would tie gradients to this stream, and none be captured

        with on_pytorch(model), torch.no_grad():
            expected = model(input_ids=ids[:1, :300], labels=ids[:1, :300], use_cache=False).loss
        found = model(input_ids=ids[:1, :300], labels=ids[:1, :300], use_cache=False).loss.detach()
        if not abs(found - expected) < 2e-2 * expected or not torch.isfinite(step()):
            raise RuntimeError(f"{name} {impl}: loss {found}, on PyTorch {expected}")
        self.route(f"{name} training", impl, step)
        self.row(f"{name}_training_{batch}x{length}", impl, self.timed(step, 10), floor=floor)
        if impl == OURS:
            self.captured(f"{name}_training_{batch}x{length}", model, ids, step(), floor)
        model.eval()
        model.zero_grad(set_to_none=True)

    def captured(self, case: str, model: Any, ids: Tensor, expected: Tensor, floor: float) -> None:
        """The same step as a CUDA graph, where it can be one."""
        replay = CapturedStep(model)

        def step() -> Tensor:
            model.zero_grad(set_to_none=True)
            return replay(input_ids=ids, labels=ids, use_cache=False)

        for _ in range(4):
            found = step()
        if not abs(found - expected) < 1e-3 * expected:
            raise RuntimeError(f"{case}, captured: loss {found}, called from Python {expected}")
        if replay.graphs:
            self.row(case, f"{OURS}, captured", self.timed(step, 10), floor=floor)
        else:
            print(f"{case}: not captured, {replay.reason}", flush=True)

    @torch.no_grad()
    def prefill(self, name: str, impl: str, model: Any, floor: float) -> None:
        length = 256 if self.tiny else 32768
        ids = torch.randint(model.config.vocab_size, (1, length), device=self.device)

        def step() -> Tensor:
            return model(ids, use_cache=True, logits_to_keep=1).logits

        if not torch.isfinite(step()).all():
            raise RuntimeError(f"{name} {impl}: logits that are not finite")
        self.route(f"{name} prefill", impl, step)
        self.row(f"{name}_prefill_1x{length}", impl, self.timed(step, 5), floor=floor)
        self.tidy()

    @torch.no_grad()
    def decoding(self, name: str, impl: str, model: Any, batch: int, floor: float) -> None:
        ids = torch.randint(model.config.vocab_size, (batch, self.context + 1), device=self.device)
        case = f"{name}_decode_b{batch}"
        if impl != OURS:
            # PyTorch's attention by cuDNN makes a plan for each new number of keys, for 38 ms.
            self.route(f"{name} decode", impl, lambda: generated(model, ids, 32))
            self.row(case, impl, quantiles(generated(model, ids, 32)), floor=floor)
            return
        with model._optimize_model_for_decode():
            for impl, step in self.steps(case, model, ids):
                self.row(case, impl, self.timed(step), floor=floor)
        self.tidy()


def quantiles(taken: list[float]) -> tuple[float, float, float]:
    """What 20, 50 and 80 % are below."""
    cuts = statistics.quantiles(taken, n=10)
    return cuts[1], cuts[4], cuts[7]


def generated(model: Any, ids: Tensor, tokens: int) -> list[float]:
    """Milliseconds from one token of ``generate`` to the next, without the first few."""
    clock = Clock()
    model.generate(
        ids, max_new_tokens=tokens + 8, min_new_tokens=tokens + 8, do_sample=False, stopping_criteria=[clock]
    )
    return [1e3 * (later - sooner) for sooner, later in itertools.pairwise(clock.times[7:])]


class Clock(StoppingCriteria):
    """Notes when each token of ``generate`` was known, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def on_pytorch(model: Any) -> Iterator[None]:
    """Has a model, ours or transformers', call PyTorch's functions alone, whatever is installed."""
    module = sys.modules[type(model).__module__]
    replaced = {name: value for name, value in vars(module).items() if name in KERNEL_FUNCTIONS}
    vars(module).update({name: inspect.unwrap(value) for name, value in replaced.items()})
    try:
        with ops.use_backend("torch"):
            yield
    finally:
        vars(module).update(replaced)


def restore(cache: Mamba2Cache, saved: Mamba2Cache) -> None:
    """Puts a cache back, in the buffers that a graph knows."""
    for layer, source in zip(cache.layers, saved.layers, strict=True):
        for name, value in vars(source).items():
            if isinstance(value, Tensor):
                getattr(layer, name).copy_(value)
    if cache.key_counts is not None:
        cache.key_counts.lengths.copy_(saved.key_counts.lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--context", type=int, help="tokens before the one that is decoded [2048, and 64 if tiny]")
    parser.add_argument("--tiny", action="store_true", help="models of a few layers, for a look")
    parser.add_argument(
        "--families", nargs="*", help="time published hybrids' shapes, those whose name has one of these"
    )
    parts = ("training", "prefill", "decode")
    parser.add_argument("--steps", nargs="+", choices=parts, default=parts, help="what of them [all]")
    parser.add_argument("--peers-only", action="store_true", help="leave our own class out")
    parser.add_argument("--few", action="store_true", help="published hybrids' shapes with few layers")
    parser.add_argument("--out", type=Path, help="CSV to write")
    options = parser.parse_args()
    context = options.context or (64 if options.tiny else 2048)
    if options.families is not None:
        families = Families(options.device, context, options.tiny, options.out)
        families.run(options.families, options.steps, options.few, options.peers_only)
        return
    bench = Bench(options.device, context, options.tiny, options.out)
    bench.decode()
    bench.memory([64, 256] if options.tiny else [2048, 32768, 131072])


if __name__ == "__main__":
    main()
