"""What the tests of the ops share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mamba2_hf.ops.triton import replay


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """No plan is left of a test that changed what leads to one."""
    replay.forget()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote reads as NaN."""
    allocate = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
