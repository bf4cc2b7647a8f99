"""Kernels of the causal depthwise convolution (+ SiLU) on channels-last rows, forward and backward.

A program owns a block of channels and walks a run of tokens, one vector of channels per step: the last K - 1 inputs
travel along in registers (the *window*), so every input is read once and no tap needs a shifted copy. Where a document
starts, the window is replaced by that document's history, which is all that packing takes. The backward walks the same
way and carries the K - 1 input gradients that later tokens still add to; weight and bias gradients are summed per
program and then over programs in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..scan.prep import _silu

ACTIVATIONS = (None, "silu")  # that `activate` and `_slope` know
# How documents are told apart; see `Documents`.
NO_PACKING = tl.constexpr(0)
BY_INDEX = tl.constexpr(1)
BY_BOUNDS = tl.constexpr(2)


@triton.jit
def _when(flag, inside):
    """The mask ``inside`` where the scalar ``flag`` holds; ``&`` of the two is no mask in Triton's interpreter."""
    return tl.where(flag, inside, False)


@triton.jit
def load_taps(weight, bias, channel, inside, K: tl.constexpr):
    """The K taps and the bias of a block of channels, fp32."""
    taps = ()
    for i in tl.static_range(K):
        taps = taps + (tl.load(weight + channel * K + i, mask=inside, other=0.0).to(tl.float32),)
    if bias is None:
        offset = tl.zeros(channel.shape, tl.float32)
    else:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return taps, offset


@triton.jit
def _history(initial, document, column, channel, inside, C, K: tl.constexpr):
    """Column ``column`` of a document's initial state; zeros outside of ``[0, K - 1)`` or where there is no state."""
    if initial is None:
        value = tl.zeros(channel.shape, tl.float32)
    else:
        at = initial + (document.to(tl.int64) * C + channel) * (K - 1) + column
        value = tl.load(at, mask=_when((column >= 0) & (column < K - 1), inside), other=0.0).to(tl.float32)
    return value


@triton.jit
def _same_document(ids, earlier, T):
    """Whether tokens ``earlier`` and ``earlier + 1`` of a row share a document; true where one is outside the row."""
    within = (earlier >= 0) & (earlier + 1 < T)
    first = tl.load(ids + earlier, mask=within, other=0)
    return first == tl.load(ids + earlier + 1, mask=within, other=0)


@triton.jit
def _window_before(t, x_row, sx_t, ids, initial, document, start, channel, inside, T, C,
                   MODE: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """The K - 1 inputs before token ``t``, oldest first, as its document (which begins at ``start``) sees them."""
    window = ()
    reachable = t == t
    for back in tl.static_range(1, K):
        at = t - back
        if MODE == BY_INDEX:
            reachable = reachable & _same_document(ids, at, T)
        seen = _when(reachable, inside)
        here = tl.load(x_row + at.to(tl.int64) * sx_t * VEC + channel, mask=_when(at >= start, seen), other=0.0)
        before = _history(initial, document, at - start + K - 1, channel, seen, C, K)
        window = (here.to(tl.float32) + before,) + window
    return window


@triton.jit
def _enter(t, window, ids, documents, initial, channel, inside, T, C, MODE: tl.constexpr, K: tl.constexpr):
    """Replaces the window where token ``t`` starts a document. Returns the window and whether it does."""
    fresh = ~_same_document(ids, t - 1, T)
    if MODE == BY_BOUNDS:
        document = tl.minimum(tl.load(ids + t, mask=t < T, other=0), documents - 1)
    replaced = ()
    for i in tl.static_range(K - 1):
        if MODE == BY_BOUNDS:
            other = _history(initial, document, i, channel, _when(fresh, inside), C, K)
        else:
            other = tl.zeros_like(window[i])
        replaced = replaced + (tl.where(fresh, other, window[i]),)
    return replaced, fresh


@triton.jit
def _owned(t, ids, documents, T, MODE: tl.constexpr):
    """Whether token ``t`` is in the row and belongs to a document."""
    owned = t < T
    if MODE == BY_BOUNDS:
        owned = tl.load(ids + t, mask=owned, other=documents) < documents
    if MODE == BY_INDEX:
        owned = tl.load(ids + t, mask=owned, other=-1) >= 0
    return owned


@triton.jit
def convolve(window, value, taps, offset, K: tl.constexpr):
    """Output for ``value`` after a window of K - 1 earlier inputs, before the activation."""
    total = offset + taps[K - 1] * value
    for i in tl.static_range(K - 1):
        total += taps[i] * window[i]
    return total


@triton.jit
def activate(total, ACTIVATION: tl.constexpr):
    """The activation of the convolution's output."""
    if ACTIVATION == "silu":
        total = _silu(total)
    return total


@triton.jit
def _slope(total, ACTIVATION: tl.constexpr):
    """The derivative of :func:`activate`."""
    if ACTIVATION == "silu":
        gate = tl.sigmoid(total)
        return gate * (1.0 + total * (1.0 - gate))


@triton.jit
def _place(T, C, RUN, BLOCK: tl.constexpr):
    """Row, first token and channels of this program; blocks of channels are neighbors in memory and in the grid."""
    blocks = tl.cdiv(C, BLOCK)
    pid = tl.program_id(0)
    run = pid // blocks
    runs = tl.cdiv(T, RUN)
    channel = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    return (run // runs).to(tl.int64), (run % runs) * RUN, channel


@triton.jit
def _document_of(t, row, ids, bounds, documents, T, MODE: tl.constexpr):
    """State index, first token and end of the document of token ``t`` (of the row, unless there are bounds)."""
    if MODE == BY_BOUNDS:
        document = tl.minimum(tl.load(ids + t), documents - 1)
        start = tl.load(bounds + document)
        end = tl.load(bounds + document + 1)
    else:
        document = row
        start = t * 0
        end = start + T
    return document, start, end


@triton.jit
def _load_steps(row, t, end, stride, channel, inside, VEC: tl.constexpr, STEPS: tl.constexpr):
    """``STEPS`` tokens from ``t`` on, zeros from ``end`` on."""
    values = ()
    for u in tl.static_range(STEPS):
        at = row + (t + u).to(tl.int64) * stride * VEC + channel
        values = values + (tl.load(at, mask=_when(t + u < end, inside), other=0.0),)
    return values


@triton.jit(do_not_specialize=["T", "RUN", "documents", "sx_b", "sy_b"])
def conv_forward_kernel(x, weight, bias, initial, ids, bounds, y, T, C, RUN, documents, sx_b, sx_t, sy_b, sy_t,
                        ACTIVATION: tl.constexpr, MODE: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr,
                        STEPS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One run of tokens for one block of channels. Strides are in units of ``VEC`` elements."""
    row, t0, channel = _place(T, C, RUN, BLOCK)
    inside = channel < C
    x_row, y_row = x + row * sx_b * VEC, y + row * sy_b * VEC
    if MODE == BY_INDEX:
        ids += row * T
    taps, offset = load_taps(weight, bias, channel, inside, K)
    document, start, _stop = _document_of(t0, row, ids, bounds, documents, T, MODE)
    window = _window_before(t0, x_row, sx_t, ids, initial, document, start, channel, inside, T, C, MODE, VEC, K)
    end = tl.minimum(t0 + RUN, T)
    following = _load_steps(x_row, t0, end, sx_t, channel, inside, VEC, STEPS)
    for step in range(0, end - t0, STEPS):
        t = t0 + step
        values = following
        following = _load_steps(x_row, t + STEPS, end, sx_t, channel, inside, VEC, STEPS)
        for u in tl.static_range(STEPS):
            if MODE != NO_PACKING:
                window, _fresh = _enter(t + u, window, ids, documents, initial, channel, inside, T, C, MODE, K)
            value = values[u].to(tl.float32)
            total = convolve(window, value, taps, offset, K)
            total = activate(total, ACTIVATION)
            if MODE != NO_PACKING:
                total = tl.where(_owned(t + u, ids, documents, T, MODE), total, 0.0)
            at = y_row + (t + u).to(tl.int64) * sy_t * VEC + channel
            tl.store(at, total.to(y.dtype.element_ty), mask=_when(t + u < T, inside))
            window = (window + (value,))[1:]


@triton.jit(do_not_specialize=["T", "sx_b"])
def conv_state_kernel(x, initial, ids, bounds, final, T, C, sx_b, sx_t,
                      MODE: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Final state of one document, ``(C, K - 1)``: what a token after its last one would see."""
    document = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    if MODE == BY_BOUNDS:
        row = document * 0
        start, end = tl.load(bounds + document), tl.load(bounds + document + 1)
    else:
        row = document
        start, end = tl.program_id(0) * 0, T
    if MODE == BY_INDEX:
        ids += row * T
    x_row = x + row * sx_b * VEC
    window = _window_before(end, x_row, sx_t, ids, initial, document, start, channel, inside, T, C, MODE, VEC, K)
    for i in tl.static_range(K - 1):
        at = final + (document * C + channel) * (K - 1) + i
        tl.store(at, window[i].to(final.dtype.element_ty), mask=inside)


@triton.jit
def _final_state_gradient(t, dfinal, row, ids, bounds, documents, channel, inside, T, C,
                          MODE: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """What token ``t``'s input receives from the gradient of the final states: zero but for a document's last K - 1."""
    document, _start, end = _document_of(t, row, ids, bounds, documents, T, MODE)
    reachable = t < end
    if MODE == BY_INDEX:
        for i in tl.static_range(K - 2):
            reachable = reachable & _same_document(ids, t + i, T)
    return _history(dfinal, document, t - end + K - 1, channel, _when(reachable, inside), C, K)


@triton.jit(do_not_specialize=["T", "RUN", "documents"])
def conv_backward_kernel(x, weight, bias, initial, ids, bounds, dy, dfinal, dx, partial, T, C, RUN, documents,
                         sx_b, sx_t, sdy_b, sdy_t, sdx_b, sdx_t,
                         ACTIVATION: tl.constexpr, MODE: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr,
                         STEPS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Computes dx of a run of tokens for a block of channels, and the run's share ``(K + 1, C)`` of dweight and dbias.

    ``pending`` is dx of the last K - 1 tokens, each complete, and written, K - 1 steps after its own token. So the
    first K - 1 tokens of the next run are walked too, for their share in this run's dx only.
    """
    row, t0, channel = _place(T, C, RUN, BLOCK)
    inside = channel < C
    x_row, dy_row, dx_row = x + row * sx_b * VEC, dy + row * sdy_b * VEC, dx + row * sdx_b * VEC
    if MODE == BY_INDEX:
        ids += row * T
    taps, offset = load_taps(weight, bias, channel, inside, K)
    document, start, _stop = _document_of(t0, row, ids, bounds, documents, T, MODE)
    window = _window_before(t0, x_row, sx_t, ids, initial, document, start, channel, inside, T, C, MODE, VEC, K)
    zero = tl.zeros([BLOCK], tl.float32)
    pending, sums = (), (zero,)
    for _ in tl.static_range(K):
        sums = sums + (zero,)
    for _ in tl.static_range(K - 1):
        pending = pending + (zero,)
    end = tl.minimum(t0 + RUN, T)
    age = t0 * 0 + K  # tokens since the document's start, as far as this run has seen one
    for step in range(0, end - t0 + K - 1, STEPS):
        t = t0 + step
        values, gradients = (), ()
        for u in tl.static_range(STEPS):
            mask = _when(t + u < T, inside)
            token = (t + u).to(tl.int64)
            values = values + (tl.load(x_row + token * sx_t * VEC + channel, mask=mask, other=0.0),)
            gradients = gradients + (tl.load(dy_row + token * sdy_t * VEC + channel, mask=mask, other=0.0),)
        for u in tl.static_range(STEPS):
            value, gradient = values[u].to(tl.float32), gradients[u].to(tl.float32)
            if MODE != NO_PACKING:
                window, fresh = _enter(t + u, window, ids, documents, initial, channel, inside, T, C, MODE, K)
                age = tl.where(fresh, 0, age + 1)
            if MODE != NO_PACKING:
                gradient = tl.where(_owned(t + u, ids, documents, T, MODE), gradient, 0.0)
            if ACTIVATION is not None:
                gradient *= _slope(convolve(window, value, taps, offset, K), ACTIVATION)
            own = tl.where(t + u < end, gradient, 0.0)
            window, old, full = window + (value,), sums, pending + (zero,)
            sums, pending = (old[K] + own,), ()
            for back in tl.static_range(K):
                sums = (old[K - 1 - back] + own * window[K - 1 - back],) + sums
            for i in tl.static_range(K):
                share = gradient * taps[i]
                if MODE != NO_PACKING:
                    share = tl.where(K - 1 - i <= age, share, 0.0)
                pending = pending + (full[i] + share,)
            at = t + u - (K - 1)
            done, ready = pending[0], (at >= t0) & (at < end)
            window, pending = window[1:], pending[1:]
            if dfinal is not None:
                last = tl.where(ready, at, t0)
                done += _final_state_gradient(last, dfinal, row, ids, bounds, documents, channel, inside, T, C, MODE, K)
            to = dx_row + at.to(tl.int64) * sdx_t * VEC + channel
            tl.store(to, done.to(dx.dtype.element_ty), mask=_when(ready, inside))
    share = partial + (row * tl.cdiv(T, RUN) + t0 // RUN) * (K + 1) * C + channel
    for i in tl.static_range(K + 1):
        tl.store(share + i * C, sums[i], mask=inside)


@triton.jit(do_not_specialize=["T", "documents"])
def conv_initial_gradient_kernel(x, weight, bias, initial, ids, bounds, dy, dfinal, dinitial, T, C, documents,
                                 sx_b, sx_t, sdy_b, sdy_t,
                                 ACTIVATION: tl.constexpr, MODE: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr,
                                 BLOCK: tl.constexpr):  # fmt: skip
    """Gradient of one document's initial state ``(C, K - 1)``: only its first K - 1 tokens reach that far back."""
    document = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    if MODE == BY_BOUNDS:
        row = document * 0
        start, end = tl.load(bounds + document), tl.load(bounds + document + 1)
    else:
        row = document
        start, end = tl.program_id(0) * 0, T
    if MODE == BY_INDEX:
        ids += row * T
    x_row, dy_row = x + row * sx_b * VEC, dy + row * sdy_b * VEC
    taps, offset = load_taps(weight, bias, channel, inside, K)
    window, reaching = (), ()
    for i in tl.static_range(K - 1):
        window = window + (_history(initial, document, start * 0 + i, channel, inside, C, K),)
    alive = start < end
    for u in tl.static_range(K - 1):
        token = (start + u).to(tl.int64)
        alive = alive & (start + u < end)
        if MODE == BY_INDEX:
            alive = alive & _same_document(ids, start + u - 1, T) & _owned(start + u, ids, documents, T, MODE)
        mask = _when(alive, inside)
        value = tl.load(x_row + token * sx_t * VEC + channel, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(dy_row + token * sdy_t * VEC + channel, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION is not None:
            gradient *= _slope(convolve(window, value, taps, offset, K), ACTIVATION)
        window = (window + (value,))[1:]
        reaching = reaching + (gradient,)
    for column in tl.static_range(K - 1):
        total = tl.zeros([BLOCK], tl.float32)
        for u in tl.static_range(column + 1):
            total += taps[column - u] * reaching[u]
        if dfinal is not None:  # a document shorter than the window hands part of it on
            kept = inside
            if MODE == BY_INDEX:
                for u in tl.static_range(K - 2):
                    kept = _when(_same_document(ids, start + u, T), kept)
            total += _history(dfinal, document, start - end + column, channel, kept, C, K)
        at = dinitial + (document * C + channel) * (K - 1) + column
        tl.store(at, total.to(dinitial.dtype.element_ty), mask=inside)


@triton.jit
def _advance(window, value, taps, offset, ACTIVATION: tl.constexpr, K: tl.constexpr):
    """Output of the convolution for one token, and the window moved on by it."""
    total = activate(convolve(window, value, taps, offset, K), ACTIVATION)
    return total, (window + (value,))[1:]


@triton.jit
def conv_update_kernel(x, state, weight, bias, y, slots, C, sx_b, sx_t, ss_b, ss_c, ss_l,
                       ACTIVATION: tl.constexpr, T: tl.constexpr, L: tl.constexpr, K: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    """A block of channels of one row: outputs of T new tokens, and the state ``(C, L)`` moved on by T."""
    blocks = tl.cdiv(C, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    slot, kept = row, inside
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
        kept = _when(slot >= 0, inside)
    at = state + slot * ss_b + channel.to(tl.int64) * ss_c
    inputs = ()
    for i in tl.static_range(L):
        inputs = inputs + (tl.load(at + i * ss_l, mask=kept, other=0.0).to(x.dtype.element_ty),)
    for t in tl.static_range(T):
        inputs = inputs + (tl.load(x + row * sx_b + t * sx_t + channel, mask=inside, other=0.0),)
    tl.debug_barrier()  # threads store to columns that others have loaded
    for i in tl.static_range(L):
        tl.store(at + i * ss_l, inputs[T + i].to(state.dtype.element_ty), mask=kept)
    taps, offset = load_taps(weight, bias, channel, inside, K)
    window = ()
    for i in tl.static_range(K - 1):
        window = window + (inputs[L - (K - 1) + i].to(tl.float32),)
    for t in tl.static_range(T):
        total, window = _advance(window, inputs[L + t].to(tl.float32), taps, offset, ACTIVATION, K)
        if slots is not None:
            total = tl.where(slot >= 0, total, 0.0)
        tl.store(y + (row * T + t) * C + channel, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def columns_of(conv, channel, mask, sc_c, sc_l, L: tl.constexpr):
    """The convolution's last ``L`` inputs, oldest first."""
    columns = ()
    for i in tl.static_range(L):
        columns = columns + (tl.load(conv + channel * sc_c + i * sc_l, mask=mask, other=0.0),)
    return columns


@triton.jit
def convolve_columns(columns, new, taps, offset, dtype, ACTIVATION: tl.constexpr, L: tl.constexpr, K: tl.constexpr):
    """The convolution's output for the input ``new``."""
    window = ()
    for i in tl.static_range(K - 1):
        window = window + (columns[L - (K - 1) + i].to(dtype).to(tl.float32),)
    return activate(convolve(window, new, taps, offset, K), ACTIVATION)


@triton.jit
def move_columns(conv, columns, new, channel, mask, sc_c, sc_l, L: tl.constexpr):
    """Moves the convolution's state on; all of the program has read it before."""
    for i in tl.static_range(L):
        value = new if i == L - 1 else columns[i + 1]
        tl.store(conv + channel * sc_c + i * sc_l, value.to(conv.dtype.element_ty), mask=mask)


@triton.jit
def _window(conv, channel, mask, dtype, sc_c, sc_l, L, K: tl.constexpr):
    """The K - 1 inputs before the new tokens, oldest first, rounded to the dtype of those."""
    window = ()
    for i in tl.static_range(K - 1):
        value = tl.load(conv + channel * sc_c + (L - (K - 1) + i) * sc_l, mask=mask, other=0.0)
        window = window + (value.to(dtype).to(tl.float32),)
    return window
