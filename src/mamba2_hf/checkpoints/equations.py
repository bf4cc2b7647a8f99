"""Which values of one format's tensors are which of another's: renamed, joined, split, or interleaved by rows.

An equation says that some tensors of theirs, their values read one after the other, are some tensors of ours read the
same way. From a list of equations, either side can be written piece by piece from the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of a tensor; all of them by default."""

    name: str
    shape: Shape
    start: int = 0
    stop: int | None = None

    @property
    def span(self) -> tuple[int, int]:
        """First and last value of these rows in the flat tensor."""
        width = math.prod(self.shape[1:])
        return self.start * width, (self.shape[0] if self.stop is None else self.stop) * width


@dataclass(frozen=True)
class Equation:
    """Theirs, one after the other, are ours."""

    theirs: tuple[Rows, ...]
    ours: tuple[Rows, ...]


@dataclass(frozen=True)
class Part:
    """Values ``start`` to ``stop`` of a flat tensor."""

    name: str
    start: int
    stop: int


def same(theirs: str, ours: str, shape: Shape) -> Equation:
    """One tensor under two names."""
    return Equation((Rows(theirs, shape),), (Rows(ours, shape),))


def shapes_of(sides: Iterable[tuple[Rows, ...]]) -> dict[str, Shape]:
    """Every tensor of one side, by name."""
    return {rows.name: rows.shape for side in sides for rows in side}


def parts_of(equations: Iterable[Equation], *, of_ours: bool) -> dict[str, list[Part]]:
    """What each tensor of one side is made of, on the other side, in the order of its values.

    Args:
        equations: which together cover both sides, each value once.
        of_ours: whether the tensors are ours, made of theirs, or the other way around.
    """
    found: dict[str, list[tuple[int, Part]]] = {}
    for equation in equations:
        made, of = (equation.ours, equation.theirs) if of_ours else (equation.theirs, equation.ours)
        spans = [(rows.name, *rows.span) for rows in of]
        for rows in made:
            start, stop = rows.span
            while start < stop:
                name, first, last = spans[0]
                count = min(stop - start, last - first)
                found.setdefault(rows.name, []).append((start, Part(name, first, first + count)))
                start += count
                spans[0] = (name, first + count, last)
                if first + count == last:
                    spans.pop(0)
        if spans:
            raise ValueError(f"{equation}: its sides hold different numbers of values")
    return {name: [part for _, part in sorted(parts, key=lambda found: found[0])] for name, parts in found.items()}


def cut(parts: Iterable[Part], start: int, stop: int) -> list[Part]:
    """The parts that make up values ``start`` to ``stop`` of a tensor."""
    out, place = [], 0
    for part in parts:
        length = part.stop - part.start
        first, last = max(start - place, 0), min(stop - place, length)
        if first < last:
            out.append(Part(part.name, part.start + first, part.start + last))
        place += length
    return out


def renamed(names: Mapping[str, str], shapes: Mapping[str, Shape]) -> list[Equation]:
    """Equations of tensors that only have another name: theirs by ours."""
    return [same(names[name], name, shapes[name]) for name in names]
