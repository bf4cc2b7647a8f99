"""Modules: mixer, attention, feed-forward layers, their norms and states, and the layout of tokens into documents. No
transformers here.
"""

from __future__ import annotations

from .attention import Attention
from .head import Head
from .kv import KeyValueState
from .mixer import Mamba2Mixer
from .mlp import MLP
from .moe import Experts, MoE, SigmoidRouter, SoftmaxRouter
from .norm import GatedRMSNorm, RMSNorm
from .placement import KeyCounts, Placement, place
from .projection import linear
from .sequence import SequenceLayout
from .state import Buffers, SSDState
from .weights import plain_weight

__all__ = [
    "MLP",
    "Attention",
    "Buffers",
    "Experts",
    "GatedRMSNorm",
    "Head",
    "KeyCounts",
    "KeyValueState",
    "Mamba2Mixer",
    "MoE",
    "Placement",
    "RMSNorm",
    "SSDState",
    "SequenceLayout",
    "SigmoidRouter",
    "SoftmaxRouter",
    "linear",
    "place",
    "plain_weight",
]
