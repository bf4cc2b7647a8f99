"""Draws the figures of ``docs/theory.md`` into ``docs/figures``: matrices as grids of squares, in plain SVG.

python docs/draw_theory.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mamba2_hf.theory import attention, lti, semiseparable

FIGURES = Path(__file__).parents[1] / "docs" / "assets" / "theory"
CELL, GAP, TITLE = 14, 28, 22
POSITIVE, NEGATIVE = (31, 95, 168), (200, 80, 40)  # of entries, fading to white at zero
Outline = tuple[int, int, int, int]  # row, column, rows, columns


def color(value: float) -> str:
    """White at 0, to the full colour at 1 or -1."""
    full, strength = POSITIVE if value >= 0 else NEGATIVE, min(1.0, abs(value)) ** 0.7
    return "#" + "".join(f"{round(255 + (channel - 255) * strength):02x}" for channel in full)


def grid(matrix: Tensor, left: int, top: int, title: str, outlines: tuple[Outline, ...] = ()) -> str:
    """A matrix ``(R, C)`` as squares, each entry relative to the largest; with parts outlined."""
    scale = float(matrix.abs().max()) or 1.0
    parts = [f'<text x="{left}" y="{top - 8}">{title}</text>']
    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values):
            place = f'x="{left + column * CELL}" y="{top + row * CELL}"'
            parts.append(f'<rect {place} width="{CELL}" height="{CELL}" fill="{color(value / scale)}" stroke="#ddd"/>')
    for row, column, rows, columns in outlines:
        place = f'x="{left + column * CELL}" y="{top + row * CELL}"'
        size = f'width="{columns * CELL}" height="{rows * CELL}"'
        parts.append(f'<rect {place} {size} fill="none" stroke="#000" stroke-width="2"/>')
    return "\n".join(parts)


def figure(name: str, *panels: tuple[Tensor, str, tuple[Outline, ...]]) -> None:
    """Writes panels side by side."""
    left, parts, height = GAP, [], 0
    for matrix, title, outlines in panels:
        parts.append(grid(matrix, left, GAP + TITLE, title, outlines))
        left += max(matrix.shape[1] * CELL, 8 * len(title)) + GAP
        height = max(height, GAP + TITLE + matrix.shape[0] * CELL + GAP)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left}" height="{height}" viewBox="0 0 {left} {height}" '
        'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>'
    )
    (FIGURES / f"{name}.svg").write_text("\n".join([head, *parts, "</svg>\n"]), encoding="utf-8")


def main() -> None:
    """All figures, from fixed seeds."""
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A, B = lti.discretize(torch.tensor([[-0.2, 1.0], [-1.0, -0.2]]), torch.tensor([1.0, 0.0]), 0.6)
    figure(
        "lti",
        (lti.kernel(A, B, torch.ones(2), 16)[None], "kernel C A^k B", ()),
        (lti.matrix(A, B, torch.ones(2), 16), "as a matrix: Toeplitz", ()),
    )
    a, B, C = 1 - normal(12).sigmoid() / 3, normal(12, 2), normal(12, 2)
    a[5] = 0.2  # a token that forgets
    M = semiseparable.build(a, B, C)
    figure(
        "semiseparable",
        (M, "N = 2: outlined parts have rank 2", ((6, 0, 6, 7), (8, 2, 3, 4))),
        (normal(12, 12).tril(), "no structure: rank 6", ((6, 0, 6, 7),)),
    )
    blocks = tuple((row, column, 4, 4) for row in (0, 4, 8) for column in range(0, row + 1, 4))
    left, center, right = semiseparable.block_factors(a, B, C, range(8, 12), range(0, 4))
    figure(
        "blocks",
        (M, "chunks of Q = 4", blocks),
        (M[8:, :4], "a block", ()),
        (left, "left", ()),
        (center, "center", ()),
        (right, "right", ()),
    )
    figure(
        "masks",
        (attention.Causal(12).matrix(), "causal", ()),
        (attention.decay(0.8, 12).matrix(), "decay", ()),
        (attention.OneSemiseparable(a).matrix(), "1-semiseparable", ()),
        (attention.Toeplitz(torch.cos(torch.arange(12) / 2)).matrix(), "Toeplitz", ()),
        (attention.Fourier(12).matrix().real, "Fourier (real part)", ()),
    )
    figure(
        "duality",
        (C, "C: Q", ()),
        (B.T, "B: K", ()),
        (C @ B.T, "scores Q K^T", ()),
        (attention.OneSemiseparable(a).matrix(), "mask L", ()),
        (M, "L * Q K^T", ()),
    )


if __name__ == "__main__":
    main()
