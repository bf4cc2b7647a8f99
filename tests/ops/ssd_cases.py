"""Random inputs of the scan and how far two results are apart, for every test of the ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||; a NaN never passes a comparison."""
    out, expected = out.detach().double(), expected.detach().double()
    return float((out - expected).norm() / expected.norm().clamp(min=1e-300))


def scan_inputs(
    batch: int = 2,
    tokens: int = 37,
    heads: int = 4,
    head_dim: int = 6,
    groups: int = 2,
    state: int = 5,
    *,
    states: int | None = None,
    d_per_channel: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Every tensor that ``ssd_chunk_scan`` takes, drawn anew for each seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": draw(batch, tokens, heads, head_dim),
        "dt": draw(batch, tokens, heads),
        "A": -draw(heads).exp(),
        "B": draw(batch, tokens, groups, state),
        "C": draw(batch, tokens, groups, state),
        "D": draw(heads, head_dim) if d_per_channel else draw(heads),
        "z": draw(batch, tokens, heads, head_dim),
        "dt_bias": draw(heads),
        "initial_states": draw(states or batch, heads, head_dim, state),
    }


def inner_arguments(seed: int, length: int, batch: int = 2) -> dict[str, Any]:
    """Arguments of ``mamba2_inner`` with H = 4, P = 6, G = 2, N = 5, drawn anew for each seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads, head_dim, groups, state = 4, 6, 2, 5
    inner, conv = heads * head_dim, heads * head_dim + 2 * groups * state
    return {
        "zxbcdt": draw(batch, length, inner + conv + heads),
        "conv_weight": draw(conv, 4),
        "conv_bias": draw(conv),
        "dt_bias": draw(heads),
        "A": -draw(heads).exp(),
        "D": draw(heads),
        "norm_weight": draw(inner),
        "head_dim": head_dim,
        "n_groups": groups,
        "group_size": inner // groups,
    }


def step_arguments(seed: int, length: int = 1, batch: int = 2) -> dict[str, Any]:
    """Arguments of ``mamba2_step`` in the same sizes, with states of zeros."""
    arguments = inner_arguments(seed, length, batch)
    del arguments["head_dim"]
    conv, taps = arguments["conv_weight"].shape
    zeros = arguments["A"].new_zeros
    return arguments | {"conv_state": zeros(batch, conv, taps - 1), "ssm_state": zeros(batch, 4, 6, 5)}


def slice_tokens(inputs: dict[str, Tensor], tokens: slice) -> dict[str, Tensor]:
    """The same inputs for some of the tokens."""
    per_token = ("x", "dt", "B", "C", "z")
    return {name: value[:, tokens] if name in per_token else value for name, value in inputs.items()}


def documents(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """``seq_idx (B, T)`` of a few documents a row, whose ids may return later."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, tokens, generator=generator) < 0.15
    return starts.long().cumsum(1) % 3
