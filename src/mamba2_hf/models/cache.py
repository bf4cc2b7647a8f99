"""The generation cache: constant in size, exact under every split of the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ..errors import CacheError
from ..layers import SSDState

if TYPE_CHECKING:
    from .configuration_mamba2 import Mamba2Config


class SSDCacheLayer(SSDState):
    """:class:`SSDState` under the names that transformers calls on the layers of a cache."""

    is_compileable = True
    is_sliding = False
    supports_early_init = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follows a beam search: sequence ``i`` becomes the former ``beam_idx[i]``."""
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences at ``indices``."""
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence ``repeats`` times, next to itself."""
        if self.conv is not None:
            self.select(torch.arange(self.batch_size, device=self.conv.device).repeat_interleave(repeats))

    def get_max_length(self) -> int:
        """-1: the state has no length and no limit."""
        return -1


class Mamba2Cache(Cache):
    """The states of every layer and the number of tokens they have seen.

    Made by a forward with ``use_cache=True`` and by ``generate``; pass it on as ``past_key_values`` (or
    ``cache_params``). The tokens may be split between calls anywhere: the states are the same. It is updated in place
    and keeps no autograd graph.

    Args:
        config: the model's configuration.
        state_dtype: of the SSM state, such as ``torch.bfloat16`` where memory matters more than exactness. None keeps
            what the scan computes in: fp32, and fp64 in an fp64 model.
        static: whether ``generate`` may compile the model over this cache (``cache_implementation="static"``).
    """

    def __init__(self, config: Mamba2Config, *, state_dtype: torch.dtype | None = None, static: bool = False) -> None:
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise CacheError(f"state_dtype is {state_dtype}, expected a floating dtype, or None for the scan's own")
        super().__init__(layers=[SSDCacheLayer(state_dtype) for _ in range(config.num_hidden_layers)])
        self.static = static
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included; the same for every layer."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns of a mask over past and new tokens, and their offset."""
        return self.seen_tokens + int(query_length), 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether any token has been seen."""
        return self.seen_tokens > 0

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first forward."""
        return self.layers[0].batch_size if self.layers else -1

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the forward over this cache."""
        return self.static

    @property
    def is_initialized(self) -> bool:
        """Whether any token has been seen."""
        return self.seen_tokens > 0

    @property
    def is_croppable(self) -> bool:
        """False: a state cannot forget its last tokens."""
        return False

    def reset(self) -> None:
        """Forgets everything, keeping the buffers where they are."""
        super().reset()
        self.seen_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a state cannot forget its last tokens.

        Raises:
            CacheError: always, unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise CacheError(
                f"crop({tokens_to_remove}): an SSM state cannot forget tokens; copy the cache before the tokens that "
                "may have to go (copy.deepcopy), and continue from the copy"
            )

    def to(self, device: torch.device | str) -> Mamba2Cache:
        """Moves every state to a device, in place."""
        for layer in self.layers:
            layer.to(device)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self.layers)}, batch={self.batch_size}, tokens={self.seen_tokens})"


def as_mamba2_cache(past_key_values: Any, cache_params: Any, config: Mamba2Config) -> Mamba2Cache | None:
    """The cache given under either of its names. An empty ``DynamicCache`` or ``StaticCache``, which generic code
    makes for any model, becomes a :class:`Mamba2Cache`.

    Raises:
        CacheError: two different caches were given, or one of another kind.
    """
    cache = past_key_values if past_key_values is not None else cache_params
    if cache_params is not None and cache is not cache_params:
        raise CacheError("past_key_values and cache_params are two different caches: pass one")
    if cache is None or isinstance(cache, Mamba2Cache):
        return cache
    if type(cache) in (DynamicCache, StaticCache) and _is_fresh(cache):
        # The caller keeps the object and will pass it again, so it is the object that has to change.
        static = isinstance(cache, StaticCache)
        vars(cache).clear()
        cache.__class__ = Mamba2Cache
        cache.__init__(config, static=static)
        return cache
    raise CacheError(
        f"the cache is a {type(cache).__name__} that is not empty or has no place for SSM states: pass a "
        "mamba2_hf.Mamba2Cache(model.config), or nothing and take the one that the forward returns"
    )


def _is_fresh(cache: Cache) -> bool:
    """Whether a cache of transformers is made for any model or for linear layers, and is empty."""
    if cache.offloading:
        return False
    return not cache.layers or (all(cache.is_linear) and not cache.has_previous_state())
