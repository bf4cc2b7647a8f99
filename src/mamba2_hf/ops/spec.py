"""What a mixer is, what its weights are and how its tokens are packed: the records that ops take.

A record is a named tuple: frozen, hashable where it holds no tensors, as cheap to make as a tuple. The record of an op
names its arguments once; its schema, autograd and checks follow from the fields (``runtime/op.py``).
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

INF = math.inf
CHUNK_SIZE = 64  # tokens of a chunk on PyTorch: the quadratic part costs Q per token, passing states costs N P / Q

Index = Annotated[Tensor, "index"]
"""Integers, which have no gradient."""
State = Annotated[Tensor, "state"]
"""Updated in place, without a gradient."""


class SSDShape(NamedTuple):
    """Sizes of one scan: see ``NOTATION.md``. ``states`` counts the states in and out (``B``, or ``S`` if packed)."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    groups: int
    state: int
    states: int


class Packing(NamedTuple):
    """How documents lie in rows: told by neither, each row is one document."""

    seq_idx: Index | None = None
    """``(B, T)`` integers; a new document starts where the value changes."""
    cu_seqlens: Index | None = None
    """``(S + 1,)`` bounds of the documents of one flat row."""

    def states(self, batch: int) -> int:
        """How many states go in and out: ``B``, or ``S`` where documents have bounds."""
        return batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


UNPACKED = Packing()


class LowRank(NamedTuple):
    """What is added to a projection ``x @ weight.T``: ``scale * (x @ down.T) @ up.T`` (LoRA, Hu et al. 2021).

    ``down`` is ``(r, d)`` and ``up`` ``(d', r)`` where the weight is ``(d', d)``.
    """

    down: Tensor
    up: Tensor
    scale: float


class Linear(NamedTuple):
    """A projection ``x @ weight.T + bias``, with the factors of what LoRA adds to it, if any."""

    weight: Tensor
    """``(d', d)``"""
    bias: Tensor | None = None
    """``(d',)``"""
    down: Tensor | None = None
    """``(r, d)``"""
    up: Tensor | None = None
    """``(d', r)``"""
    scale: float = 0.0

    def adapted(self, lora: LowRank | None) -> Linear:
        """The projection with ``lora`` added."""
        return self if lora is None else Linear(self.weight, self.bias, *lora)

    @property
    def lora(self) -> LowRank | None:
        """What is added; None for a plain projection."""
        return None if self.down is None or self.up is None else LowRank(self.down, self.up, self.scale)


class MixerWeights(NamedTuple):
    """The weights between a mixer's projections. Decay rates are given as ``A`` or as ``A_log``, the other is None."""

    conv_weight: Tensor
    """``(H P + 2 G N, K)``"""
    conv_bias: Tensor | None
    """``(H P + 2 G N,)``"""
    dt_bias: Tensor | None
    """``(H,)``"""
    A: Tensor | None
    """``(H,)`` decay rates, negative."""
    A_log: Tensor | None
    """``(H,)`` logarithms of the negated rates, as checkpoints hold them."""
    D: Tensor | None
    """``(H,)`` or ``(H, P)``"""
    gated_norm_weight: Tensor | None
    """``(H P,)``; None for a gate without a norm."""

    @property
    def heads(self) -> int:
        """How many heads there are, H."""
        return self.decay.shape[0]

    @property
    def decay(self) -> Tensor:
        """``(H,)``: the one of ``A`` and ``A_log`` that is given."""
        given = self.A_log if self.A is None else self.A
        assert given is not None  # one of them is
        return given

    @property
    def rates(self) -> Tensor:
        """Decay rates ``(H,)``, negative."""
        return decay_rates(self.decay) if self.A is None else self.A


class LayerWeights(NamedTuple):
    """The weights of a layer ``residual + out_proj(mixer(in_proj(norm(stream))))``."""

    norm_weight: Tensor
    """``(d,)`` of the norm before the mixer."""
    in_proj: Linear
    """To ``2 H P + 2 G N + H``: z, x, B, C and dt."""
    mixer: MixerWeights
    out_proj: Linear
    """From ``H P``."""


class MixerSpec(NamedTuple):
    """What a mixer, and the layer around it, does beside its weights."""

    head_dim: int
    n_groups: int
    activation: str | None = "silu"
    """Of the convolution: one of ``ACTIVATIONS``."""
    norm_eps: float = 1e-5
    """Of the norm before the mixer."""
    gated_norm_eps: float = 1e-5
    group_size: int = 0
    """Channels of the gated norm that share one mean square."""
    norm_before_gate: bool = False
    dt_limit: tuple[float, float] = (0.0, INF)
    chunk_size: int | None = None
    """A tiling hint for the scan; None leaves it to the backend."""
    multipliers: tuple[float, ...] = ()
    """Of z, x, B, C and dt, as they leave in_proj; empty for ones. Of a layer only, as the next two."""
    input_multiplier: float = 1.0
    """Of what in_proj is given."""
    output_multiplier: float = 1.0
    """Of what out_proj gives, before it is added to the stream."""

    @property
    def entering(self) -> tuple[float, ...]:
        """Multipliers of the five parts of in_proj's product, before its bias is added; empty for ones."""
        if self.input_multiplier == 1:
            return self.multipliers
        return tuple(self.input_multiplier * part for part in self.multipliers or (1.0,) * 5)


class Peers(NamedTuple):
    """Devices that reach each other's memory, and what a kernel has to know to add up a small tensor over them
    (``runtime/peers.py``). By default there is only one.
    """

    table: State | None = None
    """``(4 + size,)`` int64: what counts the sums, in units of ``2 ** 20``; whether a device did not answer in time;
    the address of an int32 that the host reads, for the same; nanoseconds to wait; addresses of every device's words.
    """
    rank: int = 0
    """Of this device."""
    size: int = 1
    """How many devices there are."""
    words: int = 0
    """Numbers that a device can send at once. It has ``2 * size`` times as many words of 8 bytes, zeros at first."""


class Ring(NamedTuple):
    """The last inputs of a state that is written once in R tokens: see ``mixer/advance.py``. All are there, or None."""

    x: State | None = None
    """``(B, H, R, P)``"""
    decays: State | None = None
    """``(B, H, 2, R)``, fp32: log decay since the state of the head, and step size."""
    B: State | None = None
    """``(B, G, R, N)``"""
    clock: State | None = None
    """``(B,)``, int32: tokens since the state was set, from 2 R on less R."""


NO_RING = Ring()


class Block(NamedTuple):
    """The last block of tokens of a mixer, as far as its states depend on them, for states that are as of before it. In
    the end ``kept`` of a row's tokens belong to it, and the others never were: see ``mixer/block.py``.
    """

    inputs: State
    """``(B, R, H P + 2 G N)`` of the convolution."""
    convolved: State
    """``(B, R, H P + G N)``: x and B."""
    steps: State
    """``(B, R, 2, H)``: log decays and step sizes, in fp32 at least."""
    kept: State
    """``(B,)``, int32: how many of the R tokens, from the first one on, come before the next block."""


class RingState(NamedTuple):
    """A state and its ring: the arguments of :func:`mamba2_hf.ops.settle`."""

    ssm_state: State
    """``(B, H, P, N)``"""
    ring: Ring


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of decays, states and sums: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def decay_rates(A_log: Tensor) -> Tensor:
    """``-exp(A_log)``, at least in fp32."""
    return -torch.exp(A_log.to(compute_dtype(A_log.dtype)))
