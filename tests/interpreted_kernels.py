"""The Triton kernels against the plain path and 50 digits, on a CPU under Triton's interpreter.

Run by `test_kernels.py` in a process of its own: TRITON_INTERPRET has to be set before Triton is imported, and no other
test is to see it. By hand: TRITON_INTERPRET=1 RKD_TRITON=1 pytest tests/interpreted_kernels.py
"""

import functools
import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import fused, layer, plain, with_gradients
from test_loss import BAR, CASES, SMALL, pair

import rkd.launches
import rkd.operators
from rkd import DistillationLoss, renyi_kd_loss
from rkd.operators import can_launch, visit_in_place, weighted_loss

VALUE_BAR, GRADIENT_BAR = BAR[torch.float32]
HALF_BAR = 2.0**-7  # of an entry: the interpreter cuts bfloat16 off, a GPU rounds
KINDS = [0.01, 0.3, 0.5, 0.9, 1 - 1e-6, 1.0, 1 + 1e-9, 1.3, 2.0, 20.0]
ENDS = [0.0, 1e-4, 1e3, math.inf]


@pytest.fixture(autouse=True, params=["fast", "exact"])
def kernel(request, monkeypatch):
    """Small batches go to the exact kernel unless told otherwise."""
    monkeypatch.setattr(rkd.launches, "FEW_LOGITS", 0 if request.param == "fast" else 2**40)
    return request.param


only_fast = pytest.mark.parametrize("kernel", ["fast"], indirect=True)


def launched(z, v, alpha, temperature=1.0, per_order=False, **options):
    z = z.clone().requires_grad_()
    rows = weighted_loss(z, v, alpha, temperature, per_order, options.pop("soft", 1.0), **options)
    rows.sum().backward()
    return rows.detach(), z.grad


def assert_close(results, expected, gradient_bar=GRADIENT_BAR, floor=1e-30):
    (value, gradient), (exact, exact_gradient) = results, expected
    finite = exact.isfinite()
    torch.testing.assert_close(value[~finite].double(), exact[~finite], equal_nan=True)
    assert ((value - exact).abs() <= VALUE_BAR * exact + 1e-30)[finite].all()
    largest = exact_gradient.abs().amax(-1, keepdim=True)
    wrong = (gradient.double() - exact_gradient).abs() > gradient_bar * largest + floor
    assert not wrong.any()
    assert (gradient.isnan().any(-1) == exact_gradient.isnan().any(-1)).all()


def state_of(z, v, alpha):
    rows = rkd.launches.Rows.of(z, v, alpha, 1.0, 1.0, 0.0, None, None)
    return torch.ops.rkd.visit(*rows, *rkd.launches.Numbers.of(alpha, 1.0, 1.0, 0.0, False), False)[1]


class TestAgainst50Digits:
    @pytest.mark.parametrize(("n", "temperature"), [(2, 1.0), (20, 3.0)])
    def test_value_and_gradient(self, n, temperature):
        z, v = torch.stack([pair(n, torch.float32, *case) for case in CASES]).unbind(1)
        for alpha in (0.3, 0.5, 1 - 1e-6, 1.0, 2.0, 20.0, 1e6):
            values, gradients = launched(z, v, alpha, temperature)
            for i, case in enumerate(CASES):
                exact, exact_gradient = reference.of_logits(z[i].tolist(), v[i].tolist(), alpha, temperature)
                assert abs(values[i].item() - exact) <= max(VALUE_BAR * exact, SMALL), (alpha, case)
                largest = max(map(abs, exact_gradient))
                if alpha <= 20 and largest > SMALL:
                    bar = GRADIENT_BAR * max(1, float(-reference.mpmath.log(largest)) / 20)
                    error = max(abs(a - b) for a, b in zip(gradients[i].tolist(), exact_gradient))
                    assert error <= bar * largest, (alpha, case)


class TestAgainstThePlainPath:
    @pytest.mark.parametrize("shape", [(1, 2), (3, 1), (3, 1000), (2, 3, 3), (1, 2501)])
    def test_awkward_shapes(self, shape):
        z = 3 * torch.randn(*shape)
        v = z + torch.randn(*shape)
        for alpha in (0.3, 1.0, 2.0):
            assert_close(launched(z, v, alpha, 2.0), plain(z, v, alpha, 2.0))

    @only_fast
    @pytest.mark.parametrize("alpha", [0.5, 1.2])
    def test_many_rows(self, alpha):
        z, v = (3 * torch.randn(2, 41, 1271)).unbind()
        assert_close(launched(z, v, alpha, 4.0), plain(z, v, alpha, 4.0))

    @pytest.mark.parametrize("per_order", [False, True])
    def test_orders(self, per_order):
        z = 3 * torch.randn(4, 50)
        v = z + torch.tensor([[1e-4], [0.1], [1.0], [5.0]]) * torch.randn(4, 50)
        for alpha in KINDS + ENDS[: 3 if per_order else 4]:
            bar = GRADIENT_BAR if alpha <= 20 else 1e-3
            assert_close(launched(z, v, alpha, 2.0, per_order), plain(z, v, alpha, 2.0, per_order), bar)

    @pytest.mark.parametrize("per_order", [False, True])
    def test_orders_and_temperatures_of_each_row(self, per_order):
        z, v = (3 * torch.randn(2, 8, 130)).unbind()
        temperature = torch.linspace(0.5, 5.0, 8)
        orders = torch.tensor([0.0, 0.2, 0.5, 1.0, 1 + 1e-7, 2.0, 7.0, 3.0 if per_order else math.inf])
        assert_close(launched(z, v, orders, temperature, per_order), plain(z, v, orders, temperature, per_order))

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 2.0, math.inf])
    def test_hard_rows_among_ordinary_ones(self, alpha):
        z, v = (3 * torch.randn(2, 18, 70)).unbind()
        z[1], z[2], z[3] = v[1], v[2] + 1e-5, 1e3 * v[3]
        z[4, 0] = v[4, 0] = v[5, 1] = z[6, 4] = -math.inf
        v[7] -= 1e4
        z[8] += 1000.0
        z[9], v[9] = 1e4 * (2 * torch.rand(2, 70) - 1)
        z[10, :30] = v[10, 30:] = -math.inf  # disjoint
        z[11, :69] = -math.inf
        exact, exact_gradient = plain(z, v, alpha, 1.5)
        z[12, 60], v[13, 3], z[14, 3], v[15, 60], z[16] = math.nan, math.nan, math.inf, math.inf, -math.inf
        value, gradient = launched(z, v, alpha, 1.5)
        assert value.isnan().tolist() == gradient.isnan().any(-1).tolist() == 12 * [False] + 5 * [True] + [False]
        kept = [*range(12), 17]
        assert_close((value[kept], gradient[kept]), (exact[kept], exact_gradient[kept]), floor=1e-14)

    @pytest.mark.parametrize("types", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)])
    def test_half_precision(self, types):
        z, v = (x.to(t) for x, t in zip(3 * torch.randn(2, 4, 300), types))
        for alpha in (0.3, 1.0, 2.0):
            value, gradient = launched(z, v, alpha, 2.0)
            exact, exact_gradient = plain(z, v, alpha, 2.0)
            assert gradient.dtype == types[0]
            torch.testing.assert_close(value.double(), exact, rtol=VALUE_BAR, atol=0)
            torch.testing.assert_close(gradient.double(), exact_gradient, rtol=HALF_BAR, atol=1e-6)

    def test_strided_and_turned_logits(self):
        z, v = torch.randn(2, 9, 80).unbind()
        for a, b in ((z[::2, :40], v[::2, 40:]), (z.t(), v.t()), (z[:1].expand(4, 80), v[:4])):
            assert_close(launched(a, b, 2.0), plain(a, b, 2.0))

    @only_fast
    def test_gradient_for_later_is_the_same(self, monkeypatch):
        z, v = torch.randn(2, 5, 600).unbind()
        first = launched(z, v, 0.3)
        monkeypatch.setattr(rkd.operators, "fits_in_cache", lambda *_: False)
        later = launched(z, v, 0.3)
        for a, b in zip(first, later):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("early", [False, True])
    def test_incoming_gradients(self, early, monkeypatch):
        monkeypatch.setattr(rkd.operators, "fits_in_cache", lambda *_: early)
        z, v = torch.randn(2, 4, 90).unbind()
        z[1] = math.nan
        upstream = torch.tensor([1.0, 0.0, -2.5, 3.0])
        z.requires_grad_()
        (gradient,) = torch.autograd.grad((weighted_loss(z, v, 2.0, 1.0, False, 1.0) * upstream)[[0, 2, 3]].sum(), z)
        exact = plain(z.detach(), v, 2.0)[1] * upstream.unsqueeze(-1)
        assert (gradient[1] == 0).all()
        torch.testing.assert_close(gradient[[0, 2, 3]].double(), exact[[0, 2, 3]], rtol=1e-5, atol=1e-7)


class TestChoice:
    @only_fast
    def test_ordinary_rows_take_the_fast_kernel_and_hard_ones_do_not(self):
        z = 3 * torch.randn(7, 500)
        v = z + torch.tensor([1e-4, 1e-2, 0.3, 1.0, 1.0, 1.0, 1.0]).unsqueeze(-1) * torch.randn(7, 500)
        z[4] = v[4]
        z[5, 7] = -math.inf
        z[6] = 1e3 * v[6].flip(0)
        for alpha in (0.3, 0.5, 1.0, 2.0):  # below 1/2 the student may exclude a class
            assert state_of(z, v, alpha)[:, 5].tolist() == [1, 1, 1, 1, 1, alpha < 0.5, 0]

    def test_where_it_applies(self, monkeypatch):
        z, v = torch.randn(2, 3, 4)
        assert can_launch(z, v)
        assert not can_launch(z.double(), v)
        assert not can_launch(z, v.clone().requires_grad_())
        assert not can_launch(z, v[:2])
        assert not can_launch(z, None)
        assert torch.vmap(lambda a, b: torch.tensor(float(can_launch(a, b))), out_dims=None)(z, v) == 0
        monkeypatch.setattr(rkd.operators, "_CHOICE", "0")
        assert not can_launch(z, v)

    @only_fast
    def test_a_gpu_without_a_compiler_is_told_once(self, monkeypatch):
        monkeypatch.setattr(rkd.operators, "_holds", functools.cache(rkd.operators._holds.__wrapped__))
        monkeypatch.setattr(rkd.launches, "power_of_2", lambda *_: 1 / 0)
        z, v = torch.randn(2, 3, 4)
        with pytest.warns(UserWarning, match="Triton kernels are not used: ZeroDivisionError"):
            assert not can_launch(z, v)
        assert not can_launch(z, v)

    @only_fast
    def test_a_gpu_that_computes_something_else_is_told(self, monkeypatch):
        monkeypatch.setattr(rkd.operators, "weighted_loss", lambda *a, **k: 1.0001 * weighted_loss(*a, **k))
        with pytest.warns(UserWarning, match="Triton kernels are not used: ArithmeticError: relative error 0.0001"):
            assert not rkd.operators._holds.__wrapped__(torch.device("cpu"))


def by_the_plain_path(monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(rkd.operators, "_CHOICE", "0")
        return function()


class TestPublicFunctions:
    z, v = torch.randn(2, 2, 3, 40, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[0, -100, 39], [5, -100, 7]])

    def both(self, monkeypatch, loss, upstream=2.0):
        def run():
            z = self.z.clone()
            z[0, 1] = math.nan  # ignored where labels are given
            z.requires_grad_()
            value = loss(z)
            (value * upstream).sum().backward()
            return value.detach(), z.grad

        ours, theirs = run(), by_the_plain_path(monkeypatch, run)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, equal_nan=True)

    @only_fast
    @pytest.mark.parametrize("scale", ["T2", "T2/alpha", 0.5])
    @pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
    def test_scales_and_reductions(self, monkeypatch, scale, reduction):
        options = {"labels": self.labels, "reduction": reduction}
        self.both(monkeypatch, lambda z: renyi_kd_loss(z, self.v, 0.3, 3.0, scale, **options))

    @pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.0), (0.3, 0.7), (1.0, 0.7), (2.0, 0.7), (2.0, 1.0)])
    def test_equation_1_13(self, monkeypatch, alpha, beta):
        loss = DistillationLoss(alpha, 3.0, beta)
        self.both(monkeypatch, lambda z: loss(z, self.v, self.labels))

    @only_fast
    @pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 40), (2, 1, 40), (2, 3, 40)])
    def test_class_masks(self, monkeypatch, shape):
        mask = torch.rand(*shape, generator=torch.Generator().manual_seed(2)) > 0.4
        mask[..., [0, 5, 7, 39]] = True
        loss = DistillationLoss(2.0, 3.0)
        self.both(monkeypatch, lambda z: loss(z, self.v, self.labels, class_mask=mask))

    def test_all_ignored(self):
        z = torch.full((3, 4), math.nan).requires_grad_()
        loss = DistillationLoss(2.0)(z, torch.randn(3, 4), torch.full((3,), -100))
        loss.backward()
        assert loss == 0
        assert (z.grad == 0).all()

    def test_a_dominant_class_takes_its_gradient_from_the_others(self):
        z = torch.tensor([[0.0, -27.6]])
        v = torch.tensor([[-1e4, 0.0]])
        for alpha, per_order in ((0.0, True), (0.3, False)):
            _, gradient = launched(z, v, alpha, per_order=per_order)
            exact = plain(z, v, alpha, per_order=per_order)[1]
            torch.testing.assert_close(gradient.double(), exact, rtol=5e-6, atol=0)

    def test_vectorised_jacobian(self):
        z, v = torch.randn(2, 3, 6).unbind()
        rows = lambda z: renyi_kd_loss(z, v, 2.0, reduction="none")  # noqa: E731
        one, many = (torch.autograd.functional.jacobian(rows, z, vectorize=x) for x in (False, True))
        torch.testing.assert_close(one, many)

    def test_labels_out_of_range_are_nan_in_their_row(self):
        z, v = torch.randn(2, 4, 5).unbind()
        labels = torch.tensor([0, 5, -1, 2**40])
        z.requires_grad_()
        rows = weighted_loss(z, v, 2.0, 1.0, False, 0.5, hard=0.5, labels=labels)
        rows.sum().backward()
        assert rows.isnan().tolist() == z.grad.isnan().all(-1).tolist() == [False, True, True, True]
        assert not z.grad[0].isnan().any()

    def test_bad_orders_on_a_device_are_nan_in_their_row(self):
        z, v = torch.randn(2, 4, 5).unbind()
        value, gradient = launched(z, v, torch.tensor([-1.0, math.nan, 1.0, 2.0]))
        assert value.isnan().tolist() == gradient.isnan().all(-1).tolist() == [True, True, False, False]

    @pytest.mark.parametrize("alpha", [0.3, 1.0, torch.tensor([[0.5, 1.0, 2.0]])])
    def test_backward_twice_and_second_derivatives(self, monkeypatch, alpha):
        loss = DistillationLoss(alpha, 2.0, 0.6)
        labels = self.labels.clamp_min(0)

        def run():
            z = self.z.clone().requires_grad_()
            value = loss(z, self.v, labels)
            first = torch.autograd.grad(value, z, retain_graph=True)[0].clone()
            second = torch.autograd.grad(value, z, torch.tensor(3.0), retain_graph=True)[0]
            torch.testing.assert_close(second, 3 * first, rtol=1e-6, atol=1e-9)
            (slope,) = torch.autograd.grad(value, z, create_graph=True)
            return first, torch.autograd.grad(slope.square().sum(), z)[0]

        for a, b in zip(run(), by_the_plain_path(monkeypatch, run)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)

    @only_fast
    def test_errors_are_those_of_the_plain_path(self):
        z = torch.zeros(2, 3)
        for message, arguments, options in (
            (r"alpha must be in \[0, inf\], got", (-1.0,), {}),
            ("temperature must be positive and finite", (1.0, 0.0), {}),
            ("scale must be", (1.0, 1.0, "T3"), {}),
            ("reduction must be", (1.0, 1.0, "T2", "mean"), {}),
            (r"alpha of shape \(3,\) does not broadcast", (torch.ones(3),), {}),
            ("labels must have shape", (), {"labels": torch.zeros(3, dtype=torch.long)}),
            (r"labels must lie in \[0, 3\)", (), {"labels": torch.tensor([0, 3])}),
            ("class_mask of shape", (), {"class_mask": torch.ones(4, dtype=torch.bool)}),
        ):
            with pytest.raises(ValueError, match=message):
                renyi_kd_loss(z, z, *arguments, **options)
        with pytest.raises(ValueError, match="same shape"):
            renyi_kd_loss(z, z[:1])


@only_fast
class TestOperators:
    def arguments(self, z, v, alpha=2.0, hard=0.0, labels=None, mask=None):
        rows = rkd.launches.Rows.of(z, v, alpha, 2.0, 0.5, hard, labels, mask)
        return [*rows, *rkd.launches.Numbers.of(alpha, 2.0, 0.5, hard, False)]

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("alpha", [2.0, torch.tensor([0.5, 1.0, 2.0])])
    def test_opcheck(self, alpha):
        z, v = torch.randn(2, 3, 20).unbind()
        arguments = self.arguments(z, v, alpha, 0.5, torch.tensor([1, 2, 3]), torch.ones(20, dtype=torch.bool))
        torch.library.opcheck(torch.ops.rkd.visit, (z.clone().requires_grad_(), *arguments[1:], False))
        torch.library.opcheck(torch.ops.rkd.visit, (*arguments, True), test_utils=("test_schema", "test_faketensor"))
        torch.library.opcheck(torch.ops.rkd.visit_, (z.clone(), *arguments[1:]))
        state = torch.ops.rkd.visit(*arguments, False)[1]
        torch.library.opcheck(torch.ops.rkd.differentiate, (torch.rand(3), state, *arguments))
        torch.library.opcheck(torch.ops.rkd.scale_, (torch.randn(3, 20), torch.rand(3)))

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.parametrize("hard", [False, True])
    def test_compiles_as_one_graph(self, dynamic, hard):
        z, v = torch.randn(2, 4, 30).unbind()
        labels = torch.tensor([0, -100, 29, 3])
        combined = DistillationLoss(0.5, torch.tensor([1.0, 2.0, 3.0, 4.0]), beta=0.5)
        loss = lambda z, v: combined(z, v, labels) if hard else renyi_kd_loss(z, v, 0.5, 2.0)  # noqa: E731
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        results = []
        for function in (loss, compiled):
            x = z.clone().requires_grad_()
            value = 2 * function(x, v)
            value.backward()
            results.append((value.detach(), x.grad))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("alpha", [0.3, 2.0, math.inf])
    def test_gradient_in_the_place_of_the_logits(self, alpha):
        z, v = torch.randn(2, 4, 700).unbind()
        labels = torch.tensor([1, 2, 3, 4])
        place = z.clone()
        values = visit_in_place(place, v, alpha, 2.0, False, 0.5, 0.25, labels)
        expected, gradient = launched(z, v, alpha, 2.0, soft=0.5, hard=0.25, labels=labels)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(place, gradient, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("reduction", ["batchmean", "none"])
    def test_fused_linear(self, monkeypatch, reduction):
        monkeypatch.setitem(rkd.fused._BYTES_OF_A_CHUNK, "cpu", 7 * 71 * 8)
        labels = torch.randint(71, (20,))
        labels[[3, 17]] = -100
        upstream = torch.linspace(0.5, 2.0, 20) if reduction == "none" else 3.0
        options = {"labels": labels, "beta": 0.7, "reduction": reduction}

        def run():
            return with_gradients(lambda x: fused(x, 0.5, 3.0, **options), layer((20,)), upstream)

        for a, b in zip(run(), by_the_plain_path(monkeypatch, run)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@settings(max_examples=12)
@given(st.integers(2, 40), st.integers(0, 10**6), st.sampled_from(KINDS + ENDS), st.floats(0.5, 20.0))
def test_properties(n, seed, alpha, temperature):
    """Never negative, 0 for equal logits; the gradient sums to 0 and is bounded."""
    z, v = 5 * torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed))
    v[2] = z[2]
    value, gradient = launched(z, v, alpha, temperature)
    assert (value >= 0).all()
    assert value[2] == 0
    assert (gradient.abs().sum(-1) <= 2 / temperature * (1 + 1e-5)).all()
    assert (gradient.sum(-1).abs() <= 1e-6).all()
