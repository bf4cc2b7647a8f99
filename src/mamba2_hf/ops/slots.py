"""States of a batch that lie in some rows of a larger tensor, on PyTorch and without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def step_in_slots(states: Tensor, slots: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
    """Runs a step on a batch's states and puts them back.

    Args:
        states: ``(S, ...)``, updated in place.
        slots: ``(B,)``, the row of each; a negative one has none.
        step: takes states ``(B, ...)``, which it updates in place, and returns ``(B, ...)``.

    Returns:
        What ``step`` returns, with zeros where there is no state.
    """
    there = slots >= 0  # (B,)
    first = there.int().argmax()  # all others write what this one does: then no two writes to a row differ
    writer = torch.where(there, torch.arange(len(slots), device=slots.device), first)
    rows = slots[writer].clamp(min=0).long()
    held = states[rows]
    new = held.clone()
    y = step(new)
    states.index_copy_(0, rows, torch.where(there[first], new[writer], held))
    return torch.where(there.view(-1, *[1] * (y.dim() - 1)), y, 0)
