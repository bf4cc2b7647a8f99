"""The generation cache: states of SSD layers, keys and values of attention; exact under every split of the tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ..errors import ArgumentError, CacheError
from ..layers import Buffers, KeyCounts, KeyValueState, Placement, SSDState
from ..layers.state import SideBySide, check_rows
from . import prompt_state
from .graphs import DecodeGraph
from .prompt_state import TokenHashes

if TYPE_CHECKING:
    from .configuration_mamba2 import Mamba2Config
    from .configuration_mamba2_hybrid import Mamba2HybridConfig
    from .pretrained import SSDPreTrainedModel

    Config = Mamba2Config | Mamba2HybridConfig


OnHiddenStates = Callable[[Tensor | None, Tensor | None, Tensor, Tensor | None], None]
"""Of ``input_ids (B, T)``, or ``inputs_embeds (B, T, d)`` where there are none, the last hidden states ``(B, T, d)``,
which the next step may overwrite, and ``keep (B, T)``, which tokens count; None for all."""


class _Earlier(NamedTuple):
    """What a cache was before tokens that are guesses: its own attributes, and those of its buffers, in order."""

    own: dict[str, Any]
    buffers: list[dict[str, Any]]


class CacheRow(NamedTuple):
    """A sequence of a cache.

    Attributes:
        cache: that holds it, or one that :meth:`Mamba2Cache.put` filled.
        row: its place.
        tokens: that it has seen, padding left out.
    """

    cache: Mamba2Cache
    row: int
    tokens: int


class Mamba2Cache(Cache):
    """The state of every mixer, in the order of the model, and the number of tokens they have seen.

    Made by a forward with ``use_cache=True`` and by ``generate``; pass it on as ``past_key_values`` (or
    ``cache_params``). The tokens may be split between calls anywhere: the states are the same. It is updated in place
    and keeps no autograd graph.

    SSD states are constant in size. Keys and values grow with the tokens, up to the window where a layer has one.

    Args:
        config: the model's configuration.
        state_dtype: of the SSM state, such as ``torch.bfloat16`` for half of its memory. Far into a text that costs
            loss where the state is rounded at every step, and hardly any where steps defer writes. None keeps what the
            scan computes in: fp32, and fp64 in an fp64 model.
        static: whether ``generate`` may compile the model over this cache (``cache_implementation="static"``).
        max_length: how many tokens a static cache has room for, padding included; a model without attention needs none.
        captured: whether ``generate`` may capture its steps into a CUDA graph: keys and values have fixed places, as in
            a static cache, and room for ``max_length`` tokens at first, then for as many as come.
        defer_writes: whether steps may write the SSM states once in 16 tokens in place of every time, and keep the
            inputs of the last tokens beside them: on a Hopper GPU for 8 sequences and more, 16 with states of 16 bits.
            Steps take less time, states 7 % more memory (14 % in 16 bits), and states of 16 bits are rounded 16 times
            less often. False writes them at every step.

    Raises:
        CacheError: an argument is out of range, or ``max_length`` is missing.
    """

    def __init__(
        self,
        config: Config,
        *,
        state_dtype: torch.dtype | None = None,
        static: bool = False,
        max_length: int | None = None,
        captured: bool = False,
        defer_writes: bool = True,
    ) -> None:
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise CacheError(f"state_dtype is {state_dtype}, expected a floating dtype, or None for the scan's own")
        if max_length is not None and max_length < 1:
            raise CacheError(f"max_length is {max_length}: a number of tokens of at least 1")
        kinds = config.mixer_kinds
        capacity = max_length if static or captured else None
        windows = {"attention": None, "sliding_attention": getattr(config, "sliding_window", None)}
        super().__init__(
            layers=[
                KeyValueState(windows[kind], capacity) if kind in windows else SSDState(state_dtype, defer_writes)
                for kind in kinds
            ]
        )
        self.key_counts = KeyCounts(capacity) if windows.keys() & set(kinds) else None
        if (static or captured) and self.key_counts is not None and capacity is None:
            raise CacheError(
                f"{'static' if static else 'captured'}=True needs max_length, the tokens to make room for: this "
                "model has attention"
            )
        self.static, self.captured, self.state_dtype = static, captured, state_dtype
        self.graph = DecodeGraph() if captured else None
        self.seen_tokens = 0
        self.soft_tokens = 0  # of those seen, no token's: a soft prompt's, which no ids and no mask of a text hold
        self.padding: Tensor | None = None  # (B,) how many of them did not count
        self._behind: Tensor | None = None  # (B,) of these, because more was taken back than of the foremost row
        self.token_hashes: TokenHashes | None = None  # of the first of them, once saved or loaded
        self._before_guesses: _Earlier | None = None
        self.on_hidden_states: OnHiddenStates | None = None
        """Is called with what a language model has made of tokens that it read behind this cache, captured or not."""

    @property
    def graph(self) -> DecodeGraph | None:
        """Through which steps run, if they may be captured. It is dropped when a buffer of the cache moves."""
        return self._graph

    @graph.setter
    def graph(self, graph: DecodeGraph | None) -> None:
        self._graph = graph
        for buffers in self._buffers:
            # Of the graph, not of the cache: that would keep the memory of every cache until Python looks for cycles.
            buffers.on_move = None if graph is None else graph.drop

    @property
    def states(self) -> list[SSDState]:
        """Those of SSD layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, SSDState)]

    def lay_side_by_side(self, whole: dict[str, Tensor] | None = None) -> dict[str, tuple[Tensor, ...]]:
        """Has the states of all SSD layers be parts of few tensors from when they are made, so that :meth:`put` and
        :class:`KeptRow` copy a sequence by few calls.

        Args:
            whole: tensors ``(L, B, ...)`` to be such ones, by the name of their buffers.

        Returns:
            the parts of these.
        """
        memory = SideBySide(len(self.states))
        for number, state in enumerate(self.states):
            state.beside = memory, number
        return {name: memory.adopt(name, tensor) for name, tensor in (whole or {}).items()}

    def whole(self, *names: str) -> dict[str, Tensor] | None:
        """Buffers ``(L, B, ...)`` of all SSD layers by name; None where they do not lie side by side."""
        states = self.states
        if not states or states[0].beside is None:
            return None
        memory = states[0].beside[0]
        found = {name: whole for name in names if (whole := memory.whole(name, states)) is not None}
        return found if len(found) == len(names) else None

    @property
    def _buffers(self) -> list[Buffers]:
        counts = [] if self.key_counts is None else [self.key_counts]
        return [*self.layers, *counts]

    def leave_inference_mode(self) -> None:
        """Makes buffers that ``torch.inference_mode`` made anew, outside of it, where nothing may write those."""
        for buffers in self._buffers:
            buffers.leave_inference_mode()

    def advance(self, tokens: int) -> None:
        """Counts tokens, without padding, that a captured step has fed; its graph has counted them on the GPU."""
        if self.key_counts is not None:
            self.key_counts.width += tokens
        self.seen_tokens += tokens
        if self.recording:
            for layer in self.layers:
                layer.count_block(max(tokens, 0))

    def reserve(self, tokens: int) -> None:
        """Makes room for that many tokens in a cache that is captured; any other has it already, or none to give."""
        capacity = self.get_max_length()
        if not self.captured or self.key_counts is None or capacity >= tokens:
            return
        self.key_counts.capacity = max(tokens, capacity * 3 // 2)
        for layer in self.layers:
            if isinstance(layer, KeyValueState):
                layer.reserve(self.key_counts.capacity)

    def count(
        self,
        tokens: int,
        keep: Tensor | None = None,
        placement: Placement | None = None,
        positions: Tensor | None = None,
    ) -> None:
        """Counts a block of tokens that every layer has seen.

        Args:
            tokens: how many, padding included.
            keep: ``(B, T)`` which of them were no padding.
            placement: where they stood, in a model with attention.
            positions: ``(B or 1, T)`` on the placement's grid, if they were given and not counted.
        """
        if placement is not None and self.key_counts is not None:
            placement.count(self.key_counts, positions)
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

    def save(
        self,
        path: str | PathLike[str],
        model: SSDPreTrainedModel,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> None:
        """Writes the cache to a file, whole or not at all: :meth:`load` goes on from it another day, bit for bit.

        Args:
            path: of the safetensors file; its folder is made. Only another prompt state is replaced.
            model: that the cache belongs to. Its fingerprint goes along (``prompt_state.fingerprint``), for which every
                weight is read once.
            input_ids: ``(B, T)`` the tokens that the cache has seen, or those since it was loaded. Their hash goes
                along, so that ``generate`` refuses to go on behind other tokens.
            attention_mask: ``(B, T)`` which of them were no padding.

        Raises:
            CacheError: the cache is empty, ``input_ids`` is not what it has seen, the file is something else, or the
                model's weights cannot be read.
        """
        for layer in self.layers:
            if isinstance(layer, SSDState):
                layer.settle()
        if input_ids is not None:
            before = self.token_hashes
            past = self.seen_tokens - input_ids.shape[1]
            if past and (before is None or past != before.tokens):
                raise CacheError(
                    f"input_ids holds {input_ids.shape[1]} tokens and the cache has seen {self.seen_tokens}: pass the "
                    "ids of all tokens that it has seen, and no others"
                )
            self.token_hashes = TokenHashes.of(input_ids, attention_mask, before if past else None)
        prompt_state.save(self, Path(path), model)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        model: SSDPreTrainedModel,
        *,
        static: bool = False,
        max_length: int | None = None,
    ) -> Mamba2Cache:
        """Reads a cache that :meth:`save` wrote, static or not, onto the model's device.

        Args:
            path: of the file.
            model: to go on with; it has to be the one that the state is of, with the same weights.
            static, max_length: as for a new cache; a file fits every kind.

        Raises:
            CacheError: the file is broken, or another model's.
        """
        return prompt_state.load(cls, Path(path), model, static, max_length)

    def has_read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> bool:
        """Whether ``input_ids (B, T)``, those that a mask ``(B, T)`` counts, are known to be what the cache has seen. A
        file that was saved with its ids knows.
        """
        known = self.token_hashes
        return known is not None and known.tokens == self.seen_tokens and known.fit(input_ids, attention_mask)

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
        """Tokens that there is room for; -1 for no limit."""
        capacity = None if self.key_counts is None else self.key_counts.capacity
        return -1 if capacity is None else capacity

    def put(self, row: int, source: Mamba2Cache | CacheRow | None) -> None:
        """Replaces a sequence of a static cache by the only one of another cache, by one of several, or by one that has
        seen nothing. The buffers stay where they are.

        Raises:
            CacheError: this cache is not static or has no such row, or the other does not fit.
        """
        if not self.static or not 0 <= row < self.batch_size:
            raise CacheError(f"put({row}) needs a static cache that holds such a row, and this one is {self!r}")
        if isinstance(source, Mamba2Cache):
            if source.batch_size != 1:
                raise CacheError(f"{source!r} does not hold one sequence of the same model")
            counts = source.key_counts
            lengths = None if counts is None else counts.lengths
            source = CacheRow(source, 0, 0 if counts is None else counts.width if lengths is None else int(lengths))
        cache, place, length = source or (None, 0, 0)
        if cache is not None and len(cache) != len(self):
            raise CacheError(f"{cache!r} does not hold one sequence of the same model")
        if self.key_counts is not None and length > self.get_max_length():
            raise CacheError(f"{cache!r} holds {length} keys, more than the {self.get_max_length()} of {self!r}")
        if not self._put_at_once(row, cache, place):
            self._put_each(row, cache, place)
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, SSDState):
                layer.put(row, None if cache is None else cache.layers[index], length, place)
        if self.key_counts is not None:
            self.key_counts.put(row, length)
        self.padding = self._behind = self.token_hashes = None

    def _put_at_once(self, row: int, cache: Mamba2Cache | None, place: int) -> bool:
        """Puts the states of all SSD layers, by a call for each kind of buffer; returns whether they lie so."""
        into = self.whole("conv", "held")
        for other in () if cache is None else cache.states:
            other.settle(place)
        source = None if cache is None else cache.whole("conv", "held")
        if into is None or (cache is not None and source is None):
            return False
        counts = [count for state in self.states for count in (state.clock, state.kept) if count is not None]
        if counts:
            torch._foreach_zero_([count[row : row + 1] for count in counts])
        for name, buffer in into.items():
            buffer[:, row] = 0 if source is None else source[name][:, place]
        return True

    def _put_each(self, row: int, cache: Mamba2Cache | None, place: int) -> None:
        """Puts the states of SSD layers, wherever they lie."""
        pairs: list[tuple[Tensor, Tensor]] = []
        zeros: list[Tensor] = []
        others = [None] * len(self.states) if cache is None else cache.states
        for state, other in zip(self.states, others, strict=True):
            filled, emptied = state.put(row, other, place)
            pairs += filled
            zeros += emptied
        _copy(pairs)
        for device in {tensor.device for tensor in zeros}:
            torch._foreach_zero_([tensor for tensor in zeros if tensor.device == device])

    def gather(self, rows: Sequence[CacheRow | None]) -> None:
        """Fills an empty cache, whose buffers grow, with copies of single sequences of other caches: to read several
        texts in one call that start behind different ones.

        Args:
            rows: a sequence for each; None for one that has seen nothing. The buffers stay empty where all are None.

        Raises:
            CacheError: this cache is not empty or its buffers do not grow.
        """
        if self.seen_tokens or self.static or self.captured:
            raise CacheError(f"gather() needs an empty cache, neither static nor captured, and this one is {self!r}")
        if not any(row is not None for row in rows):
            return
        pairs: list[tuple[Tensor, Tensor]] = []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SSDState):
                pairs += layer.gather([None if row is None else (row.cache.layers[index], row.row) for row in rows])
        _copy(pairs)
        self.gather_keys(rows)

    def gather_keys(self, rows: Sequence[CacheRow | None]) -> None:
        """What of :meth:`gather` is not about states of SSD layers; not all are None."""
        counts = [0 if row is None else row.tokens for row in rows]
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, SSDState):
                layer.gather([None if row is None else (row.cache.layers[index], *row[1:]) for row in rows])
        first = next(row.cache.layers[0] for row in rows if row is not None)
        device = next(value for value in vars(first).values() if isinstance(value, Tensor)).device
        if self.key_counts is not None:
            self.key_counts.gather(counts, device)
        self.seen_tokens = max(counts)
        if min(counts) < self.seen_tokens:
            self.padding = self.seen_tokens - torch.tensor(counts, device=device)

    def finite_rows(self) -> list[bool]:
        """Which sequences hold nothing but finite numbers. It reads all buffers, and waits for them."""
        named = [getattr(layer, name, None) for layer in self.layers for name in ("conv", "ssm", "keys", "values")]
        held = [tensor for tensor in named if tensor is not None and tensor.numel()]
        device = held[0].device
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for tensor in held:
            kinds[tensor.device, tensor.dtype].append(tensor)
        norms = [norm for alike in kinds.values() for norm in torch._foreach_norm(alike)]  # few launches, nearly always
        if bool(torch.stack([norm.to(device, torch.float32) for norm in norms]).isfinite().all()):
            return [True] * self.batch_size
        sums = [tensor.flatten(1).sum(1, dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in held]
        finite: list[bool] = torch.stack([each.isfinite().to(device) for each in sums]).all(0).tolist()
        return finite

    def set_lengths(self, lengths: list[int]) -> None:
        """Says how many keys each row of a static cache holds, for rows that :meth:`put` filled at different times and
        that have stepped together since; what is beyond is forgotten. It does nothing in a model without attention.
        """
        if self.key_counts is not None:
            self.key_counts.set(lengths)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follows a beam search: sequence ``i`` becomes the former ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences at ``indices (B',)``, in that order, which may repeat."""
        for buffers in self._buffers:
            buffers.select(indices)
        if self.padding is not None:
            self.padding = self.padding[indices.to(self.padding.device)]
        if self._behind is not None:
            self._behind = self._behind[indices.cpu()]
        if self.token_hashes is not None:
            self.token_hashes = self.token_hashes.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence ``repeats`` times, next to itself."""
        if self.batch_size > 0:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first forward."""
        return self.layers[0].batch_size if self.layers else -1

    @property
    def nbytes(self) -> int:
        """Bytes of all its buffers."""
        held = [value for layer in self.layers for value in vars(layer).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the forward over this cache."""
        return self.static

    @property
    def is_initialized(self) -> bool:
        """Whether any token has been seen."""
        return self.seen_tokens > 0

    @property
    def recording(self) -> bool:
        """Whether the tokens seen now can be removed again."""
        return bool(self.layers) and self.layers[0].record_past  # all of them, or none

    @property
    def captured_tokens(self) -> int:
        """Of each row, that a call has at most which is captured: a step's one, or those of a block that is recorded
        where buffers alone have to be written for that.
        """
        if not self.recording:
            return 1
        in_place = (isinstance(layer, SSDState) or layer.takes_back_in_place for layer in self.layers)
        size: int | None = self.layers[0].block_size
        return size if size is not None and all(in_place) else 0

    @property
    def is_croppable(self) -> bool:
        """As ``recording``: a state cannot forget what it did not expect to."""
        return self.recording

    def activate_past_recording(self, block_size: int | None = None) -> None:
        """Makes the tokens that come now removable by :meth:`crop`: assisted decoding verifies several at once, and
        keeps those up to the first that is wrong.

        It costs one copy of the states, and what the mixers projected of the tokens until the next :meth:`crop`: record
        short blocks, not prompts. Padding and packed documents cannot be recorded.

        Args:
            block_size: of a forward at most, where every forward is a block and ``crop`` comes before the next. The
                states are then neither copied nor run again. A block that nothing is removed of before the next one
                stays for good.
        """
        if self.graph is not None and block_size is not None:
            self.graph.drop()  # its steps write states in another way
        for layer in self.layers:
            layer.activate_past_recording(block_size)

    def stop_recording(self) -> None:
        """Ends :meth:`activate_past_recording`."""
        for layer in self.layers:
            layer.stop_recording()

    def start_guessing(self) -> None:
        """Makes all tokens from here on guesses, if they are not: :meth:`forget_guesses` takes them back together, and
        those before cannot be removed any more. Calls, captured ones too, take the time that they take without; it
        costs one copy of the states, and another to go back.
        """
        if self._before_guesses is not None:
            return
        before, pairs = [], []
        for buffers in self._buffers:
            held = {name: getattr(buffers, name) for name in buffers.changing}
            for name, in_place in buffers.changing.items():
                if in_place and held[name] is not None:
                    source, held[name] = held[name], torch.empty_like(held[name])
                    pairs.append((held[name], source))
            before.append(held)
        _copy(pairs)
        own = {name: getattr(self, name) for name in ("seen_tokens", "padding", "_behind")}
        self._before_guesses = _Earlier(own, before)
        if self.graph is None:  # else steps are captured as blocks of one token
            self.stop_recording()

    def forget_guesses(self) -> None:
        """Takes back all tokens since :meth:`start_guessing`, if that was called."""
        if self._before_guesses is None:
            return
        (own, before), self._before_guesses = self._before_guesses, None
        for name, then in own.items():
            setattr(self, name, then)
        _copy([pair for buffers, held in zip(self._buffers, before, strict=True) for pair in buffers.go_back(held)])

    def reset(self) -> None:
        """Forgets everything, keeping the buffers where they are."""
        super().reset()
        if self.key_counts is not None:
            self.key_counts.reset()
        self.seen_tokens, self.soft_tokens = 0, 0
        self.padding = self._behind = self.token_hashes = None

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Removes the last tokens, of those since :meth:`activate_past_recording` or the last ``crop``; the others stay
        for good. The states are put back and run over the tokens that stay, without reading a weight matrix.

        Args:
            tokens_to_remove: a negative number, as in transformers, or ``(B,)`` of them for rows that each take back
                their own; 0 removes none. A row that took back more than another has seen fewer tokens, as one with
                more padding has.

        Raises:
            CacheError: they were not recorded.
        """
        recorded = min((layer.recorded_tokens for layer in self.layers), default=0)
        removed: int | Tensor = -tokens_to_remove
        least, most = removed, removed
        if isinstance(removed, Tensor):
            check_rows(self.batch_size, len(removed))
            removed = removed.cpu()
            least, most = (int(number) for number in removed.aminmax())
            removed = least if least == most else removed
        if least < 0 or most > recorded:
            raise CacheError(
                f"crop({-most if most > recorded else -least}): {recorded} tokens were recorded, and a state cannot "
                "forget others; give a negative number of at most those, and call activate_past_recording() before the "
                "tokens that may have to go, or continue from a copy (copy.deepcopy)"
            )
        if isinstance(removed, Tensor):
            before = torch.zeros_like(removed) if self._behind is None else self._behind
            behind = before + removed
            least = int(behind.min())
            self._behind = behind - least
            more = self._behind - before
            self.padding = more if self.padding is None else self.padding + more.to(self.padding.device)
        if self.key_counts is not None:
            self.key_counts.crop(removed, int(least))
        blocks: dict[torch.device, list[Tensor]] = {}
        for layer in self.layers:
            if not isinstance(layer, SSDState):
                assert self.key_counts is not None
                layer.crop(removed, self.key_counts.width)
            elif (kept := layer.end_block()) is not None:
                blocks.setdefault(kept.device, []).append(kept)
            else:
                layer.crop(removed)
        for device, counts in blocks.items():  # few launches for all layers
            if isinstance(removed, int):
                torch._foreach_sub_(counts, removed)
            else:
                torch._foreach_sub_(counts, [removed.to(device, torch.int32)] * len(counts))
        self.seen_tokens -= int(least)
        if self.token_hashes is not None and self.token_hashes.tokens > self.seen_tokens:
            self.token_hashes = None

    def to(self, device: torch.device | str) -> Mamba2Cache:
        """Moves every state to a device, in place."""
        for buffers in self._buffers:
            buffers.to(device)
        if self.padding is not None:
            self.padding = self.padding.to(device)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self.layers)}, batch={self.batch_size}, tokens={self.seen_tokens})"


class KeptRow:
    """A copy of one sequence of a cache. Where the states of SSD layers lie side by side, it is few tensors until
    somebody goes on from it: one for each layer takes longer to make than the copy.

    Args:
        row: what to copy.
        config, state_dtype: of the cache.
    """

    def __init__(self, row: CacheRow, config: Config, state_dtype: torch.dtype | None) -> None:
        self._cache = Mamba2Cache(config, state_dtype=state_dtype, defer_writes=False)
        self._held: dict[str, Tensor] = {}  # (L, 1, ...)
        states, place = row.cache.states, slice(row.row, row.row + 1)
        names = {name for state in states for name in state.copied(row.row)}
        whole = row.cache.whole(*names - {"clock"})
        if whole is None:
            self._cache.gather([row])
        else:
            self._held = {k: v[:, place].clone(memory_format=torch.contiguous_format) for k, v in whole.items()}
            if "clock" in names:
                clocks = [state.clock for state in states if state.clock is not None]
                self._held["clock"] = torch.stack([clock[place] for clock in clocks])
            self._cache.gather_keys([row])
        self.nbytes = self._cache.nbytes + sum(held.nbytes for held in self._held.values())

    @property
    def cache(self) -> Mamba2Cache:
        """The cache that holds this sequence alone."""
        if self._held:
            parts = self._cache.lay_side_by_side(self._held)
            for number, state in enumerate(self._cache.states):
                state.hold({name: own[number] for name, own in parts.items()})
            self._held = {}
        return self._cache


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Fills the first of each pair with the second; a launch for all of one kind, not for each, but of those where one
    row fills several, whose strides are unlike and would have all of them copied one by one.
    """
    kinds: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
    for into, source in pairs:
        kind = (into.device, into.dtype, into.stride() == source.stride())
        kinds.setdefault(kind, []).append((into, source))
    for alike in kinds.values():
        torch._foreach_copy_([into for into, _ in alike], [source for _, source in alike])


def one_cache(*named: Any) -> Any:
    """The cache given under one or more of its names, ``past_key_values``, ``cache_params`` and ``cache``; or None.

    Raises:
        CacheError: two different caches were given.
    """
    given = [cache for cache in named if cache is not None]
    if any(cache is not given[0] for cache in given):
        raise CacheError(
            "past_key_values, cache_params and cache are names of one cache, and two different caches came: pass one"
        )
    return given[0] if given else None


def as_mamba2_cache(cache: Any, config: Config) -> Mamba2Cache | None:
    """A cache for a model of this configuration. An empty ``DynamicCache`` or ``StaticCache``, which generic code makes
    for any model, becomes a :class:`Mamba2Cache`.

    Raises:
        CacheError: it is of another kind, or another model's.
    """
    if cache is None:
        return cache
    if isinstance(cache, Mamba2Cache):
        if [isinstance(layer, SSDState) for layer in cache.layers] != [kind == "ssd" for kind in config.mixer_kinds]:
            raise CacheError("the cache is another model's: it holds states of other mixers than this model has")
        return cache
    reason = _why_not_ours(cache, config)
    if reason is not None:
        raise CacheError(
            f"{reason}; pass a mamba2_hf.Mamba2Cache(model.config), or nothing and take the one that the forward "
            "returns"
        )
    # The caller keeps the object and will pass it again, so it is the object that has to change.
    static = isinstance(cache, StaticCache)
    lengths = [getattr(layer, "max_cache_len", 0) for layer in cache.layers]
    vars(cache).clear()
    cache.__class__ = Mamba2Cache
    cache.__init__(config, static=static, max_length=max(lengths, default=0) or None)
    return cache


def check_implementation(name: str | None, config: Config) -> None:
    """Checks a ``cache_implementation`` of ``generate``.

    Raises:
        ArgumentError: a :class:`Mamba2Cache` has no such kind.
    """
    if name in (None, "dynamic", "static"):
        return
    less = "take fewer rows at once, or past_key_values=Mamba2Cache(model.config, state_dtype=torch.bfloat16)"
    remedy = f"; where memory is short, {less}" if "offloaded" in name or name == "quantized" else ""
    raise ArgumentError(
        f"cache_implementation={name!r}: {_what_it_keeps(config)}; use 'dynamic' (the default) or 'static'{remedy}"
    )


def _what_it_keeps(config: Config) -> str:
    if set(config.mixer_kinds) == {"ssd"}:
        return (
            "this model's cache holds SSM states, whose size is constant, so that there is little to offload, quantize "
            "or slide"
        )
    return (
        "this model's cache keeps the keys and values of attention on the device and in the dtype of their layer, "
        "beside SSM states of constant size; those of a layer with a window slide already"
    )


def _why_not_ours(cache: Any, config: Config) -> str | None:
    """Why something cannot become a :class:`Mamba2Cache`; None if it is an empty cache of transformers, made for any
    model or for one such as this.
    """
    name = type(cache).__name__
    if type(cache) not in (DynamicCache, StaticCache):
        return f"the cache is of type {name}, which has no place for SSM states"
    if cache.offloading:
        return f"{name}(offloading=True): {_what_it_keeps(config)}"
    kept = [vars(layer).get("keys") for layer in cache.layers]
    kept += [state for layer in cache.layers for state in vars(layer).get("conv_states", {}).values()]
    if any(state is not None for state in kept):
        return f"the {name} is not empty, and what transformers' layers have put into it is no state of this model"
    attends = set(config.mixer_kinds) - {"ssd"}
    if len(cache.layers) not in (0, config.num_hidden_layers) or not (attends or all(cache.is_linear)):
        return f"the {name} is made for another model: its layers are not those of this configuration"
    return None
