"""Codestral Mamba as Mistral publishes it to the mamba2 format of transformers.

    python conversion/from_codestral.py ./Mamba-Codestral-7B-v0.1 ./codestral

The source is a folder or a Hub id with

* ``params.json``: ``dim``, ``n_layers``, ``vocab_size``, ``n_groups``, ...; every other key is without effect, as it is
  for Mistral's own reader.
* ``consolidated.safetensors``: the original code's names behind ``model.``.

Its tokenizer is Llama's kind, ``tokenizer.model.v3``; AutoTokenizer reads the ``tokenizer.json`` of the Hub's copy.
That copy also holds the model in the mamba2 format, which ``mamba2-hf convert`` prefers and this script does not.
"""

from __future__ import annotations

import argparse

from mamba2_hf.checkpoints import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or a Hub id")
    parser.add_argument("destination", help="the folder to make")
    args = parser.parse_args()
    result = convert(args.source, args.destination, source_format="codestral")
    print(f"{result.parameters:,} parameters in {result.destination}")


if __name__ == "__main__":
    main()
