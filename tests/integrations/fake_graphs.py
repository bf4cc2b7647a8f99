"""CUDA graphs for a CPU: to bookkeeping, they are what graphs are on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mamba2_hf.training import captured


class FakeGraph:
    """Runs nothing when it captures, and writes into the tensors of its capture when it is replayed.

    Args:
        step: whose graphs it stands for.
        wrong: what a replay's loss is off by.
    """

    def __init__(self, step: captured.CapturedStep, wrong: float = 0.0) -> None:
        self.step, self.wrong, self.pool, self.replays = step, wrong, "pool", 0

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        places = self.step._gradients
        assert places is not None
        self.run, self.before = run, places.read()
        values = [None if gradient is None else gradient.clone() for gradient in self.before]
        self.loss, self.after = run(), places.read()
        for made in (self.loss, *self.after):  # not computed yet
            if made is not None:
                made.fill_(float("nan"))
        for gradient, value in zip(self.before, values, strict=True):
            if gradient is not None:
                gradient.copy_(value)
        return self.loss

    def replay(self) -> None:
        places = self.step._gradients
        assert places is not None
        self.replays += 1
        there = places.read()
        places.write(self.before)
        self.loss.copy_(self.run() + self.wrong)
        for made, gradient in zip(self.after, places.read(), strict=True):
            if made is not None and made is not gradient:
                made.copy_(gradient)
        places.write(there)


def install(patch: Any, step: captured.CapturedStep, **options: Any) -> list[FakeGraph]:
    """Has ``step`` make fakes, by ``patch.setattr``; returns those that it makes."""
    made: list[FakeGraph] = []

    def graph(pool: Any, stream: Any) -> FakeGraph:
        made.append(FakeGraph(step, **options))
        return made[-1]

    patch.setattr(captured, "Graph", graph)
    patch.setattr(captured, "why_not_train", lambda model: None)
    return made
