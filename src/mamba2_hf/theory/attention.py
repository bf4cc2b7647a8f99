"""Structured masked attention: ``Y = (L * Q K^T) V`` with a mask L that multiplies fast (Section 4).

The two orders of one contraction (Definition 4.2): first scores, then values is quadratic in T (Equation 13); first
keys with values, then the mask, then queries costs what multiplying by L costs (Equation 15). A mask is an object with
both its matrix and that product, so that Figure 3 is a list of classes.

Shapes: queries and keys ``(..., T, N)``, values ``(..., T, P)``, masks ``(..., T, T)``; leading axes, such as heads,
broadcast.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..errors import ArgumentError
from . import lti, semiseparable

FeatureMap = Callable[[Tensor], Tensor]
"""``(..., T, N)`` to ``(..., T, M)``, of queries and keys alike."""
MODES = ("fast", "quadratic")


class Mask(ABC):
    """A structured matrix ``(..., T, T)``."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The mask, entry by entry: ``(..., T, T)``."""

    @abstractmethod
    def multiply(self, z: Tensor) -> Tensor:
        """``L z`` in less than quadratic time, ``(..., T, F)`` to the same."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Masked attention in the fast order: expand, multiply by the mask, contract (Equation 15)."""
        expanded = torch.einsum("...sp,...sn->...spn", v, k)  # (15a)
        hidden = self.multiply(expanded.flatten(-2)).unflatten(-1, expanded.shape[-2:])  # (15b): the states
        return torch.einsum("...tn,...tpn->...tp", q.to(hidden.dtype), hidden)  # (15c)


@dataclass(frozen=True)
class Causal(Mask):
    """Ones on and below the diagonal: linear attention (Katharopoulos et al. 2020; Proposition 4.1)."""

    tokens: int

    def matrix(self) -> Tensor:
        """``(T, T)``, in the default dtype."""
        return torch.ones(self.tokens, self.tokens).tril()

    def multiply(self, z: Tensor) -> Tensor:
        """A running sum (Equation 14)."""
        return z.cumsum(-2)


@dataclass(frozen=True)
class OneSemiseparable(Mask):
    """``L_ij = a_i ... a_{j+1}``, decays that depend on the input: SSD's mask (Section 5.2)."""

    a: Tensor
    """``(..., T)``"""

    def matrix(self) -> Tensor:
        """``1SS(a)``, ``(..., T, T)``."""
        return semiseparable.one_semiseparable(self.a)

    def multiply(self, z: Tensor) -> Tensor:
        """The scalar recurrence (Equation 7)."""
        return semiseparable.scalar_recurrence(self.a, z)


@dataclass(frozen=True)
class SSD(Mask):
    """The mask of an SSD layer: ``L_ij = exp(A dt_i + ... + A dt_{j+1}) dt_j``, one for each head.

    That is ``1SS(a) diag(b)`` with ``a = exp(A dt)`` and ``b = dt``; a diagonal changes no structure (Section 3.2.2).
    Its fast form is :func:`mamba2_hf.ops.ssd_chunk_scan` itself.
    """

    dt: Tensor
    """``(H, T)`` step sizes, nonnegative."""
    A: Tensor
    """``(H,)`` decay rates, negative."""

    def matrix(self) -> Tensor:
        """``(H, T, T)``."""
        return semiseparable.one_semiseparable(torch.exp(self.A[:, None] * self.dt)) * self.dt[:, None]

    def multiply(self, z: Tensor) -> Tensor:
        """The scalar recurrence of ``dt z``, ``(H, T, F)`` to the same."""
        return semiseparable.scalar_recurrence(torch.exp(self.A[:, None] * self.dt), self.dt[..., None] * z)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The layer's own op: ``q, k (H or 1, T, N)`` and ``v (H, T, P)`` to ``(H, T, P)``."""
        x, dt, B, C = (tensor.movedim(0, 1)[None] for tensor in (v, self.dt, k, q))  # (1, T, H, ...)
        y = ops.ssd_chunk_scan(x, dt, self.A, B, C)
        assert isinstance(y, Tensor)  # no states were asked for
        return y[0].movedim(1, 0)


@dataclass(frozen=True)
class Toeplitz(Mask):
    """``L_ij = alpha_{i-j}``: a multiplicative relative position (Section 4.3)."""

    alpha: Tensor
    """``(..., T)``, of distances 0 to T - 1; causal."""

    def matrix(self) -> Tensor:
        """``(..., T, T)``."""
        return lti.toeplitz(self.alpha)

    def multiply(self, z: Tensor) -> Tensor:
        """A convolution by FFT, in ``O(T log T)``."""
        return lti.causal_convolution(self.alpha[..., None, :], z.mT).mT


@dataclass(frozen=True)
class Fourier(Mask):
    """``L_ij = omega^(ij)`` with ``omega = exp(-2 pi i / T)``, the discrete Fourier transform (Section 4.3). Complex,
    and not causal: a mask that no recurrence computes.
    """

    tokens: int

    def matrix(self) -> Tensor:
        """``(T, T)``, complex with parts of the default dtype."""
        return torch.fft.fft(torch.eye(self.tokens))

    def multiply(self, z: Tensor) -> Tensor:
        """The transform, by FFT in ``O(T log T)``."""
        return torch.fft.fft(z, dim=-2)


@dataclass(frozen=True)
class Semiseparable(Mask):
    """The general causal mask with a bounded state (Theorem 5.2), ``SSS(A, B, C)``; see :mod:`.semiseparable`."""

    A: Tensor
    B: Tensor
    C: Tensor

    def matrix(self) -> Tensor:
        """``(T, T)``."""
        return semiseparable.build(self.A, self.B, self.C)

    def multiply(self, z: Tensor) -> Tensor:
        """The recurrence, ``(T, F)`` to the same."""
        return semiseparable.multiply_recurrent(self.A, self.B, self.C, z)


def decay(gamma: float, tokens: int, dtype: torch.dtype | None = None) -> OneSemiseparable:
    """The mask of RetNet (Sun et al. 2023): ``L_ij = gamma^(i-j)``, a 1-semiseparable mask of equal factors, in
    ``dtype`` or the default one.
    """
    return OneSemiseparable(torch.full((tokens,), gamma, dtype=dtype))


def structured_masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    feature_map: FeatureMap | None = None,
    *,
    normalize: bool = False,
    mode: str = "fast",
) -> Tensor:
    """``(L * f(Q) f(K)^T) V`` (Definition 4.2).

    Args:
        q, k: ``(..., T, N)``.
        v: ``(..., T, P)``.
        mask: L.
        feature_map: f; None for none.
        normalize: whether rows of weights are divided by their sum, which is found as one more value, of ones (Section
            7.3). Feature map and mask should be positive.
        mode: ``"fast"`` (Equation 15, or what the mask knows better) or ``"quadratic"`` (Equation 13); one function.

    Returns:
        ``(..., T, P)``.

    Raises:
        ArgumentError: there is no such mode.
    """
    if mode not in MODES:
        raise ArgumentError(f"mode is {mode!r}, expected one of {', '.join(map(repr, MODES))}")
    if feature_map is not None:
        q, k = feature_map(q), feature_map(k)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if mode == "fast":
        y = mask.attend(q, k, v)
    else:
        weights = (q @ k.mT) * mask.matrix()  # (13a, b)
        y = weights @ v.to(weights.dtype)  # (13c)
    return y[..., :-1] / y[..., -1:] if normalize else y


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1`` (linear attention, Katharopoulos et al. 2020), positive."""
    return F.elu(x) + 1


def cosformer(x: Tensor) -> Tensor:
    """``relu(x)`` weighed by position, ``(..., T, N)`` to ``(..., T, 2 N)`` (cosFormer, Qin et al. 2022): products of
    queries and keys i and j are ``cos(pi (i - j) / 2 T)`` times what they were.
    """
    angle = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)[:, None] * (math.pi / 2 / x.shape[-2])
    return torch.cat([F.relu(x) * angle.cos(), F.relu(x) * angle.sin()], -1)


def positive_random_features(directions: Tensor) -> FeatureMap:
    """Features whose products are ``exp(q . k)`` on average over Gaussian directions (Performer, Choromanski et al.
    2021): ``exp(-|x|^2 / 2) (exp(W x), exp(-W x)) / sqrt(2 M)``.

    Args:
        directions: ``W (M, N)``, drawn from a standard normal distribution.

    Returns:
        A map ``(..., N)`` to ``(..., 2 M)``.
    """

    def features(x: Tensor) -> Tensor:
        projected = x @ directions.mT
        scale = x.square().sum(-1, keepdim=True) / 2
        both = torch.cat([projected, -projected], -1)
        return torch.exp(both - scale) / math.sqrt(2 * len(directions))

    return features


FEATURE_MAPS: dict[str, FeatureMap | None] = {
    "none": None,
    "silu": F.silu,
    "relu": F.relu,
    "exp": torch.exp,
    "elu + 1": elu_plus_one,
    "cosFormer": cosformer,
}
"""Those of Section 9.4.3 that need no draw; ``silu`` is what Mamba-2 applies, behind its convolution."""
