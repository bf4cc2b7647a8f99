"""Reads a long document once and asks it many times.

The state that a Mamba-2 is in after a document has a constant size, whatever its length. It is kept in a file beside
the document; every question goes on from there, and costs no more than its own tokens.

    python examples/ask_document.py README.md "What is a state?" "Who wrote this?" --model ./my-mamba2

Without --model it runs the tiny model inside the package, which writes Python that looks right: ask it for a function.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mamba2_hf import Mamba2Cache
from mamba2_hf.errors import CacheError
from mamba2_hf.pretrained import shipped_model_path


def read_once(model, tokenizer, document: Path, state: Path) -> None:
    """Leaves the state after the document in a file, unless it is there."""
    ids = tokenizer(document.read_text(encoding="utf-8"), return_tensors="pt").input_ids.to(model.device)
    try:
        if Mamba2Cache.load(state, model).has_read(ids):
            return
    except CacheError as reason:
        print(f"[{reason}]")
    start = time.perf_counter()
    model.read(ids).save(state, model, ids)
    seconds, size = time.perf_counter() - start, state.stat().st_size / 2**20
    print(f"[{ids.shape[1]} tokens read in {seconds:.1f} s, and kept in {size:.1f} MiB]")


def ask(model, tokenizer, state: Path, question: str, max_new_tokens: int) -> str:
    """The answer to one question, from the state in a file."""
    cache = Mamba2Cache.load(state, model)
    ids = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    mask = ids.new_ones(1, cache.seen_tokens + ids.shape[1])  # over the document, too
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=max_new_tokens
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Reads a long document once and asks it many times.")
    parser.add_argument("document", type=Path, help="a text file")
    parser.add_argument("questions", nargs="+", help="each is asked behind the document, and knows of no other")
    parser.add_argument("--model", default=str(shipped_model_path()), help="a directory or a Hub id")
    parser.add_argument("--state", type=Path, help="where to keep the state; the document's name with .state")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    options = parser.parse_args(arguments)
    state = options.state or options.document.with_name(options.document.name + ".state")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    read_once(model, tokenizer, options.document, state)
    for question in options.questions:
        start = time.perf_counter()
        answer = ask(model, tokenizer, state, question, options.max_new_tokens)
        print(f"{question}{answer}\n[{time.perf_counter() - start:.1f} s]")


if __name__ == "__main__":
    main()
