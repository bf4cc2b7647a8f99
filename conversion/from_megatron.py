"""Megatron's Mamba-2 models (nvidia/mamba2-hybrid-8b-3t-4k, nvidia/mamba2-8b-3t-4k) to mamba2_hybrid or mamba2.

    python conversion/from_megatron.py ./megatron-tensors ./hybrid-8b
    python conversion/from_megatron.py --pure ./megatron-tensors ./mamba2-8b

Megatron keeps its arguments and weights in a pickle that also holds its own classes. It is not loaded here: where
Megatron is installed, load it there and write the dictionary ``model`` with ``safetensors.torch.save_file``. The source
is a folder with

* ``config.json``: Megatron's arguments under their names, ``hidden_size``, ``num_attention_heads``,
  ``num_query_groups``, ``padded_vocab_size``, ``untie_embeddings_and_output_weights``, ... and
  ``hybrid_layer_pattern`` or ``hybrid_override_pattern``, a letter a layer (``M`` SSD, ``*`` attention, ``-`` MLP). A
  pattern of ``M`` alone is a Mamba-2 (``--pure``).
* ``model.safetensors``: ``decoder.layers.N.mixer.*``, ``self_attention.linear_qkv`` (queries, key and value of each
  group together), ``mlp.linear_fc1``, ``embedding.word_embeddings``, ``output_layer``; pre-norms of their own or as
  ``layer_norm_weight`` of the projection behind them. in_proj and conv1d may be in parts (``.z``, ``.x``, ``.B``,
  ``.C``, ``.dt``), as in distributed checkpoints. All ranks' parts have to be joined.

There is no way back. The tokenizer is SentencePiece's and has to be added.
"""

from __future__ import annotations

import argparse

from mamba2_hf.checkpoints import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or a Hub id")
    parser.add_argument("destination", help="the folder to make")
    parser.add_argument("--pure", action="store_true", help="it has no attention and no MLPs")
    args = parser.parse_args()
    result = convert(args.source, args.destination, source_format="megatron_mamba2" if args.pure else "megatron")
    print(f"{result.parameters:,} parameters in {result.destination}")


if __name__ == "__main__":
    main()
