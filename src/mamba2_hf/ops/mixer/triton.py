"""A mixer between its projections, and a whole layer around it, each as one op on Triton, and a whole layer's step.

Of a mixer only the inputs are kept. Its backward runs the convolution and the scan once more, then the three backwards,
each of which writes its part of the gradient of the in_proj output where it belongs.

Of a layer the stream, the output of in_proj and that of the scan are kept. With the weight matrices inside of the op,
the norms' backward kernels write what the weights' gradients are products with: both normed tensors are made again on
the way, neither kept nor computed by a kernel of their own, and the scan runs once. The gradient that passes by the
layer is added where that of the norm is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import flops
from ..conv.op import Conv
from ..conv.triton import conv_backward, conv_forward, documents
from ..neighbors import Entering, Neighbors
from ..norm.op import Norm
from ..norm.triton import WholeGroup, gate_backward, gate_forward, norm_backward, norm_forward, norm_products
from ..partners import Joined, Partners, Sharing
from ..runtime import tables
from ..runtime.launch import launch
from ..runtime.modes import product_dtype, without_autocast
from ..runtime.op import flattened, op
from ..runtime.rows import dense
from ..runtime.tables import cdiv
from ..scan.op import Scan
from ..scan.problem import Into
from ..scan.triton import scan_passes
from ..spec import UNPACKED, LayerWeights, Linear, LowRank, MixerSpec, MixerWeights, Packing
from .one_row import one_row_step
from .op import Inner, Layer, LayerStep, Step, of_own_heads
from .rows import rows_step
from .step import part_multiplier, step


class Mixer:
    """One call: what its forward and its backward have in common is computed once.

    Args:
        call: the arguments.
        entering: what enters rows that are slices; the forward has left it for the backward.
    """

    def __init__(self, call: Inner, entering: Entering | None = None) -> None:
        self.call, self.shape, self.entering = call, call.shape, entering
        weights, heads, inner = call.weights, self.shape.heads, self.shape.heads * self.shape.head_dim
        self.widths = inner, self.shape.groups * self.shape.state, heads
        self.z = call.zxbcdt[..., :inner]
        xbc, initial = call.zxbcdt[..., inner:-heads], call.conv_initial_states
        if entering is not None:
            initial = entering.columns(xbc, weights.conv_weight.shape[1])
        self.conv = Conv(xbc, weights.conv_weight, weights.conv_bias, initial, call.packing, call.spec.activation)
        self.packing = documents(call.zxbcdt, call.packing)
        self.convolved, self.conv_state = conv_forward(self.conv, self.packing, states=call.states)
        self.scan = scan_passes(self._scan(), entering)

    def _scan(self) -> Scan:
        """Arguments of the scan, which leaves the gate to what follows."""
        call, weights, (inner, maps, heads) = self.call, self.call.weights, self.widths
        x, B, C = self._heads_and_groups(*self.convolved.split([inner, maps, maps], -1))
        dt, packing, documents = call.zxbcdt[..., -heads:], call.packing, self.packing
        stateless = call.ssm_initial_states is None and not call.states
        if documents.ids is not None and packing.cu_seqlens is not None and stateless:
            # Documents without states of their own need no chunks of their own. Past the last one the convolution has
            # left zeros.
            packing = Packing(documents.ids[None])
            dt = dt.masked_fill((documents.ids[None] == documents.states)[..., None], 0.0)
        return Scan(
            *(x, dt, weights.rates, B, C, weights.D),
            None,
            *(weights.dt_bias, call.ssm_initial_states, packing, True, call.spec.dt_limit),
        )

    def _heads_and_groups(self, x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, T, H, P)`` and twice ``(B, T, G, N)``."""
        groups = (self.shape.groups, -1)
        return x.unflatten(-1, (-1, self.shape.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def scanned(self) -> tuple[Tensor, Tensor]:
        """The scan's output ``(B, T, H P)`` and final states."""
        y, states = self.scan.forward(self.entering)
        return y.flatten(-2), states

    def gated(self, y: Tensor, squares: Tensor | None = None) -> Tensor:
        """The gated norm of the scan's output, or its gate alone; for ``squares`` see :func:`norm_forward`."""
        norm = _gated_norm(self.call, y)
        return gate_forward(y, self.z) if norm is None else norm_forward(norm, squares)

    def gated_backward(
        self, dy: Tensor, y: Tensor, du: Tensor, again: Tensor | None = None, whole: WholeGroup | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """From the gradient of :meth:`gated` of ``y`` to those of ``y`` and of the norm's weight; that of z goes to its
        place in ``du``, the normed ``y`` to ``again``. ``whole`` is given where the norm's group is more than is here.
        """
        dz = du[..., : self.z.shape[-1]]
        norm = _gated_norm(self.call, y)
        if norm is None:
            return gate_backward(dy, y, self.z, dz, again), None
        found = norm_backward(dy, norm, dz=dz, y=again, whole=whole)
        return found.x, found.weight

    def backward(
        self, dy: Tensor, dconv_state: Tensor | None, dssm_state: Tensor | None, du: Tensor, dnorm: Tensor | None
    ) -> tuple[MixerWeights, Tensor | None, Tensor | None]:
        """From the gradients of the scan's output and of the gated norm's weight to those of all weights and of both
        initial states. That of ``zxbcdt`` goes to ``du``, but for z's. Called once.
        """
        inner, maps, heads = self.widths
        dconvolved = torch.empty_like(self.convolved)
        into = Into(*self._heads_and_groups(*dconvolved.split([inner, maps, maps], -1)), du[..., -heads:])
        dy = dy.unflatten(-1, (heads, -1))
        found: tuple[Any, ...] = self.scan.backward(dy, dssm_state, into, self.entering)
        _, _, dA, _, _, dD, _, dbias, dssm = found
        del self.convolved, self.scan, found  # what follows wants their memory
        dxbc = du[..., inner:-heads]
        conv = conv_backward(dconvolved, dconv_state, self.conv, self.packing, dx=dxbc)
        if self.entering is not None and conv.initial is not None:
            dcolumns = self.entering.neighbors.columns_after(conv.initial)
            dxbc[:, dxbc.shape[1] - dcolumns.shape[2] :] += dcolumns.mT
        return MixerWeights(conv.weight, conv.bias, dbias, dA, None, dD, dnorm), conv.initial, dssm


def _gated_norm(call: Inner, y: Tensor) -> Norm | None:
    """Arguments of the gated norm of the scan's output ``y (B, T, H P)``, or of its part that is here."""
    weight, spec = call.weights.gated_norm_weight, of_own_heads(call.weights, call.spec)
    if weight is None:
        return None
    z = call.zxbcdt[..., : y.shape[-1]]
    return Norm(y, z, weight, spec.gated_norm_eps, spec.group_size, spec.norm_before_gate, y.dtype)


def _inner_fake(call: Inner) -> tuple[Tensor, Tensor, Tensor]:
    u, (_, _, heads, P, _, N, states), weight = call.zxbcdt, call.shape, call.weights.conv_weight
    y = u.new_empty(*u.shape[:2], heads * P)
    if not call.states:
        return y, u.new_empty(0), u.new_empty(0)
    final = u.new_empty(states, heads, P, N, dtype=torch.float32)
    return y, u.new_empty(states, weight.shape[0], weight.shape[1] - 1), final


def _inner_flops(call: Any) -> int:
    weights, spec = call.weights, call.spec
    channels, heads = weights.conv_weight[0], (weights.A or weights.A_log)[0]
    return flops.inner(call.zxbcdt, channels, heads, spec.head_dim, spec.n_groups, call.packing.cu_seqlens)


@op("mamba2_inner", fake=_inner_fake, flops=(_inner_flops, lambda call: flops.BACKWARD * _inner_flops(call)))
def inner(call: Inner) -> tuple[Tensor, Tensor, Tensor]:
    """The output of the gated norm and the states; those that are not asked for are empty."""
    return _inner(call)


def _inner(call: Inner, entering: Entering | None = None) -> tuple[Tensor, Tensor, Tensor]:
    mixer = Mixer(call, entering)
    y, ssm_state = mixer.scanned()
    return mixer.gated(y), mixer.conv_state, ssm_state if call.states else y.new_empty(0)


@inner.backward
def _inner_backward(
    call: Inner,
    dy: Tensor,
    dconv_state: Tensor | None,
    dssm_state: Tensor | None,
    entering: Entering | None = None,
) -> tuple[Tensor, MixerWeights, Tensor | None, Tensor | None]:
    u = call.zxbcdt
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    mixer = Mixer(call, entering)
    dy, dnorm = mixer.gated_backward(dy, mixer.scanned()[0], du)
    return du, *mixer.backward(dy, dconv_state, dssm_state, du, dnorm)


_inner_of_slices = inner.between(_inner)
_inner_of_slices.backward(lambda call, entering, dy, *_: _inner_backward(call, dy, None, None, entering))


def mamba2_inner(call: Inner, neighbors: Neighbors | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.inner`."""
    y, conv_state, ssm_state = inner(call) if neighbors is None else _inner_of_slices(call, Entering(neighbors))
    return y, conv_state, ssm_state


@triton.jit
def add_kernel(a, b, total, size, scale, BLOCK: tl.constexpr):
    """``total = a + scale * b`` in fp32, a block of it."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    value = tl.load(a + i, mask=mask).to(tl.float32) + scale * tl.load(b + i, mask=mask).to(tl.float32)
    tl.store(total + i, value.to(total.dtype.element_ty), mask=mask)


@triton.jit
def scale_kernel(x, y, size, width, inner, maps, of_z, of_x, of_b, of_c, of_dt, BLOCK: tl.constexpr):
    """Each row of ``x (2 inner + 2 maps + H, width)`` times the multiplier of its part, a block of all elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    value = tl.load(x + i, mask=mask).to(tl.float32)
    value *= part_multiplier(i // width, inner, maps, of_z, of_x, of_b, of_c, of_dt)
    tl.store(y + i, value.to(y.dtype.element_ty), mask=mask)


class Parts(NamedTuple):
    """Multipliers of rows: of z, x, B, C and dt, or one of all."""

    inner: int
    maps: int
    product: tuple[float, ...]
    """Of what is multiplied with the input."""
    bias: tuple[float, ...]

    def scaled(self, x: Tensor, multipliers: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        """``x (rows, ...)`` with each row times its multiplier, in ``dtype``."""
        x = x.contiguous()
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        size, (block, warps) = x.numel(), tables.ADD
        width = size // x.shape[0]
        launch(
            scale_kernel,
            (cdiv(size, block),),
            *(x, y, size, width, self.inner, self.maps, *multipliers),
            BLOCK=block,
            num_warps=warps,
        )
        return y


class Projection:
    """One of a layer's projections and, where there is one, what LoRA adds to it.

    Multipliers of its outputs are multiplied to its weights, which are smaller than the outputs of many tokens.
    """

    def __init__(self, call: Layer, linear: Linear, parts: Parts | None = None) -> None:
        self.dtype, self.trains, self.parts = call.dtype, call.trains, parts
        self.weight, self.bias, self.lora = self._used(linear)
        self.given = linear

    def _used(self, linear: Linear) -> tuple[Tensor, Tensor | None, LowRank | None]:
        """Weight, bias and LoRA as the products take them."""
        weight, bias, lora, parts = linear.weight, linear.bias, linear.lora, self.parts
        if parts is None:
            bias = None if bias is None else bias.to(self.dtype)
            low = None if lora is None else LowRank(lora.down.to(self.dtype), lora.up.to(self.dtype), lora.scale)
            return weight.to(self.dtype), bias, low
        bias = None if bias is None else parts.scaled(bias, parts.bias, self.dtype)
        if lora is not None:
            lora = LowRank(lora.down.to(self.dtype), parts.scaled(lora.up, parts.product, self.dtype), lora.scale)
        return parts.scaled(weight, parts.product, self.dtype), bias, lora

    @property
    def needs_input(self) -> bool:
        """Whether gradients of weights are wanted."""
        return self.trains or self.lora is not None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, d)`` to ``(B, T, d')``."""
        y = F.linear(x, self.weight, self.bias)
        if self.lora is not None:
            y.flatten(0, 1).addmm_(self._lowered(self.lora, x.flatten(0, 1)), self.lora.up.t(), alpha=self.lora.scale)
        return y

    def input_gradient(self, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """From ``(B T, d')`` to ``(B T, d)``, and what reached LoRA's ``(B T, r)`` on the way."""
        dx = torch.mm(dy, self.weight)
        if self.lora is None:
            return dx, None
        dlowered = torch.mm(dy, self.lora.up)
        return dx.addmm_(dlowered, self.lora.down, alpha=self.lora.scale), dlowered

    def weight_gradients(self, dy: Tensor, dlowered: Tensor | None, x: Tensor | None) -> Linear:
        """Of weight, bias and LoRA's down and up, given the input where it is needed; of the weight None where it does
        not train.
        """
        flat, given = None if x is None else x.flatten(0, 1), self.given
        dweight: Any = None
        if self.trains and flat is not None:
            dweight = self._gradient(torch.mm(dy.t(), flat), given.weight)
        dbias = None if given.bias is None else self._gradient(dy.sum(0), given.bias)
        if self.lora is None or dlowered is None or flat is None:
            return Linear(dweight, dbias)
        down, up, scale = self.lora
        assert given.down is not None
        assert given.up is not None
        # With a beta of 0 the first argument is not read.
        ddown = torch.addmm(down, dlowered.t(), flat, beta=0, alpha=scale)
        dup = torch.addmm(up, dy.t(), self._lowered(self.lora, flat), beta=0, alpha=scale)
        return Linear(dweight, dbias, ddown.to(given.down.dtype), self._gradient(dup, given.up))

    def _gradient(self, found: Tensor, given: Tensor) -> Tensor:
        """The gradient of weight, up or bias, given that of what the products take."""
        if self.parts is None:
            return found.to(given.dtype)
        multipliers = self.parts.product if given.dim() > 1 else self.parts.bias
        return self.parts.scaled(found, multipliers, given.dtype)

    def _lowered(self, lora: LowRank, x: Tensor) -> Tensor:
        """What LoRA's down makes of ``x``, ``(B T, r)``."""
        return torch.mm(x, lora.down.t())


def _entering(call: Layer) -> Projection:
    """in_proj, with the multipliers of its parts."""
    return Projection(call, call.weights.in_proj, _parts(call.weights, call.spec))


def _parts(weights: LayerWeights, spec: MixerSpec) -> Parts | None:
    """The parts of in_proj; None without multipliers."""
    if not spec.entering:
        return None
    inner, heads = weights.mixer.heads * spec.head_dim, weights.mixer.heads
    maps = (weights.in_proj.weight.shape[0] - 2 * inner - heads) // 2
    return Parts(inner, maps, spec.entering, spec.multipliers or (1.0,) * 5)


def _layer_fake(call: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    zxbcdt = call.stream.new_empty(*call.stream.shape[:2], call.weights.in_proj.weight.shape[0], dtype=call.dtype)
    A = zxbcdt.new_empty(call.weights.mixer.heads, dtype=torch.float32)
    y, conv_state, ssm_state = _inner_fake(call.mixer(zxbcdt, A))
    return call.stream.new_empty(call.stream.shape), conv_state, ssm_state, zxbcdt, y, A


def _layer_parts(call: Any) -> tuple[int, int, int]:
    """Operations of the projections, of what LoRA adds to them, and of the scan."""
    rows, linears = call.stream[0] * call.stream[1], (call.weights.in_proj, call.weights.out_proj)
    weights = sum(flops.product(rows, linear.weight) for linear in linears)
    lora = sum(flops.product(rows, factor) for linear in linears for factor in linear[2:4] if factor is not None)
    return weights, lora, _inner_flops(Inner(call.stream, call.weights.mixer, call.spec, call.packing))


def _layer_backward_flops(call: Any) -> int:
    weights, lora, scan = _layer_parts(call)
    return weights * (1 + call.trains) + 2 * lora + flops.BACKWARD * scan


@op("mamba2_layer", fake=_layer_fake, kept=3, flops=(lambda call: sum(_layer_parts(call)), _layer_backward_flops))
def layer(call: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The stream after the layer and the final states; for the backward the outputs of in_proj and the scan, and A."""
    return _layer(call)


def _layer(call: Layer, incoming: Entering | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(call.stream.device):
        gated, _, conv_state, ssm_state, zxbcdt, y, A = _gated(call, incoming)
        mixed = Projection(call, call.weights.out_proj).forward(gated)
        del gated
        after = _add(call.added_to, mixed, call.spec.output_multiplier)
        return after, conv_state, ssm_state, zxbcdt, y, A


def _gated(call: Layer, incoming: Entering | None = None) -> Any:
    """What out_proj is given and, where only a part of the gated norm's group is here, the sums of its squares
    ``(B T,)``; then what the layer returns behind the stream.
    """
    with without_autocast(call.stream.device):
        normed = norm_forward(_norm(call))
        zxbcdt = _entering(call).forward(normed)
        del normed
        A = call.weights.mixer.rates
        mixer = Mixer(call.mixer(zxbcdt, A), incoming)
        y, ssm_state = mixer.scanned()
        rows = y.shape[0] * y.shape[1]
        squares = torch.empty(rows, dtype=torch.float32, device=y.device) if call.is_joint else None
        final = ssm_state if call.states else y.new_empty(0)
        return mixer.gated(y, squares), squares, mixer.conv_state, final, zxbcdt, y, A


@layer.backward
def _layer_backward(
    call: Layer,
    dstream: Tensor,
    dconv_state: Tensor | None,
    dssm_state: Tensor | None,
    zxbcdt: Tensor,
    y: Tensor,
    A: Tensor,
    incoming: Entering | None = None,
) -> tuple[Tensor, LayerWeights, Tensor | None, Tensor | None, Tensor | None]:
    with without_autocast(dstream.device):
        dstream = dstream.contiguous()
        given = (dconv_state, dssm_state, zxbcdt, y, A)
        du, dweights, dout, dconv, dssm = _to_zxbcdt(call, dstream, *given, incoming=incoming)
        flat = du.flatten(0, 1)
        into = _entering(call)
        dnormed, dlowered = into.input_gradient(flat)
        dnormed = dnormed.view_as(dstream)
        normed = _new(dnormed) if into.needs_input else None
        past = dstream if call.residual is None else None
        dx, _, dnorm = norm_backward(dnormed, _norm(call), more=past, y=normed)
        din = into.weight_gradients(flat, dlowered, normed)
        dresidual = None if call.residual is None else dstream
        return dx, LayerWeights(dnorm, din, dweights, dout), dresidual, dconv, dssm


def _to_zxbcdt(
    call: Layer,
    dstream: Tensor,
    dconv_state: Tensor | None,
    dssm_state: Tensor | None,
    zxbcdt: Tensor,
    y: Tensor,
    A: Tensor,
    left: tuple[Tensor, Tensor | None] | None = None,
    whole: WholeGroup | None = None,
    incoming: Entering | None = None,
) -> tuple[Tensor, MixerWeights, Linear, Tensor | None, Tensor | None]:
    """From the gradient of what out_proj is added to, to those of the output of in_proj and of what was multiplied on
    the way: the mixer's weights, out_proj, and both initial states.

    With ``left``, what :meth:`Projection.input_gradient` of out_proj gave, ``dstream`` is what that took.
    """
    dmixed = _dmixed(call, dstream) if left is None else dstream
    mixer = Mixer(call.mixer(zxbcdt, A), incoming)
    du = _new(zxbcdt)
    leaving = Projection(call, call.weights.out_proj)
    dnormed, dlowered = leaving.input_gradient(dmixed) if left is None else left
    gated = _new(y) if leaving.needs_input else None
    dy, dgated_norm = mixer.gated_backward(dnormed.view_as(y), y, du, gated, whole)
    dout = leaving.weight_gradients(dmixed, dlowered, gated)
    del dmixed, dnormed, gated
    dweights, dconv, dssm = mixer.backward(dy, dconv_state, dssm_state, du, dgated_norm)
    assert dweights.A is not None  # it always trains
    dA_log = (dweights.A * A).to(call.weights.mixer.decay.dtype)
    return du, dweights._replace(A=None, A_log=dA_log), dout, dconv, dssm


def _dmixed(call: Layer, dstream: Tensor) -> Tensor:
    """The gradient of what out_proj gives, ``(B T, d)``."""
    return _times(dstream, call.spec.output_multiplier, call.dtype).flatten(0, 1)


_layer_of_slices = layer.between(_layer)
_layer_of_slices.backward(
    lambda call, incoming, dstream, _, __, *kept: _layer_backward(call, dstream, None, None, *kept, incoming)
)


@layer.between
def _shared_layer(call: Layer, sharing: Sharing) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A layer of which every device has some of the heads. A long sum begins with a part of the rows, and goes on
    beside the product for the others.
    """
    partners, out, spec = sharing.partners, call.weights.out_proj, call.spec
    found = _gated_piece(call) if sharing.entering is None else _gated(call, sharing.entering)
    gated, squares, conv_state, ssm_state, zxbcdt, scanned, A = found
    all_squares = None if squares is None else partners.begin(squares)
    with without_autocast(gated.device):
        leaving = Projection(call, out._replace(bias=None))
        residual = call.added_to.contiguous()
        after = _new(residual)
        x, y = residual.flatten(0, 1), after.flatten(0, 1)
        size = tables.rows_at_once(*x.shape)
        totals = [partners.begin(leaving.forward(part)) for part in gated.view(1, len(x), -1).split(size, 1)]
        del gated, found
        sharing.squares = None if all_squares is None else all_squares()
        scales = len(totals) * (None,) if sharing.squares is None else sharing.squares.split(size)
        norm, factors = (spec.group_size, spec.gated_norm_eps), (spec.output_multiplier,) * 2
        for total, scale, before, to in zip(totals, scales, x.split(size), y.split(size), strict=True):
            _join(total()[0], scale, before, to, out.bias, norm, factors)
    return after, conv_state, ssm_state, zxbcdt, scanned, A


_gated_piece = layer.piece(_gated)


@layer.piece
def _left_piece(call: Layer, dstream: Tensor, zxbcdt: Tensor, y: Tensor) -> tuple[Any, ...]:
    """The gradient of out_proj's output and what :meth:`Projection.input_gradient` makes of it, and the sums of
    products that the gated norm's backward takes.
    """
    with without_autocast(dstream.device):
        dmixed = _dmixed(call, dstream)
        dnormed, dlowered = Projection(call, call.weights.out_proj).input_gradient(dmixed)
        norm = _gated_norm(call.mixer(zxbcdt, call.weights.mixer.decay), y)
        assert norm is not None
        return dmixed, dnormed, dlowered, norm_products(dnormed.view_as(y), norm)


def _entered(
    call: Layer,
    dstream: Tensor,
    dconv_state: Tensor | None,
    dssm_state: Tensor | None,
    zxbcdt: Tensor,
    y: Tensor,
    A: Tensor,
    dnormed: Tensor | None,
    dlowered: Tensor | None,
    squares: Tensor | None,
    products: Tensor | None,
    *,
    incoming: Entering | None = None,
) -> tuple[Any, ...]:
    """The gradient of in_proj's output and what :meth:`Projection.input_gradient` makes of it, and other gradients."""
    with without_autocast(dstream.device):
        left = whole = None
        if dnormed is not None and squares is not None and products is not None:
            left, whole = (dnormed, dlowered), WholeGroup(call.spec.group_size, squares, products)
        given = (dconv_state, dssm_state, zxbcdt, y, A, left, whole, incoming)
        du, *found = _to_zxbcdt(call, dstream, *given)
        return du, *_entering(call).input_gradient(du.flatten(0, 1)), *found


_entered_piece = layer.piece(_entered)


@layer.piece
def _in_proj_piece(call: Layer, du: Tensor, dlowered: Tensor | None) -> tuple[Any, ...]:
    """The gradients of in_proj, whose input is made once more."""
    with without_autocast(du.device):
        into = _entering(call)
        return into.weight_gradients(
            du.flatten(0, 1), dlowered, norm_forward(_norm(call)) if into.needs_input else None
        )


@layer.piece
def _norm_piece(call: Layer, dnormed: Tensor, dstream: Tensor) -> tuple[Any, ...]:
    """The gradients of the stream and of the norm before the mixer."""
    past = dstream if call.residual is None else None
    dx, _, dnorm = norm_backward(dnormed.view_as(dstream), _norm(call), more=past)
    return dx, dnorm


@_shared_layer.backward
def _shared_layer_backward(
    call: Layer,
    sharing: Sharing,
    dstream: Tensor,
    dconv_state: Tensor | None,
    dssm_state: Tensor | None,
    *kept: Tensor,
) -> tuple[Any, ...]:
    """While the gradient of in_proj's input is summed, those of its weights are computed."""
    dstream, partners = dstream.contiguous(), sharing.partners
    gradient: Tensor = dstream
    left: tuple[Any, ...] = (None,) * 4
    if sharing.squares is not None:
        gradient, dnormed, dlowered, products = _left_piece(call, dstream, *kept[:2])
        left = (dnormed, dlowered, sharing.squares, partners.begin(products)())
    given = (gradient, dconv_state, dssm_state, *kept, *left)
    found: Any
    if sharing.entering is None:
        found = _entered_piece(call, *given)
    else:
        found = flattened(_entered(call, *given, incoming=sharing.entering))
    du, dnormed, dlowered, *others = found
    del given, gradient, left
    total = partners.begin(dnormed)
    din = _in_proj_piece(call, du, dlowered)
    dx, dnorm = _norm_piece(call, total(), dstream)
    dweights, dout, (dconv, dssm) = others[:7], others[7:11], others[11:]
    dresidual = None if call.residual is None else dstream
    return dx, dnorm, din, dweights, dout, dresidual, dconv, dssm


def mamba2_layer(
    call: Layer, neighbors: Neighbors | None = None, partners: Partners | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mamba2_hf.ops.layer`."""
    entering = None if neighbors is None else Entering(neighbors)
    if partners is not None:
        found = _shared_layer(call, Sharing(partners, entering))
    else:
        found = layer(call) if entering is None else _layer_of_slices(call, entering)
    after, conv_state, ssm_state, *_ = found
    return after, conv_state, ssm_state


def _step_flops(call: Any) -> int:
    rows, weights = call.stream[0], call.weights
    projections = flops.product(rows, weights.in_proj.weight) + flops.product(rows, weights.out_proj.weight)
    return projections + flops.step(call.ssm_state)


def _step_fake(call: LayerStep) -> Tensor:
    rows, _, size = call.stream.shape
    if call.part:
        return call.stream.new_empty(rows, 1, size + call.is_joint, dtype=torch.float32)
    return call.stream.new_empty(call.stream.shape)


@op("mamba2_layer_step", fake=_step_fake, flops=(_step_flops,))
def mamba2_layer_step(call: LayerStep) -> Tensor:
    """See :func:`mamba2_hf.ops.mamba2_layer_step`."""
    if is_whole(call):
        return (one_row_step if call.stream.shape[0] == 1 else rows_step)(_with_scaled_bias(call))
    weights, spec, joint = call.weights, call.spec, call.is_joint
    dtype, mixer, scale = product_dtype(weights.in_proj.weight), weights.mixer, weights.mixer.gated_norm_weight
    layer_call = Layer(call.stream, weights, spec, UNPACKED, dtype, False, call.residual)
    out = weights.out_proj._replace(bias=None) if call.part else weights.out_proj
    with without_autocast(call.stream.device):
        zxbcdt = _entering(layer_call).forward(norm_forward(_norm(layer_call)))
        if joint:
            mixer = mixer._replace(gated_norm_weight=None)
        y = step(Step(zxbcdt, call.conv_state, call.ssm_state, mixer, spec), call.ring)
        mixed = Projection(layer_call, out).forward(y * scale.to(y.dtype) if joint and scale is not None else y)
        if not call.part:
            return _add(call.added_to, mixed, spec.output_multiplier)
        part = mixed.float() * spec.output_multiplier
        return torch.cat([part, y.float().square().sum(-1, keepdim=True)], -1) if joint else part


def is_whole(call: LayerStep) -> bool:
    """Whether kernels for the step of a whole layer take it."""
    weight, linears = call.weights.in_proj.weight, (call.weights.in_proj, call.weights.out_proj)
    plain = product_dtype(weight) == weight.dtype and not any(linear.lora for linear in linears)
    return plain and call.stream.shape[0] <= tables.step_rows(tables.current_chip())


@triton.jit
def joined_kernel(total, squares, x, bias, y, rows, width, stride, apart, size, eps, factor, of_bias,
                  ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``x`` plus ``factor`` times ``total`` plus ``of_bias`` times the bias, a block of ``ROWS`` rows of ``width``.
    With ``squares``, ``apart`` elements apart, ``total`` is times the scale of a norm over ``size`` channels.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (i < width)[None, :]
    value = factor * tl.load(total + row[:, None] * stride + i[None, :], mask=mask, other=0.0).to(tl.float32)
    if squares is not None:
        value *= tl.rsqrt(tl.load(squares + row * apart, mask=row < rows, other=0.0) / size + eps)[:, None]
    if bias is not None:
        value += of_bias * tl.load(bias + i, mask=i < width, other=0.0).to(tl.float32)[None, :]
    at = row[:, None] * width + i[None, :]
    value += tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@op("layer_joined", fake=lambda call: call.residual.new_empty(call.residual.shape))
def joined(call: Joined) -> Tensor:
    """Ends the step of a layer that devices share."""
    total, residual, norm = call.total.contiguous()[:, 0], call.residual.contiguous(), (call.group_size, call.norm_eps)
    y = _new(residual)
    squares = total[:, residual.shape[2]] if call.is_joint else None
    _join(total, squares, residual[:, 0], y[:, 0], call.bias, norm, (1.0, call.output_multiplier))
    return y


def _join(
    total: Tensor,
    squares: Tensor | None,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    norm: tuple[int, float],
    factors: tuple[float, float],
) -> None:
    """Adds what a layer that devices share gives to the stream: ``total (R, d)`` and the bias, times a factor each, to
    ``x (R, d)``. It goes to ``y``. Given the sums of its ``squares (R,)``, the total is times the scale of a norm of
    that group size and epsilon.
    """
    (rows, width), block = x.shape, tables.GATE_BLOCK
    per_program = tables.GATE_ROWS if rows * width >= tables.GATE_ROWS * 2**16 else 1
    launch(
        joined_kernel,
        (cdiv(rows, per_program), cdiv(width, block)),
        *(total, squares, x, dense(bias), y, rows, width, total.stride(0), 0 if squares is None else squares.stride(0)),
        *(*norm, *factors),
        ROWS=per_program,
        BLOCK=block,
        num_warps=8,
    )


def _with_scaled_bias(call: LayerStep) -> LayerStep:
    """The step with the bias of in_proj times the multipliers of its parts: kernels have those of the product only."""
    weights = call.weights
    bias, parts = weights.in_proj.bias, _parts(weights, call.spec)
    if bias is None or parts is None:
        return call
    scaled = weights.in_proj._replace(bias=parts.scaled(bias, parts.bias, bias.dtype))
    return call._replace(weights=weights._replace(in_proj=scaled))


def _norm(call: Layer) -> Norm:
    """Arguments of the norm before the mixer."""
    stream = call.stream
    return Norm(stream, None, call.weights.norm_weight, call.spec.norm_eps, stream.shape[2], False, call.dtype)


def _add(stream: Tensor, mixed: Tensor, scale: float) -> Tensor:
    """``stream + scale * mixed`` in the dtype of the stream; PyTorch is slow where that is not the other's."""
    stream, total = stream.contiguous(), _new(stream)
    size = stream.numel()
    block, warps = tables.ADD
    launch(add_kernel, (cdiv(size, block),), stream, mixed, total, size, scale, BLOCK=block, num_warps=warps)
    return total


def _times(x: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """``factor * x`` in ``dtype``, rounded once."""
    if factor == 1:
        return x.to(dtype)
    return Parts(0, 0, (), ()).scaled(x, (factor,) * 5, dtype)


def _new(like: Tensor) -> Tensor:
    """Memory for a tensor like a dense one."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
