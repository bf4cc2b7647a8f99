"""Linear time-invariant systems: one function as recurrence, convolution and matrix (Section 2.1, Equation 1).

Shapes: ``A (N, N)``, ``B (N,)``, ``C (N,)``, input ``x (T,)``, output ``y (T,)``. The state before the first token is
zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError

RULES = ("zero-order hold", "bilinear")


def discretize(A: Tensor, B: Tensor, step: float, rule: str = "zero-order hold") -> tuple[Tensor, Tensor]:
    """Returns A and B of the discrete system that follows ``h' = A h + B x`` in steps of ``step``.

    Zero-order hold is exact for an input that is constant within a step, and needs no inverse of A: both are blocks of
    the exponential of ``[[A, B], [0, 0]]``. Bilinear (Tustin) is exact to second order, and maps a stable system to a
    stable one for every step. The layer itself takes ``exp(dt A)`` and, in place of the hold's integral, ``dt B``.

    Args:
        A, B: ``(N, N)`` and ``(N,)``.
        step: positive.
        rule: one of ``RULES``.

    Raises:
        ArgumentError: there is no such rule, or the step is not positive.
    """
    if step <= 0:
        raise ArgumentError(f"step is {step}, expected a positive number")
    size = A.shape[0]
    eye = torch.eye(size, dtype=A.dtype, device=A.device)
    if rule == "bilinear":
        solved = torch.linalg.solve(eye - step / 2 * A, torch.cat([eye + step / 2 * A, step * B[:, None]], 1))
        return solved[:, :size], solved[:, size]
    if rule != "zero-order hold":
        raise ArgumentError(f"rule is {rule!r}, expected one of {', '.join(map(repr, RULES))}")
    augmented = torch.cat([torch.cat([A, B[:, None]], 1), A.new_zeros(1, size + 1)])
    exponential = torch.linalg.matrix_exp(step * augmented)
    return exponential[:size, :size], exponential[:size, size]


def recurrence(A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> Tensor:
    """``h_t = A h_{t-1} + B x_t, y_t = C . h_t``, one token at a time (Equation 1); returns ``y (T,)``."""
    h, ys = torch.zeros_like(B), []
    for x_t in x:
        h = A @ h + B * x_t
        ys.append(C @ h)
    return torch.stack(ys)


def kernel(A: Tensor, B: Tensor, C: Tensor, tokens: int) -> Tensor:
    """The impulse response ``(T,)``: ``C . B, C . A B, C . A^2 B, ...``."""
    h, values = B, []
    for _ in range(tokens):
        values.append(C @ h)
        h = A @ h
    return torch.stack(values)


def convolution(A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> Tensor:
    """``y_t = sum_s K_s x_{t-s}`` with :func:`kernel`, by FFT in ``O(T log T)``; returns ``(T,)``."""
    return causal_convolution(kernel(A, B, C, len(x)), x)


def matrix(A: Tensor, B: Tensor, C: Tensor, tokens: int) -> Tensor:
    """The Toeplitz matrix ``(T, T)`` that the system multiplies x with: ``M_ij = C . A^(i-j) B`` for ``i >= j``."""
    return toeplitz(kernel(A, B, C, tokens))


def causal_convolution(k: Tensor, x: Tensor) -> Tensor:
    """The first T values of the convolution of ``k (..., T)`` and ``x (..., T)``, by FFT; no value wraps around."""
    tokens = x.shape[-1]
    size = 2 * tokens
    return torch.fft.irfft(torch.fft.rfft(k, size) * torch.fft.rfft(x, size), size)[..., :tokens]


def toeplitz(k: Tensor) -> Tensor:
    """The lower triangular ``(..., T, T)`` with ``k (..., T)`` as its first column, constant along diagonals."""
    position = torch.arange(k.shape[-1], device=k.device)
    return k[..., (position[:, None] - position).clamp(min=0)].tril()
