"""What the dtype of SSM states costs in loss: the models that ship in the package, over long texts that they write.

    python benchmarks/state_losses.py --out benchmarks/results/state_losses.csv          # on a GPU
    python benchmarks/state_losses.py --tokens 2000 --rows 2                             # on a CPU

With states in fp32 a model samples ``--rows`` texts of ``--tokens`` tokens from nothing but the first token. The same
tokens are fed, one by one, to caches whose states have 16 bits, written at every step or once in 16 tokens. Of every
thousand tokens: the mean loss with fp32 states and how much more it is, the KL divergence from the distribution with
fp32 states, and the share of tokens where another one is the likeliest; at the end the relative error of the states.

Where steps do not defer writes (off Hopper GPUs, and for few rows) that is done by hand: states are kept in fp32, and
those of the heads whose turn it is are rounded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from table import write_csv
from torch import Tensor
from transformers import AutoModelForCausalLM

from mamba2_hf import Mamba2Cache
from mamba2_hf.pretrained import SHIPPED, shipped_model_path

FIELDS = ["model", "states", "from", "to", "loss", "more", "kl", "other_first", "state_error", "rows", "device"]
BLOCK = 1000  # tokens of a row of the table
TURNS = 16  # tokens in which each head has its turn


class Variant:
    """A way to hold states, and how far it is from fp32 ones.

    Args:
        name: of it.
        model: to run.
        rows, tokens: of the texts.
        dtype: of the states; None for fp32.
        deferred: whether they are written once in some tokens.
    """

    def __init__(
        self, name: str, model: Any, rows: int, tokens: int, dtype: torch.dtype | None = None, deferred: bool = False
    ) -> None:
        self.name, self.model, self.dtype = name, model, dtype
        captured = model.device.type == "cuda"
        options = {"captured": captured, "max_length": tokens + 1, "defer_writes": deferred}
        first = torch.full((rows, 1), model.config.bos_token_id, device=model.device)
        self.cache = Mamba2Cache(model.config, state_dtype=dtype, **options)
        self.logits = model(first, past_key_values=self.cache).logits[:, -1].float()
        defers = any(layer.clock is not None for layer in self._states)
        self.by_hand = deferred and not defers
        if self.by_hand:
            self.cache = Mamba2Cache(model.config, **options)
            model(first, past_key_values=self.cache)
        self.sums = torch.zeros(3, dtype=torch.float64, device=model.device)  # loss, KL, others first

    @property
    def _states(self) -> list[Any]:
        return [layer for layer in self.cache.layers if hasattr(layer, "ssm_dtype")]

    def step(self, token: Tensor, count: int) -> None:
        """Feeds a token ``(rows, 1)``, the ``count``-th."""
        self.logits = self.model(token, past_key_values=self.cache).logits[:, -1].float()
        if self.by_hand:
            for layer in self._states:
                state = layer.ssm[:, TURNS - 1 - count % TURNS :: TURNS]
                state.copy_(state.to(self.dtype))

    def note(self, token: Tensor, exact: Tensor) -> None:
        """Compares what was predicted for the next ``token (rows, 1)`` with what fp32 states gave for it."""
        found, wanted = self.logits.log_softmax(-1), exact.log_softmax(-1)
        loss = -found.gather(1, token).mean()
        kl = F.kl_div(found, wanted, log_target=True, reduction="batchmean")
        other = (found.argmax(-1) != wanted.argmax(-1)).float().mean()
        self.sums += torch.stack([loss, kl, other]).double()

    def error(self, exact: Variant) -> float:
        """Of the states of all layers, relative to fp32 ones."""
        pairs = [(a.ssm.double(), b.ssm.double()) for a, b in zip(self._states, exact._states, strict=True)]
        return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


@torch.no_grad()
def measure(name: str, rows: int, tokens: int, device: str, weights: torch.dtype) -> Iterator[dict[str, Any]]:
    """Rows of one model."""
    model = AutoModelForCausalLM.from_pretrained(shipped_model_path(name), dtype=weights).eval().to(device)
    exact = Variant("fp32", model, rows, tokens)
    half = Variant("bf16", model, rows, tokens, torch.bfloat16)
    deferred = Variant("bf16, deferred", model, rows, tokens, torch.bfloat16, deferred=True)
    draw = torch.Generator(device).manual_seed(0)
    for count in range(tokens):
        token = torch.multinomial(exact.logits.softmax(-1), 1, generator=draw)
        for variant in (exact, half, deferred):
            variant.note(token, exact.logits)
        for variant in (half, deferred, exact):
            variant.step(token, count)
        if (count + 1) % BLOCK == 0 or count + 1 == tokens:
            of = count % BLOCK + 1
            base = float(exact.sums[0]) / of
            for variant in (exact, half, deferred):
                loss, kl, other = (variant.sums / of).tolist()
                yield {
                    **{"model": SHIPPED[name], "states": variant.name + (" by hand" if variant.by_hand else "")},
                    **{"from": count + 1 - of, "to": count + 1, "loss": loss, "more": loss - base, "kl": kl},
                    **{"other_first": other, "state_error": variant.error(exact), "rows": rows},
                }
                variant.sums.zero_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000, help="of each text")
    parser.add_argument("--rows", type=int, default=16, help="texts")
    parser.add_argument("--models", nargs="*", default=list(SHIPPED), help="which")
    parser.add_argument("--weights", default="bfloat16", help="dtype of the weights")
    parser.add_argument("--out", type=Path, help="CSV to write")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    rows = []
    for name in options.models:
        for row in measure(name, options.rows, options.tokens, device, getattr(torch, options.weights)):
            rows.append(row | about)
            print(*(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()), flush=True)
            write_csv(options.out, FIELDS, rows)


if __name__ == "__main__":
    main()
