"""A language model's head and its loss as one op, which never holds the logits of all tokens.

Rows are taken in chunks: their logits are computed, turned into gradients where they lie, and multiplied into the
gradients of the inputs and the weight before the next chunk. The backward only scales those, because the loss is a
number. A backend serves the part between the matrix products, ``cross_entropy_rows``.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import BackendError
from .. import dispatch, flops
from ..checks import check_devices, check_floating, check_integers, check_rank, check_same_dtype, check_shape, fail
from ..runtime.modes import needs_grad, product_dtype, transformed, without_autocast
from ..spec import compute_dtype

CHUNK_ELEMENTS = {"cuda": 1 << 28, "cpu": 1 << 25}  # logits of a chunk, at most, for large products
_ALIGNED = 16  # elements, on a GPU: the vocabulary is filled up to a multiple of it


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """The summed cross-entropy of ``scale * hidden @ weight.T``, whose logits are never held whole.

    Exact, with its gradients: ``torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")``. Rows are
    taken in chunks, and gradients are computed with the loss, which costs the memory of those of ``hidden`` and (in
    fp32) ``weight``, where they are needed, until the backward. Nothing is read back to the host.

    Args:
        hidden: ``(R, d)``; bf16, fp16, fp32 or fp64. Under autocast products are taken in its dtype.
        weight: ``(V, d)``, in the dtype of ``hidden`` except under autocast.
        labels: ``(R,)`` integers in ``[0, V)``, or ``ignore_index``. Others raise on a CPU and give NaN on a GPU.
        scale: multiplies the logits.
        ignore_index: the label of rows that do not count.
        backend: as in :func:`ssd_chunk_scan`; serves what lies between the matrix products.

    Returns:
        ``()`` in fp32 (fp64): the sum over the rows that count. Divide by their number for the mean.

    Raises:
        ArgumentError: shapes, dtypes or devices contradict each other.
        BackendError: the backend cannot serve the call; or a second derivative is asked for.
    """
    check_linear_cross_entropy(hidden, weight, labels, scale)
    dtype = product_dtype(hidden)
    backend = dispatch.choose("linear_cross_entropy", hidden.device, backend, dtype=dtype).name
    if transformed():  # from logits that are held whole
        logits = F.linear(hidden.to(dtype), weight.to(dtype)).to(compute_dtype(dtype))
        return F.cross_entropy(scale * logits, labels.long(), ignore_index=ignore_index, reduction="sum")
    wants = (needs_grad(hidden), needs_grad(weight))
    loss: Tensor = getattr(torch.ops, _NAMESPACE).linear_cross_entropy(
        *(hidden, weight, labels, scale, ignore_index, dtype, *wants, backend)
    )[0]
    return loss


def check_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> None:
    """Contract of ``linear_cross_entropy``; raises :class:`ArgumentError`."""
    check_floating(hidden=hidden)
    check_rank("hidden", hidden, 2, "(R, d)")
    check_rank("weight", weight, 2, "(V, d)")
    check_shape("weight", weight, (weight.shape[0], hidden.shape[1]), "(V, d), with the d of hidden")
    check_shape("labels", labels, (hidden.shape[0],), "(R,), one per row of hidden")
    check_integers(labels=labels)
    if not -float("inf") < scale < float("inf"):
        fail(f"scale is {scale}, expected a finite number")
    if product_dtype(hidden) == hidden.dtype:
        check_same_dtype(hidden=hidden, weight=weight)
    check_devices(hidden.device, weight=weight, labels=labels)


def rows_per_chunk(vocab: int, device: torch.device) -> int:
    """Rows whose logits are held at a time: a power of two."""
    elements = CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]
    return max(1, 1 << (max(1, elements // vocab).bit_length() - 1))


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float,
    ignore_index: int,
    dtype: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss summed over rows, and its gradients: of ``hidden`` in ``dtype``, of ``weight`` in fp32 (fp64). What is
    not wanted is empty, ``(0,)``.
    """
    rows, width = hidden.shape
    vocab = weight.shape[0]
    exact = compute_dtype(dtype)
    step = min(rows_per_chunk(vocab, hidden.device), max(rows, 1))
    gradient = wants_hidden or wants_weight
    cross_entropy_rows = dispatch.backend_module(backend).cross_entropy_rows
    with without_autocast(hidden.device):
        # Products whose sizes are no multiples of 16 bytes take several times as long on a GPU: rows of zeros are added
        # to the vocabulary, whose logits nobody reads and whose gradients are zero.
        padded = -(-vocab // _ALIGNED) * _ALIGNED if hidden.is_cuda else vocab
        weight = F.pad(weight.to(dtype), (0, 0, 0, padded - vocab))
        losses = hidden.new_empty(rows, dtype=exact)
        dhidden = hidden.new_empty((rows, width) if wants_hidden else 0, dtype=dtype)
        dweight = hidden.new_zeros((padded, width) if wants_weight else 0, dtype=exact)
        buffer = hidden.new_empty(step, padded, dtype=dtype)
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            inputs = hidden[chunk].to(dtype)  # (R, d)
            logits = buffer[: len(inputs)]
            torch.mm(inputs, weight.t(), out=logits)  # (R, padded)
            losses[chunk] = cross_entropy_rows(logits[:, :vocab], labels[chunk], scale, ignore_index, gradient)
            if padded > vocab:
                logits[:, vocab:] = 0  # NaN, where hidden has one, would spread from rows that do not count
            if wants_hidden:
                torch.mm(logits, weight, out=dhidden[chunk])
            if wants_weight:
                _add_product(dweight, logits.t(), inputs)
        return losses.sum(), dhidden, dweight[:vocab] if padded > vocab else dweight


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` without rounding the product to the dtype of the factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _fake(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: float, ignore_index: int, dtype: torch.dtype, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wants_hidden, wants_weight, _ = rest
    exact = compute_dtype(dtype)
    return (
        hidden.new_empty((), dtype=exact),
        hidden.new_empty(hidden.shape if wants_hidden else 0, dtype=dtype),
        hidden.new_empty(weight.shape if wants_weight else 0, dtype=exact),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.wants = inputs[6:8]
    ctx.dtypes = [tensor.dtype for tensor in inputs[:2]]


def _scaled(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise BackendError(
            "linear_cross_entropy has no second derivative: compute the logits and their loss apart, in a model by "
            "return_logits=True"
        )
    if dloss is None:
        return (None,) * 9
    # In fp32: a factor that is rounded to 16 bits with the gradients would be off by up to 0.4 % in all of them.
    found = [
        torch.mul(gradient.to(dloss.dtype), dloss, out=gradient.new_empty(gradient.shape, dtype=dtype))
        if wanted
        else None
        for gradient, wanted, dtype in zip(ctx.saved_tensors, ctx.wants, ctx.dtypes, strict=True)
    ]
    return *found, *(None,) * 7


# One op for PyTorch: the loop of a compiled graph does not depend on how many rows it was traced with. Copies of this
# code in one process (a model's own, from a hub) have names of their own.
_NAMESPACE = re.sub(r"\W", "_", __name__.partition(".ops")[0])
_OP = f"{_NAMESPACE}::linear_cross_entropy"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
_LIBRARY.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, float scale, int ignore_index, "
    "ScalarType dtype, bool wants_hidden, bool wants_weight, str backend) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(_OP, "default", loss_and_gradients, lib=_LIBRARY)
torch.library.register_fake(_OP, _fake, lib=_LIBRARY)
torch.library.register_autograd(_OP, _scaled, setup_context=_keep, lib=_LIBRARY)
flops.register(_NAMESPACE, "linear_cross_entropy", flops.linear_cross_entropy)
