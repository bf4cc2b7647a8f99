"""Every law of the theory, in fp64, on drawn systems: several forms are one function, and structure is recognised."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mamba2_hf import ops
from mamba2_hf.errors import ArgumentError
from mamba2_hf.ops.scan.reference import ssd_attention_matrix, ssd_recurrent
from mamba2_hf.theory import attention, duality, heads, lti, semiseparable

EXACT = {"rtol": 1e-9, "atol": 1e-10}
few = settings(max_examples=25)
seeds, lengths, sizes = st.integers(0, 2**16), st.integers(1, 13), st.integers(1, 4)
kinds = st.sampled_from(["scalar", "diagonal", "full"])


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, **EXACT)


def draw(seed: int) -> Callable[..., Tensor]:
    """Standard normal fp64 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def system(seed: int, kind: str, tokens: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Generators with A of a kind; decays of either sign, and one of zero."""
    normal = draw(seed)
    shape = {"scalar": (tokens,), "diagonal": (tokens, size), "full": (tokens, size, size)}[kind]
    A = normal(*shape).tanh()
    A[seed % tokens] = 0
    return A, normal(tokens, size), normal(tokens, size)


class TestTimeInvariant:
    @few
    @given(seeds, lengths, sizes, st.sampled_from(lti.RULES))
    def test_recurrence_convolution_and_matrix_are_one_function(self, seed, tokens, size, rule):
        normal = draw(seed)
        A, B = lti.discretize(normal(size, size) - 2 * torch.eye(size), normal(size), 0.3, rule)
        C, x = normal(size), normal(tokens)
        y = lti.recurrence(A, B, C, x)
        same(lti.convolution(A, B, C, x), y)
        same(lti.matrix(A, B, C, tokens) @ x, y)
        same(semiseparable.build(A.expand(tokens, -1, -1), B.expand(tokens, -1), C.expand(tokens, -1)) @ x, y)

    @few
    @given(seeds, sizes)
    def test_zero_order_hold_is_exact_for_a_constant_input(self, seed, size):
        normal = draw(seed)
        A, B = normal(size, size) - 3 * torch.eye(size), normal(size)
        coarse, fine = lti.discretize(A, B, 0.4), lti.discretize(A, B, 0.1)
        h = torch.zeros(size, dtype=torch.float64)
        for _ in range(4):
            h = fine[0] @ h + fine[1]
        same(coarse[1], h)
        same(coarse[0], torch.linalg.matrix_power(fine[0], 4))

    def test_bilinear_is_of_second_order(self):
        A, B = torch.tensor([[-1.0, 2], [-2, -0.5]], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        errors = [
            float((lti.discretize(A, B, step, "bilinear")[0] - lti.discretize(A, B, step)[0]).norm())
            for step in (0.02, 0.01)
        ]
        assert 7 < errors[0] / errors[1] < 9  # of one step: third order

    def test_bilinear_keeps_a_stable_system_stable(self):
        A = torch.tensor([[-0.1, 50], [-50, -0.1]], dtype=torch.float64)
        discrete, _ = lti.discretize(A, torch.ones(2, dtype=torch.float64), 3.0, "bilinear")
        assert torch.linalg.eigvals(discrete).abs().max() < 1

    def test_other_rules_and_steps_are_refused(self):
        A, B = torch.eye(2), torch.ones(2)
        with pytest.raises(ArgumentError, match="'euler', expected one of 'zero-order hold', 'bilinear'"):
            lti.discretize(A, B, 0.1, "euler")
        with pytest.raises(ArgumentError, match="step is 0"):
            lti.discretize(A, B, 0)


class TestSemiseparable:
    @few
    @given(seeds, kinds, lengths, sizes, st.integers(1, 5))
    def test_all_multiplications_agree(self, seed, kind, tokens, size, chunk):
        generators = system(seed, kind, tokens, size)
        x = draw(seed + 1)(tokens, 3)
        y = semiseparable.build(*generators) @ x
        same(semiseparable.multiply_quadratic(*generators, x), y)
        same(semiseparable.multiply_recurrent(*generators, x), y)
        same(semiseparable.multiply_chunked(*generators, x, chunk), y)

    @few
    @given(seeds, kinds, lengths, sizes, st.data())
    def test_every_submatrix_on_or_below_the_diagonal_has_rank_of_the_state(self, seed, kind, tokens, size, data):
        M = semiseparable.build(*system(seed, kind, tokens, size))
        assert not M.triu(1).any()
        row = data.draw(st.integers(0, tokens - 1))
        rows = data.draw(st.lists(st.integers(row, tokens - 1), min_size=1, unique=True))
        columns = data.draw(st.lists(st.integers(0, row), min_size=1, unique=True))
        assert torch.linalg.matrix_rank(M[rows][:, columns], atol=1e-9) <= size
        assert semiseparable.order(M) <= min(size, (tokens + 1) // 2)

    @few
    @given(seeds, st.integers(2, 12))
    def test_a_matrix_without_structure_is_told_apart(self, seed, tokens):
        assert semiseparable.order(draw(seed)(tokens, tokens).tril()) == (tokens + 1) // 2

    @few
    @given(seeds, kinds, lengths, sizes)
    def test_generators_are_read_back_at_the_least_size(self, seed, kind, tokens, size):
        M = semiseparable.build(*system(seed, kind, tokens, size))
        A, B, C = semiseparable.generators(M)
        same(semiseparable.build(A, B, C), M)
        assert A.shape[-1] == semiseparable.order(M) <= size

    @few
    @given(seeds, lengths)
    def test_any_lower_triangular_matrix_is_a_state_space_model(self, seed, tokens):
        M = draw(seed)(tokens, tokens).tril()
        same(semiseparable.build(*semiseparable.generators(M)), M)

    @few
    @given(seeds, kinds, sizes, st.data())
    def test_blocks_below_the_diagonal_factor_through_the_state(self, seed, kind, size, data):
        generators = system(seed, kind, 12, size)
        bounds = sorted(data.draw(st.lists(st.integers(0, 12), min_size=4, max_size=4)))
        columns, rows = range(bounds[0], bounds[1]), range(bounds[2], bounds[3])
        if not rows or not columns:
            with pytest.raises(ArgumentError, match="is not below the diagonal"):
                semiseparable.block_factors(*generators, rows, columns)
            return
        left, center, right = semiseparable.block_factors(*generators, rows, columns)
        M = semiseparable.build(*generators)
        same(left @ center @ right, M[rows.start : rows.stop, columns.start : columns.stop])

    @few
    @given(seeds, kinds, kinds, lengths, sizes, sizes)
    def test_sums_and_products_are_semiseparable(self, seed, kind, other, tokens, size, more):
        first, second = system(seed, kind, tokens, size), system(seed + 1, other, tokens, more)
        M, K = semiseparable.build(*first), semiseparable.build(*second)
        same(semiseparable.build(*semiseparable.add(first, second)), M + K)
        same(semiseparable.build(*semiseparable.compose(first, second)), K @ M)
        assert semiseparable.order(K @ M) <= size + more

    @few
    @given(seeds, lengths)
    def test_a_scalar_recurrence_is_one_semiseparable(self, seed, tokens):
        a, x = draw(seed)(2, tokens), draw(seed + 1)(2, tokens, 3)
        M = semiseparable.one_semiseparable(a)
        same(M @ x, semiseparable.scalar_recurrence(a, x))
        for j in range(tokens):
            same(M[:, j, : j + 1], torch.stack([a[:, i + 1 : j + 1].prod(1) for i in range(j + 1)], 1))
        assert [semiseparable.order(head) for head in M] == [1, 1]

    @few
    @given(seeds, st.integers(1, 3), st.integers(0, 3))
    def test_autoregression_of_bounded_order_is_semiseparable(self, seed, outputs, inputs):
        """``y_t`` from the last outputs and inputs (Theorem 5.2, Appendix C.2): bounded by how many."""
        normal, tokens = draw(seed), 14
        past = normal(tokens, tokens).tril(-1).triu(-outputs) + torch.eye(tokens)
        now = normal(tokens, tokens).tril().triu(-inputs)
        M = torch.linalg.solve_triangular(past, now, upper=False)
        assert semiseparable.order(M, 1e-12) <= max(outputs, inputs + 1)

    def test_what_is_not_autoregressive_of_bounded_order_is_not(self):
        """Masks that look as harmless, and whose order grows with the length."""
        distance = torch.arange(24, dtype=torch.float64)
        orders = [
            [semiseparable.order(lti.toeplitz(kernel[:tokens])) for tokens in (6, 12, 24)]
            for kernel in (draw(0)(24), 1 / (1 + distance), (distance % 5 == 0).double())
        ]
        assert orders[0] == [3, 6, 12]  # as large as any
        assert orders[1][0] < orders[1][1] < orders[1][2]
        assert orders[2][2] == 5  # with a period it is bounded: y_t = y_{t-5} + x_t
        softmax = torch.softmax(draw(1)(12, 12).masked_fill(~torch.ones(12, 12).tril().bool(), -math.inf), -1)
        assert semiseparable.order(softmax) == 6

    def test_shapes_and_upper_entries_are_refused(self):
        with pytest.raises(ArgumentError, match=r"A, B and C have shapes \(3, 3\), \(4, 2\) and \(4, 2\)"):
            semiseparable.build(torch.ones(3, 3), torch.ones(4, 2), torch.ones(4, 2))
        with pytest.raises(ArgumentError, match="above the diagonal"):
            semiseparable.order(torch.ones(3, 3))
        with pytest.raises(ArgumentError, match=r"expected \(T, T\)"):
            semiseparable.order(torch.ones(3, 4))

    def test_gradients_reach_the_generators(self):
        tensors = [tensor.requires_grad_() for tensor in system(3, "diagonal", 6, 2)]
        x = draw(4)(6, 2)
        chunked, quadratic = (
            torch.autograd.grad(y.square().sum(), tensors)
            for y in (
                semiseparable.multiply_chunked(*tensors, x, 4),
                semiseparable.multiply_quadratic(*tensors, x),
            )
        )
        for got, expected in zip(chunked, quadratic, strict=True):
            same(got, expected)


def masks(seed: int, tokens: int, size: int) -> dict[str, attention.Mask]:
    normal = draw(seed)
    return {
        "causal": attention.Causal(tokens),
        "decay": attention.decay(0.9, tokens, torch.float64),
        "1-semiseparable": attention.OneSemiseparable(normal(tokens).sigmoid()),
        "heads of 1-semiseparable": attention.OneSemiseparable(normal(2, tokens)),
        "Toeplitz": attention.Toeplitz(normal(tokens)),
        "heads of Toeplitz": attention.Toeplitz(normal(2, tokens)),
        "Fourier": attention.Fourier(tokens),
        "semiseparable": attention.Semiseparable(*system(seed, "diagonal", tokens, size)),
    }


class TestMaskedAttention:
    @pytest.mark.parametrize("name", list(masks(0, 4, 2)))
    @few
    @given(seeds, lengths, sizes, st.sampled_from(list(attention.FEATURE_MAPS)))
    def test_both_orders_are_one_function(self, name, seed, tokens, size, features):
        torch.set_default_dtype(torch.float64)
        try:
            mask, normal = masks(seed, tokens, size)[name], draw(seed + 1)
            leading = (2,) if "heads" in name else ()
            q, k, v = normal(*leading, tokens, size), normal(*leading, tokens, size), normal(*leading, tokens, 3)
            features = attention.FEATURE_MAPS[features]
            fast, quadratic = (
                attention.structured_masked_attention(q, k, v, mask, features, mode=mode) for mode in attention.MODES
            )
            same(fast, quadratic)
            same(mask.multiply(torch.eye(tokens).expand(*leading, -1, -1)), mask.matrix().to(fast.dtype))
        finally:
            torch.set_default_dtype(torch.float32)

    @few
    @given(seeds, st.integers(1, 12), sizes)
    def test_masks_of_recurrences_are_semiseparable(self, seed, tokens, size):
        """Of the masks of Figure 3, the three that make recurrent models, and what attention with them is."""
        normal = draw(seed)
        q, k = normal(tokens, size), normal(tokens, size)
        for name in ("causal", "decay", "1-semiseparable"):
            L = masks(seed, tokens, size)[name].matrix()
            assert semiseparable.order(L) == 1
            assert semiseparable.order(L * (q @ k.mT)) <= size
        L = masks(seed, tokens, size)["semiseparable"].matrix()
        assert semiseparable.order(L * (q @ k.mT)) <= size * size  # Remark 7: one larger expansion

    @few
    @given(seeds, lengths, sizes)
    def test_with_the_mask_of_ssd_it_is_the_layer(self, seed, tokens, size):
        normal = draw(seed)
        q, k, v = normal(2, tokens, size), normal(2, tokens, size), normal(2, tokens, 3)
        dt, A = F.softplus(normal(2, tokens)), -normal(2).exp()
        mask = attention.SSD(dt, A)
        fast, quadratic = (attention.structured_masked_attention(q, k, v, mask, mode=mode) for mode in attention.MODES)
        x, step, B, C = (tensor.transpose(0, 1)[None] for tensor in (v, dt, k, q))
        assert torch.equal(fast, ops.ssd_chunk_scan(x, step, A, B, C)[0].transpose(0, 1))
        same(fast, quadratic)
        same(attention.Mask.attend(mask, q, k, v), quadratic)
        same(fast, ssd_recurrent(x, step, A, B, C)[0][0].transpose(0, 1))

    @few
    @given(seeds, st.integers(2, 9), sizes)
    def test_rows_of_weights_may_sum_to_one(self, seed, tokens, size):
        normal = draw(seed)
        q, k, mask = normal(tokens, size), normal(tokens, size), attention.OneSemiseparable(normal(tokens).sigmoid())
        eye = torch.eye(tokens, dtype=torch.float64)
        weights = attention.structured_masked_attention(q, k, eye, mask, attention.elu_plus_one, normalize=True)
        same(weights.sum(-1), torch.ones(tokens, dtype=torch.float64))
        assert bool((weights.tril() >= 0).all())

    def test_random_features_approach_softmax_attention(self):
        normal = draw(0)
        q, k, v = normal(16, 8) / 4, normal(16, 8) / 4, normal(16, 4)
        expected = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=1.0)[0]
        errors = []
        for features in (16, 256, 4096):
            drawn = [
                attention.structured_masked_attention(
                    *(q, k, v, attention.Causal(16), attention.positive_random_features(normal(features, 8))),
                    normalize=True,
                )
                for _ in range(8)
            ]
            errors.append(math.sqrt(sum(float((y - expected).square().mean()) for y in drawn) / 8))
        # The error falls as one over the root of their number: four times for sixteen times as many.
        assert 2.5 < errors[0] / errors[1] < 6
        assert 2.5 < errors[1] / errors[2] < 6
        assert errors[2] < 0.005

    @few
    @given(seeds, lengths, sizes)
    def test_cosformer_weighs_by_distance(self, seed, tokens, size):
        normal = draw(seed)
        q, k = normal(tokens, size), normal(tokens, size)
        position = torch.arange(tokens, dtype=torch.float64)
        weight = torch.cos((position[:, None] - position) * math.pi / 2 / tokens)
        same(attention.cosformer(q) @ attention.cosformer(k).mT, F.relu(q) @ F.relu(k).mT * weight)

    def test_other_modes_are_refused(self):
        x = torch.ones(2, 2)
        with pytest.raises(ArgumentError, match="mode is 'slow', expected one of 'fast', 'quadratic'"):
            attention.structured_masked_attention(x, x, x, attention.Causal(2), mode="slow")


class TestHeads:
    @pytest.mark.parametrize("pattern", list(heads.OWN))
    @few
    @given(seeds, lengths, sizes)
    def test_each_pattern_is_its_multi_head_form(self, pattern, seed, tokens, size):
        normal = draw(seed)
        x, B, C = (normal(*shape) for shape in heads.shapes(pattern, 3, tokens, 2, size).values())
        a = normal(3, tokens).sigmoid()
        y = heads.attend(pattern, a, x, B, C)
        same(heads.attend("multi-head", a, *heads.expand(3, x, B, C)), y)
        same(heads.attend(pattern, a, x, B, C, mode="quadratic"), y)
        for head in range(3):
            own = [tensor[head if len(tensor) > 1 else 0] for tensor in (B, C, x)]
            same(semiseparable.multiply_recurrent(a[head], *own), y[head])

    def test_the_layer_is_multi_value(self):
        normal = draw(0)
        x, B, C = (normal(*shape) for shape in heads.shapes("multi-value", 4, 9, 3, 5).values())
        dt, A = F.softplus(normal(4, 9)), -normal(4).exp()
        y = ops.ssd_chunk_scan(
            *(t.transpose(0, 1)[None] for t in (x, dt)), A, *(t.transpose(0, 1)[None] for t in (B, C))
        )
        same(heads.attend("multi-value", torch.exp(A[:, None] * dt), x * dt[..., None], B, C), y[0].transpose(0, 1))

    def test_shapes_of_another_pattern_are_refused(self):
        x, B, C = (torch.ones(shape) for shape in heads.shapes("multi-query", 3, 4, 2, 2).values())
        with pytest.raises(ArgumentError, match=r"x has shape \(1, 4, 2\), expected \(3, 4, 2\) for multi-value"):
            heads.attend("multi-value", torch.ones(3, 4), x, B, C)
        with pytest.raises(ArgumentError, match="'multi-state', expected one of"):
            heads.shapes("multi-state", 1, 1, 1, 1)


class TestDuality:
    @few
    @given(seeds, lengths, sizes, st.sampled_from([1, 2, 4]))
    def test_a_layer_is_attention_and_attention_a_layer(self, seed, tokens, size, groups):
        normal = draw(seed)
        x, dt, A = normal(tokens, 4, 3), F.softplus(normal(tokens, 4)), -normal(4).exp()
        B, C = normal(tokens, groups, size), normal(tokens, groups, size)
        layer = [x[None], dt[None], A, B[None], C[None]]
        form = duality.as_attention(x, dt, A, B, C)
        y, final = ssd_recurrent(*layer)
        same(form("fast"), y[0])
        same(form("quadratic"), y[0])
        M = form.matrices()
        same(M, ssd_attention_matrix(*layer[1:])[0])
        for h, model in enumerate(duality.as_state_space(form)):
            same(model(x[:, h]), y[0, :, h])
            same(model.matrix(), M[h])
            same(model.states(x[:, h])[-1], final[0, h])

    @few
    @given(seeds, st.integers(2, 12), sizes)
    def test_states_come_back_from_the_matrix(self, seed, tokens, size):
        """Up to a change of basis: what they can still do to outputs is the same."""
        normal = draw(seed)
        a, B, C, x = normal(tokens).sigmoid(), normal(tokens, size), normal(tokens, size), normal(tokens, 3)
        model = duality.StateSpaceModel(a, B, C)
        found = duality.from_matrix(model.matrix())
        assert found.B.shape[1] <= size
        same(found(x), model(x))
        H, own = found.states(x), model.states(x)
        for t in range(tokens):
            silent = torch.cat([x[: t + 1], torch.zeros(tokens - t - 1, 3, dtype=torch.float64)])
            future = model(silent)[t:]
            for states, (A, _, C_) in ((H, found), (own, model)):
                h = states[t]
                for step in range(tokens - t):
                    h = h if step == 0 else (h @ A[t + step].mT if A.dim() == 3 else A[t + step] * h)
                    same(h @ C_[t + step], future[step])
