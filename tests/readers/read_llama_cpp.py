"""Reads GGUF files with llama.cpp, as they are and quantized to q8_0."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
from worker import serve


def load(path: str, adapter: str | None = None) -> llama_cpp.Llama:
    """A model that keeps keys and values in float32, as the others do."""
    return llama_cpp.Llama(
        path,
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        lora_path=adapter,
        verbose=False,
    )


def logits_of(model: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    """Logits at every position, of shape (length, vocabulary)."""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: model.n_tokens])


def read(job: dict[str, Any]) -> dict[str, Any]:
    """Logits and greedy tokens of one file, and the logits of its quantized copy."""
    model = load(job["file"], job["adapter"])
    ids = list(job["ids"])
    logits = logits_of(model, ids)
    tokens: list[int] = []
    for _ in range(job["count"]):
        tokens.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(tokens[-1:])
    text = model.tokenize(job["text"].encode(), add_bos=False, special=True)
    quantized = f"{job['out']}-q8_0.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    if llama_cpp.llama_model_quantize(job["file"].encode(), quantized.encode(), parameters):
        raise ValueError("cannot be quantized to q8_0")
    small = logits_of(load(quantized, job["adapter"]), ids)
    return {"logits": logits, "tokens": tokens, "text": text, "quantized": small}


serve(read)
