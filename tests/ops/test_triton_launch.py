"""What runs again goes past Triton's front end, and only what Triton would compile to the same code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mamba2_hf.ops.runtime import launch as launches
from mamba2_hf.ops.runtime.launch import launch


class Kernel:
    """Stands in for a kernel: remembers how often it was compiled, and what its compiled code ran with."""

    def __init__(self, *names: str) -> None:
        self.params = [SimpleNamespace(name=name) for name in names]
        self.compiled: list[tuple[Any, ...]] = []
        self.ran: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_run(*args: Any, **constants: Any) -> Any:
            self.compiled.append((grid, args, constants))
            return self.Compiled(self)

        return compile_and_run

    class Compiled:
        def __init__(self, kernel: Kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args: self.kernel.ran.append((grid, args))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launches, "_compiled", {})
    return Kernel("a", "b", "c", "SIZE")


def tile(*block: int, dtype: torch.dtype = torch.float16) -> Any:
    """As a tile descriptor."""
    return SimpleNamespace(base=torch.zeros(4, dtype=dtype), block_shape=list(block))


X, OTHER = torch.zeros(64), torch.ones(64)


def test_the_second_launch_goes_to_the_compiled_kernel(kernel: Kernel) -> None:
    launch(kernel, (3,), X, 17, 1.5, SIZE=8, num_warps=2)
    launch(kernel, (5,), OTHER, 19, 2.5, SIZE=8, num_warps=2)
    assert len(kernel.compiled) == 1
    assert kernel.ran == [((5, 1, 1), (OTHER, 19, 2.5, 8))]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (X, OTHER, True),
        (X, torch.nn.Parameter(X), True),
        (X, X.half(), False),
        (X, X[1:], False),  # not aligned
        (X, None, False),
        (32, 48, True),  # both are multiples of 16
        (32, 33, False),
        (33, 1, False),
        (32, 2**31, False),
        (0.5, 1.0, True),
        (0.5, 1, False),
        (tile(1, 64), tile(1, 64), True),
        (tile(1, 64), tile(1, 32), False),
        (tile(1, 64), tile(1, 64, dtype=torch.float32), False),
    ],
)
def test_what_is_the_same_to_the_compiler(kernel: Kernel, first: Any, second: Any, same: bool) -> None:
    for argument in (first, second):
        launch(kernel, (1,), X, argument, 3, SIZE=8)
    assert (len(kernel.compiled), len(kernel.ran)) == ((1, 1) if same else (2, 0))


def test_constants_are_compiled_in(kernel: Kernel) -> None:
    for size, warps in ((8, 1), (16, 1), (16, 2)):
        launch(kernel, (1,), X, 2, 3, SIZE=size, num_warps=warps)
    assert len(kernel.compiled) == 3
