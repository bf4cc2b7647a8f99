"""Rotary position embeddings, with every scaling that transformers knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from ..layers.fp32 import KeepsFp32


class RotaryEmbedding(KeepsFp32):
    """Cosines and sines of positions, as ``config.rope_parameters`` says (``rope_type``, ``rope_theta``,
    ``partial_rotary_factor``, ...).

    Args:
        config: with ``head_dim`` and ``max_position_embeddings``.
    """

    fp32_parameters = ("inv_freq", "original_inv_freq")
    inv_freq: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        # transformers' dynamic scalings, and its initialization of models made without memory, know these names.
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        default = self.rope_type == "default"
        compute = self.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[self.rope_type]
        self.attention_scaling: float
        frequencies, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: Any, device: torch.device | None = None) -> tuple[Tensor, float]:
        """Frequencies ``(D' / 2,)`` in fp32, and the factor of cosines and sines."""
        rope = config.rope_parameters
        size = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        return 1.0 / (rope["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions ``(B, T)`` to cosines and sines ``(B, T, D')``, in the dtype of ``x``."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        angles = position_ids[..., None].to(dtype) * self.inv_freq.to(x.device, dtype)
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)
