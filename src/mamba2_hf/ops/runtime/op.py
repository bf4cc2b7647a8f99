"""Ops of ``torch.ops.mamba2_hf``, made of a record of their arguments.

A record's fields give the schema, the record of a backward's gradients and what autograd keeps. ``torch.compile``,
export, fake tensors, dispatch modes and functorch see registered ops, which are opaque to them, and which so keep whole
graphs and leave plain launches to CUDA graphs. Without any of those the dispatcher's detour through Python, longer than
some kernels run, is left out.

A backward is an op of its own. Tensors that an op may leave out of its results are empty there (``(0,)``), because a
schema has no optional results.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ...errors import BackendError
from ..flops import register as count_flops
from .plan import Replayed

NAMESPACE = "mamba2_hf"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_SCHEMA = {int: "int", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType"}

Record = TypeVar("Record", bound=tuple[Any, ...])


class Field(NamedTuple):
    """A field of a record, or of a record inside of it, which is no record itself."""

    path: str  # from the outer record, with dots
    schema: str  # its type in the op's schema
    is_tensor: bool
    has_gradient: bool

    @property
    def argument(self) -> str:
        """The declaration of the op's argument in its schema."""
        return f"{self.schema} {self.path.replace('.', '_')}"


class Op(Generic[Record]):
    """An op whose arguments are the fields of a record, the tensors first.

    Args:
        name: in ``torch.ops.mamba2_hf``.
        forward: takes the record and returns a tensor or a tuple of tensors.
        fake: returns tensors like those of ``forward``, from tensors without data.
        kept: how many results, the last ones, are for the backward only.
        flops: floating-point operations of the op and of its backward, from the record with shapes in place of tensors;
            None for none.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[Record], Any],
        fake: Callable[[Record], Any],
        kept: int = 0,
        flops: tuple[Callable[[Record], int], ...] | None = None,
    ) -> None:
        hints = get_type_hints(forward)
        self.name, self.kept = name, kept
        self.record: type[Record] = hints[next(iter(inspect.signature(forward).parameters))]
        self.results = len(get_args(hints["return"])) or 1
        nested = list(_fields(self.record))
        fields = sorted(nested, key=lambda field: not field.is_tensor)
        self.arguments, self.tensors = len(fields), sum(field.is_tensor for field in fields)
        self.differentiable = [i for i, field in enumerate(fields) if field.has_gradient]
        self.schema = ", ".join(_lettered(fields))
        # Functions of their own, as namedtuple has them, from a record to its fields and back: nothing takes less time.
        self.flatten: Callable[[Record], tuple[Any, ...]] = eval(
            f"lambda record: ({', '.join(f'record.{field.path}' for field in fields)},)"
        )
        records: dict[str, Any] = {}
        source = _constructor(self.record, iter([fields.index(field) for field in nested]), records)
        self.build: Callable[[tuple[Any, ...]], Record] = eval(f"lambda args: {source}", records)
        self._planned = Replayed(lambda *args: forward(self.build(args)))
        self._forward = self._run = here(self._planned)
        _register(f"{name}({self.schema}) -> {_tensors(self.results)}", self._run, lambda *args: fake(self.build(args)))
        count_flops(NAMESPACE, name, lambda *args: flops[0](self.build(args)) if flops else 0)
        self._flops = flops
        self.registered = getattr(getattr(torch.ops, NAMESPACE), name)

    def __call__(self, record: Record) -> Any:
        """Runs the op."""
        args = self.flatten(record)
        return self.registered(*args) if _is_watched(args[0]) else self._run(*args)

    def again(self, record: Record) -> Any:
        """What the op gives for a record that is like one before, by the plan of that, for callers who need not check
        again what depends on sizes, dtypes and devices only; None where there is none, or gradients are wanted.
        """
        args = self.flatten(record)
        if _is_watched(args[0]) or (torch.is_grad_enabled() and self._needs_gradient(args)):
            return None
        device = args[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            return None
        return self._planned.again(args)

    def _needs_gradient(self, args: tuple[Any, ...]) -> bool:
        return any(args[i] is not None and args[i].requires_grad for i in self.differentiable)

    def backward(self, run: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        """Decorates the op's backward.

        It takes the record, the gradients of the results (the first is always there, others may be None) and the
        results that are kept for it; and returns the gradients of the record's differentiable fields in their order,
        those of a record inside in a tuple, with None for what has no gradient. Where weights are frozen, ``trained()``
        of the record leaves out the ones whose gradients are None.
        """
        known = self.results - self.kept

        def flat(*args: Any) -> tuple[Tensor | None, ...]:
            found = flattened(run(self.build(args[self.results :]), *args[: self.results]))
            assert len(found) == len(self.differentiable), self.name
            return found

        def filled(*args: Any) -> tuple[Tensor, ...]:
            first = args[0]  # a gradient that is it is copied: results of registered ops are no arguments
            found = (g.clone() if g is first else g for g in launch(*args))
            return tuple(first.new_empty(0) if g is None else g for g in found)

        def fake(*args: Any) -> tuple[Tensor, ...]:
            record: Any = self.build(args[self.results :])
            given = self.flatten(record.trained() if hasattr(record, "trained") else record)
            like = [given[i] for i in self.differentiable]
            return tuple(args[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in like)

        launch = on_its_device(flat)
        gradients = [f"Tensor{'?' if 0 < i < known else ''} given_{i}" for i in range(self.results)]
        schema = f"{self.name}_backward({', '.join(gradients)}, {self.schema})"
        _register(f"{schema} -> {_tensors(len(self.differentiable))}", filled, fake)
        name, flops = f"{self.name}_backward", self._flops
        count_flops(NAMESPACE, name, lambda *args: flops[1](self.build(args[self.results :])) if flops else 0)
        registered = getattr(getattr(torch.ops, NAMESPACE), name)
        setup_context, differentiate = self._autograd(registered)
        torch.library.register_autograd(
            f"{NAMESPACE}::{self.name}", differentiate, setup_context=setup_context, lib=_LIBRARY
        )
        watched = lambda *args: (registered if _is_watched(args[0]) else launch)(*args)  # noqa: E731
        self._run = self._recorded(self._forward, *self._autograd(watched))
        return run

    def piece(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run(record, *tensors)``, a piece of the op's work with a plan of its own; what it returns is without the
        tuples and numbers of records, as gradients are.
        """
        launch = on_its_device(
            lambda *args: flattened(run(self.build(args[-self.arguments :]), *args[: -self.arguments]))
        )
        return lambda record, *tensors: launch(*tensors, *self.flatten(record))

    def between(self, forward: Callable[[Record, Any], Any]) -> Between[Record]:
        """Decorates what the op does where devices share its work; see :class:`Between`."""
        return Between(self, forward)

    def _recorded(
        self, forward: Callable[..., Any], keep: Callable[..., None], differentiate: Callable[..., Any]
    ) -> Callable[..., Any]:
        """``forward`` in eager mode, with its gradients."""

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = forward(*args)
                keep(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
                return differentiate(ctx, *gradients)

        Function.__name__ = Function.__qualname__ = self.name

        def run(*args: Any) -> Any:
            if torch.is_grad_enabled() and self._needs_gradient(args):
                return Function.apply(*args)
            return forward(*args)

        return run

    def _autograd(self, backward: Callable[..., Any]) -> tuple[Callable[..., None], Callable[..., Any]]:
        """What autograd keeps, and the backward, as ``torch.library.register_autograd`` takes them."""

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            outputs = (output,) if isinstance(output, Tensor) else output
            y = outputs[0]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*outputs[self.results - self.kept :], *inputs[: self.tensors])
            ctx.options = inputs[self.tensors :]
            ctx.like = y.shape, y.dtype, y.device

        def differentiate(ctx: Any, first: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():
                raise BackendError(
                    f"{self.name} has no second derivative on Triton: run the forward under "
                    "mamba2_hf.ops.use_backend('torch')"
                )
            if first is None:  # only the states were used
                shape, dtype, device = ctx.like
                first = torch.zeros(shape, dtype=dtype, device=device)
            found = backward(first, *rest[: len(rest) - self.kept], *ctx.saved_tensors, *ctx.options)
            result: list[Tensor | None] = [None] * (self.tensors + len(ctx.options))
            for i, gradient in zip(self.differentiable, found, strict=True):
                if ctx.needs_input_grad[i]:
                    result[i] = gradient
            return tuple(result)

        return setup_context, differentiate


class Between(Generic[Record]):
    """An op of which other devices have a part: slices of the same rows, or other heads. It waits for them on the way,
    so that no plan repeats it, and no schema holds them, so that it runs in eager mode only.

    Args:
        of: the op.
        forward: takes its record and what one call has of the others (:class:`~mamba2_hf.ops.neighbors.Entering`,
            :class:`~mamba2_hf.ops.partners.Sharing`), and returns what the op does.
    """

    def __init__(self, of: Op[Record], forward: Callable[[Record, Any], Any]) -> None:
        self._op = of
        self._forward = here(lambda *args: forward(of.build(args), args[-1]))

    def __call__(self, record: Record, others: Any) -> Any:
        """Runs the op."""
        return self._run(*self._op.flatten(record), others)

    def backward(self, run: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        """Decorates the backward: as of :meth:`Op.backward`, with what there is of the others behind the record."""
        of = self._op
        launch = here(lambda *args: flattened(run(of.build(args[of.results :]), args[-1], *args[: of.results])))
        self._run = of._recorded(self._forward, *of._autograd(launch))
        return run


def op(
    name: str, *, fake: Callable[[Any], Any], kept: int = 0, flops: tuple[Callable[[Any], int], ...] | None = None
) -> Callable[[Callable[[Record], Any]], Op[Record]]:
    """Makes an :class:`Op` of a function of a record."""
    return lambda forward: Op(name, forward, fake, kept, flops)


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`here`, by a plan where there is one."""
    return here(Replayed(launch))


def here(launch: Callable[..., Any]) -> Callable[..., Any]:
    """``launch``, run on the device of its first tensor."""

    def run(*args: Any) -> Any:
        device = args[0].get_device()
        if device in (-1, torch.cuda.current_device() if device >= 0 else -1):
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return run


def _register(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op for every device."""
    name = f"{NAMESPACE}::{schema[: schema.index('(')]}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", lambda *args: launch(*map(_frozen, args)), lib=_LIBRARY)
    torch.library.register_fake(name, lambda *args: fake(*map(_frozen, args)), lib=_LIBRARY)


def _fields(record: type[Any], before: str = "") -> Iterator[Field]:
    """The fields of a record, those of records inside in their place."""
    for name, hint in get_type_hints(record, include_extras=True).items():
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        (kind,) = (part for part in parts if part is not NoneType)
        marks = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
        kind = get_args(kind)[0] if marks else kind
        path = before + name
        if hasattr(kind, "_fields"):
            yield from _fields(kind, f"{path}.")
        elif kind is Tensor:
            optional = "?" if len(parts) > 1 else ""
            yield Field(path, f"Tensor{'(!)' if 'state' in marks else ''}{optional}", True, not marks)
        else:  # a pair of numbers, or one
            schema = "float[]" if get_origin(kind) is tuple else _SCHEMA[kind]
            yield Field(path, f"{schema}{'?' if len(parts) > 1 else ''}", False, False)


def _lettered(fields: list[Field]) -> Iterator[str]:
    """Arguments, in which every tensor that is written to has a letter of its own."""
    letters = iter("abcdefgh")
    for field in fields:
        yield field.argument.replace("(!)", f"({next(letters)}!)") if "(!)" in field.schema else field.argument


def _constructor(record: type[Any], places: Iterator[int], records: dict[str, Any]) -> str:
    """Python that makes a record of ``args``, given the places of its fields in the order of :func:`_fields`."""
    name = f"record_{len(records)}"
    records[name] = record
    parts = [
        _constructor(kind, places, records) if hasattr(kind, "_fields") else f"args[{next(places)}]"
        for kind in get_type_hints(record).values()
    ]
    return f"{name}({', '.join(parts)})"


def _frozen(value: Any) -> Any:
    """A value as records hold it: PyTorch's dispatcher makes lists of tuples."""
    return tuple(value) if type(value) is list else value


def flattened(values: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Returns the gradients in ``values``, without the tuples, lists and numbers that are around them."""
    found: list[Tensor | None] = []
    for value in values:
        if isinstance(value, tuple | list):
            found.extend(flattened(value))
        elif value is None or isinstance(value, Tensor):
            found.append(value)
    return tuple(found)


def _tensors(count: int) -> str:
    """Declares ``count`` results in a schema."""
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _is_watched(tensor: Tensor) -> bool:
    """Whether a call is traced or intercepted rather than just run."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
