"""Mixtures of experts: a router, experts, and what every token passes as well."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import BackendError
from ..ops.invariant.elementwise import sigmoid, softmax_few, sum_few
from ..ops.mlp.op import EXPERTS_ROWS, step_serves
from ..ops.runtime.linear import product
from ..ops.runtime.modes import product_dtype
from ..ops.runtime.products import ROWS
from .causal_conv1d import PLAIN_TENSORS
from .fp32 import KeepsFp32
from .mlp import MLP, MLP_KINDS
from .norm import RMSNorm
from .projection import call as call_linear
from .weights import is_unhooked, plain_parameters, plain_weight


class SoftmaxRouter(nn.Module):
    """Sends a token to the experts with the largest logits, weighed by a softmax over these alone.

    Args:
        hidden_size: width of a token.
        num_experts: E.
        top_k: experts that a token is sent to.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(n, d)`` to logits ``(n, E)`` in fp32, weights ``(n, k)`` and indices ``(n, k)``."""
        logits = product(x, self.weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen, index = logits.topk(self.top_k, -1)
        weights = softmax_few(chosen) if ops.is_batch_invariant() else torch.softmax(chosen, -1)
        return logits, weights.to(x.dtype), index


class SigmoidRouter(KeepsFp32):
    """Sends a token to the experts with the largest sigmoids plus a bias that balances their load, among the groups of
    experts whose two best promise most (DeepSeek-V3, arXiv 2412.19437).

    Args:
        hidden_size: width of a token.
        num_experts: E.
        top_k: experts that a token is sent to.
        num_groups, top_groups: groups of experts, and how many of them a token may reach.
        normalize: whether the weights of a token sum to 1.
        scale: of the weights.
    """

    fp32_parameters = ("e_score_correction_bias",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int = 1,
        top_groups: int = 1,
        normalize: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.top_k, self.num_groups, self.top_groups = top_k, num_groups, top_groups
        self.normalize, self.scale = normalize, scale
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(n, d)`` to logits ``(n, E)``, weights ``(n, k)``, both in fp32, and indices ``(n, k)``."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = product(x.to(dtype), self.weight.to(dtype))
        invariant = ops.is_batch_invariant()
        scores = sigmoid(logits) if invariant else logits.sigmoid()
        ranked = scores + self.e_score_correction_bias
        if self.num_groups > 1:
            groups = ranked.unflatten(-1, (self.num_groups, -1))  # (n, groups, E / groups)
            best = groups.topk(2, -1).values.sum(-1).topk(self.top_groups, -1, sorted=False).indices
            reachable = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, True)
            ranked = groups.masked_fill(~reachable[..., None], float("-inf")).flatten(1)
        index = ranked.topk(self.top_k, -1, sorted=False).indices
        weights = scores.gather(1, index)
        if self.normalize:
            total = sum_few(weights) if invariant else weights.sum(-1, keepdim=True)
            weights = weights / (total + 1e-20)
        return logits, weights * self.scale, index


class Experts(nn.Module):
    """Feed-forward layers side by side, each as :class:`~mamba2_hf.layers.mlp.MLP` without biases.

    Args:
        num_experts: E.
        hidden_size: width of input and output.
        intermediate_size: width in between.
        kind: one of ``MLP_KINDS``.
    """

    is_default = True
    """Whether nobody has asked for a way of running them other than the usual ones."""
    partners: ops.Partners | None = None
    """The devices that have the other inner channels of every expert; None if they are all here."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, kind: str = "swiglu") -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_size, intermediate_size
        self.act_fn, gated = MLP_KINDS[kind].activation, MLP_KINDS[kind].gated
        self.activation = MLP_KINDS[kind].name
        inner = nn.Parameter(torch.empty(num_experts, (1 + gated) * intermediate_size, hidden_size))
        self.up_name = "gate_up_proj" if gated else "up_proj"  # gate first
        self.register_parameter(self.up_name, inner)
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for weight in (inner, self.down_proj):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Tokens ``(n, d)``, the experts of each ``(n, k)`` and their weights to ``(n, d)``: one product per expert."""
        order = index.flatten().argsort(stable=True)  # (n k,) token and expert pairs, expert by expert
        sizes = torch.bincount(index.flatten(), minlength=self.num_experts).tolist()
        up = getattr(self, self.up_name)
        done = []
        for expert, tokens in enumerate((order // index.shape[1]).split(sizes)):
            inner = F.linear(x[tokens], up[expert])
            if self.up_name == "gate_up_proj":
                gate, inner = inner.chunk(2, -1)
                inner = self.act_fn(gate) * inner
            else:
                inner = self.act_fn(inner)
            done.append(F.linear(inner, self.down_proj[expert]))
        results = torch.cat(done)[order.argsort()]
        return (results.unflatten(0, index.shape) * weights[..., None]).sum(1).to(x.dtype)

    def invariant(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same where what a token gets is not to depend on which others go to its experts."""
        up, dtype = getattr(self, self.up_name), product_dtype(self.down_proj)
        out = torch.zeros(*index.shape, x.shape[-1], dtype=dtype, device=x.device)

        def run(tokens: Tensor, expert: int) -> Tensor:
            inner = product(tokens, up[expert])
            inner = ops.gated_activation(inner, None, self.activation, packed=self.up_name == "gate_up_proj")
            return product(inner, self.down_proj[expert])

        if x.is_cuda and len(x) <= ROWS["cuda"][0]:  # without waiting for the router's choice, as graphs want it
            for expert in range(self.num_experts):
                out = torch.where((index == expert)[..., None], run(x, expert)[:, None], out)
        else:
            for expert in index.unique().tolist():
                token, choice = (index == expert).nonzero(as_tuple=True)
                out[token, choice] = run(x[token], expert)
        return sum_few((out * weights[..., None]).mT)[..., 0].to(x.dtype)

    def grouped(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same with one product of all experts, on a GPU, in bf16 and without waiting for the router's choice.

        A token's weight is multiplied to what is between the products, which is narrower than their result.
        """
        k, up = index.shape[1], getattr(self, self.up_name)
        experts, order = index.flatten().sort(stable=True)  # (n k,) pairs of token and expert, expert by expert
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        every = torch.arange(self.num_experts, device=order.device)
        ends = torch.searchsorted(experts, every, right=True, out_int32=True)
        inner = F.grouped_mm(_ByExpert.apply(x, order, back, k), up.mT, offs=ends)
        inner = ops.gated_activation(inner, None, self.activation, packed=self.up_name == "gate_up_proj")
        inner = inner * _ByExpert.apply(weights.to(x.dtype).flatten()[:, None], order, back, 1)
        out: Tensor = _ByToken.apply(F.grouped_mm(inner, self.down_proj.mT, offs=ends), order, back, k)
        return out

    def can_group(self, x: Tensor) -> bool:
        """Whether :meth:`grouped` serves: bf16 on a GPU, with rows of weights that begin at multiples of 16 bytes."""
        weights = (getattr(self, self.up_name), self.down_proj)
        aligned = all(type(w) in PLAIN_TENSORS and w.is_contiguous() and w.shape[2] % 8 == 0 for w in weights)
        return aligned and x.is_cuda and {x.dtype, *(w.dtype for w in weights)} == {torch.bfloat16}


class _ByExpert(torch.autograd.Function):
    """Tokens ``(n, d)`` to their places among the pairs of token and expert, ``(n k, d)``, expert by expert. PyTorch's
    own gradient of an index sorts again what is known here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order, back)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        order, back = ctx.saved_tensors
        return _ByToken.apply(dy, order, back, ctx.k), None, None, None


class _ByToken(torch.autograd.Function):
    """The way back: what the experts of a token found, added up."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order, back)
        ctx.k = k
        return y[back] if k == 1 else y[back].unflatten(0, (-1, k)).sum(1)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None, None]:
        order, back = ctx.saved_tensors
        return _ByExpert.apply(dx, order, back, ctx.k), None, None, None


class MoE(nn.Module):
    """A router and its experts, with an MLP beside them that every token passes.

    Args:
        router: chooses the experts of a token, and their weights.
        experts: as :class:`Experts`.
        shared: the MLP that every token passes; None for none.
        hidden_size: width of a token.
        latent_size: width that tokens are projected to for the experts; None for their own.
        bias: whether the projections to that width and back have a bias.
    """

    def __init__(
        self,
        router: SoftmaxRouter | SigmoidRouter,
        experts: nn.Module,
        shared: MLP | None,
        *,
        hidden_size: int,
        latent_size: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.latent_size = latent_size
        if latent_size is not None:
            self.latent_in = nn.Linear(hidden_size, latent_size, bias=bias)
            self.latent_out = nn.Linear(latent_size, hidden_size, bias=bias)
        if shared is not None:
            self.shared = shared
        self.has_shared = shared is not None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, T, d)`` to the same and the router's logits ``(B, T, E)``."""
        tokens = x.flatten(0, -2)
        logits, weights, index = self.router(tokens)
        inner = tokens if self.latent_size is None else call_linear(self.latent_in, tokens)
        out = self._run(inner, index, weights)
        out = (out if self.latent_size is None else call_linear(self.latent_out, out)).view_as(x)
        if self.has_shared:
            out = out + self.shared(x)
        return out, logits.view(*x.shape[:-1], -1)

    def _run(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The experts' results; see :class:`Experts`."""
        experts = self.experts
        if not ops.is_batch_invariant():
            return experts(x, index, weights)  # type: ignore[no-any-return]
        if not isinstance(experts, Experts) or not plain_parameters(experts, Experts, "down_proj", experts.up_name):
            raise BackendError(
                f"batch_invariant() cannot see the products of a {type(experts).__name__} that is wrapped, hooked, "
                "quantized or sharded: merge adapters, take hooks off, load weights as they are"
            )
        return experts.invariant(x, index, weights)

    def layer(self, stream: Tensor, norm: RMSNorm, output_multiplier: float = 1.0) -> tuple[Tensor, Tensor]:
        """``stream + output_multiplier * self(norm(stream))``, ``(B, T, d)``, and the router's logits; for one token of
        each of a few sequences on a GPU, where weights may be read, in as few launches as that takes.
        """
        call = self._step(stream, norm, output_multiplier) if step_serves(stream, EXPERTS_ROWS) else None
        if call is None:
            out, logits = self(norm(stream))
            return torch.add(stream, out, alpha=output_multiplier), logits
        if self.has_shared:
            call = call._replace(residual=self.shared.layer(stream, norm, output_multiplier))
        partners: ops.Partners | None = self.experts.partners  # type: ignore[assignment]
        if partners is None:
            after, logits = ops.experts_step(call)
        else:
            after, logits = ops.experts_step(call._replace(peers=partners.peers(stream)), total=partners.total)
        return after, logits.view(*stream.shape[:-1], -1)

    def _step(self, stream: Tensor, norm: RMSNorm, output_multiplier: float) -> ops.ExpertsStep | None:
        """Arguments of the step of router and experts; None where a module has to be called."""
        router, experts, before = self.router, self.experts, plain_weight(norm)
        if not isinstance(experts, Experts) or not experts.is_default or self.latent_size is not None:
            return None
        if self.has_shared and type(self.shared) is not MLP:  # what wraps one may hand on its methods
            return None
        weights = plain_parameters(router, SoftmaxRouter, "weight")
        inner = plain_parameters(experts, Experts, experts.up_name, "down_proj")
        if before is None or weights is None or inner is None or not is_unhooked(self):
            return None
        if len({tensor.dtype for tensor in (before, *weights, *inner)}) > 1:
            return None
        gated = experts.up_name == "gate_up_proj"
        activation, top_k = experts.activation, router.top_k
        return ops.ExpertsStep(
            stream, before, weights[0], inner[0], inner[1], top_k, activation, gated, norm.eps, output_multiplier
        )
