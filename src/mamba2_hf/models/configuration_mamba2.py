"""Configuration of the pure Mamba-2 models; on disk exactly the ``mamba2`` format of transformers."""

# No `from __future__ import annotations` here: the types of the fields are checked, see `strict_config`.

import math
from typing import Any, ClassVar

from ..ops.conv.op import ACTIVATIONS
from .base_config import SSDConfig, as_limits
from .mamba_ssm_config import is_mamba_ssm_config, translate_mamba_ssm_config
from .strict_config import strict_config

Number = int | float

# llama.cpp's converter rounds the vocabulary up to this, unless the config names another multiple.
_GGUF_VOCABULARY = 16
_FLOATS = ("layer_norm_epsilon", "initializer_range", "time_step_min", "time_step_max", "time_step_floor")


@strict_config
class Mamba2Config(SSDConfig):
    """Sizes and options of a Mamba-2 model. Names and defaults are those of transformers' ``mamba2``, but for the
    initialization, which is the original's ("Transformers are SSMs", Dao & Gu 2024).

    Args:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        num_hidden_layers: mixers.
        expand: inner width over hidden width, which other readers of the format want whole; ``num_heads * head_dim``
            has to equal ``hidden_size * expand``.
        num_heads: H, heads of a mixer.
        head_dim: P, channels of a head.
        n_groups: G, groups of heads that share B and C; divides ``num_heads``.
        state_size: N, state of a channel.
        conv_kernel: K, taps of the causal convolution.
        chunk_size: tiling hint kept for other readers of the format; it never changes a result here.
        use_bias, use_conv_bias: biases of the projections and of the convolution.
        hidden_act: activation of the convolution, one of :data:`mamba2_hf.ops.conv.op.ACTIVATIONS`.
        layer_norm_epsilon: of every norm.
        residual_in_fp32: whether the residual stream is kept in fp32.
        time_step_min, time_step_max, time_step_floor: range of the initial step sizes, drawn log-uniformly.
        time_step_limit: clamp of the step size, in the forward; an upper limit of 65504 or more is none.
        initializer_range: standard deviation of new embeddings.
        rescale_prenorm_residual: whether new out_proj weights are scaled by ``1 / sqrt(num_hidden_layers)``. A saved
            model says False: its weights are scaled already, and stock transformers would scale them at every load.
        use_cache: whether a forward in eval mode returns a cache.
        tie_word_embeddings: whether the head shares the embedding.
        pad_token_id, bos_token_id, eos_token_id: special tokens.
        time_step_rank: unused by Mamba-2; part of the format.

    Raises:
        ConfigurationError: a field holds a value that no model can be built from, or is misspelt. The message names the
            field, the value and a remedy. Files are read more leniently: unknown keys of a ``config.json`` are kept
            without effect.
    """

    model_type = "mamba2"
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm_f": "keep_full_weight",
    }
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "embeddings": "embedding_rowwise",
        "layers.*.mixer.in_proj": "colwise_gather_output",
        "layers.*.mixer.out_proj": "rowwise_split_input",
    }

    num_heads: int = 128
    head_dim: int = 64
    vocab_size: int = 32768
    hidden_size: int = 4096
    state_size: int = 128
    num_hidden_layers: int = 64
    layer_norm_epsilon: Number = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    expand: Number = 2
    conv_kernel: int = 4
    n_groups: int = 8
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    initializer_range: Number = 0.02
    residual_in_fp32: bool = True
    time_step_rank: str | int = "auto"
    time_step_min: Number = 0.001
    time_step_max: Number = 0.1
    time_step_floor: Number = 1e-4
    time_step_limit: list[Number] | tuple[Number, ...] = (0.0, math.inf)
    rescale_prenorm_residual: bool = True
    use_cache: bool = True
    chunk_size: int = 256
    tie_word_embeddings: bool = False

    def _normalize(self) -> None:
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        for name in _FLOATS:  # a whole number is fine here, but not for stock transformers, which reads what we save
            setattr(self, name, float(getattr(self, name)))
        self.time_step_limit = as_limits(self.time_step_limit)
        self.expand = int(self.expand) if self.expand % 1 == 0 else self.expand

    @classmethod
    def _translate(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        return translate_mamba_ssm_config(config_dict) if is_mamba_ssm_config(config_dict) else config_dict

    def validate_architecture(self) -> None:
        """Refuses every value that no model can be built from (run on construction and on save)."""
        for name in ("num_heads", "head_dim", "vocab_size", "hidden_size", "state_size", "n_groups", "chunk_size"):
            self._require(getattr(self, name) >= 1, name, "a size of at least 1")
        self._require(self.num_hidden_layers >= 1, "num_hidden_layers", "a count of at least 1")
        self._require(self.expand > 0 and math.isfinite(self.expand), "expand", "a factor above 0, usually 2")
        self._require(self.conv_kernel >= 2, "conv_kernel", "a number of taps: 2 or more, usually 4")
        inner = self.hidden_size * self.expand
        self._require(
            inner == self.num_heads * self.head_dim,
            "num_heads",
            f"num_heads * head_dim = {self.num_heads * self.head_dim} has to equal hidden_size * expand = {inner}; "
            f"set num_heads={inner / self.head_dim:g} or head_dim={inner / self.num_heads:g}",
        )
        self._require(
            self.num_heads % self.n_groups == 0,
            "n_groups",
            f"it has to divide num_heads={self.num_heads}, so that every group has as many heads",
        )
        names = ", ".join(repr(name) for name in ACTIVATIONS if name)
        self._require(self.hidden_act in ACTIVATIONS, "hidden_act", f"the convolution knows {names}")
        rank = self.time_step_rank
        self._require(isinstance(rank, int) and rank >= 1, "time_step_rank", "'auto' or a number of at least 1")
        self._check_common()

    @property
    def intermediate_size(self) -> int:
        """The inner width, which other readers take from a key of this name."""
        return self.num_heads * self.head_dim

    @property
    def pad_vocab_size_multiple(self) -> int:
        """What the vocabulary is a multiple of, to whoever would round it up."""
        return 1 if self.vocab_size % _GGUF_VOCABULARY else _GGUF_VOCABULARY

    def _for_other_readers(self) -> dict[str, Any]:
        multiple = self.pad_vocab_size_multiple
        padding = {} if multiple == _GGUF_VOCABULARY else {"pad_vocab_size_multiple": multiple}
        return {"intermediate_size": self.intermediate_size, **padding}

    @property
    def layer_types(self) -> list[str]:
        """What each layer is, in transformers' vocabulary."""
        return ["linear_attention"] * self.num_hidden_layers

    @property
    def mixer_kinds(self) -> list[str]:
        """What has a state, in order: an SSD mixer in every layer."""
        return ["ssd"] * self.num_hidden_layers
