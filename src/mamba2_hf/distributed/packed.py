"""Tensors that processes hold pieces of: which, and modules that compute with theirs.

A weight may be packed of parts that are cut one by one, as in_proj's rows are (z, x, B, C and dt). A part with fewer
pieces than there are processes is held by several of them: B and C of one group are needed by the heads of every
process. Each has a gradient from its own heads alone, and the sum of these is the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.causal_conv1d import PLAIN_TENSORS, CausalConv1d
from ..layers.norm import JointGatedRMSNorm
from ..ops import LayerWeights, Peers
from .collectives import sum_backward
from .groups import Group


class Part(NamedTuple):
    """Rows, or columns, of a packed tensor."""

    size: int
    """How many, in the whole tensor."""
    pieces: int
    """Into how many they are cut: as many as there are processes, or a divisor of that."""


class Cut(NamedTuple):
    """How a tensor is cut along one of its dimensions, part by part."""

    dim: int
    parts: tuple[Part, ...]

    def piece(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """What process ``rank`` of ``size`` holds of the whole tensor, in memory of its own."""
        found = []
        for part, rows in zip(self.parts, whole.split([part.size for part in self.parts], self.dim), strict=True):
            length = part.size // part.pieces
            found.append(rows.narrow(self.dim, rank * part.pieces // size * length, length))
        return torch.cat(found, self.dim)

    def whole(self, pieces: Tensor) -> Tensor:
        """The whole tensor of all processes' pieces, ``(size, ...)``."""
        size, found = pieces.shape[0], []
        split = pieces.split([part.size // part.pieces for part in self.parts], self.dim + 1)
        for part, held in zip(self.parts, split, strict=True):
            found.extend(held[:: size // part.pieces])
        return torch.cat(found, self.dim)

    def copies(self, size: int) -> Iterator[tuple[int, int, int]]:
        """What of a piece several processes hold: where it starts, its length, and how many they are."""
        start = 0
        for part in self.parts:
            length = part.size // part.pieces
            if part.pieces < size:
                yield start, length, size // part.pieces
            start += length


NOTHING = Cut(0, ())
"""No part of a tensor."""


def sum_over(tensor: Tensor, group: Group, count: int) -> Tensor:
    """The sum over ``count`` processes that follow each other, this one among them, a divisor of the group's size; of a
    dense tensor that nobody else reads.
    """
    if count == group.size:
        return group.sum_(tensor)
    first = group.rank // count * count
    return tensor if count == 1 else group.gather(tensor)[first : first + count].sum(0)


class _Own(torch.autograd.Function):
    """Pieces of parameters, of whose copies the gradients are summed: those of all in one message."""

    @staticmethod
    def forward(ctx: Any, group: Group, cuts: tuple[Cut, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.cuts = group, cuts
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [gradient.clone(memory_format=torch.contiguous_format) for gradient in given]
        copied: dict[int, list[Tensor]] = {}  # by how many processes hold it
        for gradient, cut in zip(gradients, ctx.cuts, strict=True):
            for start, length, count in cut.copies(ctx.group.size):
                copied.setdefault(count, []).append(gradient.narrow(cut.dim, start, length))
        for count, rows in sorted(copied.items()):
            total = sum_over(torch.cat([row.flatten() for row in rows]), ctx.group, count)
            for row, summed in zip(rows, total.split([row.numel() for row in rows]), strict=True):
                row.copy_(summed.view_as(row))
        return (None, None, *gradients)


def own_pieces(group: Group, *pieces: tuple[Tensor | None, Cut | None]) -> list[Tensor | None]:
    """Pieces of parameters, to be computed with, each given with how it is cut: gradients of what several processes
    hold are summed on their way to the parameters.
    """
    found = [tensor for tensor, _ in pieces]
    if not torch.is_grad_enabled():
        return found
    copied = [
        (i, tensor, cut)
        for i, (tensor, cut) in enumerate(pieces)
        if tensor is not None and cut is not None and tensor.requires_grad and any(cut.copies(group.size))
    ]
    if copied:
        places, tensors, cuts = zip(*copied, strict=True)
        for place, tensor in zip(places, _Own.apply(group, cuts, *tensors), strict=True):
            found[place] = tensor
    return found


class _SumInPlace(torch.autograd.Function):
    """See :func:`sum_of_parts`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.mark_dirty(part)
        return group.sum_(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def sum_of_parts(part: Tensor, group: Group) -> Tensor:
    """The sum over all processes of a dense ``part`` that nobody else reads, which may be in its place. Autograd has it
    used once: each process's gradient is that of its own part.
    """
    if not torch.is_grad_enabled():
        return group.total(part)
    return _SumInPlace.apply(part, group)  # type: ignore[no-any-return]


class LayerPartners:
    """The processes that share a layer; a :class:`~mamba2_hf.ops.Partners` of ops.

    Args:
        group: of the processes.
        in_proj, conv1d: of a mixer, how the outputs of these are cut.
    """

    def __init__(self, group: Group, in_proj: Cut = NOTHING, conv1d: Cut = NOTHING) -> None:
        self.group, self.in_proj, self.conv1d = group, in_proj, conv1d

    def begin(self, part: Tensor) -> Callable[[], Tensor]:
        """See :class:`~mamba2_hf.ops.Partners`."""
        return self.group.begin_sum_(part)

    def total(self, part: Tensor) -> Tensor:
        """See :class:`~mamba2_hf.ops.Partners`."""
        return sum_of_parts(part, self.group)

    def entering(self, x: Tensor) -> Tensor:
        """See :class:`~mamba2_hf.ops.Partners`."""
        return sum_backward(x, self.group)

    def peers(self, like: Tensor) -> Peers:
        """See :class:`~mamba2_hf.ops.Partners`."""
        return self.group.peers(like)

    def own(self, weights: LayerWeights) -> LayerWeights:
        """See :class:`~mamba2_hf.ops.Partners`."""
        into, mixer, out = weights.in_proj, weights.mixer, weights.out_proj
        found: list[Any] = own_pieces(
            self.group,
            *((into.weight, self.in_proj), (into.bias, self.in_proj), (into.up, self.in_proj)),
            *((mixer.conv_weight, self.conv1d), (mixer.conv_bias, self.conv1d)),
            *((factor, None if factor is None else Cut(0, (Part(len(factor), 1),))) for factor in (into.down, out.up)),
        )
        weight, bias, up, conv_weight, conv_bias, down, out_up = found
        return weights._replace(
            in_proj=into._replace(weight=weight, bias=bias, down=down, up=up),
            mixer=mixer._replace(conv_weight=conv_weight, conv_bias=conv_bias),
            out_proj=out._replace(up=out_up),
        )


class _Held:
    """An attribute that gives :meth:`CutModule.held` of its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, module: CutModule | None, owner: type) -> Any:
        return self if module is None else module.held(self._name)


class CutModule(nn.Module):
    """A module of which every process of a group holds pieces.

    ``weight`` and ``bias`` are to be computed with: gradients of what several processes hold are summed on their way to
    the parameters.
    """

    has_plain_weight: ClassVar[bool] = False
    """Whether to read the weight amounts to calling the module."""
    group: Group
    cuts: dict[str, Cut]
    """Of its parameters, by name."""
    weight: Any = _Held("weight")
    bias: Any = _Held("bias")

    def held(self, name: str) -> Tensor | None:
        """The piece of a parameter, to be computed with."""
        parameter, cut = self._parameters[name], self.cuts.get(name)
        if parameter is None or cut is None or not torch.is_grad_enabled() or not parameter.requires_grad:
            return parameter
        if type(parameter) not in PLAIN_TENSORS:  # sharded over data: FSDP2 looks for its own parameter
            return parameter
        return own_pieces(self.group, (parameter, cut))[0]


class PartLinear(CutModule, nn.Linear):
    """A linear layer of which every process has its own outputs or inputs. ``in_features`` and ``out_features`` are
    those of the whole layer.
    """

    is_part: ClassVar[bool] = True

    def total(self, part: Tensor) -> Tensor:
        """See :func:`sum_of_parts`."""
        return sum_of_parts(part, self.group)


class ColumnLinear(PartLinear):
    """Every process computes its own outputs: ``(..., d)``, the same in all of them, to ``(..., d' / size)``."""

    enters: bool = True
    """Whether gradients of inputs are summed here, and not by a layer that does so for several of these at once."""

    def forward(self, x: Tensor) -> Tensor:
        """The process's outputs; the gradient of ``x`` is that of all, or this process's part of it."""
        return F.linear(sum_backward(x, self.group) if self.enters else x, self.weight, self.bias)


class CopiedLinear(PartLinear):
    """A linear layer that is whole in all processes, of whose outputs each has gradients of its own use."""

    def forward(self, x: Tensor) -> Tensor:
        """The outputs, the same in all processes; the gradient of ``x`` is this process's part."""
        return F.linear(x, self.weight, self.bias)


class RowLinear(PartLinear):
    """Every process has its own inputs: ``(..., d / size)`` to ``(..., d')``, the same in all of them."""

    def forward(self, x: Tensor) -> Tensor:
        """The sum of what all processes compute, and the bias."""
        y = self.total(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class CutConv1d(CutModule, CausalConv1d):
    """A depthwise convolution of the process's own channels."""

    has_plain_weight, is_part = True, True


class CutJointNorm(CutModule, JointGatedRMSNorm):
    """A gated norm of the process's own channels, whose group goes on in the processes beside it.

    ``holders`` is how many processes hold a group.
    """

    holders: int

    @property
    def is_part(self) -> bool:
        """Whether all processes have a part of the one group, so that its sum may go with another of theirs."""
        return self.holders == self.group.size

    def total(self, sums: Tensor) -> Tensor:
        """See :class:`JointGatedRMSNorm`."""
        return sum_over(sums, self.group, self.holders)


class CutExperts(CutModule):
    """Experts of which every process computes some of the inner channels; a base beside a class of experts."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As the experts', with the sum over the processes."""
        run: Callable[..., Tensor] = super().forward
        out = run(sum_backward(x, self.group), index, sum_backward(weights, self.group))
        return sum_of_parts(out, self.group)


@cache
def cut_class(base: type[CutModule], cls: type[nn.Module]) -> type[CutModule]:
    """``cls`` with ``base`` before it, under its name."""
    return type(cls.__name__, (base, cls), {"__module__": __name__})
