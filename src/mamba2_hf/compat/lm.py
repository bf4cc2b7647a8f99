"""``MambaLMHeadModel`` and what goes with it: loading, forward and ``generate``, through this package's models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..errors import ArgumentError
from ..models import Mamba2Config, Mamba2ForCausalLM, Mamba2HybridForCausalLM
from ..models.mamba_ssm_config import translate_mamba_ssm_config

_CACHE = "mamba2_hf"  # the key of a model's cache in inference_params


@dataclass
class MambaConfig:
    """A model's shape, as mamba_ssm's ``config.json`` has it."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


@dataclass
class InferenceParams:
    """What a layer or model keeps between calls of a generation loop."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begins another sequence: states that are there are written over by its first call."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        self.key_value_memory_dict.pop(_CACHE, None)


class Logits(NamedTuple):
    """What :class:`MambaLMHeadModel` returns: logits ``(B, T, vocabulary)``."""

    logits: Tensor


class Generated(NamedTuple):
    """Tokens ``(B, T)`` with those of the prompt, and the logits of each new one, if asked for."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None


class MambaLMHeadModel(nn.Module):
    """A Mamba-2 language model with the calls of mamba_ssm's, over a model of this package, ``model``.

    Parameters have the names that they have in ``model``; :meth:`from_pretrained` reads both layouts of checkpoints.

    Args:
        config: of a new model of random weights, which has to be a Mamba-2.
        initializer_cfg: not served.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: ``initializer_cfg`` is given.
        ConfigurationError: the model is no pure Mamba-2; hybrids are loaded only.
    """

    def __init__(
        self,
        config: Any,
        initializer_cfg: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if initializer_cfg is not None:
            raise ArgumentError(
                f"initializer_cfg is {initializer_cfg!r}: new weights follow Mamba2Config here; pass it as config"
            )
        if not isinstance(config, (Mamba2Config, nn.Module)):
            fields = config if isinstance(config, Mapping) else vars(config)
            config = Mamba2Config(**{k: v for k, v in translate_mamba_ssm_config(fields).items() if k != "model_type"})
        model = config if isinstance(config, nn.Module) else Mamba2ForCausalLM(config)
        self.model: Any = model.to(device=device, dtype=dtype)
        self.config: Any = self.model.config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """Loads a checkpoint of mamba_ssm, hybrids of attention among them, or of transformers' ``mamba2``.

        Args:
            pretrained_model_name: a folder, or a name on the Hub.
            device, dtype: of the parameters; fp32 if None.
            kwargs: for ``from_pretrained`` of this package's models.

        Raises:
            CheckpointError, ConfigurationError: there is no such model, or it is of another kind, such as a Mamba-1.
        """
        raw, _ = Mamba2Config.get_config_dict(pretrained_model_name)
        foreign = raw.get("model_type", "mamba2") not in ("mamba2", "")
        mixed = bool(raw.get("attn_layer_idx") or raw.get("d_intermediate"))
        kind = Mamba2HybridForCausalLM if foreign or mixed else Mamba2ForCausalLM
        model = kind.from_pretrained(pretrained_model_name, dtype=dtype or torch.float32, **kwargs)
        return cls(model, device=device).eval()

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes the model in this package's layout, which is that of transformers."""
        self.model.save_pretrained(save_directory)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Logits:
        """Returns logits.

        Args:
            input_ids: ``(B, T)``.
            position_ids: without effect, as in mamba_ssm.
            inference_params: continues the sequences of the calls before that had the same ones.
            num_last_tokens: how many tokens of each row get logits; 0 for all.
            seq_idx: ``(B, T)`` integers, the document of each token. cu_seqlens: ``(S + 1,)`` bounds in one row.

        Raises:
            ArgumentError: documents are to be continued, of which the model keeps one state a row.
        """
        packing = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seqlens}
        if inference_params is None:
            out = self.model(input_ids, use_cache=False, logits_to_keep=num_last_tokens, **packing)
            return Logits(out.logits)
        if cu_seqlens is not None or seq_idx is not None:
            raise ArgumentError(
                "inference_params was given with packed documents: give each a row of its own, or let "
                "mamba2_hf.generate_batch hold them"
            )
        held = inference_params.key_value_memory_dict
        if inference_params.seqlen_offset == 0:
            held.pop(_CACHE, None)
        out = self.model(input_ids, past_key_values=held.get(_CACHE), use_cache=True, logits_to_keep=num_last_tokens)
        held[_CACHE] = out.past_key_values
        return Logits(out.logits)

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        vocab_size: int | None = None,
        cg: bool = False,
        streamer: Any = None,
    ) -> Any:
        """Continues prompts.

        Args:
            input_ids: ``(B, T)``, without padding.
            max_length: tokens of a sequence, those of the prompt among them.
            top_k: 1 takes the likeliest token, 0 samples from all.
            top_p, min_p: of sampling; 0 for none. temperature, repetition_penalty: 1 for none.
            return_dict_in_generate: whether to return :class:`Generated` rather than its sequences.
            output_scores: whether that has the logits of each new token.
            eos_token_id: ends a sequence; None for none.
            vocab_size: only tokens below are written.
            cg: without effect: steps are captured wherever they can be.
            streamer: gets the tokens as they are written.
        """
        sampling = {"top_k": top_k, "top_p": top_p or 1.0, "min_p": min_p or None, "temperature": temperature}
        rows = self.config.vocab_size
        config = GenerationConfig(
            max_length=max_length,
            do_sample=top_k != 1,
            **(sampling if top_k != 1 else {}),
            repetition_penalty=repetition_penalty,
            eos_token_id=rows if eos_token_id is None else eos_token_id,  # that many is no token: none ends it
            pad_token_id=eos_token_id or 0,
            suppress_tokens=None if vocab_size is None else list(range(vocab_size, rows)),
            return_dict_in_generate=True,
            output_logits=output_scores,
        )
        out = self.model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config, streamer=streamer
        )
        return Generated(out.sequences, out.logits) if return_dict_in_generate else out.sequences
