"""Mamba-2 on one page of plain PyTorch: configuration, layer, forward in chunks, step and generation.

To be read beside the paper, "Transformers are SSMs" (Dao and Gu 2024, arXiv 2405.21060), and to be pasted. It loads the
tiny model that ships with this package, and any checkpoint that transformers calls ``mamba2``, a folder or a Hub id:

    python examples/minimal_mamba2.py "def f("
    python examples/minimal_mamba2.py "def f(" --model mistralai/Mamba-Codestral-7B-v0.1

Sizes: b sequences of t tokens with d channels; h heads of p channels with n numbers of state for each, in g groups that
share B and C; k taps of the convolution. Padding, packed documents and fast kernels are what the package is for; its
tests compare it with this page.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

SHIPPED = Path(__file__).parents[1] / "src" / "mamba2_hf" / "pretrained" / "mamba2-tiny-python"
State = tuple[Tensor, Tensor]  # of a layer: the last inputs of the convolution (b, c, k - 1), and S (b, h, p, n)


@dataclass
class Config:
    """What ``config.json`` says, with the defaults of transformers."""

    vocab_size: int = 32768
    hidden_size: int = 4096  # d
    num_hidden_layers: int = 64
    num_heads: int = 128  # h
    head_dim: int = 64  # p
    state_size: int = 128  # n
    n_groups: int = 8  # g
    conv_kernel: int = 4  # k
    chunk_size: int = 256
    layer_norm_epsilon: float = 1e-5
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    use_bias: bool = False
    use_conv_bias: bool = True
    tie_word_embeddings: bool = False

    @classmethod
    def read(cls, folder: Path) -> Config:
        infinity = {"object_hook": lambda found: float(found["__float__"]) if "__float__" in found else found}
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"), **infinity)
        return cls(**{field.name: found[field.name] for field in fields(cls) if field.name in found})


def segment_sums(a: Tensor) -> Tensor:
    """``(..., l)`` to ``(..., l, l)``: ``a_{j+1} + ... + a_i`` where ``i >= j``, else ``-inf`` (Listing 1: segsum)."""
    later = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).tril()
    return a[..., None].expand(*a.shape, a.shape[-1]).tril(-1).cumsum(-2).masked_fill(~later, -math.inf)


def ssd_chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, S: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The layer over whole sequences (Section 6, Listing 1): attention inside of chunks, states between them.

    Takes ``x (b, t, h, p)``, ``dt (b, t, h)``, ``A (h,)``, ``B, C (b, t, h, n)`` and the state before the first token,
    ``S (b, h, p, n)``. Returns y, shaped as x, and the state after the last token.
    """
    ys = []
    for x_, a, B_, C_ in zip(*(m.split(size, 1) for m in (x * dt[..., None], dt * A, B, C)), strict=True):
        a = a.mT  # (b, h, l) log decays
        from_start = a.cumsum(-1)
        L = torch.exp(segment_sums(a))  # the 1-semiseparable mask of Equation 16
        y = torch.einsum("bihn,bjhn,bhij,bjhp->bihp", C_, B_, L, x_)  # what tokens of the chunk give each other
        y = y + torch.einsum("bihn,bhpn,bhi->bihp", C_, S, from_start.exp())  # what came before the chunk
        to_end = torch.exp(from_start[..., -1:] - from_start)
        S = S * from_start[..., -1].exp()[..., None, None] + torch.einsum("bjhn,bhj,bjhp->bhpn", B_, to_end, x_)
        ys.append(y)
    return torch.cat(ys, 1), S


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The same for one token (t = 1), by the recurrence of Equation 2: ``S <- exp(dt A) S + dt x B^T``, ``y = S C``."""
    added = torch.einsum("bhp,bhn,bh->bhpn", x[:, 0], B[:, 0], dt[:, 0])
    S = torch.exp(dt[:, 0] * A)[..., None, None] * S + added
    return torch.einsum("bhpn,bhn->bhp", S, C[:, 0])[:, None], S


class RMSNorm(nn.Module):
    """Root mean square norm of each group of channels, after a gate where there is one."""

    def __init__(self, width: int, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.weight, self.eps, self.groups = nn.Parameter(torch.ones(width)), eps, groups

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * F.silu(gate)
        grouped = x.unflatten(-1, (self.groups, -1))
        return (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight


class Mamba2(nn.Module):
    """The block of Figure 6 (right): one projection for all, a short convolution, SSD, a gated norm, and out."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, heads = config, config.num_heads
        self.inner, self.maps = heads * config.head_dim, config.n_groups * config.state_size
        channels = self.inner + 2 * self.maps
        self.in_proj = nn.Linear(config.hidden_size, self.inner + channels + heads, bias=config.use_bias)
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels, bias=config.use_conv_bias)
        step = torch.exp(torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(self.inner, config.layer_norm_epsilon, config.n_groups)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=config.use_bias)

    def forward(self, u: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``(b, t, d)`` to the same, from the state before the first token (None: zeros) to that after the last."""
        c, (batch, tokens, _) = self.config, u.shape
        z, xBC, dt = self.in_proj(u).split([self.inner, self.inner + 2 * self.maps, c.num_heads], -1)
        if state is None:
            window = u.new_zeros(batch, xBC.shape[2], c.conv_kernel - 1)
            state = window, u.new_zeros(batch, c.num_heads, c.head_dim, c.state_size)
        xBC = torch.cat([state[0], xBC.mT], 2)
        window, xBC = xBC[..., tokens:], F.silu(self.conv1d(xBC).mT)
        x, B, C = xBC.split([self.inner, self.maps, self.maps], -1)
        x = x.unflatten(-1, (c.num_heads, c.head_dim))
        B, C = (m.unflatten(-1, (c.n_groups, -1)).repeat_interleave(c.num_heads // c.n_groups, 2) for m in (B, C))
        dt, A = F.softplus(dt + self.dt_bias).clamp(*c.time_step_limit), -torch.exp(self.A_log)
        if tokens == 1:
            y, S = ssd_step(x, dt, A, B, C, state[1])
        else:
            y, S = ssd_chunks(x, dt, A, B, C, state[1], c.chunk_size)
        y = self.norm((y + self.D[:, None] * x).flatten(2), z)
        return self.out_proj(y), (window, S)


class Mamba2LM(nn.Module):
    """Embeddings, layers ``x + mixer(norm(x))``, a last norm and the head, with the names of published weights."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(config.vocab_size, width)
        self.backbone.layers = nn.ModuleList(
            nn.ModuleDict({"norm": RMSNorm(width, eps), "mixer": Mamba2(config)})
            for _ in range(config.num_hidden_layers)
        )
        self.backbone.norm_f = RMSNorm(width, eps)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    @classmethod
    def from_pretrained(cls, folder: Path) -> Mamba2LM:
        weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        weights = {name.replace("embedding.", "embeddings."): tensor for name, tensor in weights.items()}
        weights.setdefault("lm_head.weight", weights["backbone.embeddings.weight"])
        model = cls(Config.read(folder))
        model.load_state_dict(weights)
        return model

    def forward(self, ids: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        """``ids (b, t)`` to logits ``(b, t, v)``; ``states`` are those of all layers before these tokens, and after."""
        x, after = self.backbone.embeddings(ids), []
        for layer, state in zip(self.backbone.layers, states or [None] * len(self.backbone.layers), strict=True):
            mixed, state = layer["mixer"](layer["norm"](x), state)
            x = x + mixed
            after.append(state)
        return self.lm_head(self.backbone.norm_f(x)), after

    @torch.inference_mode()
    def generate(self, ids: Tensor, tokens: int, temperature: float = 0.6, top_k: int = 40) -> Tensor:
        """``ids (b, t)`` and what follows, ``(b, t + tokens)``: the most probable tokens for a temperature of 0."""
        logits, states = self(ids)
        for _ in range(tokens):
            best, index = logits[:, -1].topk(min(top_k, logits.shape[-1]) if temperature > 0 else 1)
            chosen = torch.multinomial(torch.softmax(best / (temperature or 1.0), -1), 1)
            ids = torch.cat([ids, index.gather(1, chosen)], 1)
            logits, states = self(ids[:, -1:], states)
        return ids


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="def f(")
    parser.add_argument("--model", default=str(SHIPPED), help="a folder or a Hub id")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.6)
    options = parser.parse_args(arguments)
    folder = Path(options.model)
    if not folder.is_dir():
        folder = Path(snapshot_download(options.model, allow_patterns=["*.json", "model*.safetensors"]))
    tokenizer, model = Tokenizer.from_file(str(folder / "tokenizer.json")), Mamba2LM.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer.encode(options.prompt).ids])
    print(tokenizer.decode(model.generate(ids, options.tokens, options.temperature)[0].tolist()))


if __name__ == "__main__":
    main()
