"""SSD in chunks (paper, Section 6) and the single step, in PyTorch.

A differentiable call keeps its inputs only and recomputes the rest in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..neighbors import Neighbors
from ..packing import chunk_layout
from ..runtime.modes import known, recomputed, times, without_autocast
from ..slots import step_in_slots
from ..spec import CHUNK_SIZE, compute_dtype
from .chunks import Chunks, per_channel, scan_chunks
from .op import Scan, Update
from .reference import step_size


def ssd_chunk_scan(call: Scan, neighbors: Neighbors | None = None, *, recompute: bool = True) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.ssd_chunk_scan`; always returns the final states too.

    With ``neighbors`` rows are slices, whose documents ``seq_idx`` tells apart, if there are several.
    ``recompute=False`` is for callers that recompute a larger region themselves.
    """

    def scan(call: Scan) -> tuple[Tensor, Tensor]:
        return _scan_rows(call, neighbors) if call.packing.cu_seqlens is None else _scan_packed(call)

    with without_autocast(call.x.device):
        if recompute:
            rest: Any = call[9:]
            return recomputed(lambda *tensors: scan(Scan(*tensors, *rest)), *call[:9])
        return scan(call)


def _scan_rows(call: Scan, neighbors: Neighbors | None) -> tuple[Tensor, Tensor]:
    """Every row is one sequence, or several told apart by ``seq_idx``."""
    x, dt, A, B, C, D, z, dt_bias, initial_states, (seq_idx, _), dt_softplus, dt_limit, chunk_size = call
    chunk_size = chunk_size or CHUNK_SIZE
    tokens, dtype = x.shape[1], compute_dtype(x.dtype)
    size = tokens if known(tokens <= chunk_size) else chunk_size
    count = (tokens + size - 1) // size
    open_ = not (known(count == 1) or known(count > 1))
    if open_:  # one more, of padding alone: a graph for many chunks does not serve one
        count = (tokens + 2 * size - 1) // size
    pad = count * size - tokens

    def chunked(tensor: Tensor) -> Tensor:
        padded = tensor if known(pad == 0) else F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
        return padded.unflatten(1, (count, size))

    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    chunks = Chunks(chunked(x.to(dtype)), chunked(dt), chunked(B.to(dtype)), chunked(C.to(dtype)))
    document = None
    if seq_idx is not None:  # padding continues the last document, so that the final state is the last document's
        document = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, pad)], 1).unflatten(1, (count, size))
    y, states = scan_chunks(chunks, A, D, initial_states, document=document, neighbors=neighbors)
    y = y.flatten(1, 2)
    y = y[:, torch.arange(tokens, device=y.device)] if open_ else y[:, :tokens]  # a slice's strides tell its length
    return _gate(y, z).to(x.dtype), states.contiguous()


def _scan_packed(call: Scan) -> tuple[Tensor, Tensor]:
    """One row of documents, each with its own initial and final state: chunks start where documents start."""
    x, dt, A, B, C, D, z, dt_bias, initial_states, (_, cu_seqlens), dt_softplus, dt_limit, chunk_size = call
    chunk_size = chunk_size or CHUNK_SIZE
    assert cu_seqlens is not None  # else there are no bounds
    tokens, dtype = x.shape[1], compute_dtype(x.dtype)
    size = tokens if known(tokens <= chunk_size) else chunk_size
    layout = chunk_layout(cu_seqlens.to(x.device), tokens, size)

    def chunked(tensor: Tensor) -> Tensor:
        return tensor[:, layout.source].to(dtype).unflatten(1, (-1, size))

    steps = step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    chunks = Chunks(chunked(x), chunked(steps) * layout.valid.view(-1, size, 1), chunked(B), chunked(C))
    if initial_states is None:
        initial_states = x.new_zeros(cu_seqlens.shape[0] - 1, *x.shape[2:], B.shape[-1], dtype=dtype)
    entering = initial_states.to(dtype)[layout.document.clamp(max=initial_states.shape[0] - 1)]  # (c, H, P, N)
    y, states = scan_chunks(chunks, A, D, None, restart=(layout.is_first, entering))
    y = _gate(y.flatten(1, 2)[:, layout.slot], z).to(x.dtype)
    final = torch.where(layout.is_empty[:, None, None, None], initial_states, states[layout.last_chunk])
    return torch.where(layout.owned[:, None, None], y, 0), final


def _gate(y: Tensor, z: Tensor | None) -> Tensor:
    return y if z is None else times(F.silu(z.to(y.dtype)), y)


def ssd_state_update(call: Update) -> Tensor:
    """See :func:`mamba2_hf.ops.ssd_state_update`."""
    if call.slots is not None:
        return step_in_slots(
            call.state, call.slots, lambda state: ssd_state_update(call._replace(state=state, slots=None))
        )
    state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, _ = call
    dtype = compute_dtype(x.dtype)
    groups = (B.shape[1], state.shape[1] // B.shape[1])
    dt = dt if dt.dim() == 3 else dt[..., None]
    bias = None if dt_bias is None else per_channel(dt_bias, dtype)
    dt = step_size(dt, bias, dt_softplus, dt_limit, dtype)  # (B, H, 1 or P)
    decay = torch.exp(dt[..., None] * (A if A.dim() == 3 else A[:, None, None]).to(dtype))  # (B, H, 1 or P, 1 or N)
    inputs = (x.to(dtype) * dt).unflatten(1, groups)[..., None]  # (B, G, H/G, P, 1)
    in_place = state.dtype == dtype
    new = state.mul_(decay) if in_place else state.to(dtype) * decay
    new = new.unflatten(1, groups).addcmul_(inputs, B.to(dtype)[:, :, None, None])  # (B, G, H/G, P, N)
    if not in_place:
        state.copy_(new.flatten(1, 2))
    with without_autocast(x.device):  # C first: on a CPU, matrices times rows take a fraction of matrices times columns
        y = C.to(dtype)[:, :, None] @ new.flatten(2, 3).mT  # (B, G, 1, H/G * P)
    y = y.reshape(x.shape)
    if D is not None:
        y = torch.addcmul(y, x.to(dtype), per_channel(D, dtype))
    return _gate(y, z).to(x.dtype)
