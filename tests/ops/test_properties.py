"""Laws that hold for every size, split and packing."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssd_cases import inner_arguments, relative_error, scan_inputs, slice_tokens

from mamba2_hf import ops

EXACT = 1e-11
few = settings(max_examples=25, deadline=None, derandomize=True)
tokens = st.integers(1, 70)
chunks = st.sampled_from([1, 3, 16, 64, None])
seeds = st.integers(0, 2**16)


@few
@given(seeds, tokens, chunks, st.data())
def test_states_pass_through_a_split_anywhere(seed, length, chunk_size, data):
    split = data.draw(st.integers(0, length))
    inputs = scan_inputs(tokens=length, seed=seed)
    run = {"dt_softplus": True, "chunk_size": chunk_size, "return_final_states": True}
    y, last = ops.ssd_chunk_scan(**inputs, **run)
    state, parts = inputs["initial_states"], []
    for part in (slice(0, split), slice(split, length)):
        if part.start < part.stop:
            piece = slice_tokens(inputs, part)
            piece["initial_states"] = state
            out, state = ops.ssd_chunk_scan(**piece, **run)
            parts.append(out)
    assert relative_error(torch.cat(parts, 1), y) < EXACT
    assert relative_error(state, last) < EXACT


@few
@given(seeds, tokens, st.data())
def test_the_whole_mixer_passes_its_states_too(seed, length, data):
    split = data.draw(st.integers(0, length))
    arguments = inner_arguments(seed, length)
    zxbcdt = arguments.pop("zxbcdt")
    y, *last = ops.mamba2_inner(zxbcdt, **arguments, return_final_states=True)
    states, parts = [None, None], []
    for part in (zxbcdt[:, :split], zxbcdt[:, split:]):
        if part.shape[1]:
            out, *states = ops.mamba2_inner(
                part,
                **arguments,
                conv_initial_states=states[0],
                ssm_initial_states=states[1],
                return_final_states=True,
            )
            parts.append(out)
    assert relative_error(torch.cat(parts, 1), y) < EXACT
    for state, expected in zip(states, last, strict=True):
        assert relative_error(state, expected) < EXACT


@few
@given(seeds, st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any), st.integers(0, 9))
def test_packed_is_separate_and_what_follows_the_last_document_does_not_matter(seed, lengths, tail):
    total = sum(lengths)
    arguments = inner_arguments(seed, total + tail, batch=1)
    zxbcdt = arguments.pop("zxbcdt")
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed, *states = ops.mamba2_inner(zxbcdt, **arguments, cu_seqlens=cu_seqlens, return_final_states=True)
    other = zxbcdt.clone()
    other[:, total:] = torch.nan
    again = ops.mamba2_inner(other, **arguments, cu_seqlens=cu_seqlens)
    assert torch.equal(again[:, :total], packed[:, :total])
    for i, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        if start == end:
            assert not any(state[i].any() for state in states)
            continue
        alone, *ends = ops.mamba2_inner(zxbcdt[:, start:end], **arguments, return_final_states=True)
        assert relative_error(packed[:, start:end], alone) < EXACT
        for state, expected in zip(states, ends, strict=True):
            assert relative_error(state[i : i + 1], expected) < EXACT
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    by_index = ops.mamba2_inner(zxbcdt[:, :total], **arguments, seq_idx=seq_idx)
    assert relative_error(by_index, packed[:, :total]) < EXACT


@few
@given(seeds, st.integers(2, 70), chunks, st.data())
def test_the_future_does_not_reach_the_past(seed, length, chunk_size, data):
    now = data.draw(st.integers(1, length - 1))
    inputs = scan_inputs(tokens=length, seed=seed)
    changed = {name: value.clone() for name, value in inputs.items()}
    for name in ("x", "dt", "B", "C", "z"):
        changed[name][:, now:] *= -3
    y, other = (ops.ssd_chunk_scan(**i, dt_softplus=True, chunk_size=chunk_size) for i in (inputs, changed))
    assert relative_error(other[:, :now], y[:, :now]) < 1e-13


@few
@given(seeds, tokens, chunks, chunks)
def test_the_chunk_size_is_no_semantic(seed, length, one, another):
    inputs = scan_inputs(tokens=length, seed=seed)
    y, other = (ops.ssd_chunk_scan(**inputs, dt_softplus=True, chunk_size=size) for size in (one, another))
    assert relative_error(other, y) < EXACT


@few
@given(seeds, tokens)
def test_linear_in_the_input_and_rows_do_not_meet(seed, length):
    inputs = scan_inputs(tokens=length, seed=seed)
    inputs.pop("initial_states")
    y = ops.ssd_chunk_scan(**inputs, dt_softplus=True)
    doubled = ops.ssd_chunk_scan(**{**inputs, "x": 2 * inputs["x"]}, dt_softplus=True)
    assert relative_error(doubled, 2 * y) < EXACT
    per_row = {name: value[1:] if value.shape[0] == 2 and value.dim() > 2 else value for name, value in inputs.items()}
    assert relative_error(ops.ssd_chunk_scan(**per_row, dt_softplus=True), y[1:]) < EXACT
