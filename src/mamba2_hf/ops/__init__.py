"""Functions on tensors: the SSD scan, its single step, the convolution and norm around it.

Each op has one contract (``checks.py``) and several backends (``dispatch.py``); names and equations are in
``NOTATION.md``, the oracles in ``reference.py``. Every function takes ``backend=None`` (automatic), ``"torch"`` or
``"triton"``; a backend that is asked for and cannot serve raises :class:`mamba2_hf.errors.BackendError` and says why.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch import dtype as Dtype  # `torch` is the name of a backend here

from . import checks, dispatch
from .checks import LowRank
from .cross_entropy.op import product_dtype, sum_of_losses
from .dispatch import use_backend
from .runtime.modes import needs_grad
from .scan.reference import ssd_attention_matrix

__all__ = [
    "LowRank",
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_rms_norm",
    "linear_cross_entropy",
    "mamba2_inner",
    "mamba2_layer",
    "mamba2_layer_step",
    "mamba2_step",
    "ssd_attention_matrix",
    "ssd_chunk_scan",
    "ssd_state_update",
    "use_backend",
]

INF = math.inf


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    chunk_size: int | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The SSD layer over whole sequences ("Transformers are SSMs", Section 6): differentiable in every tensor.

    Args:
        x: ``(B, T, H, P)`` inputs; bf16, fp16, fp32 or fp64.
        dt: ``(B, T, H)`` step sizes. Bias, softplus and clamp are applied in that order, in fp32.
        A: ``(H,)`` decay rates, negative.
        B, C: ``(B, T, G, N)`` input and output maps; G divides H.
        D: ``(H,)`` or ``(H, P)`` skip.
        z: ``(B, T, H, P)`` gate; the output is multiplied by ``silu(z)``.
        dt_bias: ``(H,)``.
        dt_softplus: whether ``dt`` passes through softplus.
        dt_limit: ``(low, high)`` clamp of ``dt``.
        chunk_size: tiling hint; never changes the function. ``None`` leaves it to the backend.
        initial_states: ``(B, H, P, N)``, or ``(S, H, P, N)`` with ``cu_seqlens``; zeros if None.
        seq_idx: ``(B, T)`` integers; a new document starts where the value changes.
        cu_seqlens: ``(S + 1,)`` bounds of the documents of one flat row (B = 1). Tokens past the last bound belong to
            no document and come out as zeros.
        return_final_states: whether to return the states after the last token as well.
        backend: see the module.

    Returns:
        ``y (B, T, H, P)`` in the dtype of ``x``; with ``return_final_states`` also the states, shaped as
        ``initial_states``, fp32 (fp64 for fp64 inputs).

    Raises:
        ArgumentError: a shape, dtype, device or value breaks the contract.
        BackendError: ``backend`` was forced and cannot serve the call.
    """
    shape = checks.check_ssd(
        *(x, dt, A, B, C),
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
        chunk_size=chunk_size,
        initial_states=initial_states,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )
    choice = dispatch.choose("ssd_chunk_scan", x.device, backend, shape=shape, dtype=x.dtype)
    y, states = dispatch.backend_module(choice.name).ssd_chunk_scan(
        *(x, dt, A, B, C),
        shape=shape,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        chunk_size=chunk_size,
        initial_states=initial_states,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )
    return (y, states) if return_final_states else y


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    backend: str | None = None,
) -> Tensor:
    """One step of the recurrence ("Transformers are SSMs", Equation 2); ``state`` is updated in place.

    Args:
        state: ``(B, H, P, N)``, any floating dtype; the step itself is computed in fp32.
        x: ``(B, H, P)``.
        dt: ``(B, H)``.
        A: ``(H,)``, negative.
        B, C: ``(B, G, N)``.
        D, z, dt_bias, dt_softplus, dt_limit, backend: as in :func:`ssd_chunk_scan`, ``z`` being ``(B, H, P)``.

    Returns:
        ``y (B, H, P)`` in the dtype of ``x``.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    shape = checks.check_state_update(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_limit=dt_limit)
    differentiable = needs_grad(x, dt, A, B, C, D, z, dt_bias)
    choice = dispatch.choose(
        "ssd_state_update", x.device, backend, shape=shape, dtype=x.dtype, differentiable=differentiable
    )
    return dispatch.backend_module(choice.name).ssd_state_update(
        *(state, x, dt, A, B, C),
        shape=shape,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, channels last, with an optional activation.

    Args:
        x: ``(B, T, C)``; may be a view into a wider tensor.
        weight: ``(C, K)``; tap ``K - 1`` multiplies the current token.
        bias: ``(C,)``.
        activation: ``None``, ``"silu"`` or ``"swish"`` (the same function).
        initial_states: ``(B, C, K - 1)`` inputs before the first token (``(S, C, K - 1)`` with ``cu_seqlens``).
        seq_idx, cu_seqlens: as in :func:`ssd_chunk_scan`; no tap reaches into another document.
        return_final_states: whether to return each sequence's last ``K - 1`` inputs, shaped as ``initial_states``.
        backend: see the module.

    Returns:
        ``y (B, T, C)`` in the dtype of ``x``; with ``return_final_states`` also the states.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    checks.check_conv(x, weight, bias, activation, initial_states, seq_idx, cu_seqlens)
    choice = dispatch.choose("causal_conv1d", x.device, backend, taps=weight.shape[1], dtype=x.dtype)
    y, states = dispatch.backend_module(choice.name).causal_conv1d(
        *(x, weight, bias),
        activation=activation,
        initial_states=initial_states,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )
    return (y, states) if return_final_states else y


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`causal_conv1d` for one token or a short block, with the last inputs kept in ``conv_state`` (in place).

    Args:
        x: ``(B, C)`` or ``(B, T, C)``.
        conv_state: ``(B, C, L)``, the last ``L >= K - 1`` inputs, newest last.
        weight, bias, activation, backend: as in :func:`causal_conv1d`.

    Returns:
        ``y``, shaped as ``x``.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    checks.check_conv_update(x, conv_state, weight, bias, activation)
    choice = dispatch.choose(
        "causal_conv1d_update",
        x.device,
        backend,
        taps=weight.shape[1],
        dtype=x.dtype,
        differentiable=needs_grad(x, weight, bias),
    )
    return dispatch.backend_module(choice.name).causal_conv1d_update(x, conv_state, weight, bias, activation=activation)


def gated_rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    dtype: Dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """RMSNorm over groups of channels with a SiLU gate, computed in fp32.

    ``norm(x * silu(z)) * weight``, or ``norm(x) * weight * silu(z)`` with ``norm_before_gate``.

    Args:
        x: ``(..., d)``.
        z: gate shaped as ``x``, or None.
        weight: ``(d,)``.
        eps: added to the mean square.
        group_size: channels that share one mean square; None for all ``d``.
        norm_before_gate: the order; the published Mamba-2 models gate first.
        dtype: of the result, rounded to it once; None for that of ``x``.
        backend: see the module.

    Returns:
        Shaped as ``x``.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    size = checks.check_norm(x, z, weight, eps, group_size, dtype)
    dtype = dtype or x.dtype
    choice = dispatch.choose("gated_rms_norm", x.device, backend, group_size=size, dtype=x.dtype)
    return dispatch.backend_module(choice.name).gated_rms_norm(
        x, z, weight, eps=eps, group_size=size, norm_before_gate=norm_before_gate, dtype=dtype
    )


def mamba2_inner(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    *,
    norm_weight: Tensor | None,
    head_dim: int,
    n_groups: int,
    activation: str | None = "silu",
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    chunk_size: int | None = None,
    conv_initial_states: Tensor | None = None,
    ssm_initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """A Mamba-2 mixer between its two projections: convolution, scan and gated norm (paper, Section 7, Figure 6).

    In training only the inputs are kept; the rest is recomputed in the backward.

    Args:
        zxbcdt: ``(B, T, 2 H P + 2 G N + H)``, the in_proj output in the order z, x, B, C, dt.
        conv_weight: ``(H P + 2 G N, K)``. conv_bias: ``(H P + 2 G N,)`` or None.
        dt_bias: ``(H,)`` or None. A: ``(H,)``, negative. D: ``(H,)``, ``(H, P)`` or None.
        norm_weight: ``(H P,)``; None gates without a norm.
        head_dim: P. n_groups: G.
        activation: of the convolution.
        eps, group_size, norm_before_gate: of the norm; see :func:`gated_rms_norm`.
        dt_limit, chunk_size, seq_idx, cu_seqlens: see :func:`ssd_chunk_scan`.
        conv_initial_states: ``(B or S, H P + 2 G N, K - 1)``.
        ssm_initial_states: ``(B or S, H, P, N)``.
        return_final_states: whether to return both states as well.
        backend: see the module.

    Returns:
        ``y (B, T, H P)``; with ``return_final_states`` also the convolution's and the scan's states.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    shape, size = checks.check_inner(
        *(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight),
        *(head_dim, n_groups, activation, eps, group_size, dt_limit),
        *(conv_initial_states, ssm_initial_states, seq_idx, cu_seqlens),
    )
    choice = dispatch.choose(
        "mamba2_inner",
        zxbcdt.device,
        backend,
        shape=shape,
        dtype=zxbcdt.dtype,
        taps=conv_weight.shape[1],
        group_size=size,
    )
    y, conv_state, ssm_state = dispatch.backend_module(choice.name).mamba2_inner(
        *(zxbcdt, conv_weight, conv_bias, dt_bias, A, D),
        norm_weight=norm_weight,
        shape=shape,
        activation=activation,
        eps=eps,
        group_size=size,
        norm_before_gate=norm_before_gate,
        dt_limit=dt_limit,
        chunk_size=chunk_size,
        conv_initial_states=conv_initial_states,
        ssm_initial_states=ssm_initial_states,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        return_final_states=return_final_states,
    )
    return (y, conv_state, ssm_state) if return_final_states else y


def mamba2_layer(
    stream: Tensor,
    *,
    norm_weight: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    gated_norm_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    n_groups: int,
    activation: str | None = "silu",
    norm_eps: float = 1e-5,
    gated_norm_eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    chunk_size: int | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    in_lora: LowRank | None = None,
    out_lora: LowRank | None = None,
    backend: str | None = None,
) -> Tensor:
    """A layer for training: ``stream + out_proj(mamba2_inner(in_proj(norm(stream))))``, differentiable in all of them.

    On Triton the stream, the output of in_proj and that of the scan are kept, and the scan runs once; on PyTorch what
    the parts keep. Under autocast the projections' products are taken in its dtype.

    Args:
        stream: ``(B, T, d)``, the residual stream, in the weights' dtype or fp32.
        norm_weight: ``(d,)``. norm_eps: of that norm.
        in_weight: ``(2 H P + 2 G N + H, d)``. out_weight: ``(d, H P)``. in_bias, out_bias: theirs, or None.
        A_log: ``(H,)``, logarithms of the negative decay rates.
        in_lora, out_lora: low-rank additions to the projections, in the dtype of the products, or None.
        gated_norm_weight: ``(H P,)``. gated_norm_eps: of that norm.
        conv_weight, conv_bias, dt_bias, D, n_groups, activation, group_size, norm_before_gate, dt_limit, chunk_size,
            seq_idx, cu_seqlens, backend: see :func:`mamba2_inner`.

    Returns:
        ``(B, T, d)`` in the dtype of ``stream``.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    zxbcdt = checks.check_layer(
        stream, norm_weight, in_weight, in_bias, out_weight, out_bias, norm_eps, in_lora, out_lora
    )
    shape, size = checks.check_inner(
        *(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, gated_norm_weight),
        *(out_weight.shape[1] // A_log.shape[0], n_groups, activation, gated_norm_eps, group_size, dt_limit),
        *(None, None, seq_idx, cu_seqlens),
    )
    dtype = product_dtype(in_weight, out_weight)
    choice = dispatch.choose(
        "mamba2_layer",
        stream.device,
        backend,
        shape=shape,
        dtype=dtype,
        stream=stream.dtype,
        width=stream.shape[2],
        taps=conv_weight.shape[1],
        group_size=size,
    )
    return dispatch.backend_module(choice.name).mamba2_layer(
        stream,
        norm_weight=norm_weight,
        in_weight=in_weight,
        in_bias=in_bias,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        dt_bias=dt_bias,
        A_log=A_log,
        D=D,
        gated_norm_weight=gated_norm_weight,
        out_weight=out_weight,
        out_bias=out_bias,
        shape=shape,
        dtype=dtype,
        activation=activation,
        norm_eps=norm_eps,
        gated_norm_eps=gated_norm_eps,
        group_size=size,
        norm_before_gate=norm_before_gate,
        dt_limit=dt_limit,
        chunk_size=chunk_size,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        in_lora=in_lora,
        out_lora=out_lora,
    )


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
        backend: see above; serves what lies between the matrix products.

    Returns:
        ``()`` in fp32 (fp64): the sum over the rows that count. Divide by their number for the mean.

    Raises:
        ArgumentError: shapes, dtypes or devices contradict each other.
        BackendError: the backend cannot serve the call; or a second derivative is asked for.
    """
    checks.check_linear_cross_entropy(hidden, weight, labels, scale)
    dtype = product_dtype(hidden, weight)
    choice = dispatch.choose("linear_cross_entropy", hidden.device, backend, dtype=dtype)
    wants = (needs_grad(hidden), needs_grad(weight))
    return sum_of_losses(hidden, weight, labels, scale, ignore_index, dtype, *wants, choice.name)


def mamba2_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    *,
    norm_weight: Tensor | None,
    n_groups: int,
    activation: str | None = "silu",
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    log_rates: bool = False,
    backend: str | None = None,
) -> Tensor:
    """:func:`mamba2_inner` for one token or a short block, from states that are updated in place.

    Args:
        zxbcdt: ``(B, T, 2 H P + 2 G N + H)``.
        conv_state: ``(B, C, L)``, the last ``L >= K - 1`` inputs of the convolution, newest last; ``C = H P + 2 G N``.
        ssm_state: ``(B, H, P, N)``, any floating dtype; the step itself is computed in fp32.
        conv_weight: ``(C, K)``. conv_bias: ``(C,)`` or None.
        dt_bias, A, D, norm_weight, n_groups, activation, eps, group_size, norm_before_gate, dt_limit, backend: as in
            :func:`mamba2_inner`.
        log_rates: whether ``A`` holds the logarithms of the negative rates, as checkpoints do.

    Returns:
        ``y (B, T, H P)``.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    shape = checks.check_step(
        *(zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D),
        *(n_groups, activation, dt_limit),
    )
    size = inner = shape.heads * shape.head_dim
    if norm_weight is not None:
        size = checks.check_norm(zxbcdt[..., :inner], None, norm_weight, eps, group_size)
    choice = dispatch.choose(
        "mamba2_step",
        zxbcdt.device,
        backend,
        shape=shape,
        dtype=zxbcdt.dtype,
        taps=conv_weight.shape[1],
        group_size=size,
        differentiable=needs_grad(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight),
    )
    return dispatch.backend_module(choice.name).mamba2_step(
        *(zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D),
        norm_weight=norm_weight,
        shape=shape,
        activation=activation,
        eps=eps,
        group_size=size,
        norm_before_gate=norm_before_gate,
        dt_limit=dt_limit,
        log_rates=log_rates,
    )


def mamba2_layer_step(
    stream: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    *,
    norm_weight: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    gated_norm_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    n_groups: int,
    activation: str | None = "silu",
    norm_eps: float = 1e-5,
    gated_norm_eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    ready: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A layer for one token of each sequence: ``stream + out_proj(mamba2_step(in_proj(norm(stream))))``.

    Args:
        stream: ``(B, 1, d)``, the residual stream, in the weights' dtype or fp32.
        conv_state, ssm_state: updated in place; see :func:`mamba2_step`.
        norm_weight: ``(d,)``. norm_eps: of that norm.
        in_weight: ``(2 H P + 2 G N + H, d)``. out_weight: ``(d, H P)``. in_bias, out_bias: theirs, or None.
        A_log: ``(H,)``, logarithms of the negative decay rates.
        gated_norm_weight: ``(H P,)``. gated_norm_eps: of that norm.
        conv_weight, conv_bias, dt_bias, D, n_groups, activation, group_size, norm_before_gate, dt_limit, backend: see
            :func:`mamba2_step`.
        ready: ``(1,)``, int32, zero: what programs on a GPU count in, and leave at zero. Calls that may run at the same
            time need one each. None makes one, which is a launch more.

    Returns:
        ``(B, 1, d)`` in the dtype of ``stream``.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    shape, size = checks.check_layer_step(
        *(stream, conv_state, ssm_state, norm_weight, in_weight, in_bias, conv_weight, conv_bias, dt_bias, A_log, D),
        *(gated_norm_weight, out_weight, out_bias, n_groups, activation, gated_norm_eps, group_size, dt_limit, ready),
    )
    choice = dispatch.choose(
        "mamba2_layer_step",
        stream.device,
        backend,
        shape=shape,
        dtype=in_weight.dtype,
        taps=conv_weight.shape[1],
        group_size=size,
        differentiable=needs_grad(stream, in_weight, conv_weight, A_log, out_weight),
    )
    return dispatch.backend_module(choice.name).mamba2_layer_step(
        *(stream, conv_state, ssm_state),
        norm_weight=norm_weight,
        in_weight=in_weight,
        in_bias=in_bias,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        dt_bias=dt_bias,
        A_log=A_log,
        D=D,
        gated_norm_weight=gated_norm_weight,
        out_weight=out_weight,
        out_bias=out_bias,
        shape=shape,
        activation=activation,
        norm_eps=norm_eps,
        gated_norm_eps=gated_norm_eps,
        group_size=size,
        norm_before_gate=norm_before_gate,
        dt_limit=dt_limit,
        ready=ready,
    )
