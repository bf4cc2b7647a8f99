"""Causal softmax attention, on the documents and padding of a :class:`Placement`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.attention.op import attention_step_serves
from ..ops.invariant.attention import Queries
from ..ops.invariant.attention import attend as attend_each
from .causal_conv1d import CausalConv1d
from .conv import causal_convolution
from .kv import KeyValueState
from .norm import RMSNorm
from .placement import OwnKeys, Placement
from .projection import AddTo, linear
from .sequence import PLAIN, SequenceLayout
from .weights import is_unhooked, plain_linear, plain_weight

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""``(module, queries (B, H, T, D), keys (B, H', S, D), values, placement, weights)`` to ``(B, T, H, D)`` and, if
``weights``, to the attention weights ``(B, H, T, S)``."""


def attend_eagerly(
    module: Attention, queries: Tensor, keys: Tensor, values: Tensor, placement: Placement, weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """:data:`Attend` in plain PyTorch, with every weight in memory."""
    row, query, key = (torch.arange(t.shape[i], device=t.device) for t, i in ((queries, 0), (queries, 2), (keys, 2)))
    visible = placement.visible(module.window, len(key))(row[:, None, None, None], None, query[:, None], key)
    mask = torch.zeros((), dtype=queries.dtype, device=queries.device).masked_fill(~visible, float("-inf"))
    return attention(module, queries, keys, values, mask, module.scale, weights=weights)


def attention(
    module: Attention,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention in fp32. ``mask`` is added to the scores; a row of it that hides every key is not NaN but
    meaningless.
    """
    groups = module.num_key_value_groups
    keys, values = (tensor.repeat_interleave(groups, 1) if groups > 1 else tensor for tensor in (keys, values))
    scores = (queries @ keys.mT) * scale
    if mask is not None:
        scores = scores + mask.clamp(min=torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    dropped = nn.functional.dropout(probabilities, dropout, module.training)
    return (dropped @ values).transpose(1, 2), probabilities if weights else None


class Attention(nn.Module):
    """Grouped-query attention: projections, an optional convolution over all of them, rotary embedding, softmax.

    Args:
        input_size, output_size: widths.
        num_heads: H, of the queries.
        num_key_value_heads: H', divides H.
        head_dim: D.
        bias, out_bias: whether the three projections, and the last one, have a bias.
        scale: of the scores; None for ``head_dim ** -0.5``.
        window: how many tokens each sees, itself among them; None for all.
        conv_kernel: taps of a depthwise causal convolution over queries, keys and values, without an activation.
        conv_bias: whether it has a bias.
        key_multiplier: of the keys.
        dropout: of the weights, in training.
        attend: how to run the softmax.
    """

    is_causal = True
    partners: ops.Partners | None = None
    """The devices that have the layer's other heads; None if they are all here."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        window: int | None = None,
        conv_kernel: int | None = None,
        conv_bias: bool = True,
        key_multiplier: float = 1.0,
        dropout: float = 0.0,
        attend: Attend = attend_eagerly,
    ) -> None:
        super().__init__()
        self.head_dim, self.window, self.dropout, self.attend = head_dim, window, dropout, attend
        self.scale = head_dim**-0.5 if scale is None else scale
        self.key_multiplier, self.conv_kernel = key_multiplier, conv_kernel
        self.num_key_value_groups = num_heads // num_key_value_heads
        self.sizes = [num_heads * head_dim, num_key_value_heads * head_dim, num_key_value_heads * head_dim]
        self.q_proj = nn.Linear(input_size, self.sizes[0], bias=bias)
        self.k_proj = nn.Linear(input_size, self.sizes[1], bias=bias)
        self.v_proj = nn.Linear(input_size, self.sizes[2], bias=bias)
        if conv_kernel is not None:
            self.conv1d = CausalConv1d.depthwise(sum(self.sizes), conv_kernel, conv_bias)
        self.o_proj = nn.Linear(self.sizes[0], output_size, bias=out_bias)

    def forward(
        self,
        hidden_states: Tensor,
        placement: Placement,
        layout: SequenceLayout = PLAIN,
        state: KeyValueState | None = None,
        *,
        adds: Sequence[AddTo] = (),
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``(B, T, d)`` to the same; continues ``state`` and adds to it.

        Args:
            hidden_states: the input.
            placement: where its tokens stand.
            layout: their documents.
            state: of this layer; None without a cache.
            adds: of adapters, to the three projections.
            output_attentions: whether to return the weights too, ``(B, H, T, T)``; only without cached tokens.
        """
        placement = placement.to(hidden_states.device)
        entering = hidden_states if self.partners is None else self.partners.entering(hidden_states)
        projected = [linear(module, entering) for module in (self.q_proj, self.k_proj, self.v_proj)]
        if adds:
            projected = [add(hidden_states, own)[0] for add, own in zip(adds, projected, strict=True)]
        multiplier = self.key_multiplier
        if multiplier != 1 and (self.conv_kernel is not None or placement.rotary is None):
            projected[1], multiplier = projected[1] * multiplier, 1.0
        if self.conv_kernel is not None:
            projected = self._convolve(projected, placement, layout, state)
        queries, keys, values = (tensor.unflatten(-1, (-1, self.head_dim)) for tensor in projected)  # (B, T, ., D)
        queries, keys, values = map(placement.align, (queries, keys, values))
        if placement.rotary is not None:
            queries, keys = ops.rotary(queries, keys, *placement.rotary, multiplier)
        queries, keys, values = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
        if state is not None:
            keys, values = state.extend(keys, values, placement)
        weights = None
        if layout.neighbors is not None:
            attended = layout.neighbors.attend(self, queries, keys, values, placement)
        elif ops.is_batch_invariant():
            seen = placement.seen_keys(self.window, keys.shape[2])
            keys, values = (seen.in_order(each) for each in (keys, values))
            attended = attend_each(Queries(queries, keys, values, seen.begin, seen.end, seen.origin, self.scale))
        else:
            attended, weights = self.attend(self, queries, keys, values, placement, output_attentions)
        if weights is not None:
            weights = layout.unalign_matrix(weights)
        return linear(self.o_proj, placement.unalign(attended).flatten(-2)), weights

    def layer(
        self,
        stream: Tensor,
        norm: RMSNorm,
        placement: Placement,
        layout: SequenceLayout = PLAIN,
        state: KeyValueState | None = None,
        *,
        multipliers: tuple[float, float] = (1.0, 1.0),
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``stream + m' self(m norm(stream))``, ``(B, T, d)``; in one op for one token of each of a few sequences on a
        GPU, where weights may be read and the cache is static.

        Args:
            stream: ``(B, T, d)``, the residual stream.
            norm: before the layer.
            placement, layout, state, output_attentions: as in :meth:`forward`.
            multipliers: m and m'.
        """
        call = None if output_attentions else self._step(stream, norm, placement, layout, state, multipliers)
        if call is not None and self.partners is not None:
            call = call._replace(peers=self.partners.peers(stream))
            return ops.attention_step(call, total=self.partners.total), None
        if call is not None:
            return ops.attention_step(call), None
        before, after = multipliers
        x = norm(stream)
        x, weights = self(
            *(x if before == 1 else x * before, placement, layout, state), output_attentions=output_attentions
        )
        return torch.add(stream, x, alpha=after), weights

    def _step(
        self,
        stream: Tensor,
        norm: RMSNorm,
        placement: Placement,
        layout: SequenceLayout,
        state: KeyValueState | None,
        multipliers: tuple[float, float],
    ) -> ops.AttentionStep | None:
        """Arguments of the step of the layer; None where modules have to be called."""
        placement, mask = placement.to(stream.device), placement.masks.get(self.window)
        if not isinstance(mask, OwnKeys) or mask.lengths is None or layout.neighbors is not None:
            return None
        if state is None or self.conv_kernel is not None or not is_unhooked(self):
            return None
        buffers, weight = state.step_buffers(stream.shape[0]), plain_weight(norm)
        if buffers is None or weight is None or not attention_step_serves(stream, buffers[0]):
            return None
        projections, part = (self.q_proj, self.k_proj, self.v_proj, self.o_proj), self.partners is not None
        q, k, v, out = (plain_linear(module, part) for module in projections)
        if q is None or k is None or v is None or out is None:
            return None
        linears = (q, k, v, out)
        if any(each.lora for each in linears) or {matrix.dtype for matrix, *_ in linears} != {buffers[0].dtype}:
            return None
        cos, sin = placement.rotary or (None, None)
        before, after = multipliers
        return ops.AttentionStep(
            *(stream, *buffers, weight, q, k, v, out, mask.lengths, cos, sin, self.scale, norm.eps),
            *(before, self.key_multiplier, after),
        )

    def _convolve(
        self, projected: list[Tensor], placement: Placement, layout: SequenceLayout, state: KeyValueState | None
    ) -> list[Tensor]:
        assert self.conv_kernel is not None
        initial = None if state is None else layout.spread_states(state.initial_conv(placement.rows))
        inputs = torch.cat(projected, -1)
        if layout.neighbors is not None and self.conv_kernel > 1:
            initial = layout.neighbors.columns_before(inputs[:, inputs.shape[1] - self.conv_kernel + 1 :].mT)
        joined, final = causal_convolution(*(self.conv1d, self.conv_kernel, inputs, initial, layout, None))
        if state is not None:
            state.update_conv(layout.gather_states(final), inputs)
        return list(joined.split(self.sizes, -1))
