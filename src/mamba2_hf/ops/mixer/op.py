"""A mixer between its projections, and a whole layer: arguments, contracts, and the choice of a backend.

Each comes twice: as a function of tensors, which says what it computes, and as a function of records, which modules
call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..checks import (
    check_devices,
    check_dt_limit,
    check_floating,
    check_heads,
    check_rank,
    check_same_dtype,
    check_shape,
    check_sizes,
    fail,
    limits,
)
from ..conv.op import Conv, ConvUpdate, check_conv, check_conv_update
from ..neighbors import Neighbors
from ..norm.op import check_norm
from ..partners import Joined, Partners
from ..runtime.modes import needs_grad, product_dtype
from ..spec import (
    INF,
    NO_RING,
    UNPACKED,
    Block,
    LayerWeights,
    Linear,
    LowRank,
    MixerSpec,
    MixerWeights,
    Packing,
    Peers,
    Ring,
    RingState,
    SSDShape,
    State,
    compute_dtype,
)


class Inner(NamedTuple):
    """Arguments of :func:`inner`: a mixer between its projections."""

    zxbcdt: Tensor
    weights: MixerWeights
    spec: MixerSpec
    packing: Packing = UNPACKED
    conv_initial_states: Tensor | None = None
    ssm_initial_states: Tensor | None = None
    states: bool = False
    """Whether the final states are wanted."""

    @property
    def shape(self) -> SSDShape:
        """Sizes, of arguments that keep the contract."""
        batch, tokens, width = self.zxbcdt.shape
        heads, (head_dim, groups) = self.weights.heads, self.spec[:2]
        _, state = split_widths(width, heads, head_dim, groups)
        return SSDShape(batch, tokens, heads, head_dim, groups, state, self.packing.states(batch))


class Step(NamedTuple):
    """Arguments of :func:`step`: the same for one token or a short block."""

    zxbcdt: Tensor
    conv_state: State
    ssm_state: State
    weights: MixerWeights
    spec: MixerSpec

    @property
    def shape(self) -> SSDShape:
        """Sizes, of arguments that keep the contract."""
        batch, heads, head_dim, state = self.ssm_state.shape
        return SSDShape(batch, self.zxbcdt.shape[1], heads, head_dim, self.spec.n_groups, state, batch)


class BlockStep(NamedTuple):
    """Arguments of :func:`block_step`: the same for a block whose tokens may be taken back."""

    zxbcdt: Tensor
    conv_state: State
    ssm_state: State
    block: Block
    weights: MixerWeights
    spec: MixerSpec

    @property
    def step(self) -> Step:
        """The same as if all tokens stayed."""
        return Step(self.zxbcdt, self.conv_state, self.ssm_state, self.weights, self.spec)


class Layer(NamedTuple):
    """Arguments of :func:`layer`: a whole layer for any number of tokens."""

    stream: Tensor
    weights: LayerWeights
    spec: MixerSpec
    packing: Packing
    dtype: torch.dtype
    """Of the projections' products."""
    trains: bool
    """Whether gradients of the projections' weights are wanted."""
    residual: Tensor | None = None
    """``(B, T, d)``, what the layer's result is added to; None for the stream."""
    conv_initial_states: Tensor | None = None
    ssm_initial_states: Tensor | None = None
    states: bool = False
    """Whether the final states are wanted."""

    def mixer(self, zxbcdt: Tensor, A: Tensor) -> Inner:
        """What is between the projections, given the output of in_proj and the decay rates."""
        weights = self.weights.mixer._replace(A=A, A_log=None)
        initial = (self.conv_initial_states, self.ssm_initial_states)
        return Inner(zxbcdt, weights, self.spec, self.packing, *initial, states=self.states)

    @property
    def added_to(self) -> Tensor:
        """What the layer's result is added to."""
        return self.stream if self.residual is None else self.residual

    @property
    def is_joint(self) -> bool:
        """As :attr:`LayerStep.is_joint`."""
        return is_joint(self.weights.mixer, self.spec)

    def trained(self) -> Layer:
        """The same without the weights that get no gradient."""
        if self.trains:
            return self
        frozen: list[Any] = [(None, *linear[1:]) for linear in (self.weights.in_proj, self.weights.out_proj)]
        into, out = (Linear(*linear) for linear in frozen)
        return self._replace(weights=self.weights._replace(in_proj=into, out_proj=out))


class LayerStep(NamedTuple):
    """Arguments of :func:`layer_step`: a whole layer for one token of each sequence."""

    stream: Tensor
    conv_state: State
    ssm_state: State
    weights: LayerWeights
    spec: MixerSpec
    ready: State | None = None
    residual: Tensor | None = None
    """``(B, 1, d)``, what the layer's result is added to; None for the stream."""
    peers: Peers = Peers()
    """Devices that have the layer's other heads."""
    ring: Ring = NO_RING
    """Of ``ssm_state``, from :func:`new_ring`, if it is not written at every step."""
    part: bool = False
    """Whether to find what is summed over devices, and no more: fp32 at least, without residual and bias of out_proj,
    and where :attr:`is_joint` without the norm's scale, with the sum of squares behind it, ``(B, 1, d + 1)``.
    """

    @property
    def added_to(self) -> Tensor:
        """What the layer's result is added to."""
        return self.stream if self.residual is None else self.residual

    @property
    def width(self) -> int:
        """H P, of the heads that are here."""
        return self.weights.mixer.heads * self.spec.head_dim

    @property
    def is_joint(self) -> bool:
        """Whether the gated norm's one group goes on in other devices, which have the layer's other heads."""
        return is_joint(self.weights.mixer, self.spec)


def is_joint(weights: MixerWeights, spec: MixerSpec) -> bool:
    """Whether a gated norm's one group goes on in other devices, which have a layer's other heads."""
    return weights.gated_norm_weight is not None and spec.group_size > weights.heads * spec.head_dim


def of_own_heads(weights: MixerWeights, spec: MixerSpec) -> MixerSpec:
    """``spec`` for a contract of one device, where a group of the gated norm is no larger than what is there."""
    return spec._replace(group_size=min(spec.group_size, weights.heads * spec.head_dim))


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
        norm_weight: ``(H P,)`` of the gated norm, which records and functions of whole layers call
            ``gated_norm_weight``; None gates without a norm.
        head_dim: P. n_groups: G.
        activation: of the convolution.
        eps, group_size, norm_before_gate: of the norm; see :func:`gated_rms_norm`.
        dt_limit, chunk_size, seq_idx, cu_seqlens: see :func:`ssd_chunk_scan`.
        conv_initial_states: ``(B or S, H P + 2 G N, K - 1)``.
        ssm_initial_states: ``(B or S, H, P, N)``.
        return_final_states: whether to return both states as well.
        backend: as in :func:`ssd_chunk_scan`.

    Returns:
        ``y (B, T, H P)``; with ``return_final_states`` also the convolution's and the scan's states.

    Raises:
        ArgumentError, BackendError: as in :func:`ssd_chunk_scan`.
    """
    size = A.shape[0] * head_dim if group_size is None else group_size
    y, conv_state, ssm_state = inner(
        Inner(
            zxbcdt,
            MixerWeights(conv_weight, conv_bias, dt_bias, A, None, D, norm_weight),
            MixerSpec(
                *(head_dim, n_groups, activation),
                gated_norm_eps=eps,
                group_size=size,
                norm_before_gate=norm_before_gate,
                dt_limit=limits(dt_limit),
                chunk_size=chunk_size,
            ),
            Packing(seq_idx, cu_seqlens),
            *(conv_initial_states, ssm_initial_states, return_final_states),
        ),
        backend,
    )
    return (y, conv_state, ssm_state) if return_final_states else y


def inner(call: Inner, backend: str | None = None, neighbors: Neighbors | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mamba2_inner` of a record; states that are not asked for may be empty.

    With ``neighbors`` every row is a slice of one that other devices hold the rest of: what enters it comes from there,
    and the states mean nothing.
    """
    shape = check_inner(call)
    backend = dispatch.choose(
        *("mamba2_inner", call.zxbcdt.device, backend),
        shape=shape,
        dtype=call.zxbcdt.dtype,
        taps=call.weights.conv_weight.shape[1],
        group_size=call.spec.group_size,
        activation=call.spec.activation,
    ).name
    if call.weights.A is None:
        call = call._replace(weights=call.weights._replace(A=call.weights.rates, A_log=None))
    run = dispatch.backend_module(backend).mamba2_inner
    y, conv_state, ssm_state = run(call) if neighbors is None else run(call, neighbors)
    return y, conv_state, ssm_state


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
    width, heads = out_weight.shape[1], A_log.shape[0]
    y, _, _ = layer(
        stream,
        LayerWeights(
            norm_weight,
            Linear(in_weight, in_bias).adapted(in_lora),
            MixerWeights(conv_weight, conv_bias, dt_bias, None, A_log, D, gated_norm_weight),
            Linear(out_weight, out_bias).adapted(out_lora),
        ),
        MixerSpec(
            *(
                width // heads,
                n_groups,
                activation,
                norm_eps,
                gated_norm_eps,
                width if group_size is None else group_size,
            ),
            *(norm_before_gate, limits(dt_limit), chunk_size),
        ),
        Packing(seq_idx, cu_seqlens),
        backend=backend,
    )
    return y


def layer(
    stream: Tensor,
    weights: LayerWeights,
    spec: MixerSpec,
    packing: Packing = UNPACKED,
    states: tuple[Tensor | None, Tensor | None] | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
    neighbors: Neighbors | None = None,
    partners: Partners | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mamba2_layer` of records, for prompts too: with the states to start from, and what the result is added to.

    With ``partners`` of a layer of which every device has some of the heads, as in :func:`layer_step`. What
    out_proj makes of a device's heads is summed over all in the dtype of its product, and so is the gradient of what
    in_proj reads. Where the gated norm has one group over all heads, its sum of squares, and in the backward that of
    its products with their gradient, are one number a token beside, fp32.

    Args:
        stream, weights, spec, packing, backend: see :func:`mamba2_layer`.
        states: those of the convolution and of the scan to start from, or a pair of None to start from zeros; None
            where no final states are wanted either.
        residual: ``(B, T, d)`` in the dtype of ``stream``, to be added to in its place: another branch of the layer is
            in it (attention beside the mixer), or is in ``stream`` alone (a block that layers share).
        neighbors: see :func:`inner`.
        partners: the devices that share the layer; None if one has all of it.

    Returns:
        ``(B, T, d)`` in the dtype of ``stream``, the same in all devices, and the final states, which may be empty if
        they are not asked for.
    """
    weights = weights if partners is None else partners.own(weights)
    into, out = weights.in_proj.weight, weights.out_proj.weight
    trains = into.requires_grad or out.requires_grad
    initial = (None, None) if states is None else states
    call = Layer(
        stream, weights, spec, packing, product_dtype(into), trains, residual, *initial, states=states is not None
    )
    own = of_own_heads(weights.mixer, spec)
    shape = check_layer(call if partners is None else call._replace(spec=own))
    if partners is not None and call.is_joint:
        _check_joint(spec)
    backend = dispatch.choose(
        *("mamba2_layer", stream.device, backend),
        shape=shape,
        dtype=call.dtype,
        stream=stream.dtype,
        width=stream.shape[2],
        taps=weights.mixer.conv_weight.shape[1],
        group_size=own.group_size,
        activation=spec.activation,
    ).name
    y, conv_state, ssm_state = dispatch.backend_module(backend).mamba2_layer(call, neighbors, partners)
    return y, conv_state, ssm_state


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
    heads, head_dim = _heads(ssm_state)
    A, A_log = (None, A) if log_rates else (A, None)  # type: ignore[assignment]
    return step(
        Step(
            *(zxbcdt, conv_state, ssm_state),
            MixerWeights(conv_weight, conv_bias, dt_bias, A, A_log, D, norm_weight),
            MixerSpec(
                *(head_dim, n_groups, activation),
                gated_norm_eps=eps,
                group_size=heads * head_dim if group_size is None else group_size,
                norm_before_gate=norm_before_gate,
                dt_limit=limits(dt_limit),
            ),
        ),
        backend,
    )


def step(call: Step, backend: str | None = None) -> Tensor:
    """:func:`mamba2_step` of a record."""
    y: Tensor = _step_backend(call, check_step(call), backend).mamba2_step(call)
    return y


def _step_backend(call: Step, shape: SSDShape, backend: str | None) -> Any:
    """The module of the backend that serves a step, or a block of tokens."""
    name = dispatch.choose(
        *("mamba2_step", call.zxbcdt.device, backend),
        shape=shape,
        dtype=call.zxbcdt.dtype,
        taps=call.weights.conv_weight.shape[1],
        group_size=call.spec.group_size,
        activation=call.spec.activation,
        differentiable=needs_grad(call.zxbcdt, *call.weights),
    ).name
    return dispatch.backend_module(name)


def block_step(call: BlockStep, backend: str | None = None) -> Tensor:
    """:func:`mamba2_step` for a block of which each row may take tokens back: ``y (B, T, H P)``.

    Both states are as of the first ``block.kept (B,)`` tokens of the last block afterwards, and ``block`` holds this
    one: set ``kept``, which is T then, to how many of its tokens a row keeps. A state is read once and written once.
    """
    shape = check_step(call.step)
    size = call.block.inputs.shape[1]
    if shape.tokens > size:
        fail(f"zxbcdt has {shape.tokens} tokens, and the block has room for {size}")
    check_shape("block.kept", call.block.kept, (shape.batch,), "(B,)")
    y: Tensor = _step_backend(call.step, shape, backend).mamba2_block_step(call)
    return y


def new_block(conv_state: Tensor, ssm_state: Tensor, groups: int, tokens: int) -> Block:
    """A block for up to ``tokens``, of which there are none yet.

    Args:
        conv_state: ``(B, H P + 2 G N, L)``. ssm_state: ``(B, H, P, N)``. Those of :func:`block_step`.
        groups: G.
        tokens: R.
    """
    (rows, heads, P, N), channels = ssm_state.shape, conv_state.shape[1]
    wide = compute_dtype(conv_state.dtype)
    return Block(
        conv_state.new_zeros(rows, tokens, channels),
        conv_state.new_zeros(rows, tokens, heads * P + groups * N),
        conv_state.new_zeros(rows, tokens, 2, heads, dtype=wide),
        conv_state.new_zeros(rows, dtype=torch.int32),
    )


def fold(conv_state: Tensor, ssm_state: Tensor, block: Block) -> None:
    """Brings both states up to the tokens of ``block`` that are kept, and leaves none of them in it; in place."""
    dispatch.backend_module("torch").fold(conv_state, ssm_state, block)


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
    heads, head_dim = _heads(ssm_state)
    call = LayerStep(
        *(stream, conv_state, ssm_state),
        LayerWeights(
            norm_weight,
            Linear(in_weight, in_bias),
            MixerWeights(conv_weight, conv_bias, dt_bias, None, A_log, D, gated_norm_weight),
            Linear(out_weight, out_bias),
        ),
        MixerSpec(
            *(
                head_dim,
                n_groups,
                activation,
                norm_eps,
                gated_norm_eps,
                heads * head_dim if group_size is None else group_size,
            ),
            *(norm_before_gate, limits(dt_limit)),
        ),
        ready,
    )
    return layer_step(call, backend)


def layer_step(call: LayerStep, backend: str | None = None, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """:func:`mamba2_layer_step` of a record, with LoRA and under autocast too.

    With ``total`` of a layer of which every device has some of the heads, and the bias of out_proj. A device finds what
    out_proj makes of its own heads, in fp32 at least, ``(B, 1, d)``. Where the gated norm has one group over all heads,
    whose size is then ``spec.group_size``, its scale is one number a token that nobody knows yet: the products are sent
    without it, and behind them the device's sum of squares, ``(B, 1, d + 1)``. Its gate comes before it.

    Args:
        call: for the heads that are here. Where its ``peers`` can take all of that, and the backend has kernels that
            send, they do.
        backend: as in :func:`ssd_chunk_scan`.
        total: sums a tensor over all devices otherwise; it may do so in place. None if one has all heads.

    Returns:
        ``(B, 1, d)`` in the dtype of the stream, the same in all devices.
    """
    weights, spec, own = call.weights, call.spec, call.spec
    if total is not None:
        own = of_own_heads(weights.mixer, spec)
        if call.is_joint:
            _check_joint(spec)
    shape = check_layer_step(call._replace(spec=own))
    into, out, mixer = weights.in_proj.weight, weights.out_proj, weights.mixer
    name = dispatch.choose(
        *("mamba2_layer_step", call.stream.device, backend),
        shape=shape,
        dtype=product_dtype(into),
        taps=mixer.conv_weight.shape[1],
        group_size=own.group_size,
        activation=spec.activation,
        differentiable=needs_grad(call.stream, into, mixer.conv_weight, mixer.A_log, out.weight),
    ).name
    module, call = dispatch.backend_module(name), _kept_by(name, call)
    if total is None or module.sums_over_peers(call):
        y: Tensor = module.mamba2_layer_step(call)
        return y
    part = module.mamba2_layer_step(call._replace(part=True))
    joined = Joined(total(part), call.added_to, out.bias, spec.output_multiplier, spec.group_size, spec.gated_norm_eps)
    y = module.joined(joined)
    return y


def new_ring(conv_state: Tensor, ssm_state: Tensor) -> Ring:
    """A ring for the states of a mixer, with which :func:`layer_step` reads the SSM state and writes it once in 16
    steps; :data:`NO_RING` where it is not faster so. This is the one place that decides that.

    The state is then as of an earlier step: :func:`settle` it before anything else reads it, and set ``clock`` of the
    rows to zero when something else has written it.

    Args:
        conv_state: ``(B, H P + 2 G N, L)``. ssm_state: ``(B, H, P, N)``, dense. Those of :func:`layer_step`.
    """
    name = dispatch.choose("mamba2_layer_step", conv_state.device, dtype=conv_state.dtype).name
    ring: Ring = dispatch.backend_module(name).new_ring(conv_state, ssm_state)
    return ring


def settle(ssm_state: Tensor, ring: Ring) -> None:
    """Brings ``ssm_state (B, H, P, N)`` up to the last step, and empties its ring; both in place."""
    if ring.clock is not None:
        dispatch.backend_module("triton").settle(RingState(ssm_state, ring))  # there is no ring without Triton


def _kept_by(backend: str, call: LayerStep) -> LayerStep:
    """The step as a backend takes it: PyTorch knows no rings."""
    if call.ring.clock is None or backend == "triton":
        return call
    settle(call.ssm_state, call.ring)
    return call._replace(ring=NO_RING)


def check_inner(call: Inner) -> SSDShape:
    """Contract of ``mamba2_inner``; returns the sizes, raises :class:`ArgumentError`."""
    u, weights, spec, packing, conv_initial_states, ssm_initial_states, _ = call
    check_rank("zxbcdt", u, 3, "(B, T, 2 H P + 2 G N + H)")
    batch, tokens, width = u.shape
    heads, (head_dim, groups) = weights.heads, spec[:2]
    inner, state = split_widths(width, heads, head_dim, groups)
    check_dt_limit(spec.dt_limit)
    xbc = u[..., inner : width - heads]
    states = check_conv(
        Conv(xbc, weights.conv_weight, weights.conv_bias, conv_initial_states, packing, spec.activation)
    )
    check_heads(heads, head_dim, groups, weights.decay, weights.D, weights.dt_bias)
    if ssm_initial_states is not None:
        expected = (states, heads, head_dim, state)
        check_shape("ssm_initial_states", ssm_initial_states, expected, "(B or S, H, P, N)")
    _check_gated_norm(u[..., :inner], weights, spec)
    return SSDShape(batch, tokens, heads, head_dim, groups, state, states)


def check_step(call: Step) -> SSDShape:
    """Contract of ``mamba2_step``; returns the sizes, raises :class:`ArgumentError`."""
    u, conv_state, ssm_state, weights, spec = call
    check_rank("zxbcdt", u, 3, "(B, T, 2 H P + 2 G N + H)")
    check_floating(zxbcdt=u, ssm_state=ssm_state)
    batch, tokens, width = u.shape
    heads, head_dim = ssm_state.shape[1:3]
    check_sizes("zxbcdt", u, batch, tokens)
    inner, state = split_widths(width, heads, head_dim, spec.n_groups)
    check_shape("ssm_state", ssm_state, (batch, heads, head_dim, state), "(B, H, P, N)")
    xbc = u[..., inner : width - heads]
    check_conv_update(ConvUpdate(xbc, conv_state, weights.conv_weight, weights.conv_bias, spec.activation))
    check_heads(heads, head_dim, spec.n_groups, weights.decay, weights.D, weights.dt_bias)
    check_dt_limit(spec.dt_limit)
    check_devices(u.device, ssm_state=ssm_state, A=weights.decay, D=weights.D, dt_bias=weights.dt_bias)
    _check_gated_norm(u[..., :inner], weights, spec)
    return SSDShape(batch, tokens, heads, head_dim, spec.n_groups, state, batch)


def check_layer(call: Layer) -> SSDShape:
    """Contract of ``layer``; returns the sizes, raises :class:`ArgumentError`."""
    stream, weights, spec = call[:3]
    check_rank("stream", stream, 3, "(B, T, d)")
    zxbcdt = _check_projections(stream, weights, spec, call.residual)
    check_norm(stream, None, weights.norm_weight, spec.norm_eps, None)
    return check_inner(call.mixer(zxbcdt, weights.mixer.decay))


def check_layer_step(call: LayerStep) -> SSDShape:
    """Contract of ``mamba2_layer_step``; returns the sizes, raises :class:`ArgumentError`."""
    stream, conv_state, ssm_state, weights, spec, ready, residual, _, ring, _ = call
    check_rank("stream", stream, 3, "(B, 1, d)")
    if stream.shape[1] != 1:
        fail(f"stream has {stream.shape[1]} tokens, expected one of each sequence")
    zxbcdt = _check_projections(stream, weights, spec, residual)
    check_shape("norm_weight", weights.norm_weight, stream.shape[2:], "(d,)")
    if ready is not None:
        check_shape("ready", ready, (1,), "(1,)")
        if ready.dtype != torch.int32:
            fail(f"ready has dtype {ready.dtype}, expected torch.int32")
    check_devices(stream.device, norm_weight=weights.norm_weight, ready=ready, ring=ring.clock)
    if ring.clock is not None:
        check_shape("ring", ring.clock, ssm_state.shape[:1], "(B,), one of these states")
    return check_step(Step(zxbcdt, conv_state, ssm_state, weights.mixer, spec))


def _check_projections(stream: Tensor, weights: LayerWeights, spec: MixerSpec, residual: Tensor | None) -> Tensor:
    """Checks both projections of ``stream (B, T, d)`` and what is around them; returns something of the shape and dtype
    that in_proj's output ``(B, T, 2 H P + 2 G N + H)`` will have.
    """
    (into, in_bias, *_), (out, out_bias, *_) = weights.in_proj, weights.out_proj
    check_rank("in_weight", into, 2, "(2 H P + 2 G N + H, d)")
    batch, tokens, size = stream.shape
    entering = into.shape[0]
    check_shape("in_weight", into, (entering, size), "(2 H P + 2 G N + H, d)")
    if in_bias is not None:
        check_shape("in_bias", in_bias, (entering,), "(2 H P + 2 G N + H,)")
    check_rank("out_weight", out, 2, "(d, H P)")
    check_shape("out_weight", out, (size, weights.mixer.heads * spec.head_dim), "(d, H P)")
    if out_bias is not None:
        check_shape("out_bias", out_bias, (size,), "(d,)")
    check_same_dtype(in_weight=into, out_weight=out)
    for name, (weight, _, down, up, _) in (("in_lora", weights.in_proj), ("out_lora", weights.out_proj)):
        if down is not None and up is not None:
            check_rank(f"{name}.down", down, 2, "(r, d)")
            rank = down.shape[0]
            check_shape(f"{name}.down", down, (rank, weight.shape[1]), "(r, d), with the d of the weight (d', d)")
            check_shape(f"{name}.up", up, (weight.shape[0], rank), "(d', r), with the d' of the weight (d', d)")
            check_devices(stream.device, **{f"{name}.down": down, f"{name}.up": up})
    if residual is not None:
        check_shape("residual", residual, tuple(stream.shape), "as stream")
        check_same_dtype(stream=stream, residual=residual)
    if len(spec.multipliers) not in (0, 5):
        fail(f"multipliers are {spec.multipliers}, expected one for each of z, x, B, C and dt, or none")
    check_devices(stream.device, in_weight=into, out_weight=out, residual=residual)
    return into[:, 0].expand(batch, tokens, entering)


def _check_joint(spec: MixerSpec) -> None:
    if spec.norm_before_gate:
        fail("norm_before_gate=True with a group over several devices: the product cannot go ahead of the norm's scale")


def _check_gated_norm(x: Tensor, weights: MixerWeights, spec: MixerSpec) -> None:
    if weights.gated_norm_weight is not None:
        check_norm(x, None, weights.gated_norm_weight, spec.gated_norm_eps, spec.group_size)


def _heads(ssm_state: Tensor) -> tuple[int, int]:
    """H and P of a state ``(B, H, P, N)``."""
    check_rank("ssm_state", ssm_state, 4, "(B, H, P, N)")
    return ssm_state.shape[1], ssm_state.shape[2]


def split_widths(width: int, heads: int, head_dim: int, n_groups: int) -> tuple[int, int]:
    """Inner width and state size behind an in_proj output of ``width`` = 2 H P + 2 G N + H channels."""
    inner = heads * head_dim
    rest = width - 2 * inner - heads
    if n_groups < 1 or rest <= 0 or rest % (2 * n_groups):
        fail(
            f"zxbcdt has {width} channels, which is not 2 H P + 2 G N + H for H = {heads} heads, "
            f"P = head_dim = {head_dim} and G = n_groups = {n_groups} with any whole N"
        )
    return inner, rest // (2 * n_groups)
