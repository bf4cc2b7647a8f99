"""The models that other programs are given: configurations as each family publishes them, with small sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mamba2_hf.checkpoints.formats import FORMATS

VOCABULARY = 50272  # GPT-2's 50,257 tokens rounded up, as llama.cpp's converter would round them

_TOKENS = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256}
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "initializer_range": 0.02, "use_cache": True, **_TOKENS}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": False, "attention_dropout": 0.0}
_MIXER = {
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 32, "mamba_d_conv": 4},
    **{"mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False, "mamba_chunk_size": 8},
}
_WRITTEN = {"torch_dtype": "float32", "transformers_version": "4.52.0"}

MAMBA2: dict[str, Any] = {
    **{**_SIZES, **_WRITTEN, "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "num_hidden_layers": 3},
    **{"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 32, "expand": 2, "conv_kernel": 4, "chunk_size": 8},
    **{"hidden_act": "silu", "layer_norm_epsilon": 1e-5, "norm_before_gate": True, "rms_norm": True},
    **{"rescale_prenorm_residual": False, "residual_in_fp32": True, "tie_word_embeddings": False, "use_bias": False},
    **{"time_step_floor": 1e-4, "time_step_limit": [0.0, float("inf")], "time_step_max": 0.1, "time_step_min": 0.001},
    **{"time_step_rank": 4, "use_conv_bias": True, "intermediate_size": 128},
}
BAMBA: dict[str, Any] = {
    **{**_SIZES, **_ATTENTION, **_MIXER, **_WRITTEN, "architectures": ["BambaForCausalLM"], "model_type": "bamba"},
    **{"attn_layer_indices": [1], "attn_rotary_emb": 8, "hidden_act": "silu", "intermediate_size": 128},
    **{"max_position_embeddings": 512, "mlp_bias": False, "num_hidden_layers": 3, "num_logits_to_keep": 1},
    **{"rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 500.0, "tie_word_embeddings": False},
}
GRANITE: dict[str, Any] = {
    **{**_SIZES, **_ATTENTION, **_MIXER, **_WRITTEN, "architectures": ["GraniteMoeHybridForCausalLM"]},
    **{"model_type": "granitemoehybrid", "attention_multiplier": 0.2, "embedding_multiplier": 3, "logits_scaling": 2},
    **{"residual_multiplier": 0.7, "hidden_act": "silu", "init_method": "mup", "intermediate_size": 128},
    **{"layer_types": ["mamba", "attention", "mamba"], "max_position_embeddings": 512, "num_hidden_layers": 3},
    **{"normalization_function": "rmsnorm", "num_experts_per_tok": 0, "num_local_experts": 0, "rms_norm_eps": 1e-5},
    **{"output_router_logits": False, "position_embedding_type": "nope", "rope_scaling": None, "rope_theta": 500},
    **{"router_aux_loss_coef": 0.01, "shared_intermediate_size": 128, "tie_word_embeddings": True},
}
NEMOTRON: dict[str, Any] = {
    **{**_SIZES, **_ATTENTION, **_WRITTEN, "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"},
    **{"chunk_size": 8, "conv_kernel": 4, "expand": 2, "head_dim": 32, "hidden_dropout": 0.0},
    **{"hybrid_override_pattern": "M-*M-", "num_hidden_layers": 5, "intermediate_size": 128, "n_groups": 2},
    **{"layer_norm_epsilon": 1e-5, "rms_norm_eps": 1e-5, "mamba_head_dim": 16, "mamba_num_heads": 8},
    **{"mamba_hidden_act": "silu", "mamba_proj_bias": False, "max_position_embeddings": 512, "mlp_bias": False},
    **{"mlp_hidden_act": "relu2", "num_logits_to_keep": 1, "rescale_prenorm_residual": True, "sliding_window": None},
    **{"residual_in_fp32": False, "ssm_state_size": 32, "tie_word_embeddings": False, "time_step_floor": 1e-4},
    **{"time_step_limit": [0.0, float("inf")], "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 4},
    **{"use_bias": False, "use_conv_bias": True, "use_mamba_kernels": True},
}
NEMOTRON_EXPERTS: dict[str, Any] = {
    **{**NEMOTRON, "hybrid_override_pattern": "MEM*E", "n_routed_experts": 8, "num_experts_per_tok": 3},
    **{"moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 128, "n_shared_experts": 1, "n_group": 1},
    **{"topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
}
FALCON: dict[str, Any] = {
    **{**_SIZES, **_ATTENTION, **_MIXER, **_WRITTEN, "architectures": ["FalconH1ForCausalLM"]},
    **{"model_type": "falcon_h1", "mamba_n_heads": 12, "mamba_d_ssm": 192, "mamba_norm_before_gate": False},
    **{"mamba_rms_norm": False, "mamba_use_mlp": True, "attn_layer_indices": None, "head_dim": 16},
    **{"hidden_act": "silu", "intermediate_size": 128, "max_position_embeddings": 512, "mlp_bias": False},
    **{"mlp_expansion_factor": 8, "num_hidden_layers": 2, "num_logits_to_keep": 1, "projectors_bias": False},
    **{"rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 500.0, "sliding_window": None},
    **{"tie_word_embeddings": False, "embedding_multiplier": 1.5, "key_multiplier": 0.8, "lm_head_multiplier": 0.4},
    **{"attention_in_multiplier": 1.3, "attention_out_multiplier": 0.6, "ssm_in_multiplier": 1.4},
    **{"ssm_out_multiplier": 0.9, "ssm_multipliers": [0.7, 1.2, 0.9, 1.1, 0.8], "mlp_multipliers": [1.2, 0.7]},
}
ZAMBA: dict[str, Any] = {
    **{**_SIZES, **_WRITTEN, "architectures": ["Zamba2ForCausalLM"], "model_type": "zamba2", "num_hidden_layers": 6},
    **{
        "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "hybrid", "hybrid"],
        "hybrid_layer_ids": [1, 2, 4, 5],
    },
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "attention_head_dim": 32, "attention_hidden_size": 128},
    **{"attention_dropout": 0.0, "add_bias_linear": False, "adapter_rank": 8, "num_mem_blocks": 2, "chunk_size": 8},
    **{"n_mamba_heads": 8, "mamba_ngroups": 1, "mamba_d_state": 32, "mamba_d_conv": 4, "mamba_expand": 2},
    **{"ffn_hidden_size": 128, "intermediate_size": 128, "hidden_act": "gelu", "kv_channels": 16},
    **{"max_position_embeddings": 512, "num_query_groups": 4, "num_logits_to_keep": 1, "rms_norm_eps": 1e-5},
    **{"rope_theta": 500.0, "use_mem_rope": True, "use_shared_attention_adapter": True, "use_conv_bias": True},
    **{"time_step_floor": 1e-4, "time_step_limit": None, "time_step_max": 0.1, "time_step_min": 0.001},
    **{"tie_word_embeddings": True, "use_long_context": False, "use_mamba_kernels": True, "mamba_headdim": 16},
}

_ROTARY = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}
_WHOLE_ROTARY = {"attn_rotary_emb": 16, "rope_parameters": _ROTARY}


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        name: the row of the table.
        config: as the family publishes it.
        variant: whether it is beside the models that the main table shows.
    """

    name: str
    config: dict[str, Any]
    variant: bool = False

    @property
    def family(self) -> str:
        """The format in which it is written for others."""
        return self.config["model_type"]


def _variants(name: str, config: dict[str, Any], **changes: dict[str, Any]) -> list[Case]:
    return [Case(f"{name}, {what.replace('_', ' ')}", {**config, **fields}, True) for what, fields in changes.items()]


CASES = [
    Case("mamba2", MAMBA2),
    Case("mamba2, several groups", {**MAMBA2, "n_groups": 2}),
    Case("bamba", BAMBA),
    Case("granitemoehybrid", GRANITE),
    Case("granitemoehybrid with experts", {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Case("nemotron_h", NEMOTRON),
    Case("nemotron_h with experts", NEMOTRON_EXPERTS),
    Case("falcon_h1", FALCON),
    Case("zamba2", ZAMBA),
    *_variants(
        *("mamba2", MAMBA2),
        tied={"tie_word_embeddings": True},
        biases={"use_bias": True},
        no_bias_of_the_convolution={"use_conv_bias": False},
        other_epsilon={"layer_norm_epsilon": 1e-2},
        step_size_limited={"time_step_limit": [0.3, 0.6]},
        odd_vocabulary={"vocab_size": 50261},
        **{"inner width of one and a half": {"num_heads": 6, "expand": 1.5, "intermediate_size": 96}},
    ),
    *_variants(
        *("bamba", BAMBA),
        whole_rotary=_WHOLE_ROTARY,
        several_groups={"mamba_n_groups": 2},
        tied={"tie_word_embeddings": True},
        biases={**_WHOLE_ROTARY, "attention_bias": True, "mlp_bias": True},
        biases_of_the_mixer={"mamba_proj_bias": True},
        step_size_limited={"time_step_limit": [0.3, 0.6]},
    ),
    *_variants(
        *("granitemoehybrid", GRANITE),
        several_groups={"mamba_n_groups": 2},
        rotary={"position_embedding_type": "rope"},
        untied={"tie_word_embeddings": False},
        biases={"attention_bias": True},
        step_size_limited={"time_step_limit": [0.3, 0.6]},
    ),
    *_variants(
        *("nemotron_h", NEMOTRON),
        one_group={"n_groups": 1},
        biases={"mlp_bias": True},
        biases_of_the_mixer={"use_bias": True, "mamba_proj_bias": True},
        step_size_limited={"time_step_min": 0.3},
        gelu={"mlp_hidden_act": "gelu"},
    ),
    *_variants(
        *("nemotron_h with experts", NEMOTRON_EXPERTS),
        latent={"moe_latent_size": 64},
        groups_of_experts={"n_group": 4, "topk_group": 2},
        mlps_too={"hybrid_override_pattern": "MEM*E-", "num_hidden_layers": 6},
    ),
    *_variants(
        *("falcon_h1", FALCON),
        step_size_limited={"time_step_limit": [0.3, 0.6]},
        keys_not_multiplied={"key_multiplier": 1.0, "attention_in_multiplier": 1.0},
        gated_norm={"mamba_rms_norm": True},
        gated_norm_of_groups={"mamba_rms_norm": True, "mamba_n_groups": 2},
        norm_before_gate={"mamba_rms_norm": True, "mamba_norm_before_gate": True},
        tied={"tie_word_embeddings": True},
        biases={"attention_bias": True, "mlp_bias": True},
        biases_of_the_mixer={"mamba_proj_bias": True, "projectors_bias": True},
    ),
    *_variants(
        *("zamba2", ZAMBA),
        plain={"use_mem_rope": False, "use_shared_attention_adapter": False, "num_mem_blocks": 1},
        several_groups={"mamba_ngroups": 2},
        biases={"add_bias_linear": True},
        step_size_limited={"time_step_min": 0.3},
    ),
]


def random_model(case: Case, seed: int = 0) -> Any:
    """The model of a case in this package's classes, in eval mode; no two norms, biases or multipliers are alike."""
    entry = FORMATS[case.family]
    config = entry.family.config(entry.read_config(case.config), 100)
    model = entry.family.model(config)
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("A_log"):
                normal(tensor, 0.5, 0.7)
            elif name.endswith("dt_bias"):
                normal(tensor, 0.5, -0.5)
            elif "norm" in name:
                normal(tensor, 0.3, 1.0)
            elif tensor.dim() == 1 or "conv1d" in name or "embed" in name:
                normal(tensor, 0.5)
            else:
                normal(tensor, 0.8 * tensor.shape[-1] ** -0.5)
    return model.eval()
