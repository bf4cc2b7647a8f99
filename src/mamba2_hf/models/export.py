"""Prefill and decode step as ONNX graphs, with the states as named inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..layers import SSDState
from .cache import Mamba2Cache

if TYPE_CHECKING:
    from .causal_lm import SSDForCausalLM

PREFILL, STEP = "prefill.onnx", "step.onnx"


def export_onnx(model: SSDForCausalLM, folder: str | Path) -> tuple[Path, Path]:
    """Writes two ONNX graphs with which other runtimes generate, and returns their paths.

    ``prefill.onnx`` takes ``input_ids (B, T)`` and ``attention_mask (B, T)``, int64, of at least two tokens, padded on
    the left. It gives ``logits (B, 1, vocab)`` of the last token, and the states of every layer ``i``: ``conv_i (B, C,
    K - 1)`` and ``ssm_i (B, H, P, N)``. ``step.onnx`` takes ``input_ids (B, 1)`` and these states, and gives ``logits
    (B, 1, vocab)`` and the next states, ``new_conv_i`` and ``new_ssm_i``. B and T are dynamic. OpenVINO reads both by
    ``openvino.convert_model(path)``.

    Args:
        model: of SSD layers alone, in eval mode, on a CPU.
        folder: to write to; it is made.

    Raises:
        ArgumentError: the model has attention, whose keys and values grow, is in training mode, or is not on a CPU.
        ImportError: ``onnxscript`` is not installed.
    """
    if any(kind != "ssd" for kind in model.config.mixer_kinds):
        kinds = sorted(set(model.config.mixer_kinds))
        raise ArgumentError(f"export_onnx takes models of SSD layers alone, and this one has {', '.join(kinds)}")
    if model.training or model.device.type != "cpu":
        mode = "in training mode" if model.training else f"on {model.device}"
        raise ArgumentError(f"the model is {mode}: export model.eval().cpu()")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{kind}_{index}" for index in range(len(model.config.mixer_kinds)) for kind in ("conv", "ssm")]
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=2)
    ids = torch.zeros(2, 6, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    rows: dict[int, Any] = {0: batch}
    prefill, step = _Prefill(model), _Step(model)
    with torch.no_grad():
        states = prefill(ids, mask)[1:]
        paths = folder / PREFILL, folder / STEP
        _export(prefill, paths[0], (ids, mask), ["input_ids", "attention_mask"], names, ({0: batch, 1: tokens},) * 2)
        after = [f"new_{name}" for name in names]
        _export(step, paths[1], (ids[:, :1], list(states)), ["input_ids", *names], after, (rows, [rows] * len(states)))
    return paths


def _export(
    module: nn.Module, path: Path, arguments: tuple[Any, ...], inputs: list[str], states: list[str], shapes: Any
) -> None:
    torch.onnx.export(
        *(module, arguments),
        f=path,
        dynamo=True,
        verbose=False,
        input_names=inputs,
        output_names=["logits", *states],
        dynamic_shapes=shapes,
    )


class _Prefill(nn.Module):
    """A prompt to the logits of its last token and the states after it."""

    def __init__(self, model: SSDForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Logits ``(B, 1, vocab)``, then the states of every layer."""
        cache = Mamba2Cache(self.model.config)
        return _run(self.model, cache, input_ids, attention_mask)


class _Step(_Prefill):
    """One token of every row and the states before it to logits and the states after it."""

    def forward(self, input_ids: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Logits ``(B, 1, vocab)``, then the states of every layer."""
        cache = Mamba2Cache(self.model.config)
        for index, layer in enumerate(cache.layers):
            assert isinstance(layer, SSDState)
            layer.update(states[2 * index], states[2 * index + 1])
        cache.seen_tokens = 1  # some; how many is nothing that a layer asks
        return _run(self.model, cache, input_ids, None)


def _run(
    model: SSDForCausalLM, cache: Mamba2Cache, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, ...]:
    out = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        return_dict=True,
    )
    return out.logits, *(state for layer in cache.layers for state in (layer.conv, layer.ssm))
