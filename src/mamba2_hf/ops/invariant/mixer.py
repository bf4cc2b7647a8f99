"""A mixer by its recurrence: prompts, packed documents and steps are the same sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ArgumentError, BackendError
from .. import dispatch
from ..conv.op import ACTIVATIONS, Conv, ConvUpdate
from ..mixer.op import Inner, Layer, LayerStep, Step
from ..mixer.torch import scaled, times_parts
from ..norm.op import Norm
from ..packing import document_starts
from ..runtime.linear import project
from ..runtime.modes import needs_grad, product_dtype, without_autocast
from ..scan.op import Scan, Update
from ..slots import step_in_slots
from ..spec import NO_RING, UNPACKED, Packing, Ring, compute_dtype
from .elementwise import activate, gated_rms_norm, silu, softplus, sum_rows


class Documents(NamedTuple):
    """The documents of a call as rows of a grid ``(S, L)``, each at its left."""

    lengths: Tensor | None
    """``(S,)``; None where the grid is the call's own ``(B, T)``."""
    source: Tensor
    """``(S, L)`` places in the flat ``(B, T)``, any where there is no token."""
    valid: Tensor
    """``(S, L)`` whether there is a token."""
    first: Tensor
    """``(B or S,)`` the document that each initial state enters."""
    last: Tensor
    """``(B or S,)`` the document that leaves each final state."""

    def rows(self, tensor: Tensor) -> Tensor:
        """``(B, T, ...)`` on the grid, zeros where there is no token."""
        if self.lengths is None:
            return tensor
        valid = self.valid.view(*self.valid.shape, *[1] * (tensor.dim() - 2))
        return torch.where(valid, tensor.flatten(0, 1)[self.source], 0)

    def back(self, grid: Tensor, batch: int, tokens: int) -> Tensor:
        """Inverse of :meth:`rows`: zeros for tokens of no document."""
        if self.lengths is None:
            return grid
        flat = grid.new_zeros(batch * tokens, *grid.shape[2:])
        flat[self.source[self.valid]] = grid[self.valid]
        return flat.unflatten(0, (batch, tokens))

    def enter(self, states: Tensor | None, like: Tensor, *shape: int) -> Tensor:
        """Initial states of all documents, ``(S, *shape)``: a new tensor in the dtype of ``like``, zeros for None."""
        entering = like.new_zeros(self.source.shape[0], *shape)
        if states is not None:
            entering[self.first] = states.to(like.dtype)
        return entering


def documents(packing: Packing, batch: int, tokens: int, device: torch.device) -> Documents:
    """The documents of rows ``(B, T)``."""
    seq_idx, bounds = packing
    rows = torch.arange(batch, device=device)
    columns = torch.arange(tokens, device=device)
    if seq_idx is None and bounds is None:
        source = rows[:, None] * tokens + columns
        return Documents(None, source, source >= 0, rows, rows)
    if bounds is not None:
        bounds = bounds.to(device).long()
        begin, lengths = bounds[:-1], bounds.diff()
        first = last = torch.arange(len(begin), device=device)
    else:
        assert seq_idx is not None  # one of the two is given
        starts = document_starts(seq_idx)  # (B, T), the first token of each row among them
        begin = starts.flatten().nonzero()[:, 0]
        lengths = torch.cat([begin, begin.new_tensor([batch * tokens])]).diff()
        count = starts.sum(1).cumsum(0)
        first, last = F.pad(count, (1, 0))[:-1], count - 1
    columns = columns[: max(int(lengths.max()), 1)]
    valid = columns < lengths[:, None]
    return Documents(lengths, torch.where(valid, begin[:, None] + columns, 0), valid, first, last)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, activation: str | None, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Convolves the rows of ``x (S, L, C)`` behind ``history (S, C, K - 1)``.

    Returns:
        ``(S, L, C)``, and each row's last inputs ``(S, C, K - 1)``, where it ends: at ``ends (S,)``, or at L.
    """
    dtype, tokens, taps = compute_dtype(x.dtype), x.shape[1], weight.shape[1]
    inputs = torch.cat([history.mT, x], 1)  # (S, K - 1 + L, C)
    if ends is None:
        final = inputs[:, tokens:]
    else:
        places = ends[:, None] + torch.arange(taps - 1, device=x.device)
        final = inputs.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
    wide, taps_first = inputs.to(dtype), weight.to(dtype).T.contiguous()
    y = wide[:, :tokens] * taps_first[0]
    for tap in range(1, taps):
        y += wide[:, tap : tap + tokens] * taps_first[tap]
    y = y if bias is None else y.add_(bias.to(dtype))
    return activate(y, ACTIVATIONS[activation]).to(x.dtype), final.mT.contiguous()


def _step_size(dt: Tensor, bias: Tensor | None, is_raw: bool, limit: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """As :func:`mamba2_hf.ops.scan.reference.step_size`."""
    dt = dt.to(dtype) if bias is None else dt.to(dtype) + bias.to(dtype)
    return (softplus(dt) if is_raw else dt).clamp(*limit)


class _Scan(NamedTuple):
    """Arguments of the recurrence, on a grid of documents."""

    x: Tensor
    """``(S, L, H, P)``"""
    dt: Tensor
    """``(S, L, H)`` step sizes, zero where there is no token."""
    A: Tensor
    """``(H,)``"""
    B: Tensor
    """``(S, L, G, N)``"""
    C: Tensor
    """``(S, L, G, N)``"""
    D: Tensor | None
    """``(H,)`` or ``(H, P)``"""
    state: Tensor
    """``(S, H, P, N)``, dense: updated in place."""
    lengths: Tensor | None
    """``(S,)`` tokens of each document; None for L."""


def _recur(call: _Scan) -> Tensor:
    """``(S, L, H, P)`` in the dtype of x."""
    if dispatch.usable(call.x.device)[0]:
        of_triton: Tensor = dispatch.backend_module("triton").recur(*call)
        return of_triton
    x, dt, A, B, C, D, state, _ = call
    (documents, tokens, heads, width), (groups, size) = x.shape, B.shape[2:]
    dtype, per_group = state.dtype, heads // groups
    x, B, C = (tensor.to(dtype) for tensor in (x, B, C))
    decays = torch.exp(dt * A.to(dtype)).view(documents, tokens, groups, per_group, 1, 1)
    inputs = (x * dt[..., None]).view(documents, tokens, groups, per_group, width, 1)
    B, C = (maps.reshape(documents, tokens, groups, 1, 1, size) for maps in (B, C))
    s, products = state.view(documents, groups, per_group, width, size), torch.empty_like(state)
    products = products.view(s.shape)
    y = torch.empty_like(inputs)
    for t in range(tokens):
        s.mul_(decays[:, t]).add_(torch.mul(inputs[:, t], B[:, t], out=products))
        y[:, t] = sum_rows(torch.mul(s, C[:, t], out=products))
    y = y.view(x.shape)
    if D is not None:
        y += x * (D if D.dim() == 2 else D[:, None]).to(dtype)
    return y.to(call.x.dtype)


def _refuse(call: Any, neighbors: Any = None, partners: Any = None) -> None:
    """Raises where a call asks for what this backend does not do."""
    if neighbors is not None or partners is not None:
        raise BackendError(
            "batch_invariant() serves models that one process has whole: others' sums take another order"
        )
    if needs_grad(*(part for part in _flat(call) if isinstance(part, Tensor))):
        raise BackendError("batch_invariant() knows no gradients: use torch.no_grad()")


def _flat(values: Any) -> Any:
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value


def _check_state(state: Tensor | None, dtype: torch.dtype) -> None:
    if state is not None and state.dtype != dtype:
        raise ArgumentError(
            f"states in {state.dtype}, which are rounded wherever a call ends, depend on how a text is divided among "
            f"calls: batch_invariant() needs them in {dtype}, which is what state_dtype=None gives"
        )


def causal_conv1d(call: Conv) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.causal_conv1d`; always returns the final states too."""
    _refuse(call)
    x, weight, bias, initial, packing, activation = call
    batch, tokens, channels = x.shape
    docs = documents(packing, batch, tokens, x.device)
    history = docs.enter(initial, x, channels, weight.shape[1] - 1)
    y, final = _convolve(docs.rows(x), weight, bias, history, activation, docs.lengths)
    y = docs.back(y, batch, tokens)
    if packing.seq_idx is not None:
        y = torch.where((packing.seq_idx >= 0)[..., None], y, 0)
    return y, final[docs.last]


def causal_conv1d_update(call: ConvUpdate) -> Tensor:
    """See :func:`mamba2_hf.ops.causal_conv1d_update`."""
    _refuse(call)
    if call.slots is not None:
        return step_in_slots(
            call.conv_state, call.slots, lambda state: causal_conv1d_update(call._replace(conv_state=state, slots=None))
        )
    x, conv_state, weight, bias, activation, _ = call
    y, _ = _convolve(x, weight, bias, _last(conv_state, weight.shape[1] - 1).to(x.dtype), activation, None)
    _move(conv_state, x)
    return y


def _last(columns: Tensor, count: int) -> Tensor:
    return columns[..., columns.shape[-1] - count :]


def _move(conv_state: Tensor, block: Tensor) -> None:
    """Moves ``conv_state (B, C, L)`` on by the inputs ``block (B, T, C)``, in place."""
    conv_state.copy_(_last(torch.cat([conv_state, block.mT.to(conv_state.dtype)], -1), conv_state.shape[-1]))


def ssd_chunk_scan(call: Scan, neighbors: Any = None) -> tuple[Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.ssd_chunk_scan`; always returns the final states too."""
    _refuse(call, neighbors)
    x, dt, A, B, C, D, z, dt_bias, initial, packing, dt_softplus, dt_limit, _ = call
    dtype, (batch, tokens, *_) = compute_dtype(x.dtype), x.shape
    _check_state(initial, dtype)
    docs = documents(packing, batch, tokens, x.device)
    dt = docs.rows(_step_size(dt, dt_bias, dt_softplus, dt_limit, dtype))
    state = docs.enter(initial, dt, *x.shape[2:], B.shape[-1])
    y = _recur(_Scan(docs.rows(x), dt, A, docs.rows(B), docs.rows(C), D, state, docs.lengths))
    y = docs.back(y, batch, tokens)
    if z is not None:
        y = (y * silu(z.to(dtype))).to(x.dtype)
    return y, state[docs.last]


def ssd_state_update(call: Update) -> Tensor:
    """See :func:`mamba2_hf.ops.ssd_state_update`."""
    _refuse(call)
    if call.is_dense:
        raise BackendError("batch_invariant() has no step sizes and decay rates of channels, as Mamba-1 has them")
    if call.slots is not None:
        return step_in_slots(
            call.state, call.slots, lambda state: ssd_state_update(call._replace(state=state, slots=None))
        )
    x, dt, B, C, z = (None if each is None else each[:, None] for each in (call.x, call.dt, call.B, call.C, call.z))
    assert x is not None and dt is not None and B is not None and C is not None  # noqa: PT018 - for mypy
    rest = (call.D, z, call.dt_bias, call.state, UNPACKED, call.dt_softplus, call.dt_limit)
    y, state = ssd_chunk_scan(Scan(x, dt, call.A, B, C, *rest))
    call.state.copy_(state)
    return y[:, 0]


def mamba2_inner(call: Inner, neighbors: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.inner`. The states come at no cost, so they are there whether asked for or not."""
    _refuse(call, neighbors)
    with without_autocast(call.zxbcdt.device):
        return _inner(call)


def _inner(call: Inner) -> tuple[Tensor, Tensor, Tensor]:
    weights, spec, shape = call.weights, call.spec, call.shape
    inner, maps = shape.heads * shape.head_dim, shape.groups * shape.state
    z, xbc, dt = call.zxbcdt.split([inner, inner + 2 * maps, shape.heads], -1)
    conv = Conv(xbc, weights.conv_weight, weights.conv_bias, call.conv_initial_states, call.packing, spec.activation)
    convolved, conv_state = causal_conv1d(conv)
    x, B, C = convolved.split([inner, maps, maps], -1)
    heads, groups = (shape.heads, shape.head_dim), (shape.groups, shape.state)
    scanned = Scan(
        *(x.unflatten(-1, heads), dt, weights.rates, B.unflatten(-1, groups), C.unflatten(-1, groups), weights.D, None),
        *(weights.dt_bias, call.ssm_initial_states, call.packing, True, spec.dt_limit),
    )
    y, state = ssd_chunk_scan(scanned)
    y, norm = y.flatten(-2), weights.gated_norm_weight
    if norm is None:
        return (y * silu(z.to(compute_dtype(z.dtype)))).to(y.dtype), conv_state, state
    of_norm = (norm, spec.gated_norm_eps, spec.group_size, spec.norm_before_gate, y.dtype)
    return gated_rms_norm(Norm(y, z, *of_norm)), conv_state, state


def mamba2_step(call: Step) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_step`."""
    u, conv_state, ssm_state, weights, spec = call
    inner, heads = ssm_state.shape[1] * ssm_state.shape[2], ssm_state.shape[1]
    y, _, ssm = mamba2_inner(
        Inner(u, weights, spec, UNPACKED, _last(conv_state, weights.conv_weight.shape[1] - 1), ssm_state)
    )
    _move(conv_state, u[..., inner : u.shape[-1] - heads])
    ssm_state.copy_(ssm)
    return y


def mamba2_layer(call: Layer, neighbors: Any = None, partners: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.layer`."""
    _refuse(call, neighbors, partners)
    y, conv_state, ssm_state = mamba2_inner(call.mixer(_entered(call, call.dtype), call.weights.mixer.rates))
    return _left(call, y), conv_state, ssm_state


def mamba2_layer_step(call: LayerStep) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_layer_step`."""
    _refuse(call)
    _, conv_state, ssm_state, weights, spec, *_ = call
    zxbcdt = _entered(call, product_dtype(weights.in_proj.weight))
    return _left(call, mamba2_step(Step(zxbcdt, conv_state, ssm_state, weights.mixer, spec)))


def new_ring(conv_state: Tensor, ssm_state: Tensor) -> Ring:
    """See :func:`mamba2_hf.ops.new_ring`: states are written at every step here."""
    return NO_RING


def _entered(call: Layer | LayerStep, dtype: torch.dtype) -> Tensor:
    """What in_proj gives, times the multipliers."""
    stream, weights, spec = call.stream, call.weights, call.spec
    normed = gated_rms_norm(Norm(stream, None, weights.norm_weight, spec.norm_eps, stream.shape[2], False, dtype))
    zxbcdt = project(scaled(normed, spec.input_multiplier), weights.in_proj)
    return times_parts(zxbcdt, spec.multipliers, weights.mixer.heads * spec.head_dim, weights.mixer.heads)


def _left(call: Layer | LayerStep, y: Tensor) -> Tensor:
    """What out_proj gives, times its multiplier, added to the residual."""
    return call.added_to + scaled(project(y, call.weights.out_proj), call.spec.output_multiplier)
