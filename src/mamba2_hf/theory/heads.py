"""Head patterns: which of x, B and C all heads share, and which each has of its own (Section 7.2).

A head is an SSM of its own decays. In attention's words x is the values, B the keys and C the queries; where a pattern
shares one of them it has one head, and is broadcast. Shapes: ``x (H or 1, T, P)``, ``B, C (H or 1, T, N)``, decays
``a (H, T)``.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import ArgumentError
from .attention import OneSemiseparable, structured_masked_attention

OWN: dict[str, str] = {"multi-head": "xBC", "multi-query": "C", "multi-key": "B", "multi-value": "x"}
"""What each head has of its own, beside its decays (Equations 17 to 20). As SSMs the four are multi-head, -contract,
-expand and -input; Mamba-2 is multi-value, with G groups of heads that share B and C where the paper has one."""


def shapes(pattern: str, heads: int, tokens: int, head_dim: int, state: int) -> dict[str, tuple[int, int, int]]:
    """Shapes of x, B and C, by name.

    Raises:
        ArgumentError: there is no such pattern.
    """
    if pattern not in OWN:
        raise ArgumentError(f"pattern is {pattern!r}, expected one of {', '.join(map(repr, OWN))}")
    sizes = {"x": head_dim, "B": state, "C": state}
    return {name: (heads if name in OWN[pattern] else 1, tokens, size) for name, size in sizes.items()}


def attend(pattern: str, a: Tensor, x: Tensor, B: Tensor, C: Tensor, *, mode: str = "fast") -> Tensor:
    """The heads of a pattern, ``(H, T, P)``; what is shared is never copied.

    Args:
        pattern: a key of ``OWN``.
        a: ``(H, T)`` decays.
        x, B, C: see :func:`shapes`.
        mode: as in :func:`structured_masked_attention`.

    Raises:
        ArgumentError: a shape is not the pattern's.
    """
    heads, tokens = a.shape
    expected = shapes(pattern, heads, tokens, x.shape[-1], B.shape[-1])
    for name, tensor in (("x", x), ("B", B), ("C", C)):
        if tuple(tensor.shape) != expected[name]:
            raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}, expected {expected[name]} for {pattern}")
    return structured_masked_attention(C, B, x, OneSemiseparable(a), mode=mode)


def expand(heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The multi-head form: what is shared, ``(1, T, F)``, once for each head."""
    return tuple(tensor.expand(heads, *tensor.shape[1:]) for tensor in tensors)
