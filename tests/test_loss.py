"""`rkd.loss` and `rkd.logits` against 50 digits, PyTorch and autograd; limits; masks; precision; bad input."""

import math

import mpmath
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from rkd import DistillationLoss, renyi_divergence, renyi_kd_loss, softmax
from rkd.logits import renyi_from_logits

ORDERS = [
    *(1e-4, 1e-3, 1e-2, 0.1, 0.3, 0.4999, 0.5, 0.7, 0.9, 1 - 1e-3, 1 - 1e-6, 1 - 1e-12, 1.0),
    *(1 + 1e-12, 1 + 1e-6, 1 + 1e-3, 1.1, 2.0, 5.0, 20.0, 100.0, 1e4, 1e6, math.inf),
]
FINITE = [a for a in ORDERS if a < math.inf]
# what the two kinds of float promise: relative error of the value, error of the gradient relative to its largest entry
BAR = {torch.float32: (5e-6, 1e-5), torch.float64: (1e-12, 1e-12)}
SMALL = mpmath.mpf(10) ** -30


def pair(n, dtype, kind, size):
    """Student and teacher logits: `near` and `shifted` differ by `size`, `wide` fill ±size, `rare` lose one class."""
    z = torch.randn(n, dtype=dtype) * 3
    if kind == "wide":
        return (torch.rand(2, n, dtype=dtype) * 2 - 1) * size
    v = z + size * torch.randn(n, dtype=dtype)
    if kind == "shifted":
        v = v + 7.3
    if kind == "rare":
        v[0] -= 50
    return torch.stack([z, v])


def loss_and_gradient(z, v, alpha, temperature=1.0):
    z = z.clone().requires_grad_()
    value = renyi_from_logits(z[None], v[None], alpha, temperature, False)
    value.sum().backward()
    return value.item(), z.grad.tolist()


CASES = [
    *(("near", 1e-4), ("near", 1e-2), ("near", 1.0), ("near", 5.0), ("shifted", 1e-4), ("rare", 1e-3)),
    *(("wide", 30.0), ("wide", 1e4)),
]


@pytest.mark.parametrize("dtype", BAR)
@pytest.mark.parametrize(("kind", "size"), CASES)
@pytest.mark.parametrize(("n", "temperature"), [(2, 1.0), (3, 4.0), (10, 1.0), (100, 3.0)])
def test_against_50_digits(dtype, kind, size, n, temperature):
    value_bar, gradient_bar = BAR[dtype]
    z, v = pair(n, dtype, kind, size)
    for alpha in ORDERS:
        value, gradient = loss_and_gradient(z, v, alpha, temperature)
        exact, exact_gradient = reference.of_logits(z.tolist(), v.tolist(), alpha, temperature)
        if exact > SMALL or value > 1e-30:
            assert abs(value - exact) <= value_bar * exact, (alpha, value, float(exact))
        if exact_gradient is None or alpha > 20:
            continue
        largest = max(abs(g) for g in exact_gradient)
        # saturated rows: a gradient of e^-x carries the rounding of x itself
        bar = gradient_bar * max(1, float(-mpmath.log(largest)) / 20 if largest > 0 else 1)
        if largest > SMALL:
            error = max(abs(a - b) for a, b in zip(gradient, exact_gradient, strict=True))
            assert error <= bar * largest, (alpha, float(error / largest))


def assert_meets_the_bar(z, v, alpha, temperature=1.0):
    """Value and both gradients, of D_α and of D_α/α; classes that are -inf in both are left out of the reference."""
    value_bar, gradient_bar = BAR[z.dtype]
    alive = (z > -math.inf) | (v > -math.inf)
    row = z[alive].tolist(), v[alive].tolist(), alpha, temperature
    exact, by_z = reference.of_logits(*row)
    by_v = reference.teacher_gradient(*row)
    for per_order in (False, True):
        leaves = z.clone().requires_grad_(), v.clone().requires_grad_()
        value = renyi_from_logits(*(x[None] for x in leaves), alpha, temperature, per_order)
        value.sum().backward()
        unit = mpmath.mpf(alpha) if per_order else 1
        assert abs(value.item() - exact / unit) <= max(value_bar * exact / unit, SMALL), (alpha, per_order)
        for leaf, expected in zip(leaves, (by_z, by_v)):
            error = max(abs(a - b / unit) for a, b in zip(leaf.grad[alive].tolist(), expected))
            assert error <= max(gradient_bar * max(map(abs, expected)) / unit, SMALL), (alpha, per_order)


MODERATE = [1e-4, 0.1, 0.4999, 0.5, 0.9, 1 - 1e-12, 1.0, 1 + 1e-12, 1.001, 1.1, 2.0, 20.0]


@pytest.mark.parametrize("dtype", BAR)
class TestHardRows:
    """Rows on which some earlier version lost digits, each for a reason of its own."""

    def test_impossible_classes_near_convergence(self, dtype):
        z, v = pair(20, dtype, "near", 1e-3)
        z[0] = v[0] = -math.inf
        for alpha in MODERATE:
            assert_meets_the_bar(z, v, alpha, 20.0)

    @pytest.mark.parametrize("size", [1.0, 15.0])
    def test_gap_in_one_rare_class(self, dtype, size):
        z = torch.randn(10, dtype=dtype)
        z[0] -= 20
        v = z.clone()
        v[0] += size
        for alpha in MODERATE:
            assert_meets_the_bar(z, v, alpha, 0.75)

    def test_wide_rows_at_order_one(self, dtype):
        z, v = pair(30, dtype, "wide", 1000.0)
        z[0] = v[0] = 1000.0
        for alpha in (1 - 1e-12, 1.0, 1 + 1e-12):
            assert_meets_the_bar(z, v, alpha, 1.0)

    @pytest.mark.parametrize("alpha", [0.9, 1.0, 1.1])
    def test_mixture_close_to_the_teacher_of_a_far_student(self, dtype, alpha):
        z, v = torch.tensor([[0.0, 470.3, 3.0], [0.0, -60.7, -50.0]], dtype=dtype)
        assert_meets_the_bar(z, v, alpha)

    def test_student_off_in_its_heaviest_class(self, dtype):
        z, v = pair(100, dtype, "near", 1.0)
        z[0] += 40
        for alpha in (2.0, 20.0, 100.0):
            assert_meets_the_bar(z, v, alpha, 100.0)

    @pytest.mark.parametrize("alpha", [1 - 1e-12, 1 + 1e-12])
    def test_value_near_the_smallest_that_counts(self, dtype, alpha):
        z = torch.tensor([0.0, 0.5, -50.0], dtype=dtype)
        v = torch.tensor([0.0, 0.5, -50.0001], dtype=dtype)
        assert_meets_the_bar(z, v, alpha)

    def test_order_zero_keeps_the_gradient_of_a_small_lost_mass(self, dtype):
        z = torch.randn(6, dtype=dtype)
        z[0] = -18.0
        v = z.flip(0).clone()
        v[0] = -math.inf
        _, gradient = loss_and_gradient(z, v, 0.0)
        q = reference.softmax(z.tolist())
        exact = [q[0], *(-q[0] * x / (1 - q[0]) for x in q[1:])]
        assert max(abs(a - b) for a, b in zip(gradient, exact)) <= BAR[dtype][1] * q[0]

    @pytest.mark.parametrize("scale", [1.0, "T2/alpha"])
    @pytest.mark.parametrize(("alpha", "limit"), [(5e-324, 0.0), (1e-31, 0.0), (1e300, math.inf)])
    def test_orders_beyond_the_float(self, dtype, alpha, limit, scale):
        z, v = pair(5, dtype, "near", 1.0)[:, None]
        if limit == math.inf and scale != 1.0:
            assert renyi_kd_loss(z, v, alpha, 1.0, scale) == 0
        else:
            assert renyi_kd_loss(z, v, alpha, 1.0, scale) == renyi_kd_loss(z, v, limit, 1.0, scale)
        assert renyi_kd_loss(z, v, torch.tensor([alpha], dtype=torch.float64), 1.0, scale).isfinite()


@pytest.mark.parametrize("dtype", BAR)
def test_a_thousand_classes(dtype):
    z, v = pair(1000, dtype, "near", 1.0)
    for alpha in (0.01, 0.5, 1 + 1e-6, 3.0):
        value, _ = loss_and_gradient(z, v, alpha)
        exact, _ = reference.of_logits(z.tolist(), v.tolist(), alpha)
        assert abs(value - exact) <= BAR[dtype][0] * exact


@pytest.mark.parametrize("alpha", [100.0, 1e4, 1e6])
def test_gradient_at_large_orders(alpha):
    """Beyond α = 20 the exponents αδ are ill-conditioned; taken from the mixture's own mode they still hold."""
    z, v = pair(10, torch.float32, "near", 1.0)
    _, gradient = loss_and_gradient(z, v, alpha)
    _, exact = reference.of_logits(z.tolist(), v.tolist(), alpha)
    assert max(abs(a - b) for a, b in zip(gradient, exact, strict=True)) <= 1e-3


class TestAgainstTorch:
    z, v = torch.randn(2, 16, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_kl_value_and_gradient(self, temperature):
        ours, theirs = (self.z.clone().requires_grad_() for _ in range(2))
        mine = renyi_kd_loss(ours, self.v, 1.0, temperature)
        kl = F.kl_div(
            (theirs / temperature).log_softmax(-1),
            (self.v / temperature).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        (kl * temperature**2).backward()
        mine.backward()
        torch.testing.assert_close(mine, (kl * temperature**2).detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-15)

    @pytest.mark.parametrize("alpha", [0.2, 0.5, 2.0, 7.0])
    def test_definition_and_autograd(self, alpha):
        """Formula (1.16) written out and differentiated by autograd, in both arguments."""
        ours, theirs = ([x.clone().requires_grad_() for x in (self.z, self.v)] for _ in range(2))
        log_q, log_p = (x.log_softmax(-1) for x in theirs)
        plain = (alpha * log_p + (1 - alpha) * log_q).logsumexp(-1).sum() / (alpha - 1)
        plain.backward()
        renyi_kd_loss(*ours, alpha, 1.0, reduction="sum").backward()
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-13)

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 1 + 1e-7, 2.0, 6.0])
    @pytest.mark.parametrize("scale", ["T2", "T2/alpha", 0.5])
    def test_gradcheck(self, alpha, scale):
        z, v = (x[:3, :4].clone().requires_grad_() for x in (self.z, self.v))

        def loss(z, v):
            return renyi_kd_loss(z, v, alpha, 2.0, scale, "none")

        if alpha == 0 and scale == "T2/alpha":  # reverse KL: the teacher's gradient is a limit as well
            torch.autograd.gradcheck(lambda z: loss(z, v.detach()), (z,))
        else:
            torch.autograd.gradcheck(loss, (z, v))

    @pytest.mark.parametrize(
        "alpha", [0.3, 1.0, 4.0, torch.tensor([[0.3], [1.0], [4.0]], dtype=torch.float64).squeeze(1)]
    )
    def test_second_derivatives_of_the_student(self, alpha):
        z = self.z[:3, :4].clone().requires_grad_()
        loss = lambda z: renyi_kd_loss(z, self.v[:3, :4], alpha, 2.0, "T2", "none")  # noqa: E731
        torch.autograd.gradgradcheck(loss, (z,))

    def test_second_derivatives_of_the_teacher_say_so(self):
        v = self.v[:3].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(renyi_kd_loss(self.z[:3], v, 2.0), v, create_graph=True)
        with pytest.raises(RuntimeError, match="not available"):
            gradient.sum().backward()


class TestOrders:
    z, v = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2

    @pytest.mark.parametrize("scale", ["T2", "T2/alpha"])
    def test_one_order_a_sample(self, scale):
        orders = torch.tensor([0.0, 0.3, 0.5, 1.0, 2.0, 30.0], dtype=torch.float64)
        temperatures = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
        z = self.z.clone().requires_grad_()
        rows = renyi_kd_loss(z, self.v, orders, temperatures, scale, "none")
        rows.sum().backward()
        for i, (alpha, temperature) in enumerate(zip(orders.tolist(), temperatures.tolist(), strict=True)):
            x = self.z[i : i + 1].clone().requires_grad_()
            one = renyi_kd_loss(x, self.v[i : i + 1], alpha, temperature, scale, "sum")
            one.backward()
            torch.testing.assert_close(rows[i].detach(), one.detach(), rtol=1e-13, atol=0)
            torch.testing.assert_close(z.grad[i], x.grad[0], rtol=1e-12, atol=1e-15)

    def test_infinite_order_among_others(self):
        orders = torch.tensor([math.inf, 1.0, math.inf, 0.0, 2.0, 0.5], dtype=torch.float64)
        rows = renyi_kd_loss(self.z, self.v, orders, 1.0, reduction="none")
        r = self.v.log_softmax(-1) - self.z.log_softmax(-1)
        torch.testing.assert_close(rows[[0, 2]], r.amax(-1)[[0, 2]])
        assert rows[3] == 0

    def test_infinite_order_pushes_one_class(self):
        z = self.z.clone().requires_grad_()
        renyi_kd_loss(z, self.v, math.inf, 2.0, 1.0, "sum").backward()
        q = (self.z / 2).softmax(-1)
        top = ((self.v / 2).log_softmax(-1) - q.log()).argmax(-1)
        torch.testing.assert_close(z.grad, (q - F.one_hot(top, 5)) / 2)

    def test_order_zero(self):
        z = self.z.clone().requires_grad_()
        loss = renyi_kd_loss(z, self.v, 0.0, 1.0)
        loss.backward()
        assert loss == 0
        assert z.grad.abs().max() == 0

    def test_order_zero_per_order_is_reverse_kl(self):
        expected = F.kl_div(self.v.log_softmax(-1), self.z.log_softmax(-1), reduction="batchmean", log_target=True)
        torch.testing.assert_close(renyi_kd_loss(self.z, self.v, 0.0, 1.0, "T2/alpha"), expected)

    def test_scales(self):
        plain = renyi_kd_loss(self.z, self.v, 2.0, 3.0, 1.0)
        torch.testing.assert_close(renyi_kd_loss(self.z, self.v, 2.0, 3.0, "T2"), 9 * plain)
        torch.testing.assert_close(renyi_kd_loss(self.z, self.v, 2.0, 3.0, "T2/alpha"), 4.5 * plain)

    @pytest.mark.parametrize("alpha", [0.25, 1.0, 4.0])
    def test_high_temperature_gradient_gains_the_factor_alpha(self, alpha):
        z = self.z.clone().requires_grad_()
        renyi_kd_loss(z, self.v, alpha, 1e5, "T2/alpha", "sum").backward()
        centred = [x - x.mean(-1, keepdim=True) for x in (self.z, self.v)]
        torch.testing.assert_close(z.grad, (centred[0] - centred[1]) / 5, rtol=1e-3, atol=1e-4)


@given(st.integers(2, 30), st.integers(0, 10**6), st.sampled_from(FINITE), st.floats(0.5, 20.0))
def test_gradient_is_bounded_and_sums_to_zero(n, seed, alpha, temperature):
    z, v = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)) * 5
    _, gradient = loss_and_gradient(z, v, alpha, temperature)
    gradient = torch.tensor(gradient)
    assert gradient.abs().sum() <= 2 / temperature * (1 + 1e-5)
    assert abs(gradient.sum()) <= 1e-6


@given(st.integers(2, 30), st.integers(0, 10**6), st.sampled_from(ORDERS), st.floats(-1e3, 1e3))
def test_shift_invariance_and_zero(n, seed, alpha, shift):
    z, v = torch.randn(2, 1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 5
    base = renyi_kd_loss(z, v, alpha)
    torch.testing.assert_close(renyi_kd_loss(z + shift, v, alpha), base, rtol=1e-9, atol=1e-12)
    assert renyi_kd_loss(z, z, alpha) == 0
    assert base >= 0


@given(st.integers(2, 12), st.integers(0, 10**6), st.sampled_from(ORDERS), st.floats(0.5, 20.0))
def test_agrees_with_the_probability_form(n, seed, alpha, temperature):
    z, v = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    p, q = softmax(v, temperature), softmax(z, temperature)
    torch.testing.assert_close(
        renyi_kd_loss(z[None], v[None], alpha, temperature, 1.0), renyi_divergence(p, q, alpha), rtol=1e-10, atol=1e-20
    )


class TestImpossibleClasses:
    z, v = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))

    @pytest.mark.parametrize("alpha", [0.0, *ORDERS])
    def test_class_mask_equals_leaving_the_class_out(self, alpha):
        mask = torch.tensor([True, True, False, True, False, True])
        ours, theirs = (self.z.clone().requires_grad_() for _ in range(2))
        masked = renyi_kd_loss(ours, self.v, alpha, class_mask=mask)
        without = renyi_kd_loss(theirs[:, mask], self.v[:, mask], alpha)
        masked.backward()
        without.backward()
        torch.testing.assert_close(masked, without)
        torch.testing.assert_close(ours.grad, theirs.grad)

    @pytest.mark.parametrize("alpha", [1.0, 2.0, math.inf])
    def test_gradient_of_an_infinite_row_is_finite(self, alpha):
        leaves = [torch.tensor([x], requires_grad=True) for x in ([-math.inf, 0.0], [0.3, -0.2])]
        loss = renyi_kd_loss(*leaves, alpha)
        loss.backward()
        assert loss == math.inf
        assert all(x.grad.isfinite().all() for x in leaves)

    def test_per_order_at_infinity(self):
        orders = torch.tensor([math.inf, math.inf])
        z, v = torch.tensor([[[-math.inf, 0.0], [1.0, 0.0]], [[0.3, -0.2], [0.5, 2.0]]])
        assert renyi_kd_loss(z, v, orders, 1.0, "T2/alpha", "none").tolist() == [math.inf, 0.0]

    @pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
    def test_second_derivatives_with_a_class_mask(self, alpha):
        mask = torch.tensor([True, True, False, True, False, True])
        loss = lambda z: renyi_kd_loss(z, self.v.double(), alpha, 2.0, class_mask=mask)  # noqa: E731
        torch.autograd.gradgradcheck(loss, (self.z.double().requires_grad_(),))

    @pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, 2.0, math.inf])
    def test_infinite_row_does_not_poison_its_neighbours(self, alpha):
        z = self.z.clone()
        z[1, 2] = -math.inf
        z.requires_grad_()
        rows = renyi_kd_loss(z, self.v, alpha, reduction="none")
        rows.sum().backward()
        clean = self.z.clone().requires_grad_()
        kept = renyi_kd_loss(clean, self.v, alpha, reduction="none")
        kept.sum().backward()
        assert torch.isfinite(z.grad).all()
        assert torch.isinf(rows[1]) == (alpha >= 1)
        others = [0, 2, 3]
        torch.testing.assert_close(rows[others], kept[others])
        torch.testing.assert_close(z.grad[others], clean.grad[others])

    def test_student_excludes_a_class_with_one_order_a_sample(self):
        z = torch.tensor([[0.0, -math.inf]]).repeat(5, 1).requires_grad_()
        orders = torch.tensor([0.5, 1.0, 2.0, math.inf, 0.0])
        rows = renyi_kd_loss(z, torch.zeros(5, 2), orders, reduction="none")
        rows.sum().backward()
        assert rows.isinf().tolist() == [False, True, True, True, False]
        assert torch.isfinite(z.grad).all()

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 1.0, 1.5, 4.0, math.inf])
    def test_teacher_excludes_a_class(self, alpha):
        v = self.v.clone()
        v[:, 0] = -math.inf
        z = self.z.double().requires_grad_()
        rows = renyi_kd_loss(z, v.double(), alpha, 1.0, 1.0, "none")
        rows.sum().backward()
        assert torch.isfinite(z.grad).all()
        for i in range(4):
            exact = reference.renyi(reference.softmax(v[i].tolist()), reference.softmax(self.z[i].tolist()), alpha)
            assert rows[i].item() == pytest.approx(float(exact), rel=1e-12)

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, math.inf])
    def test_disjoint_supports(self, alpha):
        z = torch.tensor([[0.0, -math.inf]], requires_grad=True)
        loss = renyi_kd_loss(z, torch.tensor([[-math.inf, 0.0]]), alpha)
        loss.backward()
        assert loss == math.inf
        assert torch.isfinite(z.grad).all()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_bad_logits_stay_in_their_row(self, bad):
        z = self.z.clone()
        z[2, 1] = bad
        z.requires_grad_()
        rows = renyi_kd_loss(z, self.v, 0.5, reduction="none")
        rows.sum().backward()
        assert rows.isnan().tolist() == [False, False, True, False]
        assert z.grad.isnan().any(-1).tolist() == [False, False, True, False]

    def test_masks_by_large_negative_numbers(self):
        """Beyond order 1 such classes do count: p^α q^(1-α) is huge. There, use `class_mask`."""
        z, v = self.z.clone(), self.v.clone()
        z[:, 0], v[:, 0] = -1e9, -1e4
        for alpha in [a for a in ORDERS if a <= 1]:
            torch.testing.assert_close(renyi_kd_loss(z, v, alpha), renyi_kd_loss(self.z[:, 1:], self.v[:, 1:], alpha))


class TestReduction:
    z, v = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(4))
    labels = torch.tensor([[0, -100, 2], [-100, 4, 1]])

    def test_reductions(self):
        rows = renyi_kd_loss(self.z, self.v, 2.0, reduction="none")
        assert rows.shape == (2, 3)
        torch.testing.assert_close(renyi_kd_loss(self.z, self.v, 2.0, reduction="sum"), rows.sum())
        torch.testing.assert_close(renyi_kd_loss(self.z, self.v, 2.0), rows.mean())

    def test_ignored_samples_count_for_nothing(self):
        z = self.z.clone()
        z[0, 1] = math.nan
        z.requires_grad_()
        counted = self.labels != -100
        loss = renyi_kd_loss(z, self.v, 0.5, labels=self.labels)
        loss.backward()
        torch.testing.assert_close(loss, renyi_kd_loss(self.z[counted], self.v[counted], 0.5))
        assert (z.grad[~counted] == 0).all()
        z.grad = None
        DistillationLoss(0.5)(z, self.v, self.labels).backward()
        assert z.grad.isfinite().all()
        assert (z.grad[~counted] == 0).all()

    @pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
    def test_all_samples_ignored(self, alpha):
        z = self.z.clone().requires_grad_()
        loss = DistillationLoss(alpha)(z, self.v, torch.full((2, 3), -100))
        loss.backward()
        assert loss == 0
        assert (z.grad == 0).all()

    def test_one_sample_and_none(self):
        assert renyi_kd_loss(self.z[:1, 0], self.v[:1, 0]).shape == ()
        assert renyi_kd_loss(self.z[:0], self.v[:0]) == 0

    def test_incoming_gradient_scales(self):
        one, three = (self.z.clone().requires_grad_() for _ in range(2))
        renyi_kd_loss(one, self.v, 2.0).backward()
        (3 * renyi_kd_loss(three, self.v, 2.0)).backward()
        torch.testing.assert_close(three.grad, 3 * one.grad)


class TestPrecision:
    z, v = torch.randn(2, 64, 10, generator=torch.Generator().manual_seed(5)) * 3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        z = self.z.to(dtype).requires_grad_()
        loss = renyi_kd_loss(z, self.v.to(dtype), 0.5)
        loss.backward()
        assert loss.dtype == torch.float32
        assert z.grad.dtype == dtype
        torch.testing.assert_close(loss, renyi_kd_loss(z.detach().float(), self.v.to(dtype).float(), 0.5))

    def test_autocast_changes_nothing(self):
        plain = renyi_kd_loss(self.z, self.v, 0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = renyi_kd_loss(self.z, self.v, 0.5)
        assert cast.dtype == torch.float32
        assert cast == plain

    def test_vmap_over_students(self):
        students = torch.stack([self.z, self.z + 1, 2 * self.z])
        orders = torch.tensor([0.5, 1.0, 3.0])
        loss = lambda z, a: renyi_kd_loss(z, self.v, a, 2.0)  # noqa: E731
        gradients, values = torch.vmap(torch.func.grad_and_value(loss))(students, orders)
        for i, alpha in enumerate(orders.tolist()):
            z = students[i].clone().requires_grad_()
            one = loss(z, alpha)
            one.backward()
            torch.testing.assert_close(values[i], one.detach())
            torch.testing.assert_close(gradients[i], z.grad)


class TestDistillationLoss:
    z, v = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(6))
    labels = torch.arange(8) % 5

    def test_is_equation_1_13(self):
        loss = DistillationLoss(0.5, 3.0, beta=0.7)(self.z, self.v, self.labels)
        soft = 9 * renyi_divergence(softmax(self.v, 3.0), softmax(self.z, 3.0), 0.5).mean()
        torch.testing.assert_close(loss, 0.3 * F.cross_entropy(self.z, self.labels) + 0.7 * soft)

    @pytest.mark.parametrize("beta", [0.0, 1.0])
    def test_ends_equal_the_plain_terms(self, beta):
        loss = DistillationLoss(2.0, beta=beta)(self.z, self.v, self.labels)
        plain = F.cross_entropy(self.z, self.labels) if beta == 0 else renyi_kd_loss(self.z, self.v, 2.0)
        torch.testing.assert_close(loss, plain)

    def test_class_mask_reaches_both_terms(self):
        mask = torch.tensor([True, True, True, True, False])
        labels = torch.arange(8) % 4
        loss = DistillationLoss(2.0)(self.z, self.v, labels, class_mask=mask)
        torch.testing.assert_close(loss, DistillationLoss(2.0)(self.z[:, :4], self.v[:, :4], labels))

    def test_order_zero_warns(self):
        with pytest.warns(UserWarning, match="zero gradient"):
            DistillationLoss(0.0)

    def test_shows_its_settings(self):
        assert "alpha=0.5, temperature=2.0, beta=0.9, scale='T2'" in repr(DistillationLoss(0.5, 2.0))


class TestBadInput:
    z = torch.zeros(2, 3)

    @pytest.mark.parametrize("alpha", [-1.0, math.nan, torch.tensor([1.0, -2.0])])
    def test_order(self, alpha):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, inf\], got"):
            renyi_kd_loss(self.z, self.z, alpha)

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
    def test_temperature(self, temperature):
        with pytest.raises(ValueError, match="temperature must be positive and finite, got"):
            renyi_kd_loss(self.z, self.z, 1.0, temperature)

    @pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan, "0.9"])
    def test_beta(self, beta):
        with pytest.raises(ValueError, match=r"beta must be a number in \[0, 1\], got"):
            DistillationLoss(beta=beta)

    @pytest.mark.parametrize("scale", ["t2", 0.0, -1.0, None, True, math.nan])
    def test_scale(self, scale):
        with pytest.raises(ValueError, match="scale must be 'T2'"):
            renyi_kd_loss(self.z, self.z, scale=scale)

    def test_scale_needs_a_finite_order(self):
        with pytest.raises(ValueError, match="finite alpha"):
            DistillationLoss(math.inf, scale="T2/alpha")

    def test_reduction(self):
        with pytest.raises(ValueError, match="reduction must be one of .* got 'mean'"):
            renyi_kd_loss(self.z, self.z, reduction="mean")

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"same shape, got \(2, 3\) and \(2, 4\)"):
            renyi_kd_loss(self.z, torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"alpha of shape \(3,\) does not broadcast to \(2,\)"):
            renyi_kd_loss(self.z, self.z, torch.ones(3))

    def test_integer_logits(self):
        with pytest.raises(TypeError, match="student_logits must be floating, got torch.int64"):
            renyi_kd_loss(self.z.long(), self.z)

    @pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
    def test_label_range(self, labels):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\) or equal -100, got"):
            DistillationLoss()(self.z, self.z, torch.tensor(labels))

    def test_label_shape_and_type(self):
        with pytest.raises(ValueError, match=r"labels must have shape \(2,\), got \(3,\)"):
            DistillationLoss()(self.z, self.z, torch.zeros(3, dtype=torch.long))
        with pytest.raises(TypeError, match="labels must be an integer tensor"):
            DistillationLoss()(self.z, self.z, torch.zeros(2))

    def test_class_mask(self):
        with pytest.raises(TypeError, match="class_mask must be a boolean tensor"):
            renyi_kd_loss(self.z, self.z, class_mask=torch.ones(3))
        with pytest.raises(ValueError, match="does not broadcast"):
            renyi_kd_loss(self.z, self.z, class_mask=torch.ones(4, dtype=torch.bool))

    @pytest.mark.parametrize("name", ["alpha", "temperature"])
    def test_hyperparameters_are_not_differentiated(self, name):
        with pytest.raises(TypeError, match=f"{name} is not differentiable"):
            renyi_kd_loss(self.z, self.z, **{name: torch.tensor(2.0, requires_grad=True)})
