"""Reading a prompt in pieces, so that its length does not decide how much memory it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.generation.candidate_generator import _MapInputEmbedding

from ..layers import Attention

if TYPE_CHECKING:
    from .cache import Mamba2Cache
    from .causal_lm import SSDForCausalLM

TOKENS_AT_ONCE = 16384
"""Most tokens, of all rows together, that one call reads where free memory is not known: off a GPU."""

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


def read(
    model: SSDForCausalLM, input_ids: Tensor, attention_mask: Tensor | None, cache: Mamba2Cache, at_once: int
) -> None:
    """Lets the model read all of ``input_ids (B, T)`` into the cache, ``at_once`` tokens of each row in a call.

    Args:
        model: that reads.
        input_ids: tokens that the cache has not seen.
        attention_mask: ``(B, seen + T)``, over those that it has seen too.
        cache: that gets to see them.
        at_once: tokens of each row in a call.
    """
    past = cache.seen_tokens
    for start in range(0, input_ids.shape[1], at_once):
        ids = input_ids[:, start : start + at_once]
        mask = None if attention_mask is None else attention_mask[:, : past + start + ids.shape[1]]
        expect_prompt(model)
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)


def expect_prompt(model: SSDForCausalLM) -> None:
    """Prepares for a forward of prompt tokens that may not be the first: in sampled decoding with an assistant that has
    another tokenizer, transformers wraps the assistant's embedding in one that takes the first call for the whole
    prompt, and the ids of every later one for those of its own proposals.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, _MapInputEmbedding):
        embedding.map = False
