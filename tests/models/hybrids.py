"""Small hybrids, one for each thing that layers can be made of."""

from __future__ import annotations

from typing import Any

import torch

from mamba2_hf import Mamba2HybridConfig, Mamba2HybridForCausalLM

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "ssm_num_heads": 6,
    "ssm_head_dim": 8,
    "ssm_n_groups": 2,
    "ssm_state_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Biases everywhere, so that padding which reached anything would show.
    "ssm_use_bias": True,
    "attention_bias": True,
    "mlp_bias": True,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {"layer_blocks": ["ssd mlp", "attention mlp"]},
    "rotary": {
        "layer_blocks": ["attention", "ssd"],
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.4},
        "attention_conv_kernel": 3,
        "tie_word_embeddings": False,
    },
    "sliding": {
        "layer_blocks": ["sliding_attention", "ssd", "attention"],
        "sliding_window": 4,
        "rope_parameters": ROPE,
        "attention_scale": 0.3,
    },
    "parallel": {
        "layer_blocks": ["ssd+attention mlp", "ssd+sliding_attention"],
        "sliding_window": 3,
        "ssm_norm": "none",
        "ssm_multipliers": [0.7, 1.2, 0.9, 1.1, 0.8],
        **{"ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.8, "attention_in_multiplier": 1.2, "key_multiplier": 0.7},
        **{"attention_out_multiplier": 0.9, "mlp_multipliers": [1.2, 0.7], "embedding_multiplier": 2.0},
        **{"residual_multiplier": 0.6, "logits_scaling": 1.7, "mlp_type": "geglu"},
    },
    "experts": {
        "layer_blocks": ["ssd moe", "attention moe"],
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        "shared_expert_intermediate_size": 12,
    },
    "sigmoid": {
        "layer_blocks": ["ssd", "moe", "attention", "mlp"],
        **{"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "moe_latent_size": 24},
        **{"moe_router": "sigmoid", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "mlp_type": "relu2"},
        "ssm_norm": "norm_first",
    },
    "shared": {
        "layer_blocks": ["shared>ssd", "ssd", "shared>ssd", "shared>ssd"],
        **{"num_shared_blocks": 2, "shared_adapter_rank": 3, "shared_attention_adapters": True},
        "rope_parameters": ROPE,
    },
}


def make_config(architecture: str = "plain", **changes: Any) -> Mamba2HybridConfig:
    fields = {**SIZES, **ARCHITECTURES[architecture], **changes}
    return Mamba2HybridConfig(**{"num_hidden_layers": len(fields["layer_blocks"]), **fields})


def make_hybrid(
    architecture: str = "plain", cls: Any = Mamba2HybridForCausalLM, *, seed: int = 0, **changes: Any
) -> Any:
    """A model in eval mode whose parameters are all far from zero, and whose norms do not all weigh alike."""
    torch.manual_seed(seed)
    model = cls(make_config(architecture, **changes))
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("embeddings.weight", "lm_head.weight", ".bias", "correction_bias")):
                tensor.normal_(std=0.5)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
    return model.eval()
