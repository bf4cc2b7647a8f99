"""Shapes of published hybrids, with fewer layers where the published ones are larger than these."""

from __future__ import annotations

from typing import Any, NamedTuple

import transformers

from mamba2_hf import Mamba2HybridConfig
from mamba2_hf.checkpoints.loading import read_foreign_config
from mamba2_hf.models.configuration_mamba2_hybrid import SHARED

_ATTENTION = ("attention", "mamba")


class Family(NamedTuple):
    """A hybrid as transformers configures it."""

    config: dict[str, Any]
    few: dict[str, Any]
    """What makes a model of few layers of it, to be compared in fp32."""

    def ours(self, **changes: Any) -> Mamba2HybridConfig:
        """Our configuration."""
        fields = read_foreign_config({**self.config, **changes})
        return Mamba2HybridConfig.from_dict(fields)  # type: ignore[no-any-return, arg-type]

    def stock(self, **changes: Any) -> Any:
        """transformers' configuration."""
        fields = {**self.config, **changes}
        return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)

    def stock_model(self, **changes: Any) -> Any:
        """transformers' own class."""
        return transformers.AutoModelForCausalLM.from_config(self.stock(**changes))


def _kinds(layers: int, attention: tuple[int, ...], other: str = "mamba") -> list[str]:
    return [_ATTENTION[0] if layer in attention else other for layer in range(layers)]


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

FAMILIES = {
    "bamba_1.9b": Family(
        {
            "model_type": "bamba",
            **{"vocab_size": 50288, "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 8192},
            **{"num_attention_heads": 16, "num_key_value_heads": 4, "attn_layer_indices": [9, 18]},
            **{"mamba_n_heads": 64, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2},
        },
        {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    ),
    "nemotron_h_2.4b": Family(
        {
            "model_type": "nemotron_h",
            **{"vocab_size": 131072, "hidden_size": 3072, "intermediate_size": 12288, "head_dim": 128},
            **{"num_attention_heads": 32, "num_key_value_heads": 8},
            **{
                "layers_block_type": ["mamba", "mlp"] * 5
                + ["attention"]
                + ["mamba", "mlp"] * 5
                + ["attention", "mamba"]
            },
            **{"mamba_num_heads": 112, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "chunk_size": 128},
        },
        {"layers_block_type": ["mamba", "mlp", "attention"]},
    ),
    "granite_4_h_3.7b": Family(
        {
            "model_type": "granitemoehybrid",
            **{"vocab_size": 100352, "hidden_size": 1536, "num_hidden_layers": 20, "intermediate_size": 512},
            **{"num_local_experts": 64, "num_experts_per_tok": 6, "shared_intermediate_size": 1024},
            **{"num_attention_heads": 12, "num_key_value_heads": 4, "position_embedding_type": "nope"},
            **{"layer_types": _kinds(20, (5, 15)), "mamba_n_heads": 48, "mamba_d_head": 64, "mamba_d_state": 128},
            **{"mamba_n_groups": 1, "mamba_expand": 2, "residual_multiplier": 0.22, "embedding_multiplier": 12.0},
            **{"logits_scaling": 6.0, "attention_multiplier": 0.0078125},
        },
        {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
    ),
    "falcon_h1_1.5b": Family(
        {
            "model_type": "falcon_h1",
            **{"vocab_size": 65537, "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 4096},
            **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "mamba_d_ssm": 3072},
            **{"mamba_n_heads": 48, "mamba_d_head": 64, "mamba_d_state": 256, "mamba_n_groups": 1},
            **{"mamba_rms_norm": False, "projectors_bias": False, "tie_word_embeddings": False},
            **{"ssm_multipliers": [0.5, 0.35, 0.25, 0.7, 0.5], "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.5},
            **{"attention_out_multiplier": 0.9, "key_multiplier": 0.4, "mlp_multipliers": [0.9, 0.6]},
            **{"embedding_multiplier": 5.0, "lm_head_multiplier": 0.04},
        },
        {"num_hidden_layers": 2},
    ),
    "zamba2_1.2b": Family(
        {
            "model_type": "zamba2",
            **{"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 38, "intermediate_size": 8192},
            **{"num_attention_heads": 32, "num_key_value_heads": 32, "mamba_d_state": 64, "mamba_headdim": 64},
            **{"n_mamba_heads": 64, "mamba_ngroups": 1, "mamba_expand": 2, "num_mem_blocks": 1, "adapter_rank": 128},
            **{"use_shared_attention_adapter": True, "use_mem_rope": True},
            "layers_block_type": ["hybrid" if layer % 6 == 5 else "mamba" for layer in range(38)],
        },
        {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    ),
}


def matrix_products(model: Any) -> float:
    """Operations of a training step for a token: 6 for each weight that it meets."""
    config, blocks = model.config, [kind for kinds in model.config.blocks for kind in kinds]
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    met = experts * config.num_experts_per_tok / config.num_experts if experts else 0.0
    met += sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in name)
    if config.tie_word_embeddings:
        met += config.vocab_size * config.hidden_size
    again = blocks.count(SHARED) - config.num_shared_blocks
    if again > 0:
        met += again * sum(p.numel() for p in model.backbone.shared_blocks.parameters() if p.dim() == 2)
    return 6.0 * met
