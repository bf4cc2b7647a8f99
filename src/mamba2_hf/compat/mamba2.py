"""The module ``mamba_ssm.Mamba2``: its arguments, parameters and caches, over this package's mixer and step."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from .. import ops
from ..errors import ArgumentError
from ..ops import Inner, MixerSpec, MixerWeights, Packing, Step
from ..ops.checks import limits
from ..ops.spec import INF
from .conv import causal_conv1d_varlen_states
from .layernorm_gated import RMSNorm


class Mamba2(nn.Module, PyTorchModelHubMixin):
    """A Mamba-2 layer from hidden states to hidden states, for one process.

    Args:
        d_model: channels in and out. d_state: N. d_conv: K. headdim: P. ngroups: G.
        conv_init: bound of the convolution's first weights; None for PyTorch's.
        expand: inner width over ``d_model``.
        d_ssm: inner channels that the scan gets; a gated MLP has the rest. None for all.
        A_init_range: of the decay rates at first. dt_min, dt_max, dt_init_floor: of the step sizes at first.
        D_has_hdim: whether every channel, rather than every head, has a skip weight.
        rmsnorm: whether the gate has a norm; norm_before_gate: its order.
        dt_limit: clamp of step sizes. bias, conv_bias: of projections and convolution.
        chunk_size, use_mem_eff_path, sequence_parallel: without effect.
        layer_idx: the layer's key in a cache.
        process_group: tensor parallelism, which is not served.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: sizes do not divide, or a process group is given.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, INF),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            raise ArgumentError("process_group was given: this Mamba2 does not run in tensor parallel; pass None")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.conv_init, self.expand = (
            d_model,
            d_state,
            d_conv,
            conv_init,
            expand,
        )
        self.d_inner = expand * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.headdim, self.ngroups, self.nheads = headdim, ngroups, self.d_ssm // headdim
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit, self.activation, self.layer_idx = dt_limit, "silu", layer_idx
        self.chunk_size, self.use_mem_eff_path = chunk_size, use_mem_eff_path
        if self.nheads * headdim != self.d_ssm or self.nheads % ngroups:
            raise ArgumentError(
                f"d_ssm is {self.d_ssm}, headdim {headdim} and ngroups {ngroups}: headdim has to divide d_ssm, and "
                f"ngroups the {self.d_ssm / headdim:g} heads"
            )
        channels = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=bias, **made)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=conv_bias, **made)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.act = nn.SiLU()
        low, high = math.log(dt_min), math.log(dt_max)
        step = torch.exp(low + (high - low) * torch.rand(self.nheads, **made)).clamp(min=dt_init_floor)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus gives the step size
        rates = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(torch.log(rates).to(dtype))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        if rmsnorm:
            self.norm = RMSNorm(self.d_ssm, 1e-5, self.d_ssm // ngroups, norm_before_gate, **made)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Runs the layer.

        Args:
            u: ``(B, T, d_model)``, or ``(B T, d_model)`` with ``seqlen`` T.
            seqlen: tokens of a row, where ``u`` does not say so.
            seq_idx: ``(B, T)`` integers, the document of each token.
            cu_seqlens: ``(S + 1,)`` bounds of the documents of one row.
            inference_params: keeps the states of every layer in ``key_value_memory_dict``. With ``seqlen_offset`` 0
                they are those after this input (after each document with ``cu_seqlens``); later, it is one token.

        Returns:
            Shaped as ``u``.
        """
        rows = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        states = None
        if inference_params is not None:
            documents = rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            states = self._get_states_from_cache(inference_params, documents)
            if inference_params.seqlen_offset > 0:
                return self.step(u, *states)[0]
        mlp, zxbcdt = self._mlp(self.in_proj(rows))
        packing = Packing(seq_idx if cu_seqlens is None else None, cu_seqlens)
        y, _, ssm_state = ops.inner(
            Inner(zxbcdt, self._weights(), self._spec(), packing, states=inference_params is not None)
        )
        if states is not None:
            conv, length = zxbcdt[..., self.d_ssm : -self.nheads], states[0].shape[2]
            if cu_seqlens is None:
                states[0].copy_(F.pad(conv.mT, (length - conv.shape[1], 0)))
            else:
                states[0].copy_(causal_conv1d_varlen_states(conv[0], cu_seqlens, length))
            states[1].copy_(ssm_state)
        out = self.out_proj(_joined(mlp, y))
        return out if seqlen is None else out.flatten(0, 1)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the layer for one token of each sequence.

        Args:
            hidden_states: ``(B, 1, d_model)``.
            conv_state, ssm_state: as :meth:`allocate_inference_cache` makes them; updated in place.

        Returns:
            ``(B, 1, d_model)`` and both states.

        Raises:
            ArgumentError: there is more than one token.
        """
        if hidden_states.shape[1] != 1:
            raise ArgumentError(f"hidden_states has {hidden_states.shape[1]} tokens of a sequence, expected one")
        mlp, zxbcdt = self._mlp(self.in_proj(hidden_states))
        y = ops.step(Step(zxbcdt, conv_state, ssm_state, self._weights(), self._spec()))
        return self.out_proj(_joined(mlp, y)), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Makes the states before a sequence: those of the convolution ``(B, C, d_conv)`` and ``(B, H, P, N)``, zeros.

        They need the same memory whatever ``max_seqlen`` is.
        """
        weight = self.conv1d.weight
        made: dict[str, Any] = {"device": weight.device, "dtype": dtype or weight.dtype}
        conv_state = torch.zeros(batch_size, self.d_conv, weight.shape[0], **made).mT
        return conv_state, torch.zeros(batch_size, self.nheads, self.headdim, self.d_state, **made)

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        """This layer's states in a cache, which makes them if it has none."""
        if self.layer_idx is None:
            raise ArgumentError("layer_idx is None: a layer that keeps states in inference_params needs one of its own")
        held = inference_params.key_value_memory_dict
        if self.layer_idx not in held:
            held[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        elif initialize_states:
            for state in held[self.layer_idx]:
                state.zero_()
        states: tuple[Tensor, Tensor] = held[self.layer_idx]
        return states

    def _mlp(self, entering: Tensor) -> tuple[Tensor | None, Tensor]:
        """The gated MLP of the channels that the scan does not get, and the input of the mixer."""
        width = self.d_inner - self.d_ssm
        if not width:
            return None, entering
        gate, value, rest = entering.split([width, width, entering.shape[-1] - 2 * width], -1)
        return F.silu(gate) * value, rest

    def _weights(self) -> MixerWeights:
        D = self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D
        taps, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        return MixerWeights(taps, bias, self.dt_bias, None, self.A_log, D, self.norm.weight if self.rmsnorm else None)

    def _spec(self) -> MixerSpec:
        return MixerSpec(
            *(self.headdim, self.ngroups, self.activation),
            gated_norm_eps=self.norm.eps if self.rmsnorm else 0.0,
            group_size=self.d_ssm // self.ngroups,
            norm_before_gate=self.norm_before_gate,
            dt_limit=limits(self.dt_limit),
        )


def _joined(mlp: Tensor | None, y: Tensor) -> Tensor:
    return y if mlp is None else torch.cat([mlp, y], -1)
