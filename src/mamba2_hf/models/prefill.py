"""Reading a prompt in pieces, so that its length does not decide how much memory it takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.generation.candidate_generator import _MapInputEmbedding
from transformers.utils import logging

from ..layers import Attention
from .outputs import CACHE

if TYPE_CHECKING:
    from .causal_lm import SSDForCausalLM

logger = logging.get_logger(__name__)

TOKENS_AT_ONCE = 16384
"""Most tokens, of all rows together, that one call reads where free memory is not known, off a GPU; and that prompts of
several requests may take to be read in one call, padding included."""

_BYTES = 16
"""Of activations for each token and each channel of the widest linear layer, going in and coming out. The PyTorch
backend was measured at 5 (bfloat16) to 13 (float32, an MLP beside the mixer) of them."""
_MULTIPLE = 256


def tokens_at_once(model: SSDForCausalLM, rows: int, tokens: int, past: int) -> int:
    """How many tokens of each row one call should read.

    On a GPU the activations may take half of the memory that is free, after what the keys and values of all tokens
    need; elsewhere it is :data:`TOKENS_AT_ONCE`. A multiple of 256, at least that.

    Args:
        model: that reads.
        rows: of the batch.
        tokens: of each row, to be read.
        past: tokens that a cache has seen.
    """
    rows = max(rows, 1)
    limit = TOKENS_AT_ONCE // rows
    if model.device.type == "cuda":
        limit = _free(model.device, model, rows, tokens) // (2 * rows * _bytes_per_token(model, past + tokens))
    return max(limit // _MULTIPLE, 1) * _MULTIPLE


def _free(device: torch.device, model: SSDForCausalLM, rows: int, tokens: int) -> int:
    """Bytes of the device that are free, or held by PyTorch without use, less those of the keys to come."""
    free = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    attention = next((module for module in model.modules() if isinstance(module, Attention)), None)
    keys = 0
    if attention is not None:
        layers = sum(kind == "attention" for kind in model.config.mixer_kinds)
        keys = layers * 2 * attention.sizes[1] * rows * tokens * model.dtype.itemsize
    return max(free + unused - keys, 0)


def _bytes_per_token(model: SSDForCausalLM, keys: int) -> int:
    linears = (module for module in model.backbone.modules() if isinstance(module, nn.Linear))
    activations = _BYTES * max((module.in_features + module.out_features for module in linears), default=1)
    heads = getattr(model.config, "num_attention_heads", None)
    if heads is None:
        return activations
    # A mask of bytes, or all scores and weights.
    return activations + keys * (8 * heads if model.config._attn_implementation == "eager" else 1)


_PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")
"""Arguments of a forward whose second dimension is the tokens."""
_OF_EVERY_TOKEN = ("output_hidden_states", "output_attentions", "output_router_logits")
"""What a forward may be asked to return of every token, not of the last."""
_EXACT = (__name__.partition(".")[0], "torch", "transformers", "accelerate", "deepspeed")
"""Packages whose hooks and forwards move, shard or cast: they do to a piece what they do to the whole."""


def token_count(inputs: dict[str, Any]) -> int:
    """Tokens of each row, soft ones among them, in the arguments of a forward."""
    count: int = _tokens(inputs).shape[1]
    return count


def _tokens(inputs: dict[str, Any]) -> Tensor:
    ids: Tensor | None = inputs.get("input_ids")
    return inputs["inputs_embeds"] if ids is None else ids


def relevant_mask(mask: Any, tokens: int) -> Any:
    """An attention mask, or None where it leaves out none of the last ``tokens`` tokens: a compiled forward cannot look
    at its values, and takes every mask for one that does.
    """
    plain = isinstance(mask, Tensor) and mask.dim() == 2
    return None if plain and bool((mask[:, -tokens:] != 0).all()) else mask


def cut(inputs: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The arguments of a forward for some of its tokens, when the cache has seen those before them.

    Args:
        inputs: the arguments for all tokens; :func:`why_not_cut` has no objection.
        start, stop: the first of the tokens, and the first one after them.
    """
    behind = token_count(inputs) - stop
    piece = dict(inputs)
    for name in _PER_TOKEN:
        if inputs.get(name) is not None:
            piece[name] = inputs[name][:, start:stop]
    mask = inputs.get("attention_mask")
    if mask is not None:
        piece["attention_mask"] = relevant_mask(mask[:, : mask.shape[1] - behind], stop - start)
    return piece


def why_not_cut(inputs: dict[str, Any]) -> str | None:
    """Why the arguments of a forward cannot be cut into those for some of its tokens; None if they can."""
    tokens = token_count(inputs)
    for name, value in inputs.items():
        if name in _OF_EVERY_TOKEN and value:
            return f"{name}={value} is about every token"
        if name == "attention_mask" and isinstance(value, Tensor):
            known = value.dim() == 2 and value.shape[1] >= tokens
        elif name in _PER_TOKEN and isinstance(value, Tensor):
            known = value.dim() > 1 and value.shape[1] == tokens
        else:
            known = name == CACHE or value is None or isinstance(value, (bool, int, float, str))
        if not known:
            return f"{name} may belong to certain tokens"
    return None if inputs.get(CACHE) is not None and inputs.get("use_cache") is not False else "there is no cache"


def _why_not_exact(model: nn.Module) -> str | None:
    """Why a model may make something else of a prompt in pieces; None if it does not. A hook, or a forward of someone
    else's, may act by the position of a token, or count from the last one.
    """
    for name, module in model.named_modules():
        for function in _acting(module, is_model=module is model):
            package = _package(function)
            if package not in _EXACT:
                return f"{name or type(model).__name__} runs a function of {package}, which may act by position"
    return None


def _acting(module: nn.Module, is_model: bool) -> Iterator[Any]:
    """What runs when a module is called, beside a forward of its class."""
    if is_model or "forward" in vars(module):
        yield module.forward
    if is_model:
        yield from nn.modules.module._global_forward_hooks.values()
        yield from nn.modules.module._global_forward_pre_hooks.values()
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()


def _package(function: Any) -> str:
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    module: str = getattr(function, "__module__", None) or type(function).__module__
    return module.partition(".")[0]


def read(model: SSDForCausalLM, inputs: dict[str, Any], at_once: int | None = None) -> Any:
    """Lets the model read a prompt, in several calls where one would take too much memory, and returns the output of
    the last. Where pieces might come to something else than the whole, there is one call.

    Args:
        model: that reads.
        inputs: what ``prepare_inputs_for_generation`` made of the prompt.
        at_once: tokens of each row in a call, as the user asked for; None for what fits the memory.
    """
    (rows, tokens), cache = _tokens(inputs).shape[:2], inputs.get(CACHE)
    if at_once is None:
        size = tokens_at_once(model, rows, tokens, 0 if cache is None else cache.get_seq_length())
    else:
        size = at_once
    if tokens > size:
        reason = why_not_cut(inputs) or _why_not_exact(model)
        if reason is not None:
            tell = logger.info if at_once is None else logger.warning_once
            tell(f"a prompt of {tokens} tokens is read in one call, not in pieces of {size}: {reason}")
            size = tokens
    start = 0
    while tokens - start > size:
        _expect_prompt(model)
        model(**{**cut(inputs, start, start + size), "logits_to_keep": 1})
        start += size
    _expect_prompt(model)
    return model(**(cut(inputs, start, tokens) if start else inputs))


def _expect_prompt(model: SSDForCausalLM) -> None:
    """Prepares for a forward of prompt tokens that may not be the first: in sampled decoding with an assistant that has
    another tokenizer, transformers wraps the assistant's embedding in one that takes the first call for the whole
    prompt, and the ids of every later one for those of its own proposals.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, _MapInputEmbedding):
        embedding.map = False
