"""Reads checkpoints with the transformers that is installed where this runs, and adapters with its PEFT."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from worker import serve


@torch.no_grad()
def read(job: dict[str, Any]) -> dict[str, Any]:
    """Logits and greedy tokens of one checkpoint."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    if found := {kind: sorted(map(str, names)) for kind, names in loading.items() if names}:
        raise ValueError(f"loaded in part: {found}")
    model.generation_config = GenerationConfig()  # greedily, and on after an end
    if job["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    ids = torch.tensor([job["ids"]])
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits[0]
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=job["count"]
    )
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    return {
        "logits": logits.numpy(),
        "tokens": written[0, ids.shape[1] :].tolist(),
        "text": tokenizer(job["text"])["input_ids"],
    }


serve(read)
