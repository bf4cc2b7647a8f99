"""Ops of many launches, run again without the Python that leads to them.

What an op allocates, computes in PyTorch and launches depends on the sizes, strides and dtypes of its arguments, not on
what is in them. Walking there takes Python several times as long as the launches themselves, and longer than the GPU
needs for a layer of a few thousand tokens. So the second call of a kind is recorded as a plan: memory,
PyTorch's operations and launches, in order. Further calls of that kind carry the plan out with other addresses.

A call that no plan can express is made as ever: one that reads a value off the GPU, or uses a tensor that is neither an
argument nor made on the way. Of arguments that share memory, a part is such a tensor: nobody knows whose it is.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from operator import methodcaller
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from .modes import without_autocast

REMEMBERED = 256  # kinds of calls of one op, before all are forgotten
ALIGNED = 512  # bytes, as PyTorch's allocator gives

_INTERPRETED = knobs.runtime.interpret
# Up to this release a compiled kernel was seen to be run as here; a later one's is called as Triton documents it.
_KNOWN = tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)

_aten = torch.ops.aten
_ALLOCATIONS = {
    *(_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default),
    *(_aten.new_empty.default, _aten.new_empty_strided.default),
}


class Place(NamedTuple):
    """A tensor of a plan: a part of some memory."""

    slot: int  # the number of the memory
    offset: int  # bytes from where its tensor begins
    view: Callable[[Tensor], Tensor] | None  # makes it from that tensor; None where it is that

    def of(self, held: list[Any]) -> Tensor:
        """The tensor, given those that the memory belongs to."""
        tensor: Tensor = held[self.slot]
        return tensor if self.view is None else self.view(tensor)


class Allocation(NamedTuple):
    """A step that allocates a tensor."""

    slot: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def run(self, held: list[Any], at: list[int], stream: Any) -> None:
        """Allocates the tensor."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        held[self.slot] = tensor
        at[self.slot] = tensor.data_ptr()

    @property
    def size(self) -> int:
        """Bytes of the tensor, rounded up to ``ALIGNED``."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNED) * ALIGNED


class Arena(NamedTuple):
    """A step that allocates memory for several tensors, which are known by their addresses only."""

    slot: int  # that stands for all of it
    parts: tuple[tuple[int, int], ...]  # slots, and bytes from the beginning
    size: int  # bytes
    device: torch.device

    def run(self, held: list[Any], at: list[int], stream: Any) -> None:
        """Allocates the memory of all parts."""
        held[self.slot] = memory = torch.empty(self.size // 2, dtype=torch.bfloat16, device=self.device)
        start = memory.data_ptr()
        for slot, offset in self.parts:
            at[slot] = start + offset


class Operation(NamedTuple):
    """An operation of PyTorch that a plan runs."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: tuple[tuple[int, Place], ...]  # of arguments
    lists: tuple[int, ...]  # arguments that are lists with places
    results: tuple[int | None, ...]  # slots of its results; None for one in memory there was
    single: bool  # whether it returns one tensor rather than several

    def run(self, held: list[Any], at: list[int], stream: Any) -> None:
        """Runs the operation and keeps its results."""
        args = list(self.args)
        for i, place in self.places:
            args[i] = place.of(held)
        for i in self.lists:
            args[i] = [part.of(held) if type(part) is Place else part for part in args[i]]
        found = self.function(*args, **self.kwargs)
        for slot, tensor in zip(self.results, (found,) if self.single else found, strict=True):
            if slot is not None:
                held[slot] = tensor
                at[slot] = tensor.data_ptr()


class Launch(NamedTuple):
    """A launch of a compiled kernel, which takes addresses."""

    code: Any
    grid: tuple[int, ...]  # three numbers
    args: tuple[Any, ...]
    places: tuple[tuple[int, Place], ...]
    tiles: tuple[tuple[int, Place], ...]  # of the tensors behind tile descriptors

    def run(self, held: list[Any], at: list[int], stream: Any) -> None:
        """Launches the kernel."""
        args = list(self.args)
        for i, place in self.places:
            args[i] = at[place.slot] + place.offset
        for i, place in self.tiles:
            args[i] = _moved(args[i], Address(at[place.slot] + place.offset))
        code = self.code
        if _KNOWN:
            code.run(*self.grid, stream, code.function, code.packed_metadata, None, None, None, *args)
        else:
            code[self.grid](*args)


class InterpretedLaunch(NamedTuple):
    """A launch in Triton's interpreter, which takes tensors."""

    kernel: Any
    grid: tuple[int, ...]
    constants: dict[str, Any]
    args: tuple[Any, ...]
    places: tuple[tuple[int, Place], ...]
    tiles: tuple[tuple[int, Place], ...]

    def run(self, held: list[Any], at: list[int], stream: Any) -> None:
        """Launches the kernel."""
        args = list(self.args)
        for i, place in self.places:
            args[i] = place.of(held)
        for i, place in self.tiles:
            args[i] = _moved(args[i], place.of(held))
        self.kernel[self.grid](*args, **self.constants)


class Address:
    """Stands in a tile descriptor for a tensor of which only the address is known."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        """Returns the address, as a tensor does."""
        return self._address


Step = Allocation | Arena | Operation | Launch | InterpretedLaunch


class Plan:
    """An op's work for one kind of call.

    Args:
        slots: how many pieces of memory there are.
        given: slots of arguments, and their positions.
        steps: in order, each with the slots that are not used after it.
        results: what is returned; ``single``: whether as one tensor.
    """

    def __init__(
        self,
        slots: int,
        given: list[tuple[int, int]],
        steps: list[tuple[Step, tuple[int, ...]]],
        results: list[Place | None],
        single: bool,
        device: torch.device,
    ) -> None:
        self.slots, self.given = slots, given
        self.steps = [(step.run, frees) for step, frees in steps]
        self.results, self.single, self.device = results, single, device

    def run(self, args: tuple[Any, ...]) -> Any:
        """Carries the plan out with the arguments of a call."""
        held: list[Any] = [None] * self.slots
        at = [0] * self.slots
        for slot, position in self.given:
            held[slot] = args[position]
            at[slot] = args[position].data_ptr()
        stream = _stream(self.device)
        with without_autocast(self.device):  # its casts are steps of the plan
            for run, frees in self.steps:
                run(held, at, stream)
                for slot in frees:
                    held[slot] = None
        if self.single:
            assert self.results[0] is not None
            return self.results[0].of(held)
        return tuple(None if place is None else place.of(held) for place in self.results)


class NotReplayable(Exception):
    """A call does what no plan can express."""


class Recorder(TorchDispatchMode):
    """Records, step by step, what a call does while it runs."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.fault: str | None = None
        self.launching = False  # what Triton does meanwhile is not the op's
        self.first: list[tuple[Any, ...]] = []  # of each slot's tensor: dtype, byte offset, shape, strides, if dense
        self.slots: dict[int, int] = {}  # by the storage that has the memory now
        self.given: list[tuple[int, int]] = []
        self.steps: list[Step] = []
        self._arguments: dict[int, int] = {}  # slots by id: all are there as long as this is
        self._shared: set[int] = set()  # storages of several arguments
        for position, arg in enumerate(args):
            if isinstance(arg, Tensor):
                if _storage(arg) in self.slots:
                    self._shared.add(_storage(arg))
                if id(arg) in self._arguments:
                    self.fault = "a tensor is two arguments, which may be two tensors next time"
                self._arguments[id(arg)] = slot = self.slot(arg)
                self.given.append((slot, position))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self.launching:
            self.attempt(self.operation, func, args, kwargs or {}, found)
        return found

    def attempt(self, record: Callable[..., None], *what: Any) -> None:
        """Records, until something comes that no plan can express."""
        if self.fault is None:
            try:
                record(*what)
            except NotReplayable as fault:
                self.fault = str(fault)

    def slot(self, tensor: Tensor) -> int:
        """The slot of new memory."""
        self.first.append((tensor.dtype, _offset(tensor), tensor.shape, tensor.stride(), tensor.is_contiguous()))
        self.slots[_storage(tensor)] = len(self.first) - 1
        return len(self.first) - 1

    def place(self, tensor: Tensor) -> Place:
        """Where a tensor lies."""
        slot = self._arguments.get(id(tensor))
        if slot is not None:
            return Place(slot, 0, None)
        slot = self.slots.get(_storage(tensor))
        if slot is None or _storage(tensor) in self._shared:
            raise NotReplayable("a tensor came from elsewhere, or is a part of arguments that share memory")
        dtype, start, *first = self.first[slot]
        if tensor.dtype != dtype:
            raise NotReplayable("memory is seen in another dtype")
        offset = _offset(tensor) - start
        return Place(slot, offset, _view(tensor, offset // dtype.itemsize, *first))

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> None:
        """Records an operation of PyTorch."""
        single = isinstance(found, Tensor)
        results = (found,) if single else found
        if not isinstance(results, tuple | list) or not all(isinstance(t, Tensor) for t in results):
            raise NotReplayable(f"{func} gives a number")
        if any(isinstance(value, Tensor) for value in kwargs.values()):
            raise NotReplayable(f"{func} takes a tensor by name")
        if any(_storage(t) in self._shared and id(t) not in self._arguments for t in results):
            raise NotReplayable("a tensor is a part of arguments that share memory")
        places = tuple((i, self.place(arg)) for i, arg in enumerate(args) if isinstance(arg, Tensor))
        plain = [
            [self.place(part) if isinstance(part, Tensor) else part for part in arg] if _is_list(arg) else arg
            for arg in args
        ]
        lists = tuple(i for i, arg in enumerate(args) if _is_list(arg))
        used = {place.slot for place in _places(places, [plain[i] for i in lists])}
        storages = {storage for storage, slot in self.slots.items() if slot in used}
        fresh = tuple(None if _storage(t) in storages else self.slot(t) for t in results)
        if func in _ALLOCATIONS:
            slot = fresh[0]
            assert slot is not None
            self.steps.append(Allocation(slot, tuple(found.shape), found.stride(), found.dtype, found.device))
        elif func._schema.is_mutable or any(slot is not None for slot in fresh):  # else it is a view
            for i, _ in places:
                plain[i] = None
            self.steps.append(Operation(func._op, tuple(plain), kwargs, places, lists, fresh, single))

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], compiled: Any
    ) -> None:
        """Records a launch; ``compiled`` is the kernel's code and the constants it takes behind the arguments, None in
        the interpreter.
        """
        places = tuple((i, self.place(arg)) for i, arg in enumerate(args) if isinstance(arg, Tensor))
        tiles = tuple((i, self.place(arg.base)) for i, arg in enumerate(args) if hasattr(arg, "block_shape"))
        plain = tuple(None if isinstance(arg, Tensor) else _moved_or(arg) for arg in args)
        if compiled is None:
            self.steps.append(InterpretedLaunch(kernel, grid, constants, plain, places, tiles))
        else:
            code, tail = compiled
            self.steps.append(Launch(code, (*grid, 1, 1)[:3], (*plain, *tail), places, tiles))

    def plan(self, results: Any, device: torch.device) -> Plan | None:
        """The plan of what was recorded; None where there can be none."""
        single = isinstance(results, Tensor)
        returned: list[Place | None] = []
        for tensor in (results,) if single else results:
            try:
                returned.append(None if tensor is None else self.place(tensor))
            except NotReplayable as fault:
                self.fault = self.fault or str(fault)
        if self.fault is not None:
            return None
        steps = self.with_arena({place.slot for place in returned if place is not None}, device)
        return Plan(len(self.first) + 1, self.given, steps, returned, single, device)

    def with_arena(self, kept: set[int], device: torch.device) -> list[tuple[Step, tuple[int, ...]]]:
        """The steps, each with the slots that end with it; ``kept`` are those of results. What only launches use shares
        one allocation.
        """
        kept = kept | {slot for slot, _ in self.given}
        spans: dict[int, tuple[int, int]] = {}  # first and last step of a slot
        real = set(kept)  # slots with a tensor of their own
        sizes: dict[int, int] = {}
        for number, step in enumerate(self.steps):
            used = _used(step)
            for slot in used:
                spans[slot] = spans.get(slot, (number, number))[0], number
            if isinstance(step, Allocation):
                sizes[step.slot] = step.size
            elif not isinstance(step, Launch):
                real |= used
        sizes = {slot: size for slot, size in sizes.items() if slot not in real and spans[slot][0] < spans[slot][1]}
        arena = len(self.first)
        placed, size = _packed(sizes, spans)
        if placed:
            spans[arena] = min(spans[slot][0] for slot in placed), max(spans[slot][1] for slot in placed)
            real.add(arena)
        ends: dict[int, list[int]] = {}
        for slot in real - kept:
            ends.setdefault(spans[slot][1], []).append(slot)
        steps: list[tuple[Step, tuple[int, ...]]] = []
        for number, step in enumerate(self.steps):
            if placed and number == spans[arena][0]:
                steps.append((Arena(arena, tuple(placed.items()), size, device), ()))
            if not isinstance(step, Allocation) or step.slot in real:
                steps.append((step, tuple(ends.get(number, ()))))
        return steps


class _State(threading.local):
    recorder: Recorder | None = None


_state = _State()
_forgets: list[Callable[[], None]] = []


def noted(launch: Callable[..., Any]) -> Callable[..., None]:
    """``launch``, of which a recording in progress is told; see :meth:`Recorder.launch`."""

    def run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        recorder = _state.recorder
        if recorder is None:
            launch(kernel, grid, *args, **constants)
            return
        recorder.launching = True
        try:
            compiled = launch(kernel, grid, *args, **constants)
        finally:
            recorder.launching = False
        recorder.attempt(recorder.launch, kernel, grid, args, constants, compiled)

    return run


class Replayed:
    """A function that is carried out by a plan from its third call of a kind on.

    Args:
        function: takes tensors and hashable values and returns a tensor or a tuple of tensors and Nones. It may write
            to its arguments.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._plans: dict[tuple[Any, ...], Plan | None] = {}
        self._seen: set[tuple[Any, ...]] = set()
        _forgets.extend((self._plans.clear, self._seen.clear))

    def again(self, args: tuple[Any, ...]) -> Any:
        """What the function gives for arguments that there is a plan for; None where there is none."""
        if not self._plans or _state.recorder is not None or not enabled():
            return None
        key = _kind(args)
        plan = None if key is None else self._plans.get(key)
        return None if plan is None else plan.run(args)

    def __call__(self, *args: Any) -> Any:
        """What the function gives."""
        if _state.recorder is not None or not enabled():
            return self._function(*args)
        key = _kind(args)
        if key is None:
            return self._function(*args)
        plan = self._plans.get(key)
        if plan is not None:
            return plan.run(args)
        if key in self._plans:  # there can be no plan
            return self._function(*args)
        if key not in self._seen:
            if len(self._seen) >= REMEMBERED:
                self._seen.clear()
                self._plans.clear()
            self._seen.add(key)
            return self._function(*args)
        recorder = _state.recorder = Recorder(args)
        try:
            with recorder:
                results = self._function(*args)
        finally:
            _state.recorder = None
        self._plans[key] = recorder.plan(results, args[0].device)
        return results


def enabled() -> bool:
    """Whether plans are made: not in the interpreter, whose kernels take longer, nor while hooks observe launches."""
    runtime = knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not (_INTERPRETED or any(getattr(hook, "calls", hook) for hook in hooks))


def forget() -> None:
    """Drops all plans: what led to them has changed."""
    for clear in _forgets:
        clear()


def _kind(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Returns all that a call's work depends on; None where that is not known."""
    device = args[0].device.type
    kind: list[Any] = [torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None]
    for arg in args:
        if type(arg) is Tensor or type(arg) is Parameter:
            kind += arg.shape, arg.stride(), arg.dtype, arg.data_ptr() % 16 == 0, arg.get_device()
        elif isinstance(arg, Tensor):
            return None
        else:
            kind.append(arg)
    return tuple(kind)


def _stream(device: torch.device) -> Any:
    """What launches take as their stream."""
    return triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else None


def _moved(tile: Any, base: Any) -> Any:
    """A tile descriptor of the same tiles elsewhere."""
    made = object.__new__(type(tile))
    made.__dict__.update(tile.__dict__, base=base)
    return made


def _moved_or(arg: Any) -> Any:
    """``arg``; a tile descriptor without its memory, which is not to be held."""
    return _moved(arg, None) if hasattr(arg, "block_shape") else arg


def _packed(sizes: dict[int, int], spans: dict[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
    """Where each slot begins in an allocation that they share, the largest first: slots whose steps do not overlap may
    lie in the same place. Also the size of the allocation.
    """
    placed: dict[int, int] = {}
    for slot in sorted(sizes, key=lambda slot: -sizes[slot]):
        beside = sorted(
            (placed[other], placed[other] + sizes[other])
            for other in placed
            if spans[other][0] <= spans[slot][1] and spans[slot][0] <= spans[other][1]
        )
        begin = 0
        for first, last in beside:
            if begin + sizes[slot] <= first:
                break
            begin = max(begin, last)
        placed[slot] = begin
    return placed, max((placed[slot] + sizes[slot] for slot in placed), default=0)


def _view(
    tensor: Tensor, offset: int, shape: torch.Size, stride: tuple[int, ...], dense: bool
) -> Callable[[Tensor], Tensor] | None:
    """What makes ``tensor`` of one with that shape and those strides, which begins ``offset`` elements before it."""
    if offset == 0 and (tensor.shape, tensor.stride()) == (shape, stride):
        return None
    if offset == 0 and len(shape) == 2 and (tensor.shape, tensor.stride()) == (shape[::-1], stride[::-1]):
        return methodcaller("t")
    if offset == 0 and dense and tensor.is_contiguous() and tensor.numel() == shape.numel():
        return methodcaller("view", tuple(tensor.shape))
    sizes, steps = tuple(tensor.shape), tensor.stride()
    return lambda first: first.as_strided(sizes, steps, first.storage_offset() + offset)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _offset(tensor: Tensor) -> int:
    """Bytes from the beginning of the storage."""
    return int(tensor.storage_offset()) * tensor.element_size()


def _used(step: Step) -> set[int]:
    """Slots that a step takes or makes."""
    if isinstance(step, Allocation | Arena):
        return {step.slot}
    if isinstance(step, Operation):
        used = {place.slot for place in _places(step.places, [step.args[i] for i in step.lists])}
        return used | {slot for slot in step.results if slot is not None}
    return {place.slot for _, place in (*step.places, *step.tiles)}


def _is_list(arg: Any) -> bool:
    """Whether an argument is a list with tensors."""
    return isinstance(arg, list | tuple) and any(isinstance(part, Tensor) for part in arg)


def _places(places: tuple[tuple[int, Place], ...], lists: list[Any]) -> list[Place]:
    """Returns all places among arguments."""
    return [place for _, place in places] + [part for parts in lists for part in parts if type(part) is Place]
