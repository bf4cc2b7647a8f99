"""Runs transformers' own Mamba-2 classes on this package's ops, when asked to.

What is replaced, and taken back by the same call, in the module of each family:

* The five functions that mixers call, for those of :mod:`mamba2_hf.compat`.
* The mixers' ``forward``: in training, their fused function takes the bare weight of out_proj; told who calls it, it
  calls the module, with its adapters, hooks and quantized weights.
* The models' ``forward``: documents may be named in every way that transformers knows, and are kept apart by the mixers
  and by attention.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_torchdynamo_exporting

from ..errors import ArgumentError
from ..layers.sequence import sequence_layout
from ..ops.packing import document_ids, document_numbers
from ..registration import when_imported
from . import conv, ssd


class Family(NamedTuple):
    """Classes in the module of a family."""

    mixer: str
    model: str


FAMILIES = {
    "mamba2": Family("Mamba2Mixer", "Mamba2Model"),
    "bamba": Family("BambaMixer", "BambaModel"),
    "granitemoehybrid": Family("GraniteMoeHybridMambaLayer", "GraniteMoeHybridModel"),
    "nemotron_h": Family("NemotronHMamba2Mixer", "NemotronHModel"),
    "falcon_h1": Family("FalconH1Mixer", "FalconH1Model"),
    "zamba2": Family("Zamba2MambaMixer", "Zamba2Model"),
}
_PURE = "mamba2"  # has no attention; its causal_lm tells its model nothing but what it names itself
_MIXER = "mamba2_hf_mixer"  # the keyword argument in which functions are told who calls them
_BEFORE = -1  # the document of what is before all others
_CACHES = ("past_key_values", "cache_params", "cache")  # by release

_replaced: dict[tuple[Any, str], Any] = {}  # stock's own, by owner and name
_wanted: set[str] = set()


class _Packed(NamedTuple):
    """An attention mask and documents, in the place of the mask."""

    mask: Tensor | None
    seq_idx: Tensor


def use_with_transformers(*families: str, undo: bool = False) -> list[str]:
    """Has transformers' own ``mamba2``, ``bamba``, ``granitemoehybrid``, ``nemotron_h``, ``falcon_h1`` and ``zamba2``
    run on this package's ops, on a CPU or GPU, with no package built: packed documents exact, LoRA on every linear.

    It may be called at any time: models that are there and those to come both change. Exceptions are models spread by
    accelerate (``device_map``) or compiled before the call, which hold on to what they had. Models are built and loaded
    as ever; ``torch.export`` sees stock's functions.

    Args:
        families: which; all if none is named.
        undo: whether to put back what transformers had.

    Returns:
        Names of what was replaced, or put back, now; families that are not imported yet follow when they are.

    Raises:
        ArgumentError: there is no such family.
    """
    if unknown := set(families) - FAMILIES.keys():
        raise ArgumentError(f"families names {sorted(unknown)[0]!r}; there are: {', '.join(FAMILIES)}")
    chosen = set(families or FAMILIES)
    if undo:
        _wanted.difference_update(chosen)
        return _put_back(chosen)
    before = set(_replaced)
    _wanted.update(chosen)
    for family in sorted(chosen):
        when_imported(_module_of(family), _replace)
    when_imported("peft.tuners.tuners_utils", _allow_lora)
    return [_name(*place) for place in _replaced if place not in before]


def _module_of(family: str) -> str:
    return f"transformers.models.{family}.modeling_{family}"


def _name(owner: Any, name: str) -> str:
    return (
        f"{owner.__name__}.{name}" if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__name__}.{name}"
    )


def _replace(module: Any) -> None:
    """Replaces what is to be replaced in a family's module, which has just been imported or has been for long."""
    family = module.__name__.rpartition("modeling_")[2]
    if family not in _wanted:
        return
    names = FAMILIES[family]
    for name, ours in _FUNCTIONS.items():
        _put(module, name, functools.partial(_function, ours))
    _put(getattr(module, names.mixer), "forward", _telling)
    _put(getattr(module, names.model), "forward", _separating)
    if family == _PURE:
        _put(module.Mamba2ForCausalLM, "forward", _handing_down)


def _put(owner: Any, name: str, around: Callable[[Any], Any]) -> None:
    stock = vars(owner)[name]
    if not getattr(stock, "_is_ours", False):
        ours = around(stock)
        ours._is_ours = True
        _replaced[owner, name] = stock
        setattr(owner, name, ours)


def _put_back(families: set[str]) -> list[str]:
    modules = {_module_of(family) for family in families}
    found = [place for place in _replaced if (getattr(place[0], "__module__", None) or place[0].__name__) in modules]
    for owner, name in found:
        setattr(owner, name, _replaced.pop((owner, name)))
    return [_name(*place) for place in found]


# The five functions, as stock calls them: it hands all of its keyword arguments on.


def _function(ours: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """Our function in the place of stock's, which drops arguments that it does not know."""
    accepted = frozenset(inspect.signature(ours).parameters)

    @functools.wraps(stock)
    def run(*args: Any, **kwargs: Any) -> Any:
        if is_torchdynamo_exporting():
            return stock(*args, **kwargs)
        if not kwargs.keys() <= accepted:
            kwargs = {name: value for name, value in kwargs.items() if name in accepted}
        return ours(*args, **kwargs)

    return run


def _causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
) -> Any:
    """Stock's convolution ``(B, C, T)``; a cache puts columns before short inputs."""
    if seq_idx is not None:
        seq_idx = F.pad(seq_idx, (hidden_states.shape[2] - seq_idx.shape[1], 0), value=_BEFORE)
    return conv.causal_conv1d_fn(hidden_states, weight, bias, seq_idx, activation=activation)


def _split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    mamba2_hf_mixer: Any = None,
) -> Tensor | None:
    """Stock's fused function, which calls out_proj as the module that it is; without a mixer, stock calls the parts.

    Padding has to be blanked between convolution and scan, where it would enter the states by the bias of the first.
    """
    if mamba2_hf_mixer is None:
        return None
    y = ssd.mamba_split_conv1d_scan_combined(
        *(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size),
        seq_idx=seq_idx,
        dt_limit=dt_limit,
        activation=activation,
        rmsnorm_weight=rmsnorm_weight,
        rmsnorm_eps=rmsnorm_eps,
        headdim=headdim,
        ngroups=ngroups,
        norm_before_gate=getattr(getattr(mamba2_hf_mixer, "norm", None), "norm_before_gate", False),  # stock says False
    )
    out: Tensor = mamba2_hf_mixer.out_proj(y)
    return out


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _causal_conv1d_fn,
    "causal_conv1d_update": conv.causal_conv1d_update,
    "mamba2_chunk_scan": ssd.mamba_chunk_scan_combined,
    "mamba2_selective_state_update": ssd.selective_state_update,
    "mamba2_split_conv1d_scan_combined": _split_conv1d_scan_combined,
}


def _telling(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A mixer's ``forward`` that tells the functions it calls who calls them, unless there is padding to blank."""
    names = tuple(inspect.signature(stock).parameters)[1:]

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        told = {} if given.get("attention_mask") is not None else {_MIXER: self}
        return stock(self, **given, **told)

    return forward


# Documents


def _separating(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A model's ``forward`` that names documents to mixers and attention alike, however it was told of them."""
    names = tuple(inspect.signature(stock).parameters)[1:]

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if isinstance(given.get("attention_mask"), _Packed):
            given["attention_mask"], given["seq_idx"] = given["attention_mask"]
        seq_idx = _documents(given)
        return stock(self, **(given if seq_idx is None else _with_documents(self, given, seq_idx)))

    return forward


def _handing_down(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward`` whose model is told of documents too: in the place of the mask, which it is given."""
    names = tuple(inspect.signature(stock).parameters)[1:]

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        seq_idx = _documents(given)
        if seq_idx is not None:
            given["attention_mask"] = _Packed(given.get("attention_mask"), seq_idx)
        return stock(self, **given)

    return forward


def _documents(given: dict[str, Any]) -> Tensor | None:
    """``(B, T)`` the document of each token, by the most explicit of the ways to name them; None for rows of one each.

    Positions do as they do for transformers' masks: where there is neither a mask nor a cache, a document starts
    wherever they do not go on by one.
    """
    tokens_of = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if tokens_of is None:
        return None
    batch, tokens = tokens_of.shape[:2]
    cached = any(given.get(name) is not None for name in _CACHES)
    seq_idx, bounds, positions = (given.get(name) for name in ("seq_idx", "cu_seq_lens_q", "position_ids"))
    if (
        seq_idx is None
        and bounds is None
        and positions is not None
        and given.get("attention_mask") is None
        and not cached
    ):
        seq_idx = find_packed_sequence_indices(positions.expand(batch, -1)) if positions.dim() == 2 else None
    layout = sequence_layout(batch, tokens, seq_idx=seq_idx, cu_seqlens=bounds)
    if layout.is_plain:
        return None
    if cached:
        raise ArgumentError(
            "documents were named (by seq_idx or cu_seq_lens_q) with a cache: packed rows begin new documents; leave "
            "the cache out, or give each document a row of its own"
        )
    found = layout.seq_idx if layout.cu_seqlens is None else document_ids(layout.cu_seqlens, tokens)[None]
    assert found is not None  # a layout that is not plain has one of them
    return found.to(torch.int32)


def _with_documents(model: Any, given: dict[str, Any], seq_idx: Tensor) -> dict[str, Any]:
    """The arguments of a model's ``forward``, with documents named to its mixers and, where it has some, attention."""
    given = given | {"seq_idx": seq_idx}
    if model.config.model_type == _PURE:
        return given
    positions = _positions(seq_idx)
    if given.get("position_ids") is None:
        given["position_ids"] = positions
    mask = given.get("attention_mask")
    if is_flash_attention_requested(model.config):
        return _with_bounds(given, positions)
    if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
        return given
    like = torch.empty(1, dtype=model.dtype, device=seq_idx.device).expand(*seq_idx.shape, 1)
    apart = packed_sequence_mask_function(document_numbers(seq_idx))
    given["attention_mask"] = {
        "full_attention": create_causal_mask(model.config, like, mask, None, and_mask_function=apart),
        "linear_attention": create_recurrent_attention_mask(model.config, like, mask, None),
    }
    return given


def _positions(seq_idx: Tensor) -> Tensor:
    """``(B, T)``: how many tokens of its document are before each."""
    columns = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return columns - torch.where(starts, columns, 0).cummax(1).values


def _with_bounds(given: dict[str, Any], positions: Tensor) -> dict[str, Any]:
    """The arguments with the bounds of documents, which flash attention goes by."""
    if given.get("cu_seq_lens_q") is not None:
        return given
    if positions.shape[0] != 1 or given.get("attention_mask") is not None:
        raise ArgumentError(
            f"documents were named in {positions.shape[0]} rows or with an attention_mask: flash attention keeps them "
            "apart in one row without padding only; lay them end to end, or choose attn_implementation='sdpa'"
        )
    bounds, longest = prepare_fa_kwargs_from_position_ids(positions)
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return given | dict(zip(names, (*bounds, *longest), strict=True))


# LoRA


def _allow_lora(tuners_utils: Any) -> None:
    """Lifts PEFT's refusal of out_proj for the families that are replaced: it is called as a module here."""
    stock = tuners_utils._check_lora_target_modules_mamba
    if getattr(stock, "_is_ours", False):
        return

    @functools.wraps(stock)
    def check(peft_config: Any, model: nn.Module, target_name: str) -> None:
        family = getattr(getattr(model, "config", None), "model_type", None)
        if target_name != "out_proj" or family not in _wanted:
            stock(peft_config, model, target_name)

    check._is_ours = True  # type: ignore[attr-defined]
    tuners_utils._check_lora_target_modules_mamba = check
