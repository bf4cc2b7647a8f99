"""The Mamba-2 mixer ("Transformers are SSMs", Section 7)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import CacheError
from ..ops.checks import limits
from ..ops.mixer.torch import scaled, times_parts
from ..ops.packing import document_ids
from ..ops.runtime.modes import product_dtype
from ..ops.scan.op import Scan, scan
from ..ops.scan.reference import step_size
from ..ops.spec import decay_rates
from .causal_conv1d import CausalConv1d
from .conv import causal_convolution
from .fp32 import KeepsFp32
from .norm import GatedRMSNorm, JointGatedRMSNorm, RMSNorm, SiluGate
from .projection import linear
from .sequence import PLAIN, SequenceLayout
from .state import NOT_RECORDED, SSDState
from .weights import is_unhooked, plain_linear, plain_weight

FP32_PARAMETERS = ("A_log", "D", "dt_bias")
NORMS = ("gate_first", "norm_first", "none")


class ScanInputs(NamedTuple):
    """What a mixer's scan and gate are given."""

    x: Tensor
    """``(B, T, H, P)``"""
    dt: Tensor
    """``(B, T, H)`` step sizes after bias, softplus and clamp, fp32 (fp64)."""
    A: Tensor
    """``(H,)`` decay rates, negative."""
    B: Tensor
    """``(B, T, G, N)``"""
    C: Tensor
    """``(B, T, G, N)``"""
    z: Tensor
    """``(B, T, H, P)``, the gate before its SiLU."""


class Mamba2Mixer(KeepsFp32):
    """in_proj, causal convolution, SSD scan, gated norm, out_proj.

    ``A_log``, ``D`` and ``dt_bias`` stay in fp32 (see :class:`KeepsFp32`): half a percent of error in a decay rate
    compounds over thousands of tokens.

    Args:
        hidden_size: width of input and output.
        num_heads, head_dim: H and P; the inner width is their product.
        n_groups, state_size: G and N.
        conv_kernel: taps of the convolution.
        use_bias: whether in_proj has a bias. out_bias: whether out_proj has one; None as in_proj.
        use_conv_bias: whether the convolution has one.
        activation: of the convolution, ``"silu"`` or ``"swish"``.
        norm: whether the gate comes before the norm, after it, or without one: one of ``NORMS``.
        norm_eps: of that norm. norm_group_size: channels that are normed together; None for those of one group of the
            scan.
        dt_limit: clamp of the step size.
        chunk_size: tiling hint for the scan, None for the backend's own.
        multipliers: of z, x, B, C and dt, as they leave in_proj; None for ones.
    """

    fp32_parameters = FP32_PARAMETERS
    partners: ops.Partners | None = None
    """The devices that have the layer's other heads; None if they are all here."""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        n_groups: int,
        state_size: int,
        conv_kernel: int = 4,
        use_bias: bool = False,
        out_bias: bool | None = None,
        use_conv_bias: bool = True,
        activation: str = "silu",
        norm: str = "gate_first",
        norm_eps: float = 1e-5,
        norm_group_size: int | None = None,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        chunk_size: int | None = None,
        multipliers: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.n_groups, self.state_size = num_heads, head_dim, n_groups, state_size
        self.conv_kernel = conv_kernel
        self.inner_size = num_heads * head_dim
        self.conv_size = self.inner_size + 2 * n_groups * state_size
        self.activation, self.dt_limit, self.chunk_size = activation, limits(dt_limit), chunk_size
        ones = multipliers is None or all(factor == 1 for factor in multipliers)
        self.multipliers: tuple[float, ...] = () if ones or multipliers is None else multipliers

        self.in_proj = nn.Linear(hidden_size, self.inner_size + self.conv_size + num_heads, bias=use_bias)
        self.conv1d = CausalConv1d.depthwise(self.conv_size, conv_kernel, use_conv_bias)
        at_least_fp32 = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.A_log = nn.Parameter(torch.zeros(num_heads, dtype=at_least_fp32))
        self.D = nn.Parameter(torch.ones(num_heads, dtype=at_least_fp32))
        self.dt_bias = nn.Parameter(torch.zeros(num_heads, dtype=at_least_fp32))
        self.norm: GatedRMSNorm | SiluGate
        if norm == "none":
            self.norm = SiluGate(self.inner_size)
        else:
            size = self.inner_size // n_groups if norm_group_size is None else norm_group_size
            self.norm = GatedRMSNorm(self.inner_size, size, norm_eps, norm == "norm_first")
        self.out_proj = nn.Linear(self.inner_size, hidden_size, bias=use_bias if out_bias is None else out_bias)

    def forward(
        self,
        hidden_states: Tensor,
        layout: SequenceLayout = PLAIN,
        state: SSDState | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``(B, T, d)`` to ``(B, T, d)``; continues from ``state`` and leaves the next one there.

        With ``output_attentions`` also the SSD attention matrix of each head, ``(B, H, T, T)``, which knows nothing of
        ``state``; see :func:`mamba2_hf.ops.ssd_attention_matrix`.
        """
        zxbcdt = self._enter(hidden_states)
        out = linear(self.out_proj, self._inner(zxbcdt, layout, state))
        return (out, self._attention_matrix(zxbcdt, layout)) if output_attentions else out

    def scan_inputs(self, hidden_states: Tensor) -> ScanInputs:
        """What the scan is given for ``hidden_states (B, T, d)``, rows of one document each from its start."""
        z, xbc, dt = self._split(self._enter(hidden_states))
        x, B, C = self._split_xbc(self._convolve(xbc, None, PLAIN)[0])
        dt = step_size(dt, self.dt_bias, True, self.dt_limit, self.A.dtype)
        return ScanInputs(x, dt, self.A, B, C, z.unflatten(-1, (self.num_heads, self.head_dim)))

    def _enter(self, hidden_states: Tensor) -> Tensor:
        """``(B, T, d)`` to z, x, B, C and dt side by side, ``(B, T, 2 H P + 2 G N + H)``."""
        return times_parts(linear(self.in_proj, hidden_states), self.multipliers, self.inner_size, self.num_heads)

    def layer(
        self,
        stream: Tensor,
        norm: RMSNorm,
        layout: SequenceLayout = PLAIN,
        state: SSDState | None = None,
        *,
        residual: Tensor | None = None,
        input_multiplier: float = 1.0,
        output_multiplier: float = 1.0,
    ) -> Tensor:
        """``residual + output_multiplier * self(input_multiplier * norm(stream), layout, state)``, ``(B, T, d)``.

        One op where weights may be read; else modules are called.

        Args:
            stream: ``(B, T, d)``, the residual stream.
            norm: before the mixer.
            layout, state: see :meth:`forward`.
            residual: ``(B, T, d)``; None for ``stream``.
            input_multiplier, output_multiplier: of what the mixer is given, and gives.
        """
        recorded = state is not None and state.record_past
        weights = None if recorded else self._layer_weights(norm)
        spec = self._spec(norm.eps)._replace(input_multiplier=input_multiplier, output_multiplier=output_multiplier)
        if isinstance(self.norm, JointGatedRMSNorm):
            spec = spec._replace(group_size=self.norm.joint_size)
        one_token = stream.shape[1] == 1 and layout.is_plain and not torch.is_grad_enabled()
        if weights is not None and one_token and state is not None and state.started:
            return self._layer_step(stream, weights, spec, state, residual)
        if weights is None or not self._is_summed_as_one(weights):
            mixed: Any = self(scaled(norm(stream), input_multiplier), layout, state)
            return (stream if residual is None else residual) + scaled(mixed, output_multiplier)
        initial = None if state is None else self._initial(stream, layout, state)
        packed = None if residual is None else layout.pack(residual)
        packing = ops.Packing(layout.seq_idx, layout.cu_seqlens)
        call = (layout.pack(stream), weights, spec, packing, initial, packed)
        out, *final = ops.layer(*call, neighbors=layout.neighbors, partners=self.partners)
        if state is not None:
            state.update(*map(layout.gather_states, final))
        return layout.unpack(out)

    def _layer_step(
        self,
        stream: Tensor,
        weights: ops.LayerWeights,
        spec: ops.MixerSpec,
        state: SSDState,
        residual: Tensor | None,
    ) -> Tensor:
        """:meth:`layer` for one token of each sequence."""
        conv, ssm, ring, ready = state.for_step(stream.shape[0])
        call = ops.LayerStep(stream, conv, ssm, weights, spec, ready, residual, ring=ring)
        if self.partners is None:
            return ops.layer_step(call)
        return ops.layer_step(call._replace(peers=self.partners.peers(stream)), total=self.partners.total)

    def _is_summed_as_one(self, weights: ops.LayerWeights) -> bool:
        """Whether :func:`ops.layer` takes the layer if devices share it: not into a compiled graph, nor where products
        that wait for the scale of their norm might leave the range of fp16.
        """
        if self.partners is None:
            return True
        waits = isinstance(self.norm, JointGatedRMSNorm)
        weight, *_ = weights.in_proj
        narrow = waits and product_dtype(weight) == torch.float16
        return not narrow and not torch.compiler.is_compiling()

    def _layer_weights(self, norm: RMSNorm) -> ops.LayerWeights | None:
        """The weights of the layer around the mixer, ``norm`` among them; None where a module has to be called, or
        where weights of several dtypes are left to PyTorch to refuse.
        """
        if not is_unhooked(self):
            return None
        part = self.partners is not None
        before, mixer = plain_weight(norm), self._weights(part)
        entering, leaving = (plain_linear(projection, part) for projection in (self.in_proj, self.out_proj))
        if before is None or mixer is None or entering is None or leaving is None:
            return None
        if isinstance(self.norm, JointGatedRMSNorm):
            scale = plain_weight(self.norm, part)
            if scale is None:
                return None
            mixer = mixer._replace(gated_norm_weight=scale)
        if not torch.is_autocast_enabled(before.device.type):
            given = [(weight, down, up) for weight, _, down, up, _ in (entering, leaving)]
            if len({tensor.dtype for tensor in (before, *given[0], *given[1]) if tensor is not None}) > 1:
                return None
        return ops.LayerWeights(before, entering, mixer, leaving)

    def _weights(self, part: bool = False) -> ops.MixerWeights | None:
        """The weights between the projections; None where a module has to be called. Without a norm's weight what is
        gated is the input of the norm, if there is one. For ``part`` see :func:`plain_weight`.
        """
        conv, norm = plain_weight(self.conv1d, part), plain_weight(self.norm)
        normed_later = isinstance(self.norm, JointGatedRMSNorm) and not self.norm.norm_before_gate
        gates_only = (type(self.norm) is SiluGate or normed_later) and is_unhooked(self.norm)
        if conv is not None and (norm is not None or gates_only):
            bias = self.conv1d._parameters["bias"] if part else self.conv1d.bias
            return ops.MixerWeights(conv.squeeze(1), bias, self.dt_bias, None, self.A_log, self.D, norm)
        return None

    def _spec(self, norm_eps: float = 1e-5) -> ops.MixerSpec:
        """What the mixer is, beside its weights; ``norm_eps`` is of the norm before it."""
        norm = self.norm
        return ops.MixerSpec(
            *(self.head_dim, self.n_groups, self.activation, norm_eps, norm.eps, norm.group_size),
            *(norm.norm_before_gate, self.dt_limit, self.chunk_size, self.multipliers),
        )

    def _inner(self, zxbcdt: Tensor, layout: SequenceLayout, state: SSDState | None) -> Tensor:
        """What is between the projections: ``(B, T, 2 H P + 2 G N + H)`` to ``(B, T, H P)``."""
        records = state is not None and state.record_past
        if records and not layout.is_plain:
            raise CacheError(NOT_RECORDED)
        if records and state is not None and not torch.is_grad_enabled():
            weights = self._weights()
            held = None if weights is None else state.for_block(zxbcdt.shape[0], zxbcdt.shape[1], self.n_groups)
            if weights is not None and held is not None:
                return self._normed(ops.block_step(ops.BlockStep(zxbcdt, *held, weights, self._spec())))
        one_token = zxbcdt.shape[1] == 1 and layout.is_plain and not torch.is_grad_enabled()
        if state is not None and state.started and one_token:
            return self._step(zxbcdt, state)
        conv_initial, ssm_initial = self._initial(zxbcdt, layout, state)
        # What is recorded is what the convolution gives, which ops that do everything at once keep to themselves.
        weights = None if records else self._weights()
        if weights is not None:
            u, packing = layout.pack(zxbcdt), ops.Packing(layout.seq_idx, layout.cu_seqlens)
            call = ops.Inner(u, weights, self._spec(), packing, conv_initial, ssm_initial, state is not None)
            y, *final = ops.inner(call, neighbors=layout.neighbors)
            y = self._normed(layout.unpack(y))
        else:
            z, inputs, dt = self._split(zxbcdt)
            if layout.neighbors is not None and self.conv_kernel > 1:
                conv_initial = layout.neighbors.columns_before(inputs[:, inputs.shape[1] - self.conv_kernel + 1 :].mT)
            xbc, conv_final = self._convolve(inputs, conv_initial, layout)
            x, B, C = self._split_xbc(xbc)
            A = self.A
            if state is not None and state.record_past:
                self._record(state, inputs, x, dt, B, A)
            x, dt, B, C = map(layout.pack, (x, dt, B, C))
            packing = ops.Packing(layout.seq_idx, layout.cu_seqlens)
            scanned = Scan(
                *(x, dt, A, B, C, self.D, None, self.dt_bias, ssm_initial, packing, True),
                *(self.dt_limit, self.chunk_size),
            )
            y, ssm_final = scan(scanned, neighbors=layout.neighbors)
            y, final = self.norm(layout.unpack(y.flatten(-2)), z), [conv_final, ssm_final]
        if state is not None:
            state.update(*map(layout.gather_states, final))
        return y

    def _normed(self, y: Tensor) -> Tensor:
        """The norm of what was gated ``(B, T, H P)``, where the op of :meth:`_weights` has none of it."""
        return self.norm.normed(y) if isinstance(self.norm, JointGatedRMSNorm) else y

    def _record(self, state: SSDState, inputs: Tensor, x: Tensor, dt: Tensor, B: Tensor, A: Tensor) -> None:
        """Lets ``state`` note tokens; see :meth:`SSDState.record`."""
        state.record(inputs, x, dt.to(A.dtype) + self.dt_bias, B, A, self.dt_limit)

    def _attention_matrix(self, zxbcdt: Tensor, layout: SequenceLayout) -> Tensor:
        """The SSD attention matrix of each head, ``(B, H, T, T)``."""
        _, xbc, dt = self._split(zxbcdt)
        _, B, C = self._split_xbc(self._convolve(xbc, None, layout)[0])
        seq_idx = layout.seq_idx
        if layout.cu_seqlens is not None:
            documents = document_ids(layout.cu_seqlens.to(dt.device), layout.pack(dt).shape[1])
            seq_idx = layout.align(layout.unpack(documents[None]))
        matrix = ops.ssd_attention_matrix(
            *(layout.align(dt), self.A, layout.align(B), layout.align(C)),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            seq_idx=seq_idx,
        )
        return layout.unalign_matrix(matrix)

    @property
    def A(self) -> Tensor:
        """Decay rates ``(H,)``, negative, fp32."""
        return decay_rates(self.A_log)

    def _step(self, zxbcdt: Tensor, state: SSDState) -> Tensor:
        """One token of each sequence, ``(B, 1, 2 H P + 2 G N + H)`` to ``(B, 1, H P)``."""
        conv_state, ssm_state = state.initial(zxbcdt.shape[0])
        assert conv_state is not None  # the state has started
        assert ssm_state is not None
        weights = None if state.record_past else self._weights()
        if weights is not None:
            return self._normed(ops.step(ops.Step(zxbcdt, conv_state, ssm_state, weights, self._spec())))
        z, inputs, dt = self._split(zxbcdt)
        xbc, final = self._convolve(inputs, conv_state, PLAIN)
        x, B, C = self._split_xbc(xbc)
        A = self.A
        if state.record_past:
            self._record(state, inputs, x, dt, B, A)
        conv_state.copy_(final)
        y = ops.ssd_state_update(
            *(ssm_state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0]),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
        )
        return self.norm(y.flatten(-2)[:, None], z)

    def _initial(
        self, zxbcdt: Tensor, layout: SequenceLayout, state: SSDState | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Initial states of every document."""
        if state is None:
            return None, None
        rows = zxbcdt.shape[0]
        if layout.first is not None:
            rows = layout.first.shape[0]
        elif layout.cu_seqlens is not None:
            rows = layout.cu_seqlens.shape[0] - 1
        conv, ssm = state.initial(rows)
        return layout.spread_states(conv), layout.spread_states(ssm)

    def _convolve(self, xbc: Tensor, initial: Tensor | None, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Convolution and activation, ``(B, T, C)``, through the module itself where its weight may not be read."""
        return causal_convolution(self.conv1d, self.conv_kernel, xbc, initial, layout, self.activation)

    def _split(self, zxbcdt: Tensor) -> list[Tensor]:
        """in_proj output to z ``(..., H P)``, xBC ``(..., H P + 2 G N)``, dt ``(..., H)``."""
        return list(zxbcdt.split([self.inner_size, self.conv_size, self.num_heads], -1))

    def _split_xbc(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x ``(..., H, P)``, B and C ``(..., G, N)``."""
        bc = self.n_groups * self.state_size
        x, B, C = xbc.split([self.inner_size, bc, bc], -1)
        groups = (self.n_groups, self.state_size)
        return x.unflatten(-1, (self.num_heads, self.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)
