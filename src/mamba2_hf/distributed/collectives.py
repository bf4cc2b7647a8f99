"""Collectives with gradients. The loss is understood to be the sum of all processes' losses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .groups import Group


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        return group.sum(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(gradient), None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather_tokens(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scatter_tokens(gradient, ctx.group), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scatter_tokens(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gather_tokens(gradient, ctx.group), None


class _PreviousColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return of_neighbor(columns, group, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return of_neighbor(gradient, ctx.group, 1), None


class _EnteringStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, decay: Tensor, group: Group) -> Tensor:
        owns, decays = gather_states(own, decay, group)
        entering = passed(owns, decays, range(group.rank))
        ctx.group = group
        ctx.save_for_backward(entering, decays)
        return entering

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        group: Group = ctx.group
        entering, decays = ctx.saved_tensors
        leaving = passed(group.gather(gradient), decays, range(group.size - 1, group.rank, -1))
        return leaving, (leaving * entering).sum((-1, -2)), None


def sum_forward(tensor: Tensor, group: Group) -> Tensor:
    """The sum over a group, of which only one use is made: each process's gradient is that of its own share."""
    return _SumForward.apply(tensor, group)  # type: ignore[no-any-return]


def sum_backward(tensor: Tensor, group: Group) -> Tensor:
    """``tensor``, the same in all processes of a group, each of which makes its own use of it: gradients are summed."""
    return _SumBackward.apply(tensor, group)  # type: ignore[no-any-return]


def gather_tokens(tensor: Tensor, group: Group) -> Tensor:
    """Slices ``(B, n, ...)`` to whole rows ``(B, n W, ...)``; gradients are summed."""
    return _GatherTokens.apply(tensor, group)  # type: ignore[no-any-return]


def scatter_tokens(tensor: Tensor, group: Group) -> Tensor:
    """Whole rows ``(B, n W, ...)``, summed over a group, to slices ``(B, n, ...)``."""
    return _ScatterTokens.apply(tensor, group)  # type: ignore[no-any-return]


def previous_columns(columns: Tensor, group: Group) -> Tensor:
    """The ``columns`` of the process before this one; zeros in the first."""
    return _PreviousColumns.apply(columns, group)  # type: ignore[no-any-return]


def entering_states(own: Tensor, decay: Tensor, group: Group) -> Tensor:
    """The state that enters a slice of a sequence, ``(B, H, P, N)``; zeros in the first.

    Args:
        own: ``(B, H, P, N)``, the state behind the slice if zeros entered it.
        decay: ``(B, H)``, of a state on its way through the slice.
        group: its processes hold the slices in order.
    """
    return _EnteringStates.apply(own, decay, group)  # type: ignore[no-any-return]


def of_neighbor(tensor: Tensor, group: Group, step: int) -> Tensor:
    """The ``tensor`` of the process ``step`` behind this one; zeros where there is none."""
    everyones, place = group.gather(tensor), group.rank + step
    return everyones[place] if 0 <= place < group.size else torch.zeros_like(everyones[0])


def gather_states(own: Tensor, decay: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """``(B, H, P, N)`` and ``(B, H)`` of all processes, ``(W, ...)`` each, in one message."""
    both = group.gather(torch.cat([own.flatten(2), decay.to(own.dtype)[..., None]], -1))
    return both[..., :-1].unflatten(-1, own.shape[2:]), both[..., -1]


def passed(owns: Tensor, decays: Tensor, slices: Iterable[int]) -> Tensor:
    """What is left of states ``owns (W, B, H, P, N)`` behind ``slices``, in the order in which they pass them.

    ``decays (W, B, H)`` are those of a state on its way through a slice.
    """
    state = torch.zeros_like(owns[0])
    for place in slices:
        state = torch.addcmul(owns[place], state, decays[place][..., None, None])
    return state


def _gather_tokens(tensor: Tensor, group: Group) -> Tensor:
    return group.gather(tensor).movedim(0, 1).flatten(1, 2)


def _scatter_tokens(tensor: Tensor, group: Group) -> Tensor:
    return group.sum_of_parts(tensor.unflatten(1, (group.size, -1)).movedim(1, 0))
