"""Falcon-H1 (TII) to mamba2_hybrid, and back.

    python conversion/from_falcon_h1.py tiiuae/Falcon-H1-0.5B-Base ./falcon
    python conversion/from_falcon_h1.py --back ./falcon-tuned ./for-vllm

The source is a folder or a Hub id with

* ``config.json`` (``model_type: falcon_h1``): ``mamba_d_ssm``, ``mamba_rms_norm``, ``mamba_norm_before_gate`` and
  twelve or so multipliers, all of which are kept as they are and not folded into weights.
* ``model.safetensors`` or ``pytorch_model.bin``, in one file or in shards: ``model.layers.N.mamba.*`` and
  ``self_attn.*`` side by side, ``feed_forward.*``, ``model.final_layernorm``.

Back goes what is such a model: SSD beside rotary attention and then SwiGLU in every layer, ``residual_multiplier`` 1.
The rest is refused by name.
"""

from __future__ import annotations

import argparse

from mamba2_hf.checkpoints import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or a Hub id")
    parser.add_argument("destination", help="the folder to make")
    parser.add_argument("--back", action="store_true", help="from mamba2_hybrid to falcon_h1")
    args = parser.parse_args()
    source_format, to = ("mamba2_hybrid", "falcon_h1") if args.back else ("falcon_h1", "mamba2_hybrid")
    result = convert(args.source, args.destination, source_format=source_format, to=to)
    print(f"{result.parameters:,} parameters in {result.destination}")


if __name__ == "__main__":
    main()
