"""state-spaces/mamba2attn-2.7b (the original code's hybrids) to mamba2_hybrid.

    python conversion/from_mamba2attn.py state-spaces/mamba2attn-2.7b ./mamba2attn-2.7b

The source is a folder or a Hub id with

* ``config.json`` without ``model_type``: as of a Mamba-2, and ``attn_layer_idx``, ``attn_cfg`` or ``d_intermediate``.
* ``pytorch_model.bin``: in layers with attention ``mixer.in_proj`` is queries, keys and values, and ``mixer.conv1d``
  goes over all three, without an activation. With MLPs, ``norm2`` and ``mlp.fc1``, ``mlp.fc2``; the second half of
  ``fc1`` is the gate, and its width is rounded up to a multiple of 128.

The original code's own decoding keeps values for the convolution that it has gone over already; what is computed here
is its full forward. There is no way back. No tokenizer is published with it; it was trained with that of
EleutherAI/gpt-neox-20b, which is taken along.
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
    result = convert(args.source, args.destination, source_format="mamba2attn", tokenizer=args.tokenizer or None)
    print(f"{result.parameters:,} parameters in {result.destination}")


if __name__ == "__main__":
    main()
