"""Every kernel compiles for every GPU family, fits its shared memory, and does not spill where it matters.

Run as a script, this file compiles for the target it is given and prints what the kernels need: the tests run it in a
process of its own, since Triton decides at import whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from forks import forks

# Sizes of a 2.7B model's layer; every option with wide heads; odd sizes, packed; segments in fp32; its widest state.
SCANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"P": 128, "dtype": "float16", "z": True, "D": 2, "documents": True},
    "odd": {"P": 48, "N": 24, "T": 100, "G": 2, "packed": True},
    "segments": {"N": 64, "T": 16384, "dtype": "float32"},
    "wide": {"N": 256, "dtype": "float32"},
    "odd slices": {"P": 48, "N": 24, "T": 100, "G": 2, "slices": True},
}
# Sizes and options that take other paths through the kernels made for Hopper, where "plain" goes too.
HOPPER_SCANS: dict[str, dict[str, Any]] = {
    "documents, segments": {"T": 16384, "documents": True, "dtype": "float16"},
    "small state": {"N": 16, "H": 3},
    "own maps": {"G": 4, "N": 64},
    "large state": {"N": 256},
    "wide heads": {"P": 128},
    "slices": {"P": 128, "slices": True},
}
# Those that are compiled for a target: each for one at least, as a compiler with an empty cache takes minutes for all.
CHOSEN = {
    "sm_90": (*SCANS, *HOPPER_SCANS),
    "sm_80": ("options", "odd", "segments"),
    "sm_100": ("plain", "odd slices"),
    "gfx942": ("options", "odd"),  # the widest tiles, where shared memory is smallest
}
SCAN_KERNELS = {"walk_kernel", "state_kernel", "inputs_backward_kernel", "maps_backward_kernel"}
HOPPER_KERNELS = {"walk_kernel", "state_kernel", "chunk_backward_kernel"}
INVARIANT_KERNELS = ("recur_kernel", "attend_kernel")
MIXER_KERNELS = {
    *INVARIANT_KERNELS,
    "conv_forward_kernel",
    "conv_state_kernel",
    "conv_backward_kernel",
    "conv_initial_gradient_kernel",
    "conv_update_kernel",
    "norm_forward_kernel",
    "norm_backward_kernel",
    "norm_products_kernel",
    "state_update_kernel",
    "step_kernel",
    "finish_kernel",
    "block_kernel",
    "convolve_block_kernel",
    "finish_block_kernel",
    "convolve_rows_kernel",
    "advance_rows_kernel",
    "enter_kernel",
    "enter_step_kernel",
    "leave_kernel",
    "joined_kernel",
    "exchange_kernel",
    "cross_entropy_kernel",
    "add_kernel",
    "sum_rows_kernel",
    "gate_kernel",
    "gated_kernel",
    "mlp_inner_kernel",
    "project_back_kernel",
    "router_kernel",
    "choose_kernel",
    "experts_inner_kernel",
    "experts_leave_kernel",
    "attend_part_kernel",
    "attend_sum_kernel",
    "rotary_kernel",
    "attention_enter_kernel",
    "attention_enter_rows_kernel",
    "place_kernel",
}
ROWS_KERNELS = {  # of several sequences' steps, where these were timed
    "norm_rows_kernel",
    "enter_rows_kernel",
    "leave_rows_kernel",
    "ring_step_kernel",
    "settle_kernel",
}
CAPABILITIES = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": 0}
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB that a program may have


def compile_scan(
    target: str,
    T: int = 256,
    H: int = 4,
    P: int = 64,
    G: int = 1,
    N: int = 128,
    dtype: str = "bfloat16",
    D: int = 1,
    z: bool = False,
    documents: bool = False,
    packed: bool = False,
    slices: bool = False,
) -> list[dict[str, Any]]:
    """Forward and backward of one scan, compiled and not run; with ``slices`` of rows that go on elsewhere."""
    import torch
    from compiling import compile_only

    from mamba2_hf.ops.scan.op import Scan
    from mamba2_hf.ops.scan.triton import ssd_chunk_scan
    from mamba2_hf.ops.spec import Packing

    class Neighbors:
        def state_before(self, own: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
            return own

        gradient_after = state_before

    _set_chip(target)
    kind = getattr(torch, dtype)
    x = torch.zeros(1, T, H, P, dtype=kind, requires_grad=True)
    maps = torch.zeros(1, T, G, N, dtype=kind)
    per_head = torch.zeros(H)
    with compile_only(target) as kernels:
        y, _ = ssd_chunk_scan(
            Scan(
                *(x, torch.zeros(1, T, H, dtype=kind), per_head, maps, maps),
                D=per_head if D == 1 else torch.zeros(H, P),
                z=torch.zeros_like(x) if z else None,
                dt_bias=per_head,
                dt_softplus=True,
                packing=Packing(
                    torch.zeros(1, T, dtype=torch.int32) if documents else None,
                    torch.tensor([0, 10, T]) if packed else None,
                ),
            ),
            Neighbors() if slices else None,
        )
        y.sum().backward()
    return [kernel._asdict() for kernel in kernels]


def compile_prompts(target: str) -> list[dict[str, Any]]:
    """Forwards of scans and convolutions of many lengths and numbers of documents, compiled and not run."""
    import torch
    from compiling import compile_only

    from mamba2_hf.ops.conv import triton as conv
    from mamba2_hf.ops.conv.op import Conv
    from mamba2_hf.ops.scan.op import Scan
    from mamba2_hf.ops.scan.triton import ssd_chunk_scan
    from mamba2_hf.ops.spec import Packing

    _set_chip(target)
    per_head, weight = torch.zeros(16), torch.zeros(64, 4, dtype=torch.bfloat16)
    packings: list[tuple[int, tuple[int, ...]]] = [(17, ()), (100, ()), (256, ()), (300, ())]
    packings += [(256, (0, 256)), (300, (0, 7, 9, 300)), (333, tuple(range(0, 340, 20)))]
    with compile_only(target) as kernels, torch.no_grad():
        for tokens, bounds in packings:
            x, maps = (torch.zeros(1, tokens, *size, dtype=torch.bfloat16) for size in ((16, 64), (1, 128)))
            packing = Packing(None, torch.tensor(bounds).clamp(max=tokens) if bounds else None)
            ssd_chunk_scan(Scan(x, x[..., 0].contiguous(), per_head, maps, maps, dt_softplus=True, packing=packing))
            call = Conv(x[:, :, 0], weight, None, None, packing, "silu")
            conv.conv_forward(call, conv.documents(call.x, packing))
    return [kernel._asdict() for kernel in kernels]


def combinations(target: str, *choices: Sequence[Any]) -> Iterable[tuple[Any, ...]]:
    """Of values to choose from: every one where it is asked what a kernel spills; as many elsewhere that each value is
    in one of them, since what a target cannot compile or hold lies in one value, and compiling takes long.
    """
    if target == "sm_90":
        return itertools.product(*choices)
    count = max(map(len, choices))
    return zip(*(itertools.islice(itertools.cycle(values), count) for values in choices), strict=True)


def _set_chip(target: str) -> None:
    from mamba2_hf.ops.runtime import tables

    capability = CAPABILITIES[target]
    tables.current_chip = lambda: tables.Chip("cuda" if capability else "hip", capability, 132)


def compile_invariant(H: int, P: int, N: int) -> None:
    """What does not depend on the batch: for all numbers of sequences, tokens and keys, and wherever these lie."""
    import torch

    from mamba2_hf.ops.invariant import kernels

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16)

    for documents, tokens in ((1, 1), (2, 16), (3, 7)):
        per_head = torch.zeros(H)
        maps, dt = zeros(documents, tokens, 1, N), torch.zeros(documents, tokens, H)
        lengths = torch.full((documents,), tokens) if tokens > 1 else None
        state = torch.zeros(documents, H, P, N)
        kernels.recur(zeros(documents, tokens, H, P), dt, per_head, maps, maps, per_head, state, lengths)
        seen = torch.zeros(documents, tokens, dtype=torch.long)
        for keys in (1, 33, 64):
            k = zeros(documents, 2, keys + 1, 64)[:, :, 1:]
            kernels.attend_each(zeros(documents, 8, tokens, 64), k, k, seen, seen, seen, 0.125)


def compile_mixer(target: str) -> list[dict[str, Any]]:
    """The kernels around the scan at the sizes of a 2.7B model's layer, bf16, in every packing; nothing runs."""
    import torch
    from compiling import compile_only

    from mamba2_hf.ops.attention import triton as attention
    from mamba2_hf.ops.attention.op import AttentionStep, OneQuery, Rotary
    from mamba2_hf.ops.conv import triton as conv
    from mamba2_hf.ops.conv.op import Conv, ConvUpdate
    from mamba2_hf.ops.cross_entropy import triton as loss
    from mamba2_hf.ops.mixer import block as mixer_block
    from mamba2_hf.ops.mixer import step as mixer_step
    from mamba2_hf.ops.mixer import triton as training
    from mamba2_hf.ops.mixer.advance import new_ring, settle
    from mamba2_hf.ops.mixer.op import BlockStep, LayerStep, Step, new_block
    from mamba2_hf.ops.mlp import triton as mlp
    from mamba2_hf.ops.mlp.op import ACTIVATIONS, ExpertsStep, Gated, MLPStep
    from mamba2_hf.ops.norm import triton as norm
    from mamba2_hf.ops.norm.op import Norm
    from mamba2_hf.ops.partners import Joined
    from mamba2_hf.ops.runtime import tables
    from mamba2_hf.ops.runtime.peers import Exchange, exchange
    from mamba2_hf.ops.scan import update as scan_update
    from mamba2_hf.ops.scan.op import Update
    from mamba2_hf.ops.spec import LayerWeights, Linear, MixerSpec, MixerWeights, Packing, Peers, RingState
    from mamba2_hf.ops.triton import sums_over_peers

    _set_chip(target)
    H, P, N, K, T = 80, 64, 128, 4, 16
    inner = H * P
    channels = inner + 2 * N

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Of floats without their values, which nobody reads: writing hundreds of megabytes takes seconds."""
        return (torch.empty if dtype.is_floating_point else torch.zeros)(*shape, dtype=dtype)

    rows, weight, bias = zeros(1, T, 2 * inner + 2 * N + H), zeros(channels, K), zeros(channels)
    z, xbc = rows[..., :inner], rows[..., inner : inner + channels]
    dy, state = zeros(1, T, channels), zeros(1, channels, K - 1)
    per_head = zeros(H, dtype=torch.float32)
    with compile_only(target) as kernels:
        for seq_idx, cu_seqlens in ((None, None), (zeros(1, T, dtype=torch.int32), None), (None, torch.tensor([0, T]))):
            initial = None if seq_idx is None and cu_seqlens is None else state
            call = Conv(xbc, weight, bias, initial, Packing(seq_idx, cu_seqlens), "silu")
            packing = conv.documents(xbc, call.packing)
            conv.conv_forward(call, packing)
            conv.conv_backward(dy, initial, call, packing)
        y, norm_weight = zeros(1, T, inner), zeros(inner)
        compile_invariant(H, P, N)
        for group_size, norm_before_gate in ((inner, False), (inner // 8, True), (P, False)):
            gated = Norm(y, z, norm_weight, 1e-5, group_size, norm_before_gate, y.dtype)
            norm.norm_forward(gated)
            norm.norm_backward(y, gated)
        plain = Norm(y.float(), None, norm_weight, 1e-5, inner, False, y.dtype)
        norm.norm_forward(plain)
        norm.norm_backward(y, plain)
        norm.norm_backward(y, plain, more=y.float(), y=y)
        norm.norm_backward(y, Norm(y, z, norm_weight, 1e-5, inner, False, y.dtype), y=y)
        part, sums = Norm(y, z, norm_weight, 1e-5, inner, False, y.dtype), zeros(T, dtype=torch.float32)
        norm.norm_forward(part, sums)
        norm.norm_backward(y, part, y=y, whole=norm.WholeGroup(2 * inner, sums, norm.norm_products(y, part)))
        training._add(y.float(), y, 0.5)
        mixer = MixerWeights(weight, bias, per_head, per_head, None, per_head, norm_weight)
        for batch in (1, 64):
            ssm_state = zeros(batch, H, P, N, dtype=torch.float32)
            x, step, maps = zeros(batch, H, P), zeros(batch, H), zeros(batch, 1, N)
            arguments = (ssm_state, x, step, per_head, maps, maps, per_head, x, per_head, True)
            scan_update.ssd_state_update(Update(*arguments))
            slots = zeros(batch, dtype=torch.int32)
            wide = Update(ssm_state, x, x, -zeros(H, P, N), maps, maps, dt_bias=zeros(H, P), slots=slots)
            scan_update.ssd_state_update(wide)
            block = ConvUpdate(zeros(batch, 1, channels), zeros(batch, channels, K), weight, bias, "silu")
            conv.causal_conv1d_update(block)
            conv.causal_conv1d_update(block._replace(slots=slots))
            rows_of_step = zeros(batch, 1 + batch % 2, rows.shape[-1])
            spec = MixerSpec(P, 1, group_size=inner)
            mixer_step.mamba2_step(Step(rows_of_step, zeros(batch, channels, K - 1), ssm_state, mixer, spec))
            conv_state = zeros(batch, channels, K - 1)
            held = new_block(conv_state, ssm_state, 1, 9)
            block_step = BlockStep(zeros(batch, 9, rows.shape[-1]), conv_state, ssm_state, held, mixer, spec)
            mixer_block.mamba2_block_step(block_step)
        many = tables.MANY_ROWS + 1
        states = zeros(many, channels, K - 1), zeros(many, H, P, N, dtype=torch.float32)
        mixer_step.mamba2_step(Step(zeros(many, 1, rows.shape[-1]), *states, mixer, spec))
        entering = rows.shape[-1]
        mixer = mixer._replace(A=None, A_log=per_head)
        one = [(1, inner // 2, inner), (1, inner // 2, inner // 8), (1, 768, inner)]
        several = [(16, inner // 2, inner), (64, inner // 2, inner), (64, inner // 2, inner // 8)]
        bare = mixer._replace(gated_norm_weight=None)
        options = ((mixer, ()), (bare, (0.5, 0.5, 2.0, 2.0, 1.5)))
        sizes = one + several if target == "sm_90" else [one[2], several[0], several[2]]
        for (batch, width, group_size), (own, multipliers) in combinations(target, sizes, options):
            training.mamba2_layer_step(
                LayerStep(
                    *(zeros(batch, 1, width, dtype=torch.float32), zeros(batch, channels, K - 1)),
                    zeros(batch, H, P, N, dtype=torch.float32),
                    LayerWeights(zeros(width), Linear(zeros(entering, width)), own, Linear(zeros(width, inner))),
                    MixerSpec(*(P, 1), group_size=group_size, norm_before_gate=width < 1000, multipliers=multipliers),
                )
            )
        # A layer so small that each output is one program's.
        for dtype, batch in combinations(target, (torch.float32, torch.bfloat16), (4, 16)):

            def small(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
                return zeros(*shape, dtype=of)

            little = MixerWeights(small(96, K), small(96), small(4), None, small(4), small(4), small(64))
            moved = small(batch, 96, K - 1), small(batch, 4, 16, 16)
            training.mamba2_layer_step(
                LayerStep(
                    small(batch, 1, 32, of=torch.float32),
                    *moved,
                    LayerWeights(small(32), Linear(small(164, 32)), little, Linear(small(32, 64))),
                    MixerSpec(16, 1, group_size=64),
                    ring=new_ring(*moved),
                )
            )
        stream = zeros(64, 1, 2560, dtype=torch.float32)
        weights = LayerWeights(zeros(2560), Linear(zeros(entering, 2560)), mixer, Linear(zeros(2560, inner)))
        for kept, own in combinations(target, (torch.float32, torch.bfloat16), (mixer, bare)):
            states = zeros(64, channels, K - 1), zeros(64, H, P, N, dtype=kept)
            ring, spec = new_ring(*states), MixerSpec(P, 1, group_size=inner)
            training.mamba2_layer_step(LayerStep(stream, *states, weights._replace(mixer=own), spec, ring=ring))
            if ring.clock is not None:
                settle(RingState(states[1], ring))
        for batch, size in (
            (1, 2 * inner),
            (1, inner // 8),
            (64, 2 * inner),
        ):  # heads of which others have more, or not
            stream, spec = zeros(batch, 1, 2560, dtype=torch.float32), MixerSpec(P, 1, group_size=size)
            states = zeros(batch, channels, K - 1), zeros(batch, H, P, N, dtype=torch.float32)
            weights = LayerWeights(zeros(2560), Linear(zeros(entering, 2560)), mixer, Linear(zeros(2560, inner)))
            call = LayerStep(stream, *states, weights, spec)
            part = training.mamba2_layer_step(call._replace(part=True))
            training.joined(Joined(part, stream, zeros(2560), 1.0, size, 1e-5))
            for devices in (2, 8):
                peers = Peers(torch.zeros(4 + devices, dtype=torch.int64), 1, devices, 2**18)
                if sums_over_peers(call._replace(peers=peers)):
                    training.mamba2_layer_step(call._replace(peers=peers))
                exchange(Exchange(stream, peers, beside=devices == 2))
        many = zeros(1024, 2560)
        for squares in (None, zeros(1024, dtype=torch.float32)):
            training._join(many, squares, many.float(), many.float(), None, (2 * inner, 1e-5), (1.0, 1.0))
        norm.gate_forward(y, z)
        norm.gate_backward(y, y, z, z, y)
        width = 2048
        stream, norm_weight = zeros(1, 1, width, dtype=torch.float32), zeros(width)
        for kind in ACTIVATIONS:
            mlp.gated_activation(Gated(zeros(4, 2 * width), None, kind, packed=True))
            mlp._gated_backward(Gated(zeros(4, width), zeros(4, width), kind), zeros(4, width))
        up, down = Linear(zeros(8192, width)), Linear(zeros(width, 8192))
        for kind, gate in combinations(target, list(ACTIVATIONS), (None, zeros(8192, width))):
            mlp.mlp_step(MLPStep(stream, norm_weight, gate, None, up, down, kind))
        eight = Peers(torch.zeros(12, dtype=torch.int64), 1, 8, 2**18)
        for shared in ({"peers": eight}, {"part": True}):  # its last kernel is that of attention, too
            mlp.mlp_step(MLPStep(stream, norm_weight, None, None, up, down, "silu")._replace(**shared))
        inner_weights = (zeros(64, width), zeros(64, 1024, width), zeros(64, width, 512))
        for batch, shared in combinations(target, (1, 16), ({}, {"peers": eight}, {"part": True})):
            several_rows = stream.expand(batch, 1, width).contiguous()
            of_experts = ExpertsStep(several_rows, norm_weight, *inner_weights, 6, "silu")
            mlp.experts_step(of_experts._replace(**shared))
        for heads, groups in ((8, 2), (32, 32)):
            q, k = zeros(2, heads, 1, 128), zeros(2, groups, 4096, 128)
            attention.attend_one(OneQuery(q, k, k, torch.zeros(2, dtype=torch.int64), 0.1))
            angles = zeros(1, 1, 64, dtype=torch.float32)
            linears = [Linear(zeros(n * 128, width)) for n in (heads, groups, groups)]
            for batch, has_biases in combinations(target, (1, 16, 64), (False, True)):
                buffers = (zeros(batch, groups, 4096, 128), zeros(batch, groups, 4096, 128), norm_weight)
                lengths = torch.zeros(batch, dtype=torch.int64)
                states = zeros(batch, 1, width, dtype=torch.float32), *buffers
                weights = *linears, Linear(zeros(width, heads * 128))
                if has_biases:
                    weights = (*(Linear(each.weight, zeros(each.weight.shape[0])) for each in weights),)
                turns = None if has_biases else zeros(1, 1, 128, dtype=torch.float32)
                attention.attention_step(AttentionStep(*states, *weights, lengths, turns, turns, 0.1))
            attention.rotary(Rotary(q.transpose(1, 2), k[:, :, :1].transpose(1, 2), angles, angles))
        for gradient in (False, True):
            loss.rows(loss.Rows(zeros(4, 50288), torch.zeros(4, dtype=torch.long), 1.0, -100, gradient))
    return [kernel._asdict() for kernel in kernels]


@pytest.fixture(scope="module")
def compile_all() -> Iterator[Callable[[str], dict[str, list[dict[str, Any]]]]]:
    """Runs this file for a target."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    here = Path(__file__).resolve()
    folders = [here.parents[2] / "src", here.parent, here.parents[1] / "distributed"]
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, folders), environment.get("PYTHONPATH", "")])
    with forks("mamba2_hf.ops, triton.backends.compiler", "-W", "error", environment=environment) as run:

        def compile_for(target: str) -> dict[str, list[dict[str, Any]]]:
            # More is asked of one than that its kernels compile and fit: lines take the compiler long.
            lines = "" if target == "sm_90" else "os.environ['TRITON_DISABLE_LINE_INFO'] = '1'\n"
            program = f"import os, runpy, sys; sys.argv[1:] = [{target!r}]\n{lines}"
            printed = run(f"{program}runpy.run_path({str(here)!r}, run_name='__main__')")
            found: dict[str, list[dict[str, Any]]] = json.loads(printed.splitlines()[-1])
            return found

        yield compile_for


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute of one core that is not shared
@pytest.mark.parametrize("target", CAPABILITIES)
def test_kernels_compile_everywhere(target: str, compile_all: Callable[[str], dict[str, Any]]) -> None:
    found = compile_all(target)
    prompts = [kernel["name"] for kernel in found.pop("prompts", ())]
    for case, kernels in found.items():
        names = {kernel["name"] for kernel in kernels}
        expected = SCAN_KERNELS
        if target == "sm_90" and case in ("plain", *HOPPER_SCANS):
            expected = HOPPER_KERNELS
        if case == "mixer":
            expected = MIXER_KERNELS | (ROWS_KERNELS if target == "sm_90" else {"scale_kernel"})
        assert names == expected if case == "mixer" else names >= expected, (case, names ^ expected)
        if case == "mixer":  # one kernel has one order of sums
            assert [kernel["name"] for kernel in kernels if kernel["name"] in INVARIANT_KERNELS] == [*INVARIANT_KERNELS]
        for kernel in kernels:
            assert kernel["shared"] <= SHARED[target] * 1024, (case, kernel)
    if target == "sm_80":  # requests of all lengths do not wait for a compiler again and again
        assert {name: prompts.count(name) for name in prompts} == {
            **{"layout_kernel": 1, "steps_kernel": 2, "walk_kernel": 2},  # packed, and not
            **{"conv_forward_kernel": 2, "conv_state_kernel": 2},
        }
    if target == "sm_90":
        # The backward uses every register there is and parks a few words outside its loops; a block of tokens, too, was
        # measured to be fastest with tiles of which a few words are parked.
        for kernel in found["plain"] + found["mixer"]:
            assert kernel["stack"] <= {"chunk_backward_kernel": 256, "block_kernel": 128}.get(kernel["name"], 0), kernel
        # Where consumers spill, the assembler has every product of theirs wait for the one before it.
        for kernel in found["large state"] + found["wide heads"]:
            assert kernel["stack"] <= 128, kernel


if __name__ == "__main__":
    target = sys.argv[1]
    chosen = {name: (SCANS | HOPPER_SCANS)[name] for name in CHOSEN[target]}
    found = {name: compile_scan(target, **case) for name, case in chosen.items()}
    if target == "sm_80":
        found["prompts"] = compile_prompts(target)
    print(json.dumps(found | {"mixer": compile_mixer(target)}))
