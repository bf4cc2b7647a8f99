"""Decoding through a CUDA graph: one launch for a step whose calls from Python take longer than the GPU does."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..layers.weights import HOOKS, all_hooked, is_unhooked
from ..ops import is_batch_invariant

if TYPE_CHECKING:
    from .cache import Mamba2Cache

logger = logging.get_logger(__name__)

Run = Callable[[Tensor], tuple[Tensor, ...]]


class DecodeGraph:
    """A forward of one token per sequence over one cache: run as it is the first time, which compiles kernels, then
    captured, and replayed from then on. Blocks of other widths, which are recorded, are captured beside.

    ``generate`` makes one for every call, so that nothing of the model can change behind it; who keeps one for longer
    needs a :class:`ModelWatch`. A capture runs nothing and takes about as long as a step. Where it fails, steps go on
    without, and ``reason`` says why.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._warm = False
        self._graph: Any = None
        self._ids: Tensor | None = None
        self._outputs: tuple[Tensor, ...] | None = None
        self._invariant = False  # whether what was captured is batch-invariant
        self._blocks: dict[int, DecodeGraph] = {}  # by their width

    @property
    def is_captured(self) -> bool:
        """Whether steps are replayed."""
        return self._graph is not None

    def fits(self, input_ids: Tensor) -> bool:
        """Whether a step with these ids is replayed as it is."""
        ids = self._ids
        return ids is not None and ids.shape == input_ids.shape and ids.device == input_ids.device

    def drop(self) -> None:
        """Forgets what was captured, as the cache's buffers are no longer where they were; the next step captures."""
        self._graph = self._ids = self._outputs = None
        for block in self._blocks.values():
            block.drop()

    def step(self, run: Run, input_ids: Tensor, cache: Mamba2Cache) -> tuple[Tensor, ...]:
        """``run(input_ids)``, of tokens ``(B, T)``: tensors that the next step overwrites."""
        width = input_ids.shape[1]
        graph = self if width == 1 else self._blocks.setdefault(width, type(self)())
        return graph.replay(run, input_ids, cache)

    def replay(self, run: Run, input_ids: Tensor, cache: Mamba2Cache) -> tuple[Tensor, ...]:
        """The same where all calls have one shape."""
        if self._ids is not None and (self._ids.shape != input_ids.shape or self._invariant != is_batch_invariant()):
            self.drop()
        if self._graph is None:
            if not self._warm or self.reason is not None:
                self._warm = True
                return run(input_ids)
            self._capture(run, input_ids, cache)
            if self._graph is None:
                return run(input_ids)
        assert self._ids is not None
        self._ids.copy_(input_ids)
        self._graph.replay()
        cache.advance(input_ids.shape[1])
        assert self._outputs is not None
        return self._outputs

    def _capture(self, run: Run, input_ids: Tensor, cache: Mamba2Cache) -> None:
        cache.leave_inference_mode()  # what a capture clones would be cloned again by every replay
        graph, counted = torch.cuda.CUDAGraph(), cache.seen_tokens
        with torch.inference_mode(False):  # to be written by steps in either mode
            ids = input_ids.clone()
        try:
            with capturing(graph):
                outputs = run(ids)
        except RuntimeError as error:
            self.reason = f"its step cannot be captured: {str(error).splitlines()[0]}"
            logger.warning_once(f"decoding goes on without a CUDA graph: {self.reason}")
        else:
            self._graph, self._ids, self._outputs, self._invariant = graph, ids, outputs, is_batch_invariant()
        cache.advance(counted - cache.seen_tokens)  # a capture counts, but runs nothing

    def __deepcopy__(self, memo: Any) -> DecodeGraph:
        return DecodeGraph()

    def __reduce__(self) -> Any:
        return DecodeGraph, ()


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None, stream: Any = None) -> Iterator[None]:
    """Captures what is launched inside, whatever other threads launch. A capture that fails leaves no trace: PyTorch's
    generator of random numbers, which would wait for its end, goes on.
    """
    try:
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            yield
    except BaseException:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise


def why_not(model: nn.Module) -> str | None:
    """Why a model's steps are not to be captured; None if they may be."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return f"the model is on {', '.join(sorted(map(str, devices)))}, not on one GPU"
    if model.training:
        return "the model is in training mode"
    if all_hooked():
        return "hooks are registered for all modules, which a graph would skip"
    for name, module in model.named_modules():
        if not is_unhooked(module) and name:
            return f"{name} is hooked, which a graph would skip"
    for name, parameter in model.named_parameters():
        if type(parameter) not in (nn.Parameter, Tensor):
            return f"{name} is a {type(parameter).__name__}"
    return None


_CONTAINERS = frozenset((dict, list, tuple))
_PLAIN = frozenset((bool, int, float, str, type(None)))


class ModelWatch:
    """Tells whether a model is still what was captured of it. What its tensors hold is no part of that: a replay reads
    them where they lie.

    Args:
        model: to look at; the first :meth:`changed` says yes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._all_tensors: list[Tensor] = []
        self._tensors: list[Tensor] = []  # those that lie anywhere, which ones of other types need not
        self._places: list[int] = []
        self._versions: list[int] = []
        self._seen: _Seen | None = None
        self.written = False
        """Whether the last :meth:`changed` found that a tensor had been written in place, as far as PyTorch counts
        that: not by way of ``.data``."""

    def moved(self) -> bool:
        """Whether a tensor lies elsewhere than when :meth:`changed` last looked, which takes a tenth of a microsecond
        for each: a replay would read memory that may be another's by now.
        """
        return [tensor.data_ptr() for tensor in self._tensors] != self._places

    def changed(self) -> bool:
        """Whether anything is different from when this was last asked: tensors, modules, their hooks, or what they hold
        of numbers, strings and containers of these, which is where adapters keep which of them is active and how much
        it counts. Takes milliseconds.
        """
        places, versions, before = self._places, self._versions, self._seen
        seen = before
        if seen is None or not seen.is_current():
            self._all_tensors, seen = _walk(self._model)
            self._seen = seen
            self._tensors = [tensor for tensor in self._all_tensors if type(tensor) in (nn.Parameter, Tensor)]
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        self._versions = [0 if tensor.is_inference() else tensor._version for tensor in self._all_tensors]
        self.written = self._versions != versions
        return before is None or self._places != places or (seen is not before and seen.told != before.told)


class _Seen:
    """What a walk through a model has found, and the objects that it came by, which stay alive as long.

    Args:
        told: all that says what the model is, but for where its tensors lie.
        modules: that it went through.
        mappings: that these hold, those of their hooks among them.
        sequences: that they hold.
    """

    def __init__(
        self,
        told: list[Any],
        modules: Sequence[nn.Module],
        mappings: Sequence[dict[Any, Any]],
        sequences: Sequence[Sequence[Any]],
    ) -> None:
        self.told = told
        self._modules, self._containers = modules, [*mappings, *sequences]
        self._sizes = [*map(len, self._containers)]
        self._filled = [mapping for mapping in mappings if mapping]
        self._sequences = sequences
        self._objects = self._now()

    def is_current(self) -> bool:
        """Whether everything is the very object that it was, so that a walk would find the same. It takes a third of
        the time of one, as no line of Python is run for single attributes.
        """
        if self._sizes != [*map(len, self._containers)]:
            return False
        objects = self._now()
        return len(objects) == len(self._objects) and all(map(operator.is_, objects, self._objects))

    def _now(self) -> list[Any]:
        attributes = chain.from_iterable(module.__dict__.values() for module in self._modules)
        items = chain(chain.from_iterable(self._filled), chain.from_iterable(map(dict.values, self._filled)))
        return [all_hooked(), *map(type, self._modules), *attributes, *items, *chain.from_iterable(self._sequences)]


def _walk(model: nn.Module) -> tuple[list[Tensor], _Seen]:
    """A model's parameters and buffers, and all else that says what it is. One pass: it is taken between two steps."""
    tensors: dict[int, Tensor] = {}
    told: list[Any] = [all_hooked()]
    waiting, modules = [model], {}
    mappings: list[dict[Any, Any]] = []
    sequences: list[Sequence[Any]] = []
    while waiting:
        module = waiting.pop()
        if id(module) in modules:
            continue
        modules[id(module)] = module
        held = module.__dict__
        told += (id(module), type(module), is_unhooked(module))
        mappings += [getattr(module, name) for name in HOOKS]
        for name, value in held.items():
            kind = type(value)
            if kind in _PLAIN:
                told.append(value)
                continue
            if kind not in _CONTAINERS:
                continue
            (mappings if kind is dict else sequences).append(value)
            if name == "_modules":
                waiting += [child for child in value.values() if child is not None]
            elif name in ("_parameters", "_buffers"):
                tensors.update((id(tensor), tensor) for tensor in value.values() if tensor is not None)
            elif kind is dict:
                told += [item for item in value.items() if type(item[1]) in _PLAIN]
            else:
                told += [item for item in value if type(item) in _PLAIN]
    told += tensors
    return list(tensors.values()), _Seen(told, list(modules.values()), mappings, sequences)
