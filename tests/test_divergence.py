"""`rkd.divergence` against 50-digit arithmetic, PyTorch and dit; the identities of van Erven & Harremoës; bad input."""

import math

import dit
import mpmath
import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from rkd import kl_divergence, renyi_divergence, softmax

ORDERS = [
    0.0,
    1e-4,
    0.1,
    0.3,
    0.5,
    0.9,
    1 - 1e-6,
    1 - 1e-12,
    1.0,
    1 + 1e-12,
    1 + 1e-6,
    1.1,
    2.0,
    20.0,
    1e4,
    1e6,
    math.inf,
]
orders = st.one_of(st.sampled_from(ORDERS), st.floats(0.001, 50.0))
classes = st.integers(2, 12)
seeds = st.integers(0, 2**31 - 1)


def distribution(n, seed, zeros=0):
    weights = np.random.default_rng(seed).exponential(size=n) ** 3 + 1e-12
    weights[:zeros] = 0
    return weights / weights.sum()


def exact(p, q, alpha):
    """Of the exactly normalised rows: a rounded sum of 1 + 1e-16 alone would give 1e-16/(α − 1) in (1.16)."""
    rows = [[mpmath.mpf(float(x)) for x in row] for row in (p, q)]
    return reference.renyi(*([x / mpmath.fsum(row) for x in row] for row in rows), alpha)


@pytest.mark.parametrize("alpha", ORDERS)
@pytest.mark.parametrize("n", [2, 10, 100])
def test_matches_50_digits(alpha, n):
    for seed in range(3):
        p, q = distribution(n, seed), distribution(n, seed + 100)
        assert renyi_divergence(p, q, alpha) == pytest.approx(float(exact(p, q, alpha)), rel=2e-13, abs=1e-30)


@pytest.mark.parametrize("alpha", [a for a in ORDERS if a > 0])
@pytest.mark.parametrize("gap", [1e-2, 1e-5, 1e-7])
def test_near_convergence_of_normalised_rows(alpha, gap):
    q = distribution(20, 1)
    p = q * (1 + gap * np.cos(np.arange(20)))
    p = p / p.sum()
    assert renyi_divergence(p, q, alpha) == pytest.approx(float(exact(p, q, alpha)), rel=1e-8)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 2.0, 3.5])
def test_agrees_with_dit(alpha):
    p, q = distribution(6, 3), distribution(6, 4)
    outcomes = [str(i) for i in range(6)]
    bits = dit.divergences.renyi_divergence(dit.Distribution(outcomes, p), dit.Distribution(outcomes, q), alpha)
    assert renyi_divergence(p, q, alpha) == pytest.approx(bits * math.log(2), rel=1e-10)


def test_kl_agrees_with_torch():
    p, q = (torch.tensor(distribution(9, s)) for s in (5, 6))
    expected = torch.nn.functional.kl_div(q.log(), p, reduction="sum")
    torch.testing.assert_close(kl_divergence(p, q), expected)


class TestConventions:
    def test_zero_log_zero_over_zero_is_zero(self):
        p, q = [0.5, 0.5, 0.0], [0.25, 0.75, 0.0]
        for alpha in ORDERS:
            assert renyi_divergence(p, q, alpha) == pytest.approx(renyi_divergence(p[:2], q[:2], alpha), rel=1e-14)

    @pytest.mark.parametrize("alpha", ORDERS)
    def test_student_zero(self, alpha):
        p, q = [0.5, 0.3, 0.2], [0.6, 0.4, 0.0]
        expected = math.inf if alpha >= 1 else float(exact(p, q, alpha))
        assert renyi_divergence(p, q, alpha) == pytest.approx(expected, rel=1e-9, abs=1e-15)

    def test_student_zero_with_orders_as_an_array(self):
        """At exactly 1 inside an array h·H is 0·∞, which must not become NaN."""
        together = renyi_divergence([0.5, 0.5], [1.0, 0.0], np.array(ORDERS))
        np.testing.assert_allclose(together, [renyi_divergence([0.5, 0.5], [1.0, 0.0], a) for a in ORDERS], rtol=1e-13)

    @pytest.mark.parametrize("alpha", ORDERS)
    def test_teacher_zero(self, alpha):
        p, q = [0.6, 0.4, 0.0], [0.5, 0.3, 0.2]
        assert renyi_divergence(p, q, alpha) == pytest.approx(float(exact(p, q, alpha)), rel=1e-13)

    @pytest.mark.parametrize("alpha", ORDERS)
    def test_disjoint_supports(self, alpha):
        assert renyi_divergence([1.0, 0.0], [0.0, 1.0], alpha) == math.inf

    def test_conditional_distribution_does_not_depend_on_the_order(self):
        q = distribution(8, 11)
        p = np.where(np.arange(8) < 3, q, 0.0) / q[:3].sum()
        values = [renyi_divergence(p, q, alpha) for alpha in ORDERS]
        np.testing.assert_allclose(values, -math.log(q[:3].sum()), rtol=1e-13)


class TestLimits:
    p, q = distribution(7, 21), distribution(7, 22)

    @pytest.mark.parametrize("side", [-1, 1])
    def test_order_one_from_both_sides(self, side):
        kl = kl_divergence(self.p, self.q)
        variance = np.sum(self.p * (np.log(self.p / self.q) - kl) ** 2)
        for h in (1e-3, 1e-6, 1e-9, 1e-12):
            slope = (renyi_divergence(self.p, self.q, 1 + side * h) - kl) / (side * h)
            assert slope == pytest.approx(variance / 2, rel=max(20 * h, 4e-15 / h), abs=4e-15 / h)

    def test_order_zero_scaled_is_reverse_kl(self):
        for alpha in (1e-4, 1e-8, 1e-12):
            assert renyi_divergence(self.p, self.q, alpha) / alpha == pytest.approx(
                kl_divergence(self.q, self.p), rel=10 * alpha + 1e-13
            )

    def test_order_infinity(self):
        top = np.max(np.log(self.p / self.q))
        assert renyi_divergence(self.p, self.q, math.inf) == pytest.approx(top, rel=1e-14)
        for alpha in (10.0, 1e3, 1e6):
            assert 0 <= top - renyi_divergence(self.p, self.q, alpha) <= (math.log(7) + 2 * top + 20) / alpha


class TestIdentities:
    @given(classes, seeds, st.floats(0.001, 0.999))
    def test_skew_symmetry(self, n, seed, alpha):
        p, q = distribution(n, seed), distribution(n, seed + 1)
        assert (1 - alpha) * renyi_divergence(p, q, alpha) == pytest.approx(
            alpha * renyi_divergence(q, p, 1 - alpha), rel=1e-11
        )

    @given(classes, seeds, orders, orders)
    def test_monotone_in_the_order(self, n, seed, a, b):
        p, q = distribution(n, seed), distribution(n, seed + 1)
        low, high = sorted((a, b))
        assert renyi_divergence(p, q, low) <= renyi_divergence(p, q, high) * (1 + 1e-12) + 1e-15

    @given(classes, seeds, orders)
    def test_data_processing(self, n, seed, alpha):
        p, q = distribution(n, seed), distribution(n, seed + 1)
        channel = np.random.default_rng(seed + 2).dirichlet(np.ones(4), size=n)
        assert renyi_divergence(p @ channel, q @ channel, alpha) <= renyi_divergence(p, q, alpha) * (1 + 1e-10) + 1e-12

    @given(classes, seeds, orders)
    def test_additive_over_products(self, n, seed, alpha):
        p1, q1, p2, q2 = (distribution(n, seed + k) for k in range(4))
        joint = renyi_divergence(np.outer(p1, p2).ravel(), np.outer(q1, q2).ravel(), alpha)
        parts = renyi_divergence(p1, q1, alpha) + renyi_divergence(p2, q2, alpha)
        assert joint == pytest.approx(parts, rel=1e-9, abs=1e-12)

    @given(classes, seeds, orders)
    def test_permutation_invariant(self, n, seed, alpha):
        p, q = distribution(n, seed), distribution(n, seed + 1)
        turn = np.random.default_rng(seed).permutation(n)
        assert renyi_divergence(p[turn], q[turn], alpha) == pytest.approx(
            renyi_divergence(p, q, alpha), rel=1e-12, abs=1e-15
        )

    @given(classes, seeds, orders)
    def test_zero_iff_equal(self, n, seed, alpha):
        p, q = distribution(n, seed), distribution(n, seed + 1)
        assert renyi_divergence(p, p, alpha) == 0
        assert renyi_divergence(p, q, alpha) >= 0

    def test_hellinger_and_chi_square(self):
        p, q = distribution(6, 1), distribution(6, 2)
        assert renyi_divergence(p, q, 0.5) == pytest.approx(-2 * math.log(np.sqrt(p * q).sum()), rel=1e-13)
        assert renyi_divergence(p, q, 2.0) == pytest.approx(math.log1p(((p - q) ** 2 / q).sum()), rel=1e-13)


class TestShapes:
    def test_orders_as_an_array(self):
        p, q = distribution(5, 1), distribution(5, 2)
        together = renyi_divergence(p, q, np.array(ORDERS))
        assert together.shape == (len(ORDERS),)
        np.testing.assert_allclose(together, [renyi_divergence(p, q, a) for a in ORDERS], rtol=1e-13)

    def test_rows_and_orders_broadcast(self):
        p = np.stack([distribution(5, s) for s in range(3)])
        value = renyi_divergence(p[:, None], distribution(5, 9), [0.5, 2.0])
        assert value.shape == (3, 2)
        assert value[1, 1] == pytest.approx(renyi_divergence(p[1], distribution(5, 9), 2.0))

    def test_same_kind_out(self):
        p = [0.5, 0.5]
        assert isinstance(renyi_divergence(p, p, 2), np.floating)
        assert renyi_divergence(torch.tensor(p), torch.tensor(p), 2).dtype == torch.float32
        assert renyi_divergence(np.float32(p), np.float32(p), 2).dtype == np.float32
        assert isinstance(softmax([1.0, 2.0]), np.ndarray)


@pytest.mark.parametrize(
    "alpha", [0.2, 0.5, 1.0, 1.7, 4.0, math.inf, torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)]
)
def test_gradients_of_probability_form(alpha):
    p, q = (torch.tensor(np.stack([distribution(4, s + k) for k in range(3)])).requires_grad_() for s in (1, 8))
    torch.autograd.gradcheck(lambda x, y: renyi_divergence(x, y, alpha), (p, q), eps=1e-9, atol=1e-5)


@pytest.mark.parametrize("tiny", [(1e-120, 1e-250), (1e-300, 1e-80)])
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.999, 1.0, 1.5])
def test_gradients_at_tiny_probabilities(alpha, tiny):
    p, q = ([0.5, 0.5 - x, x] for x in tiny)
    rows = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (p, q)]
    renyi_divergence(*rows, alpha).backward()
    value, ratios = exact(p, q, alpha), [mpmath.mpf(a) / b for a, b in zip(p, q)]
    h = mpmath.mpf(alpha) - 1
    for i, r in enumerate(ratios):
        by_q = 1 - r**alpha * mpmath.exp(-h * value)
        by_p = mpmath.log(r) - value if h == 0 else alpha * (mpmath.exp(h * (mpmath.log(r) - value)) - 1) / h
        for row, expected in zip(rows, (by_p, by_q)):
            assert row.grad[i].item() == pytest.approx(float(expected), rel=1e-11, abs=1e-15)


@pytest.mark.parametrize("alpha", [*ORDERS, 1.5])
def test_gradients_at_zeros_hold_no_nan(alpha):
    rows = [[[0.6, 0.4, 0.0], [0.5, 0.0, 0.5], [0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 1e-310]]]
    rows += [[[0.3, 0.3, 0.4], [0.4, 0.6, 0.0], [0.3, 0.7, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.3, 0.7, 1e-300]]]
    p, q = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in rows)
    renyi_divergence(p, q, alpha).sum().backward()
    assert p.grad.isfinite().all()
    assert q.grad.isfinite().all()


def test_softmax_with_temperature():
    logits = torch.tensor([5.4, 0.2, -1.3])
    torch.testing.assert_close(softmax(logits, 4.0), torch.softmax(logits / 4, -1))
    assert softmax([1.0, -math.inf])[1] == 0


class TestBadInput:
    half = (0.5, 0.5)

    @pytest.mark.parametrize("alpha", [-0.1, math.nan, -math.inf, [0.5, -1.0]])
    def test_order(self, alpha):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, inf\], got"):
            renyi_divergence(self.half, self.half, alpha)

    @pytest.mark.parametrize("alpha", ["1", None, True])
    def test_order_type(self, alpha):
        with pytest.raises(TypeError, match="alpha must be"):
            renyi_divergence(self.half, self.half, alpha)

    @pytest.mark.parametrize("p", [[0.6, 0.5], [1.5, -0.5], [math.nan, 1.0], [0.0, 0.0]])
    def test_not_a_distribution(self, p):
        with pytest.raises(ValueError, match=r"p must (sum to 1|hold probabilities).*got"):
            renyi_divergence(p, self.half, 2)

    def test_shapes(self):
        with pytest.raises(ValueError, match="same number of classes, got 2 and 3"):
            renyi_divergence(self.half, [0.2, 0.3, 0.5], 2)
        with pytest.raises(ValueError, match="does not broadcast"):
            renyi_divergence(np.full((3, 2), 0.5), self.half, [1.0, 2.0])

    @pytest.mark.parametrize("logits", [[math.nan, 0.0], [math.inf, 0.0]])
    def test_logits(self, logits):
        with pytest.raises(ValueError, match="finite or -inf"):
            softmax(logits)

    @pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
    def test_temperature(self, temperature):
        with pytest.raises(ValueError, match="temperature must be positive"):
            softmax([1.0, 2.0], temperature)
