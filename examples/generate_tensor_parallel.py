"""Continues a text with a model that several GPUs share: each computes some of the heads of every layer.

    torchrun --nproc_per_node 2 examples/generate_tensor_parallel.py --model ./mamba2-2.7b "The state of a model is"

Every process is given the same text and writes the same tokens; the first one prints them. Without --model it runs the
tiny model inside the package, which writes Python; without torchrun, one process has the whole model.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from mamba2_hf.pretrained import shipped_model_path


def load(name: str, processes: int):
    """The model, or this process's part of it, where it runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if processes == 1:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    spread = DistributedConfig(tp_size=processes)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, distributed_config=spread).eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="def main(", help="to be continued")
    parser.add_argument("--model", default=str(shipped_model_path()), help="a directory or a Hub id")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--sample", action="store_true", help="draw tokens, where the likeliest is taken otherwise")
    options = parser.parse_args(arguments)
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = load(options.model, processes)
    inputs = tokenizer(options.text, return_tensors="pt").to(model.device)
    start = time.perf_counter()
    out = model.generate(
        **inputs,
        do_sample=options.sample,
        max_new_tokens=options.max_new_tokens,
        streamer=TextStreamer(tokenizer) if rank == 0 else None,
    )
    seconds = time.perf_counter() - start
    if rank == 0:
        new = out.shape[1] - inputs["input_ids"].shape[1]
        print(f"[{new} tokens in {seconds:.2f} s on {processes} x {model.device.type}]")
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
