"""Writes GPT-2's tokenizer from the vocabulary in a checkout of llama.cpp, which knows it by the tokens that it makes.

Usage: make_tokenizer.py CHECKOUT FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2TokenizerFast

checkout, folder = map(Path, sys.argv[1:])
fields = gguf.GGUFReader(checkout / "models" / "ggml-vocab-gpt-2.gguf").fields
tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
tokenizer = Tokenizer(
    models.BPE({token: index for index, token in enumerate(tokens)}, [tuple(pair.split(" ")) for pair in merges])
)
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
GPT2TokenizerFast(tokenizer_object=tokenizer, model_max_length=1024).save_pretrained(folder)
