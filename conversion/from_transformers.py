"""A mamba2 checkpoint of transformers to the original code's format, or written anew.

    python conversion/from_transformers.py ./my-mamba2 ./for-mamba-ssm --to mamba_ssm
    python conversion/from_transformers.py ./old-mamba2 ./new-mamba2

The source is a folder or a Hub id with ``config.json`` (``model_type: mamba2``) and ``model.safetensors`` or
``pytorch_model.bin``, in one file or in shards with an index. Early conversions name the embedding
``backbone.embedding.weight`` and may carry keys in their config that nothing reads; both are understood.

``mamba_ssm`` has no place for token ids and the like: the whole config goes along as ``mamba2_config.json``, so that
the way back returns exactly what was there. A norm epsilon other than 1e-5 is refused: mamba_ssm knows no other.
"""

from __future__ import annotations

import argparse

from mamba2_hf.checkpoints import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or a Hub id")
    parser.add_argument("destination", help="the folder to make")
    parser.add_argument("--to", choices=["mamba2", "mamba_ssm"], default="mamba2")
    args = parser.parse_args()
    result = convert(args.source, args.destination, source_format="mamba2", to=args.to)
    print(f"{result.parameters:,} parameters in {result.destination}")


if __name__ == "__main__":
    main()
