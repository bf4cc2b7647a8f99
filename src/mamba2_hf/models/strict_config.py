"""Strict configuration classes whose refusals are :class:`mamba2_hf.errors.ConfigurationError`."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from ..errors import ConfigurationError

C = TypeVar("C")


def strict_config(cls: type[C]) -> type[C]:
    """``huggingface_hub``'s ``@strict``: types are checked at every assignment, ``validate_*`` methods on construction
    and on save. Its errors are no ``ValueError`` and bury the message, so they are raised as what caused them.

    The class must be defined without ``from __future__ import annotations``: ``@strict`` does not check types that are
    strings.
    """
    config: Any = strict(cls)
    assign, validate = config.__setattr__, config.validate

    @functools.wraps(assign)
    def assign_typed(self: Any, name: str, value: Any) -> None:
        try:
            assign(self, name, value)
        except StrictDataclassFieldValidationError:
            kind = type(self).__dataclass_fields__[name].type
            expected = kind.__name__ if isinstance(kind, type) else kind
            raise ConfigurationError(f"{name} is {value!r}: expected {expected}") from None

    @functools.wraps(validate)
    def validate_typed(self: Any) -> None:
        try:
            validate(self)
        except StrictDataclassClassValidationError as error:
            raise ConfigurationError(str(error.__cause__)) from None

    config.__setattr__, config.validate = assign_typed, validate_typed
    return cls
