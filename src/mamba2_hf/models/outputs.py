"""What the models return."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor
from transformers.generation import utils as generation
from transformers.utils import ModelOutput

from ..errors import LogitsError
from .cache import Mamba2Cache

_Output = TypeVar("_Output")

CACHE = "cache" if "cache" in generation.ALL_CACHE_NAMES else "past_key_values"
"""What transformers calls a cache among arguments and outputs: ``cache`` from 5.24 on."""

_GENERATED = {"__init__", "__repr__", "__eq__", "__match_args__"}


def _named(cls: type[_Output]) -> type[_Output]:
    """Gives the field ``past_key_values`` of a dataclass the name that transformers looks for. Read by the former it is
    there in either case.
    """
    if CACHE == "past_key_values":
        return cls
    cls.__annotations__ = {CACHE if k == "past_key_values" else k: v for k, v in cls.__annotations__.items()}
    for name in ("past_key_values", *_GENERATED & vars(cls).keys()):  # dataclass leaves alone what is there
        delattr(cls, name)
    setattr(cls, CACHE, None)
    return dataclass(cls)


@_named
@dataclass
class Mamba2Output(ModelOutput):
    """Output of a backbone.

    Attributes:
        last_hidden_state: ``(B, T, d)`` after the final norm.
        past_key_values: the cache after these tokens; also readable as ``cache_params``.
        hidden_states: embeddings, then every layer's output, the last one after the final norm; ``(B, T, d)`` each.
        attentions: ``(B, H, T, T)`` per mixer, in the order of the model: SSD attention matrices, and in hybrids the
            weights of attention.
        router_logits: ``(B T, E)`` per mixture of experts, zeros where a token is padding.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Mamba2Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None

    @property
    def cache_params(self) -> Mamba2Cache | None:
        """``past_key_values`` under the name that transformers' Mamba models use."""
        return getattr(self, CACHE)  # type: ignore[no-any-return]


@_named
@dataclass
class _CausalLMFields(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Mamba2Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class _FieldsThatAreThere:
    """``__dataclass_fields__``: of an output whose logits were left out all others, so that who goes through the fields
    of any dataclass (``dataclasses.replace``, DDP, FSDP 1) does not read them.
    """

    def __get__(self, output: Mamba2CausalLMOutput | None, owner: type[Any]) -> dict[str, Any]:
        every = _CausalLMFields.__dataclass_fields__
        if output is None or not output.lacks_logits:
            return every
        return {name: field for name, field in every.items() if name != "logits"}


class Mamba2CausalLMOutput(_CausalLMFields):
    """Output of a language model: :class:`Mamba2Output` with ``loss ()``, ``logits (B, T, vocab)`` unless they were
    left out (``return_logits``), and ``aux_loss ()`` where router logits were asked for.

    Raises:
        LogitsError: ``logits`` is read, by attribute or key, and was left out. ``"logits" in output`` tells.
    """

    __dataclass_fields__ = _FieldsThatAreThere()  # type: ignore[assignment]

    @property
    def lacks_logits(self) -> bool:
        """Whether the logits were left out."""
        missing = object()  # while the fields are being set, one after the other
        return self.__dict__.get("logits", missing) is None and self.__dict__.get("loss") is not None

    @property
    def logits(self) -> Tensor | None:
        """``(B, T, vocab)``; None in an output without anything."""
        if self.lacks_logits:
            raise LogitsError(
                "the logits were left out, as they are in training mode with labels and with return_logits=False: call "
                "the model with return_logits=True, or without labels"
            )
        return self.__dict__.get("logits")

    @logits.setter
    def logits(self, value: Tensor | None) -> None:
        self.__dict__["logits"] = value

    @property
    def cache_params(self) -> Mamba2Cache | None:
        """``past_key_values`` under the name that transformers' Mamba models use."""
        return getattr(self, CACHE)  # type: ignore[no-any-return]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str) and key == "logits":
            _ = self.logits  # which says what to do, if there are none
        return super().__getitem__(key)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self.__dict__.get(field.name) for field in fields(type(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.items())})"


_NOTHING: dict[str, None] = dict.fromkeys(field.name for field in fields(Mamba2CausalLMOutput))


def step_output(logits: Tensor, cache: Mamba2Cache) -> Mamba2CausalLMOutput:
    """``Mamba2CausalLMOutput(logits=logits, past_key_values=cache)``, without the checks of its fields by which a
    ``ModelOutput`` takes longer to make than all else that Python does for a captured step.
    """
    output = Mamba2CausalLMOutput.__new__(Mamba2CausalLMOutput)
    given = {"logits": logits, CACHE: cache}
    output.__dict__.update(_NOTHING, **given)
    for name, value in given.items():
        OrderedDict.__setitem__(output, name, value)
    return output


@_named
@dataclass
class Mamba2SequenceClassifierOutput(ModelOutput):
    """Output of a classifier: ``loss ()`` and ``logits (B, num_labels)``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Mamba2Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
