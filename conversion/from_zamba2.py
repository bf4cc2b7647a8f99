"""Zamba2 (Zyphra) to mamba2_hybrid, and back.

    python conversion/from_zamba2.py Zyphra/Zamba2-1.2B ./zamba
    python conversion/from_zamba2.py --back ./zamba-tuned ./for-vllm

The source is a folder or a Hub id with

* ``config.json`` (``model_type: zamba2``): ``layers_block_type`` (``mamba`` or ``hybrid``), ``num_mem_blocks``,
  ``adapter_rank``, ``use_mem_rope``, ``use_shared_attention_adapter``, ...
* ``model.safetensors`` or ``pytorch_model.bin``, in one file or in shards: a shared block is stored with the first
  layer that uses it, or with every one; then all copies have to be the same.

The step size is clamped from ``time_step_min`` up, as transformers' own class does in a full forward; its decoding
does not. Back goes what is such a model: SSD in every layer, shared blocks with adapters in some, GeGLU. The rest is
refused by name.
"""

from __future__ import annotations

import argparse

from mamba2_hf.checkpoints import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or a Hub id")
    parser.add_argument("destination", help="the folder to make")
    parser.add_argument("--back", action="store_true", help="from mamba2_hybrid to zamba2")
    args = parser.parse_args()
    source_format, to = ("mamba2_hybrid", "zamba2") if args.back else ("zamba2", "mamba2_hybrid")
    result = convert(args.source, args.destination, source_format=source_format, to=to)
    print(f"{result.parameters:,} parameters in {result.destination}")


if __name__ == "__main__":
    main()
