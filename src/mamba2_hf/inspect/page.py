"""One HTML page of an :class:`Inspection`, with its numbers, drawings and script inside."""

from __future__ import annotations

import base64
import html
import json
import math
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .measure import Inspection, MixerView

SERIES = 600_000
"""Most numbers that a page holds of each token and head; above, means over several tokens are kept."""


def write_page(inspection: Inspection, path: str | os.PathLike[str], title: str | None = None) -> int:
    """Writes the page and returns its size in bytes.

    The page asks for nothing outside of it. Matrices are kept in a byte an entry, ``sign * 127 * sqrt(|M_ij| / max)``;
    all other numbers are fp32.

    Args:
        inspection: what to show.
        path: where to write it.
        title: of the page; None for the model's class and size.
    """
    # In a script element, "<" alone could end it; an escape in a string of JSON means the same.
    data = json.dumps(page_data(inspection), separators=(",", ":")).replace("<", "\\u003c")
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    page = template.replace("{{title}}", html.escape(title or inspection.model)).replace("{{data}}", data)
    return Path(path).write_bytes(page.encode())


def page_data(inspection: Inspection) -> dict[str, Any]:
    """What a page holds, as JSON can: see ``page.html`` for how it is read."""
    tokens = len(inspection.ids)
    heads = sum(view.heads for view in inspection.mixers if view.kind == "ssd")
    span = max(1, math.ceil(3 * heads * tokens / SERIES))  # tokens of one number
    return {
        "model": inspection.model,
        "tokens": inspection.tokens,
        "leftOut": inspection.left_out,
        "block": inspection.block,
        "span": span,
        "positions": inspection.positions,
        "surprise": _numbers(inspection.surprise),
        "mixers": [_mixer(view, span) for view in inspection.mixers],
    }


def _mixer(view: MixerView, span: int) -> dict[str, Any]:
    scale = view.matrix.abs().amax((1, 2))
    relative = view.matrix / scale.clamp(min=torch.finfo(scale.dtype).tiny)[:, None, None]
    entries = (relative.sign() * 127 * relative.abs().sqrt()).round().to(torch.int8)
    found: dict[str, Any] = {
        "layer": view.layer,
        "kind": view.kind,
        "heads": view.heads,
        "size": view.matrix.shape[1],
        "scale": _numbers(scale),
        "entries": _base64(entries.numpy().tobytes()),
        "reach": _numbers(view.reach),
    }
    if view.half_life is not None and view.state_size is not None:
        assert view.step is not None
        assert view.gate is not None
        assert view.state_norm is not None
        assert view.state_rank is not None
        # A dt of zero remembers for ever, and quantiles between infinities would be no numbers.
        finite = view.half_life.clamp(max=torch.finfo(torch.float32).max)
        quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=finite.dtype)
        found |= {
            "memory": _numbers(torch.quantile(finite, quantiles, 1).T),  # (H, 3)
            # Decays add up in the exponent, so that rates are averaged and not half-lives.
            "halfLife": _numbers(1 / _means(1 / view.half_life, span)),
            "step": _numbers(_means(view.step, span)),
            "gate": _numbers(_means(view.gate, span)),
            "stateNorm": _numbers(view.state_norm),
            "stateRank": _numbers(view.state_rank),
            "fullRank": min(view.state_size),
        }
    return found


def _means(series: Tensor, span: int) -> Tensor:
    """Means over ``span`` tokens, ``(H, T)`` to ``(H, T / span)``; the last may be of fewer."""
    return torch.stack([part.mean(1) for part in series.split(span, 1)], 1)


def _numbers(tensor: Tensor) -> str:
    """Little-endian fp32, within its range."""
    largest = torch.finfo(torch.float32).max
    return _base64(tensor.to(torch.float32).clamp(-largest, largest).numpy().astype("<f4").tobytes())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
