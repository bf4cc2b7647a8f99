"""SSD in chunks (paper, Section 6) and the single step, in PyTorch.

What keeps it lean: ``C B^T`` is formed once per group and not per head; the state products run as one matrix product
per chunk and group with the heads side by side; states pass between chunks in a blocked scan whose work is linear in
the number of chunks; and a differentiable call keeps its inputs only and recomputes the rest in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checks import SSDShape
from ..reference import compute_dtype, step_size
from .packing import chunk_layout
from .precision import without_autocast

CHUNK_SIZE = 64  # tokens of a chunk: the quadratic part costs Q per token, passing states costs N P / Q
SCAN_BLOCK = 16  # chunks whose states are passed by one matrix product


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    shape: SSDShape,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    recompute: bool = True,
) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.ssd_chunk_scan`; always returns the final states too.

    ``recompute=False`` is for callers that recompute a larger region themselves.
    """
    scan: Callable[..., tuple[Tensor, Tensor]] = _scan_packed if cu_seqlens is not None else _scan_rows
    args = (
        *(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit),
        *(chunk_size or CHUNK_SIZE, initial_states, seq_idx if cu_seqlens is None else cu_seqlens),
    )
    with without_autocast(x.device):
        if recompute and needs_grad(x, dt, A, B, C, D, z, dt_bias, initial_states):
            return checkpoint(scan, *args, use_reentrant=False, preserve_rng_state=False)
        return scan(*args)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will record an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def known(condition: bool) -> bool:
    """A condition on sizes, False where it depends on a size that a compiled or exported graph leaves open."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


class _Chunks(NamedTuple):
    """Operands of the scan, cut into chunks, in the compute dtype."""

    x: Tensor  # (B, c, Q, H, P)
    dt: Tensor  # (B, c, Q, H), after bias, softplus and clamp; 0 on padding
    B: Tensor  # (B, c, Q, G, N)
    C: Tensor  # (B, c, Q, G, N)


def _scan_rows(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Every row is one sequence, or several told apart by ``seq_idx``."""
    tokens, dtype = x.shape[1], compute_dtype(x.dtype)
    size = tokens if known(tokens <= chunk_size) else chunk_size
    count = (tokens + size - 1) // size
    open_ = not (known(count == 1) or known(count > 1))
    if open_:  # one more, of padding alone: a graph for many chunks does not serve one
        count = (tokens + 2 * size - 1) // size
    pad = count * size - tokens

    def cut(tensor: Tensor) -> Tensor:
        padded = tensor if known(pad == 0) else F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
        return padded.unflatten(1, (count, size))

    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    chunks = _Chunks(cut(x.to(dtype)), cut(dt), cut(B.to(dtype)), cut(C.to(dtype)))
    document = None
    if seq_idx is not None:  # padding continues the last document, so that the final state is the last document's
        document = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, pad)], 1).unflatten(1, (count, size))
    y, states = _scan_chunks(chunks, A.to(dtype), initial_states, document=document)
    y = y.flatten(1, 2)
    y = y[:, torch.arange(tokens, device=y.device)] if open_ else y[:, :tokens]  # a slice's strides tell its length
    return _skip_and_gate(y, x, D, z), states[:, -1]


def _scan_packed(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int,
    initial_states: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """One row of documents, each with its own initial and final state: chunks start where documents start."""
    tokens, dtype = x.shape[1], compute_dtype(x.dtype)
    size = tokens if known(tokens <= chunk_size) else chunk_size
    layout = chunk_layout(cu_seqlens.to(x.device), tokens, size)

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:, layout.source].to(dtype).unflatten(1, (-1, size))

    steps = step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    chunks = _Chunks(cut(x), cut(steps) * layout.valid.view(-1, size, 1), cut(B), cut(C))
    if initial_states is None:
        initial_states = x.new_zeros(cu_seqlens.shape[0] - 1, *x.shape[2:], B.shape[-1], dtype=dtype)
    entering = initial_states.to(dtype)[layout.document.clamp(max=initial_states.shape[0] - 1)]  # (c, H, P, N)
    y, states = _scan_chunks(chunks, A.to(dtype), None, restart=(layout.is_first, entering))
    y = torch.where(layout.owned[:, None, None], y.flatten(1, 2)[:, layout.slot], 0)
    final = torch.where(layout.is_empty[:, None, None, None], initial_states, states[0, layout.last_chunk])
    y = _skip_and_gate(y, x, D, z)
    return torch.where(layout.owned[:, None, None], y, 0), final


def _scan_chunks(
    chunks: _Chunks,
    A: Tensor,
    initial_states: Tensor | None,
    *,
    document: Tensor | None = None,
    restart: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunked form itself.

    Args:
        chunks: operands; ``c`` chunks of ``Q`` tokens.
        A: ``(H,)``.
        initial_states: ``(B, H, P, N)``, entering the first chunk of each row.
        document: ``(B, c, Q)`` ids; nothing passes between tokens whose ids differ on the way.
        restart: ``(c,)`` mask of the chunks that a given state ``(c, H, P, N)`` enters in place of the carried one.

    Returns:
        ``y (B, c, Q, H, P)`` without skip and gate, and the state after each chunk, ``(B, c, H, P, N)``.
    """
    x, dt, B, C = chunks
    batch, count, size, heads, head_dim = x.shape
    groups = B.shape[-2]
    per_group = heads // groups

    a = (dt * A).cumsum(2).permute(0, 1, 3, 2)  # (B, c, H, Q) log decay from the chunk's start
    causal = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    leaves = torch.exp(a[..., -1:] - a)  # (B, c, H, Q) decay from each token to the chunk's end
    enters = torch.exp(a)  # (B, c, H, Q) decay from the chunk's start to each token
    passes = a[..., -1]  # (B, c, H) log decay across the chunk
    cut = torch.zeros_like(passes[..., 0], dtype=torch.bool)  # (B, c) whether no state crosses the chunk
    if document is not None:
        segment = _segments(document)  # (B, c, Q)
        causal = causal & (segment[..., :, None] == segment[..., None, :])[:, :, None]
        before = segment[..., -1].roll(1, 1)  # (B, c) segment the carried state belongs to
        before[:, 0] = 0
        leaves = leaves * (segment == segment[..., -1:])[:, :, None]
        enters = enters * (segment == before[..., None])[:, :, None]
        cut = segment[..., -1] != before

    # Inside a chunk: (C B^T, once per group) * decay * dt, times x.
    decay = torch.exp((a[..., :, None] - a[..., None, :]).masked_fill(~causal, -torch.inf))  # (B, c, H, Q, Q)
    scores = C.transpose(2, 3) @ B.permute(0, 1, 3, 4, 2)  # (B, c, G, Q, Q)
    steps = dt.transpose(2, 3)  # (B, c, H, Q)
    weights = (decay * steps[..., None, :]).unflatten(2, (groups, per_group)) * scores.unsqueeze(3)
    y = (weights.flatten(2, 3) @ x.transpose(2, 3)).transpose(2, 3)  # (B, c, Q, H, P)

    # What a chunk adds to the state: B^T (x * weight), a group's heads side by side.
    weighted = x * (leaves * steps).transpose(2, 3)[..., None]  # (B, c, Q, H, P)
    weighted = weighted.view(batch, count, size, groups, per_group * head_dim).transpose(2, 3)
    added = B.permute(0, 1, 3, 4, 2) @ weighted  # (B, c, G, N, H/G * P)
    added = added.unflatten(-1, (per_group, head_dim)).permute(0, 1, 2, 4, 3, 5).flatten(2, 3)  # (B, c, H, N, P)

    if initial_states is not None:
        first = initial_states.to(x.dtype).transpose(-1, -2)[:, None]  # (B, 1, H, N, P)
        open_ = torch.exp(passes[:, :1]) * ~cut[:, :1, None]
        added = torch.cat([added[:, :1] + open_[..., None, None] * first, added[:, 1:]], 1)
    elif restart is not None:
        is_first, given = restart  # the given state, decayed across the chunk, replaces what was carried
        given = given.transpose(-1, -2)  # (c, H, N, P)
        added = added + (is_first[:, None] * torch.exp(passes))[..., None, None] * given
        cut = cut | is_first
    states = _pass_states(added, passes, cut.cumsum(1))  # (B, c, H, N, P) after each chunk

    carried = states.roll(1, 1)
    carried[:, 0] = 0 if initial_states is None else first[:, 0]
    if restart is not None:
        carried = torch.where(is_first[:, None, None, None], given, carried)
    carried = carried.unflatten(2, (groups, per_group)).permute(0, 1, 2, 4, 3, 5).flatten(4)  # (B, c, G, N, H/G * P)
    read = (C.transpose(2, 3) @ carried).transpose(2, 3)  # (B, c, Q, G, H/G * P)
    y = y + read.reshape(y.shape) * enters.transpose(2, 3)[..., None]
    return y, states.transpose(-1, -2)


def _pass_states(added: Tensor, log_decay: Tensor, epoch: Tensor) -> Tensor:
    """``S_c = exp(log_decay_c) S_{c-1} + added_c`` along dim 1, with ``S_{-1} = 0``.

    ``epoch`` grows at every chunk that nothing crosses. Blocks of ``SCAN_BLOCK`` chunks are summed by one masked
    matrix product (a 1-semiseparable one: the paper's Section 3.2), then the same function passes the blocks' states
    on, so the work is linear in the number of chunks.

    Args:
        added: ``(B, c, H, N, P)``. log_decay: ``(B, c, H)``. epoch: ``(B, c)``.

    Returns:
        ``(B, c, H, N, P)``.
    """
    count = added.shape[1]
    block, blocks = count, 1  # also where a graph leaves the count open
    if known(count > SCAN_BLOCK):
        block, blocks = SCAN_BLOCK, (count + SCAN_BLOCK - 1) // SCAN_BLOCK
    pad = blocks * block - count
    if not known(pad == 0):
        added, log_decay = F.pad(added, (0, 0) * 3 + (0, pad)), F.pad(log_decay, (0, 0, 0, pad))
        epoch = torch.cat([epoch, epoch[:, -1:].expand(-1, pad)], 1)
    added, log_decay, epoch = (t.unflatten(1, (blocks, block)) for t in (added, log_decay, epoch))

    a = log_decay.cumsum(2).transpose(2, 3)  # (B, k, H, r)
    mask = torch.ones(block, block, dtype=torch.bool, device=a.device).tril()
    mask = mask & (epoch[..., :, None] == epoch[..., None, :])[:, :, None]  # (B, k, 1, r, r)
    decay = torch.exp((a[..., :, None] - a[..., None, :]).masked_fill(~mask, -torch.inf))
    states = (decay @ added.transpose(2, 3).flatten(4)).unflatten(-1, added.shape[-2:])  # (B, k, H, r, N, P)
    if not known(blocks == 1):
        last = epoch[..., -1]  # (B, k)
        before = F.pad(last[:, :-1], (1, 0))  # (B, k) epoch of the state carried into each block
        carried = _pass_states(states[:, :, :, -1], a[..., -1], last)
        carried = F.pad(carried[:, :-1], (0, 0) * 3 + (1, 0))  # (B, k, H, N, P)
        enters = torch.exp(a) * (epoch == before[..., None])[:, :, None]  # (B, k, H, r)
        states = states + enters[..., None, None] * carried.unsqueeze(3)
    return states.transpose(2, 3).flatten(1, 2)[:, :count]


def _segments(document: Tensor) -> Tensor:
    """Numbers the documents of each row in order, so that ids which return later stay apart: ``(B, c, Q)``."""
    flat = document.flatten(1)
    return F.pad((flat[:, 1:] != flat[:, :-1]).long().cumsum(1), (1, 0)).view_as(document)


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = torch.addcmul(y, x.to(y.dtype), (D if D.dim() == 2 else D[:, None]).to(y.dtype))
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    shape: SSDShape,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> Tensor:
    """See :func:`mamba2_hf.ops.ssd_state_update`."""
    dtype = compute_dtype(x.dtype)
    groups = (shape.groups, shape.heads // shape.groups)
    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)  # (B, H)
    decay = torch.exp(dt * A.to(dtype))[..., None, None]
    inputs = (x.to(dtype) * dt[..., None]).unflatten(1, groups)[..., None]  # (B, G, H/G, P, 1)
    in_place = state.dtype == dtype
    new = state.mul_(decay) if in_place else state.to(dtype) * decay
    new = new.unflatten(1, groups).addcmul_(inputs, B.to(dtype)[:, :, None, None])  # (B, G, H/G, P, N)
    if not in_place:
        state.copy_(new.flatten(1, 2))
    with without_autocast(x.device):  # C first: on a CPU, matrices times rows take a fraction of matrices times columns
        y = C.to(dtype)[:, :, None] @ new.flatten(2, 3).mT  # (B, G, 1, H/G * P)
    return _skip_and_gate(y.reshape(x.shape), x, D, z)
