"""Tiny random models of transformers' own hybrid classes. Norms, multipliers and biases are random too."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

COMMON: dict[str, Any] = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 3e-5},
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_d_conv": 3}


class Case(NamedTuple):
    """A family and how it is set up.

    Attributes:
        family: its model type.
        fields: of its configuration.
        biases: whether projections into the mixer have one, which stock lets padding reach the convolution through.
        decodes: whether stock's own cached decoding agrees with its full forward.
    """

    family: str
    fields: dict[str, Any]
    biases: bool = False
    decodes: bool = True


_BAMBA = {**COMMON, **MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1], "rope_theta": 500.0}
_GRANITE = {
    **{**COMMON, **MAMBA, "num_hidden_layers": 3, "mamba_n_groups": 1},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    **{"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.7, "attention_multiplier": 0.3},
}
_NEMOTRON = {
    **{name: value for name, value in COMMON.items() if name != "rms_norm_eps"},
    **{"layer_norm_epsilon": 3e-5, "head_dim": 10, "ssm_state_size": 8, "mamba_num_heads": 6, "mamba_head_dim": 8},
    **{"n_groups": 2, "conv_kernel": 3, "time_step_min": 1e-20, "expand": 2},
}
_EXPERTS = {
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "routed_scaling_factor": 1.7},
    **{"moe_shared_expert_intermediate_size": 24},
}
_FALCON = {
    **{**COMMON, **MAMBA, "num_hidden_layers": 2, "mamba_n_heads": 6, "mamba_d_ssm": 48, "rope_theta": 1e4},
    **{"embedding_multiplier": 1.5, "lm_head_multiplier": 0.4, "key_multiplier": 0.8, "attention_in_multiplier": 1.3},
    **{"attention_out_multiplier": 0.6, "ssm_in_multiplier": 1.4, "ssm_out_multiplier": 0.9},
    **{"ssm_multipliers": [0.7, 1.2, 0.9, 1.1, 0.8], "mlp_multipliers": [1.2, 0.7], "mamba_rms_norm": True},
}
_ZAMBA = {
    **{**COMMON, "num_key_value_heads": 4, "num_hidden_layers": 6, "mamba_d_state": 8, "n_mamba_heads": 8},
    "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid", "hybrid"],
    **{"mamba_ngroups": 2, "adapter_rank": 4, "num_mem_blocks": 2, "time_step_min": 1e-20},
}
CASES = {
    "bamba": Case("bamba", {**_BAMBA, "attention_bias": True, "mlp_bias": True}),
    "bamba-biases": Case("bamba", {**_BAMBA, "mamba_proj_bias": True, "tie_word_embeddings": True}, biases=True),
    "bamba-limits": Case("bamba", {**_BAMBA, "time_step_limit": (0.3, 0.6)}, decodes=False),
    "granite": Case("granitemoehybrid", {**_GRANITE, "num_local_experts": 0, "shared_intermediate_size": 24}),
    "granite-experts": Case(
        "granitemoehybrid",
        {**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    ),
    "granite-rotary": Case(
        "granitemoehybrid",
        {
            **{**_GRANITE, "num_local_experts": 0, "position_embedding_type": "rope", "attention_bias": True},
            **{"tie_word_embeddings": True, "shared_intermediate_size": 24},
        },
    ),
    "nemotron": Case("nemotron_h", {**_NEMOTRON, "hybrid_override_pattern": "M-*M-", "mlp_bias": True, "n_groups": 1}),
    "nemotron-experts": Case(
        "nemotron_h",
        {
            **_NEMOTRON,
            **_EXPERTS,
            "hybrid_override_pattern": "MEM*E-",
            "moe_latent_size": 16,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "nemotron-biases": Case(
        "nemotron_h", {**_NEMOTRON, **_EXPERTS, "hybrid_override_pattern": "ME*", "use_bias": True}, biases=True
    ),
    "nemotron-limits": Case(
        "nemotron_h", {**_NEMOTRON, "hybrid_override_pattern": "M*M", "time_step_min": 0.5}, decodes=False
    ),
    "falcon": Case("falcon_h1", {**_FALCON, "attention_bias": True, "mlp_bias": True}),
    "falcon-biases": Case(
        "falcon_h1",
        {**_FALCON, "mamba_proj_bias": True, "projectors_bias": True, "mamba_norm_before_gate": False},
        biases=True,
    ),
    "falcon-no-norm": Case(
        "falcon_h1",
        {**_FALCON, "mamba_rms_norm": False, "mamba_d_ssm": None, "mamba_n_heads": 8, "tie_word_embeddings": True},
    ),
    "zamba": Case("zamba2", {**_ZAMBA, "use_mem_rope": True, "use_shared_attention_adapter": True}),
    "zamba-plain": Case("zamba2", {**_ZAMBA, "num_mem_blocks": 1}),
    "zamba-biases": Case("zamba2", {**_ZAMBA, "add_bias_linear": True}, biases=True),
    "zamba-limits": Case("zamba2", {**_ZAMBA, "time_step_min": 0.5}, decodes=False),
}


def stock(case: Case, seed: int = 0) -> Any:
    """The model of a case, in eval mode."""
    config = CONFIG_MAPPING[case.family](**case.fields)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("A_log"):
                normal(tensor, 0.5, 0.7)
            elif name.endswith("dt_bias"):
                normal(tensor, 0.5, -0.5)  # step sizes around 0.5
            elif "norm" in name:
                normal(tensor, 0.3, 1.0)
            elif tensor.dim() == 1 or "conv1d" in name or "embed" in name:
                normal(tensor, 0.5)
            else:
                normal(tensor, 0.8 * tensor.shape[-1] ** -0.5)
    return model.eval()
