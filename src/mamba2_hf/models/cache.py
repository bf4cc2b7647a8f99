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
        super().__init__(layers=[SSDState(state_dtype) for _ in range(config.num_hidden_layers)])
        self.static = static
        self.seen_tokens = 0
        self.padding: Tensor | None = None  # (B,) how many of them did not count

    def count(self, tokens: int, keep: Tensor | None = None) -> None:
        """Counts a block of tokens that every layer has seen; ``keep (B, T)`` says which of them were no padding."""
        self.seen_tokens += tokens
        if keep is not None:
            padding = (~keep).sum(1)
            self.padding = padding if self.padding is None else self.padding + padding

    def check_padding(self, mask: Tensor) -> None:
        """Compares a mask of the seen tokens, ``(B, seen_tokens)``, with what was padding when they were seen.

        Raises:
            CacheError: a row's states hold other tokens than the mask says, such as those that ``generate`` fed after
                the end of the row.
        """
        said = (mask == 0).sum(1)
        known = torch.zeros_like(said) if self.padding is None else self.padding.to(said)
        if said.shape == known.shape and not bool((said == known).all()):
            row = int((said != known).nonzero()[0])
            raise CacheError(
                f"attention_mask leaves out {int(said[row])} of the {self.seen_tokens} tokens that the cache saw in "
                f"row {row}, but {int(known[row])} were left out when it saw them and a state cannot forget: keep the "
                "mask as it was, or start with an empty cache"
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included; the same for every layer."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns of a mask over past and new tokens, and their offset."""
        return self.seen_tokens + int(query_length), 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether any token has been seen."""
        return self.seen_tokens > 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a state has no length and no limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follows a beam search: sequence ``i`` becomes the former ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences at ``indices (B',)``, in that order, which may repeat."""
        for layer in self.layers:
            layer.select(indices)
        if self.padding is not None:
            self.padding = self.padding[indices.to(self.padding.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence ``repeats`` times, next to itself."""
        if self.batch_size > 0:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

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
        self.seen_tokens, self.padding = 0, None

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
