"""Reads checkpoints with mlx-lm, whole and quantized to 4 bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import convert, load
from mlx_lm.generate import generate_step
from worker import serve


def read(job: dict[str, Any]) -> dict[str, Any]:
    """Logits and greedy tokens of one checkpoint, and the logits of its quantized copy."""
    model, tokenizer = load(job["folder"])
    ids = mx.array(job["ids"])
    steps = generate_step(ids, model, max_tokens=job["count"])
    quantized = Path(f"{job['out']}-4bit")
    shutil.rmtree(quantized, ignore_errors=True)
    convert(job["folder"], str(quantized), quantize=True, q_bits=4)
    small, _ = load(str(quantized))
    return {
        "logits": np.array(model(ids[None])[0].astype(mx.float32)),
        "tokens": [int(token) for token, _ in steps],
        "text": tokenizer.encode(job["text"]),
        "quantized": np.array(small(ids[None])[0].astype(mx.float32)),
    }


serve(read)
