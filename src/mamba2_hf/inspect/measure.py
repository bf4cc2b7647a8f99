"""What the mixers of a model do over one text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import ArgumentError
from ..layers import Attention, Mamba2Mixer
from ..layers.mixer import ScanInputs
from ..models.backbone import SSDBackbone

MAX_TOKENS = 1024
"""Tokens that are looked at unless the caller says otherwise; the matrix of one head takes their square."""
POSITIONS = 64
"""Most positions at which states are measured."""


@dataclass(frozen=True)
class MixerView:
    """One mixer over T tokens. Series are fp32 (fp64 for an fp64 model), on the CPU.

    Attributes:
        layer: that it is in, from 0.
        kind: ``"ssd"``, ``"attention"`` or ``"sliding_attention"``.
        matrix: ``(H, S, S)`` attention matrices, of SSD without the skip; of each ``block x block`` tokens the entry
            that is largest in magnitude.
        reach: ``(H,)`` mean distance in tokens between a token and those it draws on, weighted by ``|M_ij|``.
        half_life: ``(H, T)``, of SSD: in how many tokens the state would halve at the decay of each token,
            ``ln 2 / (dt |A|)``.
        step: ``(H, T)``, of SSD: step sizes dt, which say how much a token writes.
        gate: ``(H, T)``, of SSD: root mean square of ``silu(z)``, which says how much of a head leaves the mixer.
        state_norm: ``(H, K)``, of SSD: Frobenius norm of the state after each of ``Inspection.positions``.
        state_rank: ``(H, K)``, of SSD: its effective rank ``(sum s^2)^2 / sum s^4`` over singular values s, between 1
            and ``min(P, N)``; 0 for a state of zeros.
        state_size: ``(P, N)`` of SSD.
    """

    layer: int
    kind: str
    matrix: Tensor
    reach: Tensor
    half_life: Tensor | None = None
    step: Tensor | None = None
    gate: Tensor | None = None
    state_norm: Tensor | None = None
    state_rank: Tensor | None = None
    state_size: tuple[int, int] | None = None

    @property
    def heads(self) -> int:
        """How many heads there are, H."""
        return self.matrix.shape[0]


@dataclass(frozen=True)
class Inspection:
    """A model over a text.

    Attributes:
        model: its class and size.
        ids: the T tokens that were looked at.
        tokens: their texts, or their ids as text without a tokenizer that knows them.
        left_out: tokens of the text behind these.
        block: tokens of each row and column of the matrices.
        positions: K tokens after which states were measured.
        surprise: ``(T,)`` nats by which each token was missed, 0 for the first.
        mixers: in the order in which they run.
    """

    model: str
    ids: list[int]
    tokens: list[str]
    left_out: int
    block: int
    positions: list[int]
    surprise: Tensor
    mixers: list[MixerView]


def look(
    model: nn.Module,
    text: str | list[int] | Tensor,
    tokenizer: Any = None,
    *,
    max_tokens: int = MAX_TOKENS,
    cells: int = 3_000_000,
) -> Inspection:
    """Runs a model over a text and measures what its mixers do. Gradients are not recorded and nothing is changed.

    Args:
        model: a language model of this package, on any device and in any dtype.
        text: the text, or its token ids, ``(T,)`` or ``(1, T)``.
        tokenizer: the model's; needed for a text, and for ids it says what they are.
        max_tokens: what comes behind them is left out, and counted.
        cells: entries of all matrices together; longer texts are shown in blocks of several tokens.

    Raises:
        ArgumentError: the model is no language model of this package, the text has no tokens or no tokenizer, or an id
            is out of range.
    """
    backbone = next((module for module in model.modules() if isinstance(module, SSDBackbone)), None)
    head = getattr(model, "get_output_embeddings", None)
    if backbone is None or head is None or head() is None:
        raise ArgumentError(f"a {type(model).__name__} is no language model of this package: nothing to look at")
    if max_tokens < 1:
        raise ArgumentError(f"max_tokens is {max_tokens}, expected a positive number")
    every_id = _ids(text, tokenizer)
    ids, vocabulary = every_id[:max_tokens], backbone.embeddings.num_embeddings
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocabulary:
        raise ArgumentError(f"ids go from {low} to {high}, and the model knows those from 0 to {vocabulary - 1}")
    heads = sum(_heads(module) for module in backbone.modules())
    block = max(1, math.ceil(len(ids) * math.sqrt(heads / cells)))
    positions = sorted({math.ceil((i + 1) * len(ids) / POSITIONS) - 1 for i in range(POSITIONS)} - {-1})
    views: list[MixerView] = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), _observed(backbone, views, block, positions):
            row = torch.tensor([ids], device=backbone.embeddings.weight.device)
            options = {"use_cache": False, "output_attentions": False, "return_dict": True}
            logits = model(input_ids=row, **options).logits[0]
    finally:
        for module, mode in modes:
            module.training = mode
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()
    surprise = F.pad(F.cross_entropy(logits[:-1], torch.tensor(ids[1:], dtype=torch.long), reduction="none"), (1, 0))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Inspection(
        model=f"{type(model).__name__}, {parameters:,} parameters",
        ids=ids,
        tokens=_pieces(ids, tokenizer),
        left_out=len(every_id) - len(ids),
        block=block,
        positions=positions,
        surprise=surprise,
        mixers=views,
    )


def _ids(text: str | list[int] | Tensor, tokenizer: Any) -> list[int]:
    if isinstance(text, str):
        if tokenizer is None:
            raise ArgumentError("a text needs its model's tokenizer: pass it, or pass token ids")
        ids = list(tokenizer(text)["input_ids"])
    else:
        given = torch.as_tensor(text)
        if given.dim() > 2 or (given.dim() == 2 and given.shape[0] != 1):
            raise ArgumentError(f"ids have shape {tuple(given.shape)}, expected (T,) or (1, T)")
        if given.is_floating_point() and given.numel():
            raise ArgumentError(f"ids have dtype {given.dtype}, expected integers")
        ids = given.flatten().tolist()
    if not ids:
        raise ArgumentError("the text has no tokens: give at least one")
    return ids


def _pieces(ids: list[int], tokenizer: Any) -> list[str]:
    """The text of each token, decoded behind those before it: some tokenizers drop a space at the start. A character of
    several tokens is the text of its last, and empty the others'.
    """
    if tokenizer is None or None in tokenizer.convert_ids_to_tokens(ids):
        return [str(index) for index in ids]  # transformers makes an empty tokenizer for a folder without one
    pieces, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = tokenizer.decode(ids[start:done]), tokenizer.decode(ids[start:end])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            pieces.append("")
        else:
            pieces.append(now[len(before) :])
            start, done = done, end
    return pieces


def _heads(module: nn.Module) -> int:
    if isinstance(module, Mamba2Mixer):
        return module.num_heads
    return module.sizes[0] // module.head_dim if isinstance(module, Attention) else 0


@contextmanager
def _observed(backbone: SSDBackbone, views: list[MixerView], block: int, positions: list[int]) -> Iterator[None]:
    """Lets the mixers of a backbone add to ``views`` as they run."""
    layer = -1
    handles = []

    def entering(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal layer
            layer = index

        return hook

    def before_ssd(mixer: Mamba2Mixer, args: tuple[Any, ...]) -> None:
        views.append(_ssd_view(layer, mixer.scan_inputs(args[0]), block, positions))

    def before_attention(_: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "output_attentions": True}

    def after_attention(module: Attention, args: Any, kwargs: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        attended, weights = out
        matrix, reach = zip(*(_summary(head, block) for head in weights[0]), strict=True)
        kind = "attention" if module.window is None else "sliding_attention"
        views.append(MixerView(layer, kind, torch.stack(matrix), torch.stack(reach)))
        return attended, None  # nobody else asked for the weights

    try:
        for index, module in enumerate(backbone.layers):
            handles.append(module.register_forward_pre_hook(entering(index)))
        for module in backbone.modules():
            if isinstance(module, Mamba2Mixer):
                handles.append(module.register_forward_pre_hook(before_ssd))
            elif isinstance(module, Attention):
                handles.append(module.register_forward_pre_hook(before_attention, with_kwargs=True))
                handles.append(module.register_forward_hook(after_attention, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ssd_view(layer: int, scan: ScanInputs, block: int, positions: list[int]) -> MixerView:
    x, dt, A, B, C, z = scan
    heads, groups = x.shape[2], B.shape[2]
    matrices, reaches = [], []
    for head in range(heads):  # one at a time: each takes T^2
        group = head * groups // heads
        maps = (B[:, :, group : group + 1], C[:, :, group : group + 1])
        full = ops.ssd_attention_matrix(dt[:, :, head : head + 1], A[head : head + 1], *maps)
        matrix, reach = _summary(full[0, 0], block)
        matrices.append(matrix)
        reaches.append(reach)
    norms, ranks = zip(*(_fullness(state) for state in _states(scan, positions)), strict=True)
    return MixerView(
        layer=layer,
        kind="ssd",
        matrix=torch.stack(matrices),
        reach=torch.stack(reaches),
        half_life=(math.log(2) / (dt[0] * -A)).T.cpu(),
        step=dt[0].T.cpu(),
        gate=F.silu(z[0].to(dt.dtype)).square().mean(-1).sqrt().T.cpu(),
        state_norm=torch.stack(norms, 1),
        state_rank=torch.stack(ranks, 1),
        state_size=(x.shape[3], B.shape[3]),
    )


def _states(scan: ScanInputs, positions: list[int]) -> Iterator[Tensor]:
    """The state ``(H, P, N)`` after each position."""
    state, start = None, 0
    for position in positions:
        x, dt, B, C = (tensor[:, start : position + 1] for tensor in (scan.x, scan.dt, scan.B, scan.C))
        _, state = ops.ssd_chunk_scan(x, dt, scan.A, B, C, initial_states=state, return_final_states=True)
        start = position + 1
        yield state[0]


def _fullness(state: Tensor) -> tuple[Tensor, Tensor]:
    """Frobenius norm and effective rank ``(H,)`` of ``(H, P, N)``."""
    norm = torch.linalg.matrix_norm(state)
    unit = state / norm.clamp(min=torch.finfo(state.dtype).tiny)[:, None, None]
    gram = unit @ unit.mT  # (H, P, P); its trace is 1, and the sum of squares that of s^4
    rank = torch.where(norm > 0, 1 / gram.square().sum((1, 2)).clamp(min=torch.finfo(state.dtype).tiny), 0)
    return norm.cpu(), rank.cpu()


def _summary(matrix: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Of a matrix ``(T, T)``: its largest entries by blocks ``(S, S)``, and the mean distance they reach."""
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    position = torch.arange(len(matrix), device=matrix.device, dtype=matrix.dtype)
    weight = matrix.abs()
    distance = (weight * (position[:, None] - position)).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
    high, low = (F.max_pool2d(sign * matrix[None], block, ceil_mode=True)[0] * sign for sign in (1, -1))
    return torch.where(high >= -low, high, low).cpu(), distance.cpu()
