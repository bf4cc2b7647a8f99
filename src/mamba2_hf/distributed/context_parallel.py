"""Sequence parallelism that passes states: every process holds a slice of each sequence.

An SSD layer needs of the tokens before a slice nothing but its convolution's last inputs and one state, so that is all
that is sent. What slices give from zero, and how a state decays on its way through each, is gathered; every process
then knows what enters its own slice before it computes outputs, and no token is looked at twice ("Transformers are
SSMs", Section 8.2).

All processes of a group are given the whole batch, and cut their slice out of it: neither the labels of the next token
nor the documents at a border need a message.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError
from ..layers import Attention, Mamba2Mixer, Placement, SequenceLayout
from ..ops.packing import document_ids
from .attention import attend_slices, pieces_of
from .collectives import (
    entering_states,
    gather_states,
    gather_tokens,
    of_neighbor,
    passed,
    previous_columns,
    sum_backward,
    sum_forward,
)
from .groups import Group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=nn.Module)


def context_parallel(model: Model, mesh: DeviceMesh | Group | None) -> Model:
    """Spreads every sequence that a model is called with over the processes of a mesh's dimension ``"cp"``, in place.

    Afterwards each process calls the model with the same, whole batch. It computes its slice: outputs are
    ``(B, n, ...)`` for the n tokens of :meth:`Context.bounds`, and the loss is that of the whole batch, in every
    process. Gradients are those of the slice, times the size of the group: what averages over processes, as DDP and
    FSDP2 do over all that data and context make, comes to the gradient of one process.

    Args:
        model: holds a model of this package; before DDP and FSDP2 wrap it, or after.
        mesh: of one dimension, or with one of the name ``"cp"``; None ends it.

    Returns:
        ``model``.

    Raises:
        ArgumentError: the mesh has no such dimension, or nothing in the model knows slices.
    """
    backbones = [module for module in model.modules() if hasattr(type(module), "refuse_in_context")]
    if not backbones:
        raise ArgumentError(
            f"{type(model).__name__} holds no model of mamba2_hf: only its layers pass states from slice to slice"
        )
    group = Group.of(mesh, "cp") if mesh is not None and not isinstance(mesh, Group) else mesh
    for backbone in backbones:
        backbone.context = None if group is None else Context(group, backbone)  # type: ignore[assignment]
    return model


class Context:
    """How the rows of a batch are spread over a group.

    Args:
        group: its processes hold the slices in order.
        model: whose layers say how small a slice may be.
    """

    def __init__(self, group: Group, model: nn.Module) -> None:
        self.group, self._is_checked = group, False
        taps = [1]
        self._pieces = 1  # of a slice
        for module in model.modules():
            if isinstance(module, Mamba2Mixer):
                taps.append(module.conv_kernel)
            elif isinstance(module, Attention):
                taps.append(module.conv_kernel or 1)
                self._pieces = 2
        self.reach = max(*taps, 2) - 1
        """Tokens before a slice that a layer may look at."""

    def check(self, given: Tensor, layout: SequenceLayout) -> None:
        """Compares, once, what the processes of the group are given: ids ``(B, T)`` or embeddings ``(B, T, d)``, and
        their documents and padding, which one process alone might refuse.

        Raises:
            ArgumentError: in every process, if that is not one batch.
        """
        if self._is_checked:
            return
        self._is_checked = True
        batch, tokens = given.shape[:2]
        read = [given if given.dim() == 2 else None, layout.seq_idx, layout.cu_seqlens, layout.keep]
        sums = [0 if each is None else _checksum(each.to(given.device)) for each in read]
        everyones = self.group.gather(torch.tensor([batch, tokens, *sums], device=given.device))
        if bool((everyones != everyones[0]).any()):
            raise ArgumentError(
                f"the {self.group.size} processes that share sequences were given different batches: each has to pass "
                "the whole one, with the same documents and padding. accelerate deals out the batches of an iterable "
                "dataset from its first process: have every process read them, by "
                "accelerator_config={'dispatch_batches': False} in TrainingArguments"
            )

    def length(self, tokens: int) -> int:
        """How many tokens the slices have of rows of ``tokens``: as few as fill the group, padding behind them."""
        parts = self.group.size * self._pieces
        least = -(-self.reach // self._pieces)
        return max(-(-tokens // parts), least) * self._pieces

    def bounds(self, tokens: int) -> tuple[int, int]:
        """First token and end of this process's slice of rows of ``tokens``, without padding."""
        length = self.length(tokens)
        start = self.group.rank * length
        return min(start, tokens), min(start + length, tokens)

    def cut(self, tensor: Tensor, fill: float = 0) -> Tensor:
        """This process's slice of ``(B, T, ...)``: ``(B, n, ...)``, padded behind the row's end with ``fill``."""
        tokens = tensor.shape[1]
        start, end = self.bounds(tokens)
        padding = (0, 0) * (tensor.dim() - 2) + (0, self.length(tokens) - (end - start))
        return F.pad(tensor[:, start:end], padding, value=fill)

    def join(self, tensor: Tensor, tokens: int) -> Tensor:
        """The whole ``(B, T, ...)`` of all processes' slices ``(B, n, ...)``, as outputs are; differentiable."""
        return gather_tokens(tensor, self.group)[:, :tokens]

    def layout(self, layout: SequenceLayout, batch: int, tokens: int, device: torch.device) -> SequenceLayout:
        """The layout of this process's slice, given that of the whole rows, ``(batch, tokens)`` on ``device``.

        Raises:
            ArgumentError: there is padding elsewhere than behind the tokens of a row.
        """
        seq_idx, keep = _documents(layout.to(device), tokens)
        length = self.length(tokens)
        if seq_idx is not None:  # padding goes on with the last document
            seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, length * self.group.size - tokens)], 1)
        if keep is None and length * self.group.size > tokens:
            keep = torch.ones(1, tokens, dtype=torch.bool, device=device).expand(batch, -1)
        start = self.group.rank * length
        return SequenceLayout(
            seq_idx=None if seq_idx is None else seq_idx[:, start : start + length],
            keep=None if keep is None else self.cut(keep),
            neighbors=Slice(self.group, batch, length, self.reach, seq_idx),
        )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the group; each process's loss may depend on it."""
        return sum_forward(sum_backward(tensor, self.group), self.group)


class Slice:
    """This process's slice of the rows of one call; a :class:`~mamba2_hf.ops.Neighbors` of ops.

    Args:
        group: its processes hold the slices in order.
        rows: B.
        length: n, tokens of each slice.
        reach: how far before the slice a layer may look.
        seq_idx: ``(B, n W)``, documents of the whole rows; None if each is one.
    """

    def __init__(self, group: Group, rows: int, length: int, reach: int, seq_idx: Tensor | None) -> None:
        self.group, self.rows, self.length, self.reach = group, rows, length, reach
        self.starts: Tensor | None = None  # (B, n W) where the document of each token starts
        self.follows: Tensor | None = None  # (B, reach) whether a token before the slice is of its first document
        if seq_idx is None:
            return
        changes = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        columns = torch.arange(seq_idx.shape[1], device=seq_idx.device)
        self.starts = torch.where(changes, columns, 0).cummax(1).values
        start = group.rank * length
        if group.rank:
            first = self.starts[:, start, None]
            self.follows = first <= columns[start - reach : start]
        else:
            self.follows = torch.zeros(rows, reach, dtype=torch.bool, device=seq_idx.device)

    def to(self, device: torch.device | str) -> Slice:
        """The same with tensors on another device."""
        moved = Slice(self.group, self.rows, self.length, self.reach, None)
        moved.starts = None if self.starts is None else self.starts.to(device)
        moved.follows = None if self.follows is None else self.follows.to(device)
        return moved

    def _followed(self, tensor: Tensor) -> Tensor:
        """``(B, ...)``, zeros in rows whose slice begins with a new document."""
        if self.follows is None:
            return tensor
        return tensor * self.follows[:, -1].view(-1, *[1] * (tensor.dim() - 1))

    def _reached(self, columns: Tensor) -> Tensor:
        """``(B, C, K - 1)``, zeros for tokens before the slice that belong to another document than its first."""
        if self.follows is None:
            return columns
        return columns * self.follows[:, None, self.reach - columns.shape[2] :]

    def columns_before(self, last: Tensor) -> Tensor:
        """See :class:`~mamba2_hf.ops.Neighbors`."""
        return self._reached(previous_columns(last, self.group))

    def columns_after(self, gradient: Tensor) -> Tensor:
        """See :class:`~mamba2_hf.ops.Neighbors`."""
        return of_neighbor(self._reached(gradient), self.group, 1)

    def state_before(self, own: Tensor, decay: Tensor) -> Tensor:
        """See :class:`~mamba2_hf.ops.Neighbors`."""
        return self._followed(entering_states(own, self._followed(decay), self.group))

    def gradient_after(self, own: Tensor, decay: Tensor) -> Tensor:
        """See :class:`~mamba2_hf.ops.Neighbors`."""
        group = self.group
        owns, decays = gather_states(self._followed(own), self._followed(decay), group)
        return passed(owns, decays, range(group.size - 1, group.rank, -1))

    def attend(self, module: Attention, queries: Tensor, keys: Tensor, values: Tensor, placement: Placement) -> Tensor:
        """Attention of the slice to all tokens before; see :func:`~mamba2_hf.distributed.attention.attend_slices`."""
        return attend_slices(module, queries, keys, values, placement, self.group)

    def place(self, device: torch.device) -> Placement:
        """Where the tokens of the slice stand, and those of the pieces whose queries this process takes."""
        half = self.length // 2
        pieces = (self._placed(piece * half, half, device) for piece in pieces_of(self.group.rank, self.group.size))
        return replace(self._placed(self.group.rank * self.length, self.length, device), pieces=tuple(pieces))

    def _placed(self, start: int, tokens: int, device: torch.device) -> Placement:
        """The ``tokens`` from ``start`` on, as if those before them were in a cache."""
        past = starts = None
        if self.starts is not None:
            absolute = self.starts.to(device)[:, start : start + tokens]
            past = start - absolute[:, 0].clamp(max=start)
            starts = (absolute - start).clamp(min=0)
        return Placement(
            rows=self.rows,
            tokens=tokens,
            stored=start,
            capacity=None,
            past=past if start else None,
            fresh=None,
            starts=starts,
            width=start + tokens,
            lengths=None,
            to_grid=None,
            from_grid=None,
            masks={},
            device=device,
        )


def _checksum(numbers: Tensor) -> int:
    """A number that differs where one of these does, or two have changed places."""
    flat = numbers.flatten().long()
    return int((flat * torch.arange(1, flat.numel() + 1, device=flat.device)).sum()) + flat.numel()


def _documents(layout: SequenceLayout, tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """``(B, T)``: the documents of whole rows, None if each is one; and which tokens count, None if all do."""
    keep, seq_idx = layout.keep, layout.seq_idx
    if keep is not None and bool((keep[:, 1:] & ~keep[:, :-1]).any()):
        row = int((keep[:, 1:] & ~keep[:, :-1]).any(1).nonzero()[0])
        raise ArgumentError(
            f"attention_mask has padding before a token in row {row}: rows that are spread over processes are padded "
            "on the right; pad there, or lay documents end to end and name them by seq_idx"
        )
    if layout.cu_seqlens is not None:
        several = layout.first is not None and layout.last is not None and bool((layout.first != layout.last).any())
        ids = document_ids(layout.cu_seqlens, tokens if layout.source is None else layout.source.shape[0])[None]
        if layout.source is None:
            keep = ids < layout.cu_seqlens.shape[0] - 1 if bool(layout.cu_seqlens[-1] < tokens) else keep
        seq_idx = layout.unpack(ids) if several or layout.source is None else None
    return seq_idx, keep
