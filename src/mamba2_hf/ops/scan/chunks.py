"""The chunked form of SSD (paper, Section 6): attention inside a chunk, states between chunks.

What keeps it lean: ``C B^T`` is formed once per group and not per head; the products with the state run as one matrix
product per chunk and group with the heads side by side; and states pass between chunks in work that is linear in their
number, one after the other on a CPU and in blocks elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..neighbors import Neighbors
from ..packing import document_numbers
from ..runtime.modes import in_steps, known, plus, times

SCAN_BLOCK = 16  # chunks whose states are passed by one matrix product


class Chunks(NamedTuple):
    """Operands of the scan, cut into chunks, in the compute dtype."""

    x: Tensor  # (B, c, Q, H, P)
    dt: Tensor  # (B, c, Q, H), after bias, softplus and clamp; 0 on padding
    B: Tensor  # (B, c, Q, G, N)
    C: Tensor  # (B, c, Q, G, N)


def scan_chunks(
    chunks: Chunks,
    A: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    *,
    document: Tensor | None = None,
    restart: tuple[Tensor, Tensor] | None = None,
    neighbors: Neighbors | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the scan from operands in chunks.

    Args:
        chunks: operands; ``c`` chunks of ``Q`` tokens.
        A: ``(H,)``.
        D: ``(H,)``, ``(H, P)`` or None.
        initial_states: ``(B, H, P, N)``, entering the first chunk of each row.
        document: ``(B, c, Q)`` ids; nothing passes between tokens whose ids differ on the way.
        restart: ``(c,)`` mask of the chunks that a given state ``(c, H, P, N)`` enters in place of the carried one.
        neighbors: from which the state comes that enters the first chunk of each row, in place of ``initial_states``.

    Returns:
        ``y (B, c, Q, H, P)`` with the skip; and the last state ``(B, H, P, N)``, or with ``restart`` the state after
        each chunk ``(c, H, P, N)``.
    """
    x, dt = chunks.x, chunks.dt
    heads, head_dim = x.shape[3:]
    B, C = chunks.B.transpose(2, 3), chunks.C.transpose(2, 3)  # (B, c, G, Q, N)
    groups = (B.shape[2], heads // B.shape[2])

    # Per token, as factors of (B, c, Q, H, P): log decay from the chunk's start, and decays from and to its ends.
    a = (dt * A.to(x.dtype)).cumsum(2)  # (B, c, Q, H)
    leaves, enters = torch.exp(a[:, :, -1:] - a), torch.exp(a)
    passes = a[:, :, -1]  # (B, c, H) log decay across the chunk
    cut = torch.zeros_like(passes[..., 0], dtype=torch.bool)  # (B, c) whether no state crosses the chunk
    causal = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool, device=x.device).tril()
    if document is not None:
        segment = document_numbers(document.flatten(1)).view_as(document)  # (B, c, Q)
        causal = causal & (segment[..., :, None] == segment[..., None, :])[:, :, None]
        before = segment[..., -1].roll(1, 1)  # (B, c) segment the carried state belongs to
        before[:, 0] = 0
        leaves = leaves * (segment == segment[..., -1:])[..., None]
        enters = enters * (segment == before[..., None])[..., None]
        cut = segment[..., -1] != before

    # Inside a chunk: (C B^T, once per group) * decay, times x dt.
    a = a.transpose(2, 3).contiguous()  # (B, c, H, Q)
    mask = torch.zeros_like(causal, dtype=x.dtype).masked_fill_(~causal, -torch.inf)
    weights = plus(a[..., :, None] - a[..., None, :], mask).exp_()  # (B, c, H, Q, Q)
    weights = times(weights.unflatten(2, groups), (C @ B.mT).unsqueeze(3)).flatten(2, 3)
    xdt = x * dt[..., None]
    y = weights @ xdt.transpose(2, 3)  # (B, c, H, Q, P)

    # What a chunk adds to the state: B^T (x dt * decay), a group's heads side by side.
    xdt = times(xdt, leaves[..., None]).unflatten(3, groups).flatten(4)  # (B, c, Q, G, H/G * P)
    added = (B.mT @ xdt.transpose(2, 3)).unflatten(4, (groups[1], head_dim))  # (B, c, G, N, H/G, P)

    first = None if initial_states is None else _inward(initial_states.to(x.dtype), groups)
    if restart is not None:
        is_first, given = restart  # the given state, decayed across the chunk, replaces what was carried
        given = _inward(given, groups)  # (c, G, N, H/G, P)
        added = added + _per_head(is_first[:, None] * torch.exp(passes), groups) * given
        cut = cut | is_first
    if neighbors is not None:
        _, own = _pass_states(added, passes, cut, None, keep_all=False)
        decay = torch.exp(passes.sum(1)) * ~cut.any(1, keepdim=True)  # (B, H)
        first = _inward(neighbors.state_before(_outward(own), decay), groups)
    carried, states = _pass_states(added, passes, cut, first, keep_all=restart is not None)
    if restart is not None:
        carried = torch.where(is_first.view(-1, 1, 1, 1, 1), given, carried)

    # What a chunk reads from the state that was carried to its start.
    read = (C @ carried.flatten(4)).transpose(2, 3).reshape(x.shape)  # (B, c, Q, H, P)
    y = plus(times(read, enters[..., None]), y.transpose(2, 3))
    if D is not None:
        y = plus(y, x, per_channel(D, x.dtype))
    return y, _outward(states)


def _inward(states: Tensor, groups: tuple[int, int]) -> Tensor:
    """``(..., H, P, N)`` to ``(..., G, N, H/G, P)``: a group's heads side by side, as the matrix products see them."""
    return states.unflatten(-3, groups).movedim(-1, -3)


def _outward(states: Tensor) -> Tensor:
    """Inverse of :func:`_inward`."""
    return states.movedim(-3, -1).flatten(-4, -3)


def _per_head(factor: Tensor, groups: tuple[int, int]) -> Tensor:
    """``(..., H)`` as a factor of ``(..., G, N, H/G, P)``."""
    return factor.unflatten(-1, groups)[..., None, :, None]


def _pass_states(
    added: Tensor, log_decay: Tensor, cut: Tensor, first: Tensor | None, *, keep_all: bool
) -> tuple[Tensor, Tensor]:
    """``S_c = exp(log_decay_c) S_{c-1} + added_c``, or ``added_c`` where ``cut``, with ``S_{-1} = first``, or 0.

    Args:
        added: ``(B, c, G, N, H/G, P)``. log_decay: ``(B, c, H)``. cut: ``(B, c)``.
        first: ``(B, G, N, H/G, P)`` or None.
        keep_all: whether to return the states after every chunk, of a single row.

    Returns:
        The state before each chunk, shaped as ``added``; and the last one ``(B, G, N, H/G, P)``, or with ``keep_all``
        the state after each chunk ``(c, G, N, H/G, P)``.
    """
    groups = added.shape[2], added.shape[4]
    if in_steps(added.device):
        decay = _per_head(torch.exp(log_decay) * ~cut[..., None], groups)
        states = [torch.zeros_like(added[:, 0]) if first is None else first]
        for more, factor in zip(added.unbind(1), decay.unbind(1), strict=True):
            states.append(torch.addcmul(more, states[-1], factor))
        return torch.stack(states[:-1], 1), torch.cat(states[1:]) if keep_all else states[-1]
    per_head = added.permute(0, 1, 2, 4, 3, 5).flatten(2, 3).flatten(3)  # (B, c, H, N P)
    start = None if first is None else first.permute(0, 1, 3, 2, 4).flatten(1, 2).flatten(2)[:, None]
    after = _pass_in_blocks(per_head, log_decay, cut.cumsum(1), start)
    after = after.unflatten(3, (added.shape[3], -1)).unflatten(2, groups).transpose(3, 4)
    before = torch.zeros_like(after[:, :1]) if first is None else first[:, None]
    return torch.cat([before, after[:, :-1]], 1), after[0] if keep_all else after[:, -1]


def _pass_in_blocks(added: Tensor, log_decay: Tensor, epoch: Tensor, first: Tensor | None) -> Tensor:
    """:func:`_pass_states` in few operations. Blocks of ``SCAN_BLOCK`` chunks are summed by one masked matrix product
    (a 1-semiseparable one: the paper's Section 3.2), then the same function passes the blocks' states on, so the work
    is linear in the number of chunks.

    Args:
        added: ``(B, c, H, N P)``. log_decay: ``(B, c, H)``. epoch: ``(B, c)``, grows at every chunk that nothing
            crosses. first: ``(B, 1, H, N P)`` or None.

    Returns:
        The states after each chunk, shaped as ``added``.
    """
    count = added.shape[1]
    block, blocks = count, 1  # also where a graph leaves the count open
    if known(count > SCAN_BLOCK):
        block, blocks = SCAN_BLOCK, (count + SCAN_BLOCK - 1) // SCAN_BLOCK
    pad = blocks * block - count
    if not known(pad == 0):
        added, log_decay = F.pad(added, (0, 0, 0, 0, 0, pad)), F.pad(log_decay, (0, 0, 0, pad))
        epoch = torch.cat([epoch, epoch[:, -1:].expand(-1, pad)], 1)
    added, log_decay, epoch = (t.unflatten(1, (blocks, block)) for t in (added, log_decay, epoch))

    a = log_decay.cumsum(2).transpose(2, 3)  # (B, k, H, r)
    mask = torch.ones(block, block, dtype=torch.bool, device=a.device).tril()
    mask = mask & (epoch[..., :, None] == epoch[..., None, :])[:, :, None]  # (B, k, 1, r, r)
    decay = torch.exp((a[..., :, None] - a[..., None, :]).masked_fill(~mask, -torch.inf))
    states = decay @ added.transpose(2, 3)  # (B, k, H, r, N P)
    before = torch.zeros_like(epoch[..., 0])  # (B, k) epoch of the state carried into each block
    if not known(blocks == 1):
        last = epoch[..., -1]
        before = F.pad(last[:, :-1], (1, 0))
        passed = _pass_in_blocks(states[:, :, :, -1], a[..., -1], last, first)[:, :-1]  # (B, k - 1, H, N P)
        first = torch.cat([torch.zeros_like(states[:, :1, :, 0]) if first is None else first, passed], 1)
    if first is not None:
        enters = torch.exp(a) * (epoch == before[..., None])[:, :, None]  # (B, k, H, r)
        states = torch.addcmul(states, enters[..., None], first.unsqueeze(3))
    return states.transpose(2, 3).flatten(1, 2)[:, :count]


def per_channel(D: Tensor, dtype: torch.dtype) -> Tensor:
    """``D (H,)`` or ``(H, P)`` as a factor of ``(..., H, P)``."""
    return (D if D.dim() == 2 else D[:, None]).to(dtype)
