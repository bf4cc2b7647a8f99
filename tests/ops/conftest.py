"""What the tests of the ops share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mamba2_hf.ops import dispatch
from mamba2_hf.ops.runtime import plan as replay


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """No plan is left of a test that changed what leads to one."""
    replay.forget()


@pytest.fixture
def triton_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton serves the CPU too: in its interpreter, where there is no GPU."""
    monkeypatch.setattr(dispatch, "_usable", lambda device: (True, "by test"))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote reads as NaN."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            with torch.no_grad():
                return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return run

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
