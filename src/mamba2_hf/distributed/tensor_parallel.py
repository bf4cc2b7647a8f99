"""Tensor parallelism: every process computes some of the heads of each layer ("Transformers are SSMs", Section 8.1).

A mixer's convolution, scan, gated norm and states are of its own heads and need no message. What out_proj makes of them
is summed over the processes, once a block, and then added to the residual stream, which all processes hold; the
gradient of what in_proj reads is summed on the way back. A gated norm that is one group over all heads takes one number
a token more. Attention is cut by heads, feed-forward layers and experts by inner channels, embedding and head by rows
of the vocabulary; norms before layers and routers are whole in every process.

Parameters are smaller ones of the same names, plain tensors: whatever serves a model of one process serves its part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..layers import MLP, Attention, Experts, GatedRMSNorm, Head, Mamba2Mixer
from ..layers.causal_conv1d import PLAIN_TENSORS, CausalConv1d
from ..layers.norm import SiluGate
from ..layers.weights import is_unhooked
from .groups import Group
from .packed import (
    ColumnLinear,
    CopiedLinear,
    Cut,
    CutConv1d,
    CutExperts,
    CutJointNorm,
    CutModule,
    LayerPartners,
    Part,
    RowLinear,
    cut_class,
)
from .vocabulary import CutEmbedding, CutHead

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=nn.Module)


class _Change(NamedTuple):
    """What becomes of a module."""

    module: nn.Module
    cuts: dict[str, Cut]
    """Of its parameters, by name."""
    cls: type[nn.Module] | None = None
    """Its class from then on; None for its own."""
    attributes: dict[str, Any] = {}
    """With new values."""


def tensor_parallel(model: Model, mesh: DeviceMesh | Group) -> Model:
    """Cuts the layers of a model for the processes of a mesh's dimension ``"tp"``, in place; each keeps its part.

    All processes hold the same model when they call it. Afterwards they call the part with the same inputs, and have
    the same outputs and the same loss; gradients are those of one process, cut as the parameters are. Gradients are
    clipped by :func:`clip_grad_norm_`. Processes draw the same numbers of random generators of the same state: that of
    the first is sent to all others at the start of ``generate``, training with dropout sets the same seed in all.

    LoRA of PEFT may be there before, or come after. What an adapter adds to a layer is cut as the layer is.

    Args:
        model: holds layers of this package, as they are made and loaded; before DDP and FSDP2 wrap it.
        mesh: of one dimension, or with one of the name ``"tp"``.

    Returns:
        ``model``.

    Raises:
        ArgumentError: the mesh has no such dimension, heads or channels cannot be shared by so many processes, a module
            is wrapped or holds other than plain weights, or processes hold different models. The model is as it was.
        ProcessError: another process cannot cut its model.
    """
    group = mesh if isinstance(mesh, Group) else Group.of(mesh, "tp")
    with group.together():
        changes = list(_changes(model, group))
        if not changes and not any(hasattr(module, "cuts") for module in model.modules()):
            raise ArgumentError(
                f"{type(model).__name__} holds no layers of mamba2_hf, and no others are known how to be cut"
            )
    _refuse_different(model, group)
    _make(changes, group)
    for module in model.modules():
        share: Any = getattr(module, "share", None)
        if share is not None:
            share(group, None if isinstance(mesh, Group) else mesh)
    _agree(model, group)
    return model


def cut_adapters(layer: nn.Module) -> None:
    """Cuts what LoRA adds to a linear layer as the layer is cut, if it is. All processes of its group call it."""
    base = _innermost(layer)
    if isinstance(base, CutModule):
        enters = getattr(base, "enters", True)
        _make(list(_linear(layer, type(layer).__name__, type(base), base.cuts["weight"], enters)), base.group)
        _agree(layer, base.group)


def whole_state_dict(model: nn.Module, group: Group, state_dict: dict[str, Any] | None = None) -> dict[str, Any]:
    """The ``state_dict`` of a model that was never cut, in every process, on the CPU; called by all of the group.

    Args:
        model: that :func:`tensor_parallel` has cut.
        group: of its processes.
        state_dict: of the model, or some of it under the same names; None for all of it.
    """
    cuts = dict(every_cut(model))
    given = model.state_dict() if state_dict is None else state_dict
    found = {}
    for name, value in given.items():
        cut = cuts.get(name)
        found[name] = value if cut is None else whole_tensor(value, cut, group)
    return found


def whole_tensor(piece: Tensor, cut: Cut, group: Group) -> Tensor:
    """The whole of a tensor, on the CPU, of which this process has a piece, or under FSDP2 a shard of it; called by all
    of the group, and by all that share the piece.
    """
    return cut.whole(group.gather(_sendable(unsharded(piece), group))).cpu()


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` of all gradients of a model that :func:`tensor_parallel` has cut: what several
    processes hold counts once. Called by all processes of the group; returns the norm before.
    """
    cut = {id(p): module.cuts[name] for module, name, p in _parameters(model) if name in _cuts(module)}
    parameters = [p for p in model.parameters() if p.grad is not None]
    group = group_of(model)
    if group is None:
        raise ArgumentError(f"{type(model).__name__} is cut for no group of processes: see tensor_parallel")
    power = 1.0 if math.isinf(norm_type) else norm_type

    def share(p: Tensor) -> Tensor:
        """Of the sum over the whole gradient (of powers, or the largest), what this process answers for."""
        gradient = unsharded(p.grad)
        assert gradient is not None
        if id(p) not in cut:  # whole in every process
            kept = [gradient] if group.rank == 0 else []
        else:
            how = cut[id(p)]
            lengths = [part.size // part.pieces for part in how.parts]
            rows = zip(how.parts, gradient.split(lengths, how.dim), strict=True)
            kept = [row for part, row in rows if group.rank % (group.size // part.pieces) == 0]
        norms = [torch.linalg.vector_norm(row, norm_type, dtype=_wide(row.dtype)) ** power for row in kept]
        return torch.stack(norms) if norms else gradient.new_zeros(1, dtype=_wide(gradient.dtype))

    shares = torch.cat([share(p).float() if p.grad.dtype != torch.float64 else share(p) for p in parameters])  # type: ignore[union-attr]
    own = shares.max() if math.isinf(norm_type) else shares.sum()
    everyones = group.gather(_sendable(own[None], group))
    total = everyones.max() if math.isinf(norm_type) else everyones.sum() ** (1 / norm_type)
    total = total.to(parameters[0].device)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for p in parameters:
        gradient: Any = p.grad
        getattr(gradient, "_local_tensor", gradient).mul_(factor.to(p.device))
    return total


def unsharded(tensor: Any) -> Any:
    """The whole of a tensor that is sharded over data as well; called by all processes that share it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def agree_on_random_numbers(group: Group, device: torch.device) -> None:
    """Gives all processes of a group the state of the first one's random generators, those of ``device`` among them."""
    torch.set_rng_state(_of_first(torch.get_rng_state(), group))
    if device.type == "cuda":
        torch.cuda.set_rng_state(_of_first(torch.cuda.get_rng_state(device), group), device)


def _make(changes: list[_Change], group: Group) -> None:
    done: set[int] = set()  # of weights that modules share
    for module, cuts, cls, attributes in changes:
        for name, cut in cuts.items():
            parameter: nn.Parameter = getattr(module, name)
            if id(parameter) not in done:
                parameter.data = cut.piece(parameter.data, group.rank, group.size)
                parameter.grad = None
            done.add(id(parameter))
        if cls is not None:
            module.__class__ = cls
        module.cuts, module.group = cuts, group  # type: ignore[assignment]
        for name, value in attributes.items():
            setattr(module, name, value)
        module.register_load_state_dict_pre_hook(_cut_what_is_loaded)


def _cut_what_is_loaded(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets ``load_state_dict`` read whole tensors too."""
    group: Group = module.group
    for name, cut in module.cuts.items():
        value = state_dict.get(prefix + name)
        if value is None or value.shape == module._parameters[name].shape:
            continue
        if value.shape[cut.dim] == sum(part.size for part in cut.parts):
            state_dict[prefix + name] = cut.piece(value, group.rank, group.size)


def _refuse_different(model: nn.Module, group: Group) -> None:
    """Raises in all processes where they hold models of different sizes."""
    everyones = group.gather_objects({name: tuple(p.shape) for name, p in model.named_parameters()})
    first: dict[str, Any] = everyones[0]
    for rank, other in enumerate(everyones):
        for name in first.keys() | other.keys():
            one, another = first.get(name, "missing"), other.get(name, "missing")
            if one != another:
                raise ArgumentError(
                    f"processes hold different models: {name} is {one} in process 0 of the group, and {another} in "
                    f"process {rank}. Make or load the same model in all of them"
                )


def _changes(model: nn.Module, group: Group) -> Iterator[_Change]:
    """What is to become of all modules of a model; raises where they cannot be cut, and changes nothing."""
    size = group.size
    yield from _of_vocabulary(model, size)
    for name, module in model.named_modules():
        if isinstance(module, Mamba2Mixer):
            yield from _of_mixer(module, name, group)
        elif isinstance(module, Attention):
            yield from _of_attention(module, name, group)
        elif isinstance(module, MLP):
            yield from _of_mlp(module, name, group)
        elif isinstance(module, Experts):
            yield from _of_experts(module, name, group)
        elif hasattr(module, "added_projections"):
            # What a layer adds to the outputs of projections, before anything else, is cut as they are.
            for adapter, projections in module.added_projections():
                layers = [_innermost(projection) for projection in projections]
                parts = tuple(part for layer in layers for part in _rows_of(model, layer, size))
                yield from _linear(adapter[1], f"{name}: an adapter", ColumnLinear, Cut(0, parts))


def _of_vocabulary(model: nn.Module, size: int) -> Iterator[_Change]:
    """Embeddings and heads that are plain, where the rows can be shared alike; those with one weight both or neither.
    Others stay whole in every process.
    """
    found: dict[int, list[nn.Module]] = {}
    whole: set[int] = set()
    for module in model.modules():
        for part in (getattr(module, "embeddings", None), getattr(module, "lm_head", None)):
            if not isinstance(part, nn.Module) or not isinstance(getattr(part, "weight", None), Tensor):
                continue
            weight: Any = part.weight
            plain = type(part) in (nn.Embedding, Head) and is_unhooked(part) and type(weight) in PLAIN_TENSORS
            if not plain or weight.is_meta or weight.shape[0] % size or getattr(part, "bias", None) is not None:
                whole.add(id(weight))
            elif part not in found.setdefault(id(weight), []):
                found[id(weight)].append(part)
    for key, parts in found.items():
        for part in parts if key not in whole else ():
            weight = part.weight
            cut = Cut(0, (Part(weight.shape[0], size),))
            yield _Change(part, {"weight": cut}, CutHead if type(part) is Head else CutEmbedding)


def _of_mixer(mixer: Any, name: str, group: Group) -> Iterator[_Change]:
    size = group.size
    given = (mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.state_size)
    heads, head_dim, groups, state = whole = getattr(mixer, "whole_sizes", given)
    inner = heads * head_dim
    _shared(heads, size, f"{name}: num_heads={heads} heads")
    _shared_or_copied(groups, size, f"{name}: n_groups={groups} groups")
    own, maps = Part(inner, size), Part(groups * state, min(groups, size))
    cut_heads = Cut(0, (Part(heads, size),))
    channels = Cut(0, (own, maps, maps))
    rows = Cut(0, (own, own, maps, maps, Part(heads, size)))
    yield from _linear(mixer.in_proj, f"{name}.in_proj", ColumnLinear, rows)
    yield from _linear(mixer.out_proj, f"{name}.out_proj", RowLinear, Cut(1, (own,)))
    if hasattr(mixer, "cuts"):
        return
    yield _convolution(mixer.conv1d, f"{name}.conv1d", channels, size)
    yield from _gated_norm(mixer.norm, f"{name}.norm", inner, size)
    _plain(mixer, name, *mixer.fp32_parameters)
    yield _Change(
        mixer,
        dict.fromkeys(mixer.fp32_parameters, cut_heads),
        attributes={
            "partners": LayerPartners(group, rows, channels),
            "whole_sizes": whole,
            "num_heads": heads // size,
            "n_groups": max(groups // size, 1),
            "inner_size": inner // size,
            "conv_size": inner // size + 2 * max(groups // size, 1) * state,
        },
    )


def _gated_norm(norm: Any, name: str, inner: int, size: int) -> Iterator[_Change]:
    if type(norm) is SiluGate:
        yield _Change(norm, {}, attributes={"group_size": inner // size})
        return
    if type(norm) is not GatedRMSNorm:
        raise _cannot_be_cut(name, norm)
    _plain(norm, name, "weight")
    cuts = {"weight": Cut(0, (Part(inner, size),))}
    groups = inner // norm.group_size
    if groups % size == 0:
        yield _Change(norm, cuts)
        return
    _shared_or_copied(groups, size, f"{name}: {groups} groups of {norm.group_size} channels")
    sizes = {"group_size": inner // size, "joint_size": norm.group_size, "holders": size // groups}
    yield _Change(norm, cuts, CutJointNorm, sizes)


def _of_attention(attention: Any, name: str, group: Group) -> Iterator[_Change]:
    size = group.size
    queries, keys = (width // attention.head_dim for width in _whole_sizes(attention)[:2])
    _shared(queries, size, f"{name}: num_attention_heads={queries} heads")
    _shared_or_copied(keys, size, f"{name}: num_key_value_heads={keys} heads")
    parts = _attention_parts(attention, size)
    for projection, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
        yield from _linear(getattr(attention, projection), f"{name}.{projection}", ColumnLinear, Cut(0, (part,)), False)
    yield from _linear(attention.o_proj, f"{name}.o_proj", RowLinear, Cut(1, parts[:1]))
    if hasattr(attention, "cuts"):
        return
    if attention.conv_kernel is not None:
        yield _convolution(attention.conv1d, f"{name}.conv1d", Cut(0, parts), size)
    held = [part.size // part.pieces for part in parts]
    sizes = {"whole_sizes": attention.sizes, "sizes": held, "num_key_value_groups": held[0] // held[1]}
    yield _Change(attention, {}, attributes={**sizes, "partners": LayerPartners(group)})


def _whole_sizes(attention: Any) -> list[int]:
    """Channels of queries, keys and values in all processes together."""
    sizes: list[int] = getattr(attention, "whole_sizes", attention.sizes)
    return sizes


def _attention_parts(attention: Any, size: int) -> tuple[Part, ...]:
    """Of what the three projections give."""
    sizes = _whole_sizes(attention)
    pieces = min(sizes[1] // attention.head_dim, size)
    return tuple(Part(width, count) for width, count in zip(sizes, (size, pieces, pieces), strict=True))


def _of_mlp(mlp: Any, name: str, group: Group) -> Iterator[_Change]:
    size = group.size
    down = _innermost(mlp.down_proj)
    width = down.in_features
    _shared(width, size, f"{name}: intermediate_size={width} channels")
    for projection in ("gate_proj", "up_proj") if mlp.gated else ("up_proj",):
        rows = Cut(0, (Part(width, size),))
        yield from _linear(getattr(mlp, projection), f"{name}.{projection}", ColumnLinear, rows, False)
    yield from _linear(mlp.down_proj, f"{name}.down_proj", RowLinear, Cut(1, (Part(width, size),)))
    if not hasattr(mlp, "cuts"):
        yield _Change(mlp, {}, attributes={"partners": LayerPartners(group)})


def _of_experts(experts: Any, name: str, group: Group) -> Iterator[_Change]:
    if hasattr(experts, "cuts"):
        return
    size = group.size
    width, up = experts.intermediate_dim, experts.up_name
    _shared(width, size, f"{name}: moe_intermediate_size={width} channels")
    _plain(experts, name, up, "down_proj")
    part = Part(width, size)
    cuts = {up: Cut(1, (part,) * (2 if up == "gate_up_proj" else 1)), "down_proj": Cut(2, (part,))}
    cls = cut_class(CutExperts, type(experts))  # type: ignore[arg-type]
    yield _Change(experts, cuts, cls, {"intermediate_dim": width // size, "partners": LayerPartners(group)})


def _rows_of(model: nn.Module, layer: nn.Module, size: int) -> tuple[Part, ...]:
    """How the outputs of a layer inside of ``model`` are cut."""
    for module in model.modules():
        if isinstance(module, Attention):
            places = [_innermost(getattr(module, name)) for name in ("q_proj", "k_proj", "v_proj")]
            if layer in places:
                return (_attention_parts(module, size)[places.index(layer)],)
    return (Part(layer.out_features, size),)  # type: ignore[arg-type]


def _innermost(module: Any) -> Any:
    """The linear layer that LoRA wraps, or the module itself."""
    return module.get_base_layer() if hasattr(module, "lora_A") else module


def _linear(module: Any, name: str, cls: type[nn.Module], cut: Cut, enters: bool = True) -> Iterator[_Change]:
    """A linear layer whose outputs (``ColumnLinear``) or inputs (``RowLinear``) are cut, and what LoRA adds to it; see
    :attr:`ColumnLinear.enters`.
    """
    attributes = {} if enters else {"enters": False}
    base = _innermost(module)
    if not hasattr(base, "cuts"):
        if type(base) is not nn.Linear or not is_unhooked(base) or not is_unhooked(module):
            raise _cannot_be_cut(name, module)
        _plain(base, name, "weight", *(("bias",) if base.bias is not None else ()))
        yield _Change(base, _cuts_of(base, cls, cut), cls, attributes)
    if base is module:
        return
    if getattr(module, "lora_variant", None) or getattr(module, "merged", False):
        raise _cannot_be_cut(name, module)
    factors = module.lora_B if cls is ColumnLinear else module.lora_A
    for adapter, factor in factors.items():
        if not hasattr(factor, "cuts"):
            _plain(factor, f"{name}, adapter {adapter!r}", "weight")
            yield _Change(factor, _cuts_of(factor, cls, cut), cls, attributes)
            down = module.lora_A[adapter]
            if not enters:  # of what enters the other factor each process has its own part of the gradient
                yield _Change(down, {"weight": Cut(0, (Part(down.out_features, 1),))}, CopiedLinear)


def _cuts_of(linear: nn.Linear, cls: type[nn.Module], cut: Cut) -> dict[str, Cut]:
    with_bias = linear.bias is not None and cls is ColumnLinear
    return {"weight": cut, "bias": cut} if with_bias else {"weight": cut}


def _convolution(conv1d: Any, name: str, cut: Cut, size: int) -> _Change:
    if type(conv1d) is not CausalConv1d or not is_unhooked(conv1d):
        raise _cannot_be_cut(name, conv1d)
    names = ("weight",) if conv1d.bias is None else ("weight", "bias")
    _plain(conv1d, name, *names)
    channels = sum(part.size // part.pieces for part in cut.parts)
    sizes = dict.fromkeys(("in_channels", "out_channels", "groups"), channels)
    return _Change(conv1d, dict.fromkeys(names, cut), CutConv1d, sizes)


def _plain(module: nn.Module, name: str, *parameters: str) -> None:
    """Refuses parameters that are not there, or are no plain tensors."""
    for parameter in parameters:
        tensor = getattr(module, parameter)
        if type(tensor) not in PLAIN_TENSORS or tensor.is_meta:
            held = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__}"
            raise ArgumentError(
                f"{name}.{parameter} is {held}: tensor_parallel cuts a model that is loaded and not sharded yet, then "
                "FSDP2 or DDP may wrap it"
            )


def _cannot_be_cut(name: str, module: nn.Module) -> ArgumentError:
    return ArgumentError(
        f"{name} is a {type(module).__module__}.{type(module).__qualname__}, quantized, hooked or adapted so that it "
        "cannot be cut: call tensor_parallel on the plain model, or with plain LoRA that is not merged, before "
        "anything else is done to it"
    )


def _shared(count: int, size: int, what: str) -> None:
    if count % size:
        fitting = [divisor for divisor in range(1, count + 1) if count % divisor == 0]
        raise ArgumentError(
            f"{what} cannot be shared by {size} processes alike: use a number of processes (tp_size) that divides "
            f"{count}: {', '.join(map(str, fitting[:12]))}"
        )


def _shared_or_copied(count: int, size: int, what: str) -> None:
    if count % size and size % count:
        raise ArgumentError(
            f"{what} can neither be shared by {size} processes nor can as many of these share each: use a number of "
            f"processes (tp_size) that divides {count}, or a multiple of it"
        )


def _cuts(module: nn.Module) -> dict[str, Cut]:
    cuts: dict[str, Cut] = getattr(module, "cuts", {})
    return cuts


def group_of(model: nn.Module) -> Group | None:
    """Of the processes for which :func:`tensor_parallel` has cut a model, None if it has not.

    Raises:
        ArgumentError: layers are cut for several groups.
    """
    groups: set[Any] = {module.group for module in model.modules() if _cuts(module)}
    if len(groups) > 1:
        raise ArgumentError(f"{type(model).__name__} is cut for {len(groups)} groups of processes, expected one")
    return next(iter(groups), None)


def _parameters(model: nn.Module) -> Iterator[tuple[Any, str, nn.Parameter]]:
    """Every module, and a name and parameter of its own."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def every_cut(model: nn.Module) -> Iterator[tuple[str, Cut]]:
    """Names in the model's ``state_dict``, and how the tensors are cut."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, cut in _cuts(module).items():
            yield f"{prefix}.{name}" if prefix else name, cut


@torch.no_grad()
def _agree(model: nn.Module, group: Group) -> None:
    """Gives what several processes hold the values of the first of them: they may have drawn different ones."""
    done: set[int] = set()
    for module in model.modules():
        for tensor in module._buffers.values():
            if tensor is not None and not tensor.is_meta:
                tensor.copy_(_of_first(tensor, group))
    for module, name, parameter in _parameters(model):
        if id(parameter) in done:
            continue
        done.add(id(parameter))
        cut = _cuts(module).get(name)
        if cut is None:
            parameter.copy_(_of_first(parameter, group))
            continue
        for start, length, count in cut.copies(group.size):
            rows = parameter.narrow(cut.dim, start, length)
            rows.copy_(group.gather(_sendable(rows, group))[group.rank // count * count])


def _sendable(tensor: Tensor, group: Group) -> Tensor:
    """The tensor where the group's backend can send it: NCCL's is a GPU."""
    import torch.distributed as dist

    if tensor.is_cuda or "nccl" not in dist.get_backend(group.process_group):
        return tensor.contiguous()
    return tensor.to("cuda").contiguous()


def _of_first(tensor: Tensor, group: Group) -> Tensor:
    """The tensor of the group's first process, where this process's is."""
    import torch.distributed as dist

    sent = _sendable(tensor, group).clone()
    dist.broadcast(sent, group=group.process_group, group_src=0)
    return sent.to(tensor.device)
