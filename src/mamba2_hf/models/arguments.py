"""Arguments of a forward that code for any model passes, and that these models have no use for."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn
from transformers.utils.generic import TransformersKwargs

from ..errors import ArgumentError

IGNORED = {
    # What transformers' models hand down to one another, such as a language model to the one that sees the images too.
    *TransformersKwargs.__optional_keys__,
    "logits_to_keep",
    # Made by tokenizers and processors.
    *("special_tokens_mask", "mm_token_type_ids"),
    # Taken by every model before transformers 5, and still passed by code that was written then.
    *("cache_position", "num_logits_to_keep", "head_mask"),
}
"""Names that no forward here refuses; transformers' own models ignore them, with any other name."""


def check_ignored(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Judges arguments that the forward of a model has no parameter for.

    Raises:
        TypeError: a name is none of :data:`IGNORED`, so it is misspelt or another model's.
        ArgumentError: the value asks for something that would be missing from the result.
    """
    for name, value in arguments.items():
        if name not in IGNORED:
            near = difflib.get_close_matches(name, inspect.signature(model.forward).parameters, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{type(model).__name__}.forward() got an unexpected keyword argument {name!r}{hint}")
        if name == "is_causal" and value is False:
            raise ArgumentError("is_causal=False: a state has seen the tokens before, and none of those that follow")
        if name == "head_mask" and value is not None:
            raise ArgumentError("head_mask: no heads are left out; hooks on the mixers can do that")
