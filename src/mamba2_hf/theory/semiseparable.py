"""Semiseparable matrices (Section 3): lower triangular, with rank N at most in what lies on or below the diagonal.

They are what state space models multiply with (Theorem 3.5). A matrix is given by its generators (Definition 3.2)::

    M_ji = C_j^T A_j ... A_{i+1} B_i        for j >= i, else 0

with ``B, C (T, N)`` and A scalar ``(T,)``, diagonal ``(T, N)`` or full ``(T, N, N)``, all of which functions here take;
``A_0`` is never used. An input ``x`` is ``(T, P)``: P columns, each multiplied by the matrix.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError


def one_semiseparable(a: Tensor) -> Tensor:
    """``1SS(a)``: ``(..., T)`` to ``(..., T, T)`` with ``a_j ... a_{i+1}`` at ``(j, i)`` (Equation 6).

    Each row is the one above times ``a_j``, and a 1 on the diagonal: no quotients, an ``a`` of zero is allowed.
    """
    return scalar_recurrence(a, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device))


def scalar_recurrence(a: Tensor, x: Tensor) -> Tensor:
    """``y_t = a_t y_{t-1} + x_t``: ``1SS(a) x`` in linear time, the cumprodsum (Equation 7).

    Args:
        a: ``(..., T)``.
        x: ``(..., T, F)``; leading axes broadcast.

    Returns:
        ``(..., T, F)``.
    """
    y, ys = torch.zeros_like(x[..., 0, :]), []
    for a_t, x_t in zip(a.unbind(-1), x.unbind(-2), strict=True):
        y = a_t[..., None] * y + x_t
        ys.append(y)
    return torch.stack(ys, -2)


def build(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """``SSS(A, B, C)``, the matrix ``(T, T)`` entry by entry (Equation 4)."""
    _check(A, B, C)
    tokens = len(B)
    entries = [B.new_zeros(())] * (tokens * tokens)
    for i in range(tokens):
        h = B[i]
        for j in range(i, tokens):
            h = h if j == i else _times(A[j], h)
            entries[j * tokens + i] = C[j] @ h
    return torch.stack(entries).view(tokens, tokens)


def multiply_quadratic(A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> Tensor:
    """``M x`` with the matrix in memory (Section 3.4.2): ``(T, P)`` to ``(T, P)``, quadratic in T.

    For a scalar A the matrix is ``1SS(a)`` times ``C B^T``, entry by entry: masked attention (Equation 16).
    """
    M = one_semiseparable(A) * (C @ B.T) if A.dim() == 1 else build(A, B, C)
    return M @ x


def multiply_recurrent(A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> Tensor:
    """``M x`` by the recurrence (Section 3.4.1, Equation 8): ``(T, P)`` to ``(T, P)``, linear in T."""
    return torch.einsum("tn,tpn->tp", C, states(A, B, x))


def states(A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    """``H_t = A_t H_{t-1} + x_t B_t^T``, after every token: ``(T, P, N)`` (Equation 2a)."""
    _check(A, B, B)
    H = x.new_zeros(x.shape[1], B.shape[1])
    after = []
    for A_t, B_t, x_t in zip(A, B, x, strict=True):
        H = _times(A_t, H.mT).mT + torch.outer(x_t, B_t)
        after.append(H)
    return torch.stack(after)


def multiply_chunked(A: Tensor, B: Tensor, C: Tensor, x: Tensor, size: int) -> Tensor:
    """``M x`` by blocks (Section 6): attention inside of chunks, a state between them.

    A diagonal block is a smaller matrix of the same kind; a block below is ``left @ center @ right``, of rank N, and
    centers are applied by passing a state from chunk to chunk. Linear in T, and almost all of it matrix products.

    Args:
        A, B, C: generators.
        x: ``(T, P)``.
        size: tokens of a chunk, Q; it need not divide T.

    Returns:
        ``(T, P)``.
    """
    H = x.new_zeros(x.shape[1], B.shape[1])  # the state that enters a chunk
    ys = []
    for A_, B_, C_, x_ in zip(*(tensor.split(size) for tensor in (A, B, C, x)), strict=True):
        left = _left_factors(A_, C_)  # (Q, N)
        right = _right_factors(A_, B_)  # (Q, N)
        ys.append(multiply_quadratic(A_, B_, C_, x_) + left @ H.mT)
        H = _times(_product(A_), H.mT).mT + x_.mT @ right
    return torch.cat(ys)


def block_factors(A: Tensor, B: Tensor, C: Tensor, rows: range, columns: range) -> tuple[Tensor, Tensor, Tensor]:
    """The block of rows and columns below the diagonal as ``left (R, N) @ center (N, N) @ right (N, L)`` (Equation 5).

    Args:
        A, B, C: generators.
        rows, columns: in steps of one; the first row is below the last column.

    Raises:
        ArgumentError: the block reaches the diagonal.
    """
    if not rows or not columns or rows[0] <= columns[-1]:
        raise ArgumentError(f"a block of rows {rows} and columns {columns} is not below the diagonal")
    left = _left_factors(A[rows.start : rows.stop], C[rows.start : rows.stop])
    right = _right_factors(A[columns.start : columns.stop], B[columns.start : columns.stop])
    center = _times(_product(A[columns.stop : rows.start]), torch.eye(B.shape[1], dtype=B.dtype, device=B.device))
    return left, center, right.mT


def order(M: Tensor, tolerance: float | None = None) -> int:
    """The least N for which ``M (T, T)`` is N-semiseparable (Definition 3.1); T for a matrix without the structure.

    Every submatrix on or below the diagonal is part of one of the T largest, ``M[t:, :t+1]``, so that their ranks say
    it for all. Singular values count that exceed ``tolerance`` times the largest of M; None is ``eps ** (2/3)`` of its
    dtype, 4e-11 in fp64.

    Raises:
        ArgumentError: M has entries above the diagonal.
    """
    return max((len(basis.mT) for basis in _column_bases(M, tolerance)), default=0)


def generators(M: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Reads ``A (T, N, N), B (T, N), C (T, N)`` off ``M (T, T)``, of the least N there is (Proposition 3.4).

    What tokens up to t can still do to outputs from t on is ``M[t:, :t+1]``; coordinates in an orthonormal basis of its
    columns are the state. The next state's coordinates follow from these, without an inverse.

    Raises:
        ArgumentError: M has entries above the diagonal.
    """
    bases = _column_bases(M, tolerance)  # (T - t, N_t)
    size = max((basis.shape[1] for basis in bases), default=0)
    bases = [F.pad(basis, (0, size - basis.shape[1])) for basis in bases]
    A = [M.new_zeros(size, size)]  # never used
    A += [basis.mT @ before[1:] for before, basis in pairwise(bases)]
    B = [basis.mT @ M[t:, t] for t, basis in enumerate(bases)]
    return torch.stack(A), torch.stack(B), torch.stack([basis[0] for basis in bases])


def add(first: tuple[Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Generators of the sum of two matrices: their states side by side, orders add up (Appendix C.1)."""
    A = torch.stack([torch.block_diag(*pair) for pair in zip(_full(*first), _full(*second), strict=True)])
    return A, torch.cat([first[1], second[1]], 1), torch.cat([first[2], second[2]], 1)


def compose(
    first: tuple[Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Generators of the product ``second @ first``, one layer behind another: orders add up (Appendix C.1)."""
    (A1, B1, C1), (A2, B2, C2) = (_full(*first), *first[1:]), (_full(*second), *second[1:])
    into = B2[:, :, None] * (A1.mT @ C1[:, :, None]).mT  # (T, N2, N1) from the former state, through C1 . A1 h
    upper = torch.cat([A1, A1.new_zeros(len(A1), A1.shape[1], A2.shape[1])], 2)
    A = torch.cat([upper, torch.cat([into, A2], 2)], 1)
    B = torch.cat([B1, B2 * (C1 * B1).sum(1, keepdim=True)], 1)
    return A, B, torch.cat([torch.zeros_like(C1), C2], 1)


def _check(A: Tensor, B: Tensor, C: Tensor) -> None:
    shapes = ((len(B),), tuple(B.shape), (*B.shape, B.shape[-1]))
    if B.dim() != 2 or C.shape != B.shape or tuple(A.shape) not in shapes:
        raise ArgumentError(
            f"A, B and C have shapes {tuple(A.shape)}, {tuple(B.shape)} and {tuple(C.shape)}: expected (T,), (T, N) or "
            "(T, N, N) and twice (T, N)"
        )


def _times(A: Tensor, h: Tensor) -> Tensor:
    """``A_t h`` for one token's A, scalar, diagonal ``(N,)`` or full ``(N, N)``, and ``h (N,)`` or ``(N, P)``."""
    if A.dim() == 2:
        return A @ h
    return A * h if A.dim() == 0 or h.dim() == 1 else A[:, None] * h


def _product(A: Tensor) -> Tensor:
    """``A_{Q-1} ... A_0`` of a stretch of tokens; for none of them the identity."""
    if A.dim() < 3:
        return A.prod(0)
    product = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    for A_t in A:
        product = A_t @ product
    return product


def _left_factors(A: Tensor, C: Tensor) -> Tensor:
    """``(Q, N)``: ``C_j^T A_j ... A_0``, from the state that enters a stretch to each output in it."""
    products = [_product(A[: j + 1]) for j in range(len(C))]
    return torch.stack(
        [_times(product.T if A.dim() == 3 else product, row) for product, row in zip(products, C, strict=True)]
    )


def _right_factors(A: Tensor, B: Tensor) -> Tensor:
    """``(Q, N)``: ``A_{Q-1} ... A_{i+1} B_i``, from each input of a stretch to the state that leaves it."""
    return torch.stack([_times(_product(A[i + 1 :]), B[i]) for i in range(len(B))])


def _full(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A of any kind as ``(T, N, N)``."""
    _check(A, B, C)
    if A.dim() == 3:
        return A
    return torch.diag_embed(A if A.dim() == 2 else A[:, None].expand_as(B))


def _column_bases(M: Tensor, tolerance: float | None) -> list[Tensor]:
    """For each t an orthonormal basis ``(T - t, N_t)`` of the columns of ``M[t:, :t+1]``."""
    if M.dim() != 2 or M.shape[0] != M.shape[1]:
        raise ArgumentError(f"M has shape {tuple(M.shape)}, expected (T, T)")
    if bool(M.triu(1).any()):
        raise ArgumentError("M has entries above the diagonal: semiseparable matrices here are lower triangular")
    if tolerance is None:
        tolerance = torch.finfo(M.dtype).eps ** (2 / 3)
    least = tolerance * float(torch.linalg.matrix_norm(M, 2))
    bases = []
    for t in range(len(M)):
        columns, values, _ = torch.linalg.svd(M[t:, : t + 1], full_matrices=False)
        bases.append(columns[:, values > least])
    return bases
