"""Granite 4 H (IBM) to mamba2_hybrid, and back.

    python conversion/from_granitemoehybrid.py ibm-granite/granite-4.0-h-micro ./granite
    python conversion/from_granitemoehybrid.py --back ./granite-tuned ./for-vllm

The source is a folder or a Hub id with

* ``config.json`` (``model_type: granitemoehybrid``): ``layer_types``, ``num_local_experts`` (0 for none),
  ``shared_intermediate_size``, four multipliers; ``position_embedding_type: rope`` rotates whole heads.
* ``model.safetensors`` or ``pytorch_model.bin``, in one file or in shards: ``model.layers.N.mamba.*`` or
  ``self_attn.*``; gate and up projection are one matrix, ``shared_mlp.input_linear``, and so are those of all experts,
  ``block_sparse_moe.input_linear``. The names that transformers gives experts in memory are read too.

Back goes what is such a model: softmax routing with an MLP beside the experts, SwiGLU, one epsilon for all norms. The
rest is refused by name.
"""

from __future__ import annotations

import argparse

from mamba2_hf.checkpoints import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or a Hub id")
    parser.add_argument("destination", help="the folder to make")
    parser.add_argument("--back", action="store_true", help="from mamba2_hybrid to granitemoehybrid")
    args = parser.parse_args()
    source_format, to = ("mamba2_hybrid", "granitemoehybrid") if args.back else ("granitemoehybrid", "mamba2_hybrid")
    result = convert(args.source, args.destination, source_format=source_format, to=to)
    print(f"{result.parameters:,} parameters in {result.destination}")


if __name__ == "__main__":
    main()
