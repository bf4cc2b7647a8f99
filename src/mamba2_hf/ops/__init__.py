"""Functions on tensors: the SSD scan, its single step, the convolution and norm around it.

Each op has a folder: its arguments and contract (``op.py``), its PyTorch (``torch.py``) and Triton (``triton.py``), and
kernels; ``dispatch.py`` chooses between the two, or takes ``invariant/`` where results are not to depend on the batch.
Names and equations are in ``NOTATION.md``, the oracles in ``scan/reference.py``. Every function takes ``backend=None``
(automatic), ``"torch"`` or ``"triton"``; a backend that is asked for and cannot serve raises
:class:`mamba2_hf.errors.BackendError` and says why.
"""

from __future__ import annotations

from . import dispatch
from . import torch as torch
from .attention.op import AttentionStep, attend_one, attention_step, rotary
from .conv.op import activate, causal_conv1d, causal_conv1d_update
from .cross_entropy.op import linear_cross_entropy
from .dispatch import batch_invariant, is_batch_invariant, use_backend
from .mixer.op import (
    BlockStep,
    Inner,
    LayerStep,
    Step,
    block_step,
    fold,
    inner,
    layer,
    layer_step,
    mamba2_inner,
    mamba2_layer,
    mamba2_layer_step,
    mamba2_step,
    new_block,
    new_ring,
    settle,
    step,
)
from .mlp.op import ExpertsStep, MLPStep, experts_step, gated_activation, mlp_step
from .neighbors import Neighbors
from .norm.op import gated_rms_norm
from .partners import Partners
from .scan.op import ssd_chunk_scan, ssd_state_update
from .scan.reference import ssd_attention_matrix
from .spec import NO_RING, Block, LayerWeights, Linear, LowRank, MixerSpec, MixerWeights, Packing, Peers, Ring

__all__ = [
    "NO_RING",
    "AttentionStep",
    "Block",
    "BlockStep",
    "ExpertsStep",
    "Inner",
    "LayerStep",
    "LayerWeights",
    "Linear",
    "LowRank",
    "MLPStep",
    "MixerSpec",
    "MixerWeights",
    "Neighbors",
    "Packing",
    "Partners",
    "Peers",
    "Ring",
    "Step",
    "activate",
    "attend_one",
    "attention_step",
    "batch_invariant",
    "block_step",
    "causal_conv1d",
    "causal_conv1d_update",
    "experts_step",
    "fold",
    "gated_activation",
    "gated_rms_norm",
    "inner",
    "is_batch_invariant",
    "layer",
    "layer_step",
    "linear_cross_entropy",
    "mamba2_inner",
    "mamba2_layer",
    "mamba2_layer_step",
    "mamba2_step",
    "mlp_step",
    "new_block",
    "new_ring",
    "rotary",
    "settle",
    "ssd_attention_matrix",
    "ssd_chunk_scan",
    "ssd_state_update",
    "step",
    "use_backend",
]

dispatch.backend_module("torch")  # loaded before graphs look it up
