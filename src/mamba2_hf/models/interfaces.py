"""transformers' interfaces: how attention and experts are run is for the user to choose, by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .. import ops
from ..errors import ArgumentError
from ..layers import Attention, Experts, Placement
from ..layers.attention import attend_eagerly, attention
from ..layers.placement import FlatDocuments, OwnKeys
from ..ops.attention.op import attend_one_serves


def attend(
    module: Any, queries: Tensor, keys: Tensor, values: Tensor, placement: Placement, weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """:data:`~mamba2_hf.layers.attention.Attend` as ``config._attn_implementation`` names it; weights are always
    computed eagerly. :func:`prepare_masks` has to come first.
    """
    if weights:
        return attend_eagerly(module, queries, keys, values, placement, weights=True)
    run = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, _attend_eagerly)
    mask = placement.masks[module.window]
    if isinstance(mask, OwnKeys):
        if attend_one_serves(queries, keys):
            return ops.attend_one(queries, keys, values, mask.lengths, module.scale).transpose(1, 2), None
        mask = mask.additive(keys)
    dropout = module.dropout if module.training else 0.0
    if isinstance(mask, FlatDocuments):
        return _attend_flat(run, module, (queries, keys, values), mask, dropout), None
    out, _ = run(
        *(module, queries, keys, values, mask),
        dropout=dropout,
        scaling=module.scale,
        sliding_window=module.window,
    )
    return out, None


def _attend_eagerly(
    module: Attention,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    return attention(module, queries, keys, values, mask, scaling, dropout)


def _attend_flat(
    run: Any, module: Any, tensors: tuple[Tensor, Tensor, Tensor], documents: FlatDocuments, dropout: float
) -> Tensor:
    """Runs a kernel on documents laid end to end: ``(B, H, T, D)`` and keys ``(B, H', S, D)`` to ``(B, T, H, D)``."""
    grid = tensors[0].transpose(1, 2)  # (B, T, H, D)
    if not documents.most_queries:
        return torch.zeros_like(grid)
    places = (documents.queries, documents.keys, documents.keys)
    flat = [
        tensor.transpose(1, 2).flatten(0, 1)[place].transpose(0, 1)[None]  # (1, H, Q, D)
        for tensor, place in zip(tensors, places, strict=True)
    ]
    out, _ = run(
        *(module, *flat, None),
        dropout=dropout,
        scaling=module.scale,
        sliding_window=module.window,
        cu_seq_lens_q=documents.query_bounds,
        cu_seq_lens_k=documents.key_bounds,
        max_length_q=documents.most_queries,
        max_length_k=documents.most_keys,
    )
    placed = out.new_zeros(grid.shape[0] * grid.shape[1], *out.shape[2:])
    return placed.index_copy(0, documents.queries, out[0]).unflatten(0, grid.shape[:2])


def prepare_masks(
    config: Any, placement: Placement, windows: Iterable[int | None], dtype: torch.dtype, *, piece: bool = False
) -> None:
    """Makes what :func:`attend` needs of a call, once for all layers with the same window.

    Args:
        config: names the implementation of attention.
        placement: of the tokens.
        windows: of the layers.
        dtype: of the scores.
        piece: whether these are some tokens of long rows, for which a matrix of all pairs would be too much.

    Raises:
        ArgumentError: the attention implementation takes no masks, and the call needs one.
    """
    name = config._attn_implementation
    for window in windows:
        if is_flash_attention_requested(config):
            regular = placement.is_regular
            placement.masks[window] = None if regular else placement.flat(window, placement.key_count(window))
        elif name == "sdpa" and window is None and placement.is_step:
            placement.masks[window] = OwnKeys(placement.lengths if placement.is_static else None)
        elif placement.sees_all or (name == "sdpa" and placement.is_plain_causal(window)):
            placement.masks[window] = None
        elif name == "sdpa" and piece and window is None and placement.is_regular and placement.device.type == "cuda":
            # Of the kinds that PyTorch knows by name; elsewhere it would make the matrix, and warn.
            placement.masks[window] = causal_lower_right(placement.tokens, placement.key_count(window))
        elif name in ALL_MASK_ATTENTION_FUNCTIONS:
            keys = placement.key_count(window)
            placement.masks[window] = ALL_MASK_ATTENTION_FUNCTIONS[name](
                batch_size=placement.rows,
                q_length=placement.tokens,
                kv_length=keys,
                mask_function=placement.visible(window, keys),
                allow_is_causal_skip=False,
                dtype=dtype,
                config=config,
                device=placement.device,
            )
        else:
            raise ArgumentError(
                f"attn_implementation={name!r} takes no masks, and these inputs or this cache need one: use 'sdpa', "
                "'eager', 'flex_attention' or a flash attention"
            )


FEW_TOKENS, SOME_TOKENS = 4, 16
"""Under the former the experts' weights are gathered for each token rather than tokens for each expert.

Where a dtype has no grouped product, and its substitute would wait for the GPU, so they are up to the latter, and in
whatever a graph captures.
"""


def _run_here(cls: type[Experts]) -> type[Experts]:
    """The implementations to choose from know no fp64; "grouped_mm" is slow for the few tokens that "batched_mm", which
    copies the weights of every token's experts, is for; for many, that of :class:`Experts` moves fewer bytes.
    """
    run = cls.forward

    def forward(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return Experts.forward(self, x, index, weights)
        if self.config._experts_implementation == "grouped_mm" and not self._is_expert_parallel and x.is_cuda:
            groups, tokens = self.can_group(x), x.shape[0]
            few = tokens < FEW_TOKENS or (not groups and tokens <= SOME_TOKENS)
            few = few or (not groups and torch.cuda.is_current_stream_capturing())
            if few and not torch.is_grad_enabled():
                return ALL_EXPERTS_FUNCTIONS["batched_mm"](self, x, index, weights)  # type: ignore[no-any-return]
            if groups:
                return Experts.grouped(self, x, index, weights)
        return run(self, x, index, weights)

    cls.forward = forward  # type: ignore[method-assign]
    cls.is_default = property(  # type: ignore[assignment]
        lambda self: self.config._experts_implementation in (None, "grouped_mm", "batched_mm")
    )
    return cls


@_run_here
@use_experts_implementation
class GatedExperts(Experts):
    """:class:`~mamba2_hf.layers.Experts` with a gate, run as ``config._experts_implementation`` names it."""

    def __init__(self, config: Any, *sizes: Any) -> None:
        super().__init__(*sizes)


@_run_here
@use_experts_implementation(has_gate=False)
class PlainExperts(Experts):
    """:class:`~mamba2_hf.layers.Experts` without a gate, run as ``config._experts_implementation`` names it."""

    def __init__(self, config: Any, *sizes: Any) -> None:
        super().__init__(*sizes)


def experts(config: Any, num_experts: int, hidden_size: int, intermediate_size: int, kind: str) -> nn.Module:
    """The experts of a kind of MLP."""
    cls = GatedExperts if kind.endswith("glu") else PlainExperts
    return cls(config, num_experts, hidden_size, intermediate_size, kind)
