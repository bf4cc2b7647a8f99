"""Bamba (IBM, Princeton, CMU, UIUC) to mamba2_hybrid, and back.

    python conversion/from_bamba.py ibm-fms/Bamba-9B ./bamba
    python conversion/from_bamba.py --back ./bamba-tuned ./for-vllm

The source is a folder or a Hub id with

* ``config.json`` (``model_type: bamba``): ``attn_layer_indices``, ``mamba_n_heads``, ``mamba_d_head``, ... Every layer
  is SSD or rotary attention, then SwiGLU.
* ``model.safetensors`` or ``pytorch_model.bin``, in one file or in shards: ``model.layers.N.mamba.*`` or
  ``self_attn.*``, ``feed_forward.*``, ``input_layernorm``, ``pre_ff_layernorm``, ``model.final_layernorm``.

Back goes what is such a model: no multipliers, one epsilon for all norms, heads of ``hidden_size /
num_attention_heads``, an inner width that is a multiple of ``hidden_size``. The rest is refused by name. transformers'
own Bamba decodes by hand only with ``position_ids``; here they may be left out.
"""

from __future__ import annotations

import argparse

from mamba2_hf.checkpoints import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or a Hub id")
    parser.add_argument("destination", help="the folder to make")
    parser.add_argument("--back", action="store_true", help="from mamba2_hybrid to bamba")
    args = parser.parse_args()
    source_format, to = ("mamba2_hybrid", "bamba") if args.back else ("bamba", "mamba2_hybrid")
    result = convert(args.source, args.destination, source_format=source_format, to=to)
    print(f"{result.parameters:,} parameters in {result.destination}")


if __name__ == "__main__":
    main()
