"""Modules: the Mamba-2 mixer, its norms, its state, and the layout of tokens into documents. No transformers here."""

from __future__ import annotations

from .mixer import Mamba2Mixer
from .norm import GatedRMSNorm, RMSNorm
from .projection import linear
from .sequence import SequenceLayout
from .state import SSDState
from .weights import plain_weight

__all__ = ["GatedRMSNorm", "Mamba2Mixer", "RMSNorm", "SSDState", "SequenceLayout", "linear", "plain_weight"]
