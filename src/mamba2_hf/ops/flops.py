"""How many floating-point operations the registered ops take, for ``torch.utils.flop_counter``.

What counts is what PyTorch counts: matrix products, two operations per multiplication and addition, and nothing that
works element by element (norms, gates, the few taps of the convolution, decays). A scan is counted as the chunked form
(paper, Section 6) on chunks of ``CHUNK_SIZE`` tokens, the last one filled up, whatever tiles a kernel takes; its
backward as the same again, because the forward is recomputed, and two products for each of its products. So the count
of a model is that of the PyTorch backend, whose products the counter sees one by one. On a GPU that backend passes
states from chunk to chunk by products too, which are not counted here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import _FlopCounterMode, register_flop_formula

from .spec import CHUNK_SIZE

Shape = Sequence[int]
BACKWARD = 3  # of a scan, in forwards


def register(namespace: str, name: str, formula: Callable[..., int]) -> None:
    """Registers the count of ``torch.ops.<namespace>.<name>``: ``formula`` takes its arguments, shapes for tensors.

    A counter copies what is registered when it is made, and ops of a backend are registered when it is first used: so
    those that count already are told.
    """
    op = getattr(getattr(torch.ops, namespace), name)

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    counted = register_flop_formula(op)(count)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, _FlopCounterMode):
            mode.counter.flop_registry[op] = counted


def product(rows: int, weight: Shape) -> int:
    """Counts ``rows`` vectors times a matrix."""
    return 2 * rows * weight[0] * weight[1]


def scan(x: Shape, B: Shape, cu_seqlens: Shape | None) -> int:
    """Counts the scan in its chunked form.

    Args:
        x: ``(B, T, H, P)``.
        B: ``(B, T, G, N)``.
        cu_seqlens: ``(S + 1,)``, or None; each document starts a chunk, so that S more are laid out.
    """
    (rows, tokens, heads, head_dim), (groups, maps) = x, B[2:]
    size = max(1, min(tokens, CHUNK_SIZE))
    chunks = rows * -(-tokens // size) if cu_seqlens is None else tokens // size + cu_seqlens[0] - 1
    inside = groups * size * maps + heads * size * head_dim  # C B^T, and its product with x dt
    between = 2 * heads * head_dim * maps  # what a chunk adds to the state and reads from it
    return 2 * chunks * size * (inside + between)


def inner(zxbcdt: Shape, channels: int, heads: int, head_dim: int, groups: int, cu_seqlens: Shape | None) -> int:
    """Counts the mixer between its projections, of which only the scan counts.

    Args:
        zxbcdt: ``(B, T, 2 H P + 2 G N + H)``.
        channels: of the convolution, ``H P + 2 G N``.
        heads, head_dim, groups: H, P and G.
        cu_seqlens: as in :func:`scan`.
    """
    maps = (channels - heads * head_dim) // (2 * groups)
    return scan((*zxbcdt[:2], heads, head_dim), (*zxbcdt[:2], groups, maps), cu_seqlens)


def step(state: Shape, tokens: int = 1) -> int:
    """Counts the recurrence, which goes through the state ``(B, H, P, N)`` once per token."""
    return 2 * tokens * math.prod(state)


def linear_cross_entropy(hidden: Shape, weight: Shape, *rest: Any) -> int:
    """Counts the logits and, with them, the gradients that are wanted of hidden states and weight."""
    *_, wants_hidden, wants_weight, _ = rest
    return product(hidden[0], weight) * (1 + wants_hidden + wants_weight)
