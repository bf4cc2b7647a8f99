"""Nemotron-H and Nemotron 3 (NVIDIA) to mamba2_hybrid, and back.

    python conversion/from_nemotron_h.py nvidia/Nemotron-H-8B-Base-8K ./nemotron
    python conversion/from_nemotron_h.py --back ./nemotron-tuned ./for-vllm

The source is a folder or a Hub id with

* ``config.json`` (``model_type: nemotron_h``): ``hybrid_override_pattern``, a letter a layer (``M`` SSD, ``*``
  attention, ``-`` MLP, ``E`` experts), or ``layers_block_type``; ``mamba_num_heads``, ``n_groups``, ...
* ``model.safetensors`` or ``pytorch_model.bin``, in one file or in shards: ``backbone.layers.N.mixer.*`` whatever the
  layer is, ``backbone.norm_f``, ``lm_head``; every expert is a tensor of its own. Heads that predict further tokens
  (``num_nextn_predict_layers``, ``mtp_hybrid_override_pattern``) are one list of layers, ``mtp.layers.N.*``.

The step size is clamped from ``time_step_min`` up, as transformers' own class does in a full forward; its decoding
does not. Back goes what is such a model: one block in a layer, attention without positions, MLPs without a gate,
sigmoid routing. The rest is refused by name.
"""

from __future__ import annotations

import argparse

from mamba2_hf.checkpoints import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or a Hub id")
    parser.add_argument("destination", help="the folder to make")
    parser.add_argument("--back", action="store_true", help="from mamba2_hybrid to nemotron_h")
    args = parser.parse_args()
    source_format, to = ("mamba2_hybrid", "nemotron_h") if args.back else ("nemotron_h", "mamba2_hybrid")
    result = convert(args.source, args.destination, source_format=source_format, to=to)
    print(f"{result.parameters:,} parameters in {result.destination}")


if __name__ == "__main__":
    main()
