"""state-spaces/mamba2-* (the original code's format) to the mamba2 format of transformers.

    python conversion/from_state_spaces.py state-spaces/mamba2-130m ./mamba2-130m

The source is a folder or a Hub id with

* ``config.json`` without ``model_type``: ``d_model``, ``n_layer``, ``ssm_cfg`` with ``layer: Mamba2``, ... Its
  ``vocab_size`` counts the tokens; the embedding is padded to a multiple of ``pad_vocab_size_multiple`` (50277 to
  50288).
* ``pytorch_model.bin``: the names of ``mamba2``, but ``backbone.embedding.weight``; a tied head is there as well.

No tokenizer is published with these models; they were trained with that of EleutherAI/gpt-neox-20b, which is taken
along. A Mamba-1 (``ssm_cfg.layer`` absent) and options that ``mamba2`` lacks are refused by name. Hybrids are for
``from_mamba2attn.py``.
"""

from __future__ import annotations

import argparse

from mamba2_hf.checkpoints import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or a Hub id")
    parser.add_argument("destination", help="the folder to make")
    parser.add_argument("--tokenizer", default="EleutherAI/gpt-neox-20b", help="a folder or a Hub id, or '' for none")
    args = parser.parse_args()
    result = convert(args.source, args.destination, source_format="mamba_ssm", tokenizer=args.tokenizer or None)
    print(f"{result.parameters:,} parameters in {result.destination}")


if __name__ == "__main__":
    main()
