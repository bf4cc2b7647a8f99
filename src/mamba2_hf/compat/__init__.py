"""What people run on mamba_ssm and causal_conv1d, on this package's ops: on a CPU or GPU, with nothing to build.

* Functions and modules with those packages' names, arguments and defaults, to be imported from here.
* :func:`use_with_transformers` has transformers' own classes run on them.
* :func:`install` answers ``import mamba_ssm`` and ``import causal_conv1d`` where these cannot be imported.

Nothing of it happens by an import. ``docs/drop-in.md`` says what is covered and what differs.
"""

from __future__ import annotations

from .conv import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from .layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from .layernorm_gated import LayerNorm as LayerNormGated
from .layernorm_gated import RMSNorm as RMSNormGated
from .layernorm_gated import layernorm_fn, rmsnorm_fn
from .lm import InferenceParams, MambaConfig, MambaLMHeadModel
from .mamba2 import Mamba2
from .ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined, selective_state_update
from .stand_in import install
from .stock import use_with_transformers

__all__ = [
    "InferenceParams",
    "LayerNormGated",
    "Mamba2",
    "MambaConfig",
    "MambaLMHeadModel",
    "RMSNorm",
    "RMSNormGated",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "install",
    "layer_norm_fn",
    "layernorm_fn",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "rms_norm_fn",
    "rmsnorm_fn",
    "selective_state_update",
    "use_with_transformers",
]
