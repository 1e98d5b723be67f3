"""`rkd.rows` and `rkd.fused`: one truth with the plain path and 50 digits, whatever is asked of autograd; memory."""

import itertools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
import torch.nn.functional as F
from test_loss import BAR, CASES, ORDERS, SMALL, pair

import rkd.rows
from rkd import DistillationLoss, fused_linear_renyi_kd_loss, renyi_kd_loss
from rkd.logits import renyi_from_logits
from rkd.rows import visit, weighted_divergence


def visited(z, v, alpha, temperature=1.0, per_order=False):
    """Value and gradient of each row through `rkd.rows`."""
    z = z.clone().requires_grad_()
    rows = weighted_divergence(z, v, alpha, temperature, per_order, 1.0, False)
    rows.sum().backward()
    return rows.detach(), z.grad


def plain(z, v, alpha, temperature=1.0, per_order=False):
    """The same in float64 by `rkd.logits`."""
    z = z.double().clone().requires_grad_()
    alpha, temperature = (x.double() if isinstance(x, torch.Tensor) else x for x in (alpha, temperature))
    rows = renyi_from_logits(z, v.double(), alpha, temperature, per_order)
    rows.sum().backward()
    return rows.detach(), z.grad


def assert_close(results, expected, dtype=torch.float32):
    """Within the bar of the plain path: values relative, gradients relative to the largest entry of the row."""
    value_bar, gradient_bar = BAR[dtype]
    (value, gradient), (exact, exact_gradient) = results, expected
    finite = exact.isfinite()
    assert (value[~finite].double() == exact[~finite]).all()
    assert ((value - exact).abs() <= value_bar * exact + 1e-30)[finite].all()
    largest = exact_gradient.abs().amax(-1, keepdim=True)
    assert ((gradient - exact_gradient).abs() <= gradient_bar * largest + 1e-30).all()


class TestRowsAgainst50Digits:
    @pytest.mark.parametrize(("kind", "size"), CASES)
    @pytest.mark.parametrize(("n", "temperature"), [(2, 1.0), (3, 4.0), (10, 1.0), (100, 3.0)])
    @pytest.mark.parametrize("per_order", [False, True])
    def test_value_and_gradient(self, kind, size, n, temperature, per_order):
        z, v = pair(n, torch.float32, kind, size)
        value_bar, gradient_bar = BAR[torch.float32]
        for alpha in [a for a in ORDERS if a < math.inf or not per_order]:
            value, gradient = visited(z[None], v[None], alpha, temperature, per_order)
            exact, exact_gradient = reference.of_logits(z.tolist(), v.tolist(), alpha, temperature)
            unit = alpha if per_order else 1.0
            if exact > SMALL or value > 1e-30:
                assert abs(value.item() - exact / unit) <= value_bar * exact / unit, alpha
            if exact_gradient is None or alpha > 20:
                continue
            largest = max(map(abs, exact_gradient))
            bar = gradient_bar * max(1, float(-reference.mpmath.log(largest)) / 20 if largest > 0 else 1)
            if largest > SMALL:
                error = max(abs(a - b / unit) for a, b in zip(gradient[0].tolist(), exact_gradient))
                assert error <= bar * largest / unit, alpha

    def test_reverse_kl(self):
        z, v = pair(10, torch.float32, "near", 1.0)
        value, gradient = visited(z[None], v[None], 0.0, 2.0, True)
        exact = reference.renyi(*(reference.softmax(x.tolist(), 2) for x in (z, v)), 1.0)
        assert value.item() == pytest.approx(float(exact), rel=5e-6)
        torch.testing.assert_close(gradient.double(), plain(z[None], v[None], 0.0, 2.0, True)[1], rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 3.0])
    def test_formulas_are_used_where_they_hold_and_only_there(self, alpha, monkeypatch):
        """Far from the teacher none of the rows goes the long way; equal logits all do."""
        calls = []
        monkeypatch.setattr(rkd.rows, "value_and_gradient", lambda z, *_: calls.append(len(z)) or (z[:, 0], z))
        z, v = pair(100, torch.float32, "near", 1.0)
        visit(z.expand(7, 100), v.expand(7, 100), alpha, 2.0, True, 1.0, True)
        assert not calls
        visit(z.expand(7, 100), z.expand(7, 100), alpha, 2.0, True, 1.0, True)
        assert calls == [7]


AWKWARD = [(41, 1271), (1, 2), (3, 1), (5, 7, 3), (130, 10)]


class TestRowsAgainstThePlainPath:
    @pytest.mark.parametrize("shape", AWKWARD)
    @pytest.mark.parametrize("dtype", BAR)
    def test_shapes_and_orders(self, shape, dtype):
        z = 3 * torch.randn(*shape, dtype=dtype)
        v = z + torch.randn(*shape, dtype=dtype)
        for alpha in (0.0, 1e-4, 0.5, 1.0, 1 - 1e-9, 1 + 1e-9, 2.0, 1e6, math.inf):
            assert_close(visited(z, v, alpha, 2.0), plain(z, v, alpha, 2.0), dtype if alpha <= 20 else torch.float32)

    @pytest.mark.parametrize("per_order", [False, True])
    def test_orders_and_temperatures_of_each_row(self, per_order):
        z, v = (3 * torch.randn(2, 6, 1271)).unbind()
        temperature = torch.linspace(0.5, 5.0, 6)
        orders = torch.tensor([0.0, 0.5, 1.0, 1 + 1e-7, 2.0, 7.0])
        assert_close(visited(z, v, orders, temperature, per_order), plain(z, v, orders, temperature, per_order))
        for alpha in (0.3, 1.0, 2.0):
            assert_close(visited(z, v, alpha, temperature, per_order), plain(z, v, alpha, temperature, per_order))

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, 30.0])
    def test_hard_rows_among_ordinary_ones(self, alpha, monkeypatch):
        monkeypatch.setattr(rkd.rows, "_BYTES_IN_CACHE", 2000)
        z, v = (3 * torch.randn(2, 40, 13)).unbind()
        z[3], z[8], z[14] = v[3], v[8] + 1e-5, 1e3 * v[14]
        z[20, 0] = v[20, 0] = v[25, 1] = z[31, 4] = -math.inf
        v[35] -= 1e4
        z[36] += 1000.0
        assert_close(visited(z, v, alpha), plain(z, v, alpha))
        z[39, 0] = math.nan
        value, gradient = visited(z, v, alpha)
        assert value.isnan().tolist() == [False] * 39 + [True]
        assert gradient.isfinite().all(-1).tolist() == [True] * 39 + [False]

    @pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
    @pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
    def test_ignored_rows(self, alpha, reduction):
        z, v = torch.randn(2, 6, 5)
        labels = torch.tensor([0, -100, 2, -100, 4, 1])
        z[1], v[3, 2] = math.nan, math.inf
        ours, theirs = (x.clone().requires_grad_() for x in (z, z))
        upstream = torch.linspace(0.5, 2.0, 6) if reduction == "none" else torch.tensor(3.0)
        loss = renyi_kd_loss(ours, v, alpha, labels=labels, reduction=reduction)
        (loss * upstream).sum().backward()
        kept = labels != -100
        expected = renyi_kd_loss(theirs[kept], v[kept], alpha, reduction=reduction)
        (expected * (upstream[kept] if reduction == "none" else upstream)).sum().backward()
        torch.testing.assert_close(loss[kept] if reduction == "none" else loss, expected)
        assert reduction != "none" or (loss[~kept] == 0).all()
        assert (ours.grad[~kept] == 0).all()
        torch.testing.assert_close(ours.grad[kept], theirs.grad[kept])

    @pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
    def test_all_ignored(self, alpha):
        z = torch.full((3, 4), math.nan).requires_grad_()
        loss = renyi_kd_loss(z, torch.randn(3, 4), alpha, labels=torch.full((3,), -100))
        loss.backward()
        assert loss == 0
        assert (z.grad == 0).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_rows(self, dtype):
        z, v = torch.randn(2, 8, 50).to(dtype)
        value, gradient = visit(z, v, 2.0, 2.0, False, 1.0, True)
        exact, exact_gradient = plain(z, v, 2.0, 2.0)
        assert gradient.dtype == dtype
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0.01, atol=1e-4)

    @pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)])
    def test_half_precision_is_not_widened_as_a_whole(self, dtypes, monkeypatch):
        """float16 gradients below its smallest number survive until the loss scale has multiplied them."""
        monkeypatch.setattr(rkd.loss, "widen", lambda *_: pytest.fail("the whole tensor was converted"))
        z, v = (x.to(dtype) for x, dtype in zip(torch.randn(2, 64, 50), dtypes))
        z.requires_grad_()
        loss = renyi_kd_loss(z, v, 2.0, scale=2.0**-12)
        (2.0**16 * loss).backward()
        exact, exact_gradient = plain(z.detach(), v, 2.0, 4.0)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact.mean() * 2.0**-12, rtol=1e-5, atol=0)
        torch.testing.assert_close(z.grad.double(), 16 / 64 * exact_gradient, rtol=0.005, atol=2.0**-24)

    def test_scratch_memory_serves_every_mode_and_thread(self):
        """Made in inference mode, used with gradients; eight threads at once do not share it."""
        z, v = torch.randn(2, 8, 64, 200)
        rkd.rows._thread.__dict__.clear()
        with torch.inference_mode():
            renyi_kd_loss(z[0], v[0], 2.0)
        assert rkd.rows._thread.memory.numel() >= 3 * 64 * 200
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda x: visited(*x, 2.0), [*zip(z, v)] * 20))
        for i, (a, b) in enumerate(zip(z, v)):
            assert_close(results[i], plain(a, b, 2.0))
            for j in range(i, 160, 8):
                assert all((a == b).all() for a, b in zip(results[j], results[i]))

    def test_strided_logits(self):
        z, v = torch.randn(2, 9, 40).transpose(1, 2)
        assert_close(visited(z, v, 2.0), plain(z, v, 2.0))


class TestAutograd:
    z, v = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(7))

    @pytest.mark.parametrize("reduction", ["batchmean", "none"])
    def test_backward_twice(self, reduction):
        z = self.z.clone().requires_grad_()
        loss = renyi_kd_loss(z, self.v, 2.0, reduction=reduction)
        upstream = torch.rand_like(loss) + 1
        (first,) = torch.autograd.grad(loss, z, upstream, retain_graph=True)
        kept = first.clone()
        first.zero_()
        (second,) = torch.autograd.grad(loss, z, 2 * upstream)
        torch.testing.assert_close(second, 2 * kept)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, z, upstream)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_second_derivatives_in_float32(self, weighted):
        """create_graph gives the Hessian, on logits that the formulas serve and with ignored samples."""
        labels = torch.tensor([1, -100, 0, 2]) if weighted else None

        def hessian(path, z):
            (gradient,) = torch.autograd.grad(path(z), z, create_graph=True)
            return torch.stack([torch.autograd.grad(x, z, retain_graph=True)[0] for x in gradient.flatten()])

        ours = lambda z: 3 * renyi_kd_loss(z, self.v.to(z), 2.0, labels=labels)  # noqa: E731
        single, double = (hessian(ours, self.z.to(t).clone().requires_grad_()) for t in BAR)
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-6)
        mine = torch.autograd.functional.hessian(ours, self.z.double())
        torch.testing.assert_close(double, mine.reshape(24, 4, 6))

    def test_second_derivative_in_the_incoming_gradient(self):
        z = self.z.double().requires_grad_()
        factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(factor * renyi_kd_loss(z, self.v.double(), 2.0), z, create_graph=True)
        (by_factor,) = torch.autograd.grad(gradient.square().sum(), factor)
        torch.testing.assert_close(by_factor, gradient.square().sum().detach())

    def test_hooks_of_the_logits_run_once(self):
        z, calls = self.z.clone().requires_grad_(), []
        z.register_hook(lambda _: calls.append(1))
        torch.autograd.grad(renyi_kd_loss(z, self.v), z, create_graph=True)
        assert calls == [1]

    def test_vectorised_jacobian(self):
        rows = lambda z: renyi_kd_loss(z, self.v, 2.0, reduction="none")  # noqa: E731
        one, many = (torch.autograd.functional.jacobian(rows, self.z, vectorize=x) for x in (False, True))
        torch.testing.assert_close(one, many)

    def test_teacher_gradient_is_there_when_asked_for(self):
        z, v = self.z.clone().requires_grad_(), self.v.clone().requires_grad_()
        loss = renyi_kd_loss(z, v, 2.0)
        loss.backward()
        assert v.grad.abs().max() > 0
        alone = self.z.clone().requires_grad_()
        renyi_kd_loss(alone, self.v, 2.0).backward()
        torch.testing.assert_close(z.grad, alone.grad)
        with torch.no_grad():
            torch.testing.assert_close(renyi_kd_loss(z, v, 2.0), loss.detach())

    def test_changed_logits_are_noticed(self):
        z = self.z.clone().requires_grad_()
        x = 1 * z
        loss = renyi_kd_loss(x, self.v)
        x.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def layer(samples=(41,), n=71, d=9, e=5, dtype=torch.float32, seed=0):
    """Hidden states, weights and biases of a student and a teacher."""
    make = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=make).to(dtype)  # noqa: E731
    return [draw(*samples, d), draw(n, d), draw(n), draw(*samples, e), draw(n, e), draw(n)]


def fused(tensors, *arguments, **options):
    h, w, b, g, u, c = tensors
    return fused_linear_renyi_kd_loss(h, w, g, u, *arguments, student_bias=b, teacher_bias=c, **options)


def logits_of(tensors):
    h, w, b, g, u, c = tensors
    return F.linear(h, w, b), F.linear(g, u, c)


def with_gradients(function, tensors, upstream=1.0):
    leaves = [x.clone().requires_grad_(i < 3) for i, x in enumerate(tensors)]
    loss = function(leaves)
    (loss * upstream).sum().backward()
    return [loss.detach(), *(x.grad for x in leaves[:3])]


@pytest.fixture
def small_chunks(monkeypatch):
    """Seven rows of 71 classes in float32 at a time."""
    monkeypatch.setitem(rkd.fused._BYTES_OF_A_CHUNK, "cpu", 7 * 71 * 12)


@pytest.mark.usefixtures("small_chunks")
class TestFusedLinear:
    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 1 + 1e-9, 2.0, 1e3, math.inf, torch.linspace(0, 3, 41)])
    @pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
    def test_equals_the_loss_of_the_logits(self, alpha, reduction):
        upstream = torch.linspace(0.5, 2.0, 41) if reduction == "none" else 3.0
        options = alpha, 2.0, "T2" if alpha is math.inf else "T2/alpha", reduction
        ours = with_gradients(lambda x: fused(x, *options), layer(), upstream)
        theirs = with_gradients(lambda x: renyi_kd_loss(*logits_of(x), *options), layer(), upstream)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * float(b.abs().max()))

    @pytest.mark.parametrize("beta", [0.0, 0.7, 1.0])
    def test_is_equation_1_13(self, beta):
        labels = torch.randint(71, (41,))
        labels[[3, 17]] = -100
        hidden = layer()
        hidden[0][3] = math.nan
        ours = with_gradients(lambda x: fused(x, 0.5, 3.0, labels=labels, beta=beta), hidden, 2.0)
        distil = DistillationLoss(0.5, 3.0, beta)
        theirs = with_gradients(lambda x: distil(*logits_of(x), labels), layer(), 2.0)
        assert (ours[1][[3, 17]] == 0).all()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_all_ignored(self):
        labels = torch.full((41,), -100)
        for gradient in with_gradients(lambda x: fused(x, labels=labels, beta=0.5), layer()):
            assert (gradient == 0).all()

    @pytest.mark.parametrize("alpha", [0.4, 1.0, 2.0])
    @pytest.mark.parametrize("reduction", ["batchmean", "none"])
    def test_gradcheck(self, alpha, reduction):
        *student, g, u, c = layer((4,), 5, 3, 2, torch.float64)
        labels = torch.tensor([0, 4, -100, 2])
        torch.autograd.gradcheck(
            lambda *x: fused([*x, g, u, c], alpha, 2.0, reduction=reduction, labels=labels, beta=0.8),
            [x.requires_grad_() for x in student],
        )

    def test_against_50_digits(self):
        tensors = layer((3,), 6, 4, 2, torch.float64)
        loss, by_hidden, by_weight, by_bias = with_gradients(lambda x: fused(x, 1.5, 2.0, "T2", "sum"), tensors)
        z, v = logits_of(tensors)
        exact = [reference.of_logits(a.tolist(), b.tolist(), 1.5, 2.0) for a, b in zip(z, v)]
        assert loss.item() == pytest.approx(4 * float(sum(value for value, _ in exact)), rel=1e-12)
        by_z = 4 * torch.tensor([[float(x) for x in gradient] for _, gradient in exact], dtype=torch.float64)
        expected = by_z @ tensors[1], by_z.T @ tensors[0], by_z.sum(0)
        for a, b in zip((by_hidden, by_weight, by_bias), expected):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)

    def test_leading_axes_and_no_bias(self):
        h, w, _, g, u, _ = layer((2, 3))
        rows = fused_linear_renyi_kd_loss(h, w, g, u, 2.0, torch.tensor([1.0, 2.0, 3.0]), reduction="none")
        expected = renyi_kd_loss(h @ w.T, g @ u.T, 2.0, torch.tensor([1.0, 2.0, 3.0]), reduction="none")
        torch.testing.assert_close(rows, expected)
        assert fused_linear_renyi_kd_loss(h[:0], w, g[:0], u) == 0

    def test_backward_twice_and_frozen_parts(self):
        tensors = layer()
        tensors[1].requires_grad_()
        loss = fused(tensors, 2.0)
        (first,) = torch.autograd.grad(loss, tensors[1], torch.tensor(2.0), retain_graph=True)
        kept = first.clone()
        first.zero_()
        (second,) = torch.autograd.grad(loss, tensors[1])
        torch.testing.assert_close(2 * second, kept)

    def test_the_teacher_gets_none_and_there_are_no_second_derivatives(self):
        tensors = [x.requires_grad_() for x in layer()]
        fused(tensors).backward()
        assert [x.grad is None for x in tensors] == [False] * 3 + [True] * 3
        (gradient,) = torch.autograd.grad(fused(tensors), tensors[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable|does not require grad|twice"):
            gradient.sum().backward()

    def test_half_precision(self):
        exact = with_gradients(lambda x: fused(x, 2.0), layer())
        half = with_gradients(lambda x: fused(x, 2.0), layer(dtype=torch.bfloat16))
        assert [x.dtype for x in half] == [torch.float32, *[torch.bfloat16] * 3]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = with_gradients(lambda x: fused(x, 2.0), layer())
        assert {x.dtype for x in cast} == {torch.float32}
        for a, b in itertools.chain(zip(half, exact), zip(cast, exact)):
            torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.05 * float(b.abs().max()))

    def test_impossible_classes_by_the_bias(self):
        tensors = layer()
        tensors[2][5] = tensors[5][5] = -math.inf
        loss, *gradients = with_gradients(lambda x: fused(x, 2.0), tensors)
        keep = [i for i in range(71) if i != 5]
        for i in (1, 2, 4, 5):
            tensors[i] = tensors[i][keep]
        torch.testing.assert_close(loss, fused(tensors, 2.0))
        assert all(x.isfinite().all() for x in gradients)

    def test_bad_input(self):
        h, w, b, g, u, _ = layer()
        with pytest.raises(ValueError, match=r"student_hidden \(..., d\) must fit student_weight"):
            fused_linear_renyi_kd_loss(h, u, g, u)
        with pytest.raises(ValueError, match="agree in samples and classes"):
            fused_linear_renyi_kd_loss(h[:3], w, g, u)
        with pytest.raises(ValueError, match="teacher_bias must have shape"):
            fused_linear_renyi_kd_loss(h, w, g, u, teacher_bias=b[:3])
        with pytest.raises(ValueError, match="student_weight must be torch.float32 like"):
            fused_linear_renyi_kd_loss(h, w.double(), g, u)
        with pytest.raises(TypeError, match="teacher_weight must be a floating tensor"):
            fused_linear_renyi_kd_loss(h, w, g, None)
        with pytest.raises(ValueError, match="needs labels"):
            fused_linear_renyi_kd_loss(h, w, g, u, beta=0.5)
        with pytest.raises(ValueError, match="beta must be"):
            fused_linear_renyi_kd_loss(h, w, g, u, beta=2.0)
        with pytest.raises(ValueError, match="reduction must be"):
            fused_linear_renyi_kd_loss(h, w, g, u, reduction="mean")


PEAK = """
import resource, sys, torch
from rkd import fused_linear_renyi_kd_loss, renyi_kd_loss
rows, classes, fused = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "fused"
def step(rows):
    if fused:
        h, w, g, u = (torch.randn(n, 8) for n in (rows, classes, rows, classes))
        fused_linear_renyi_kd_loss(h.requires_grad_(), w.requires_grad_(), g, u, 2.0).backward()
    else:
        renyi_kd_loss(torch.randn(rows, classes).requires_grad_(), torch.randn(rows, classes), 2.0).backward()
step(min(rows, 64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(rows)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def extra_mebibytes(rows, classes, kind):
    """Growth of a child's peak memory from a step of at most 64 rows to one of `rows`."""
    command = [sys.executable, "-c", PEAK, str(rows), str(classes), kind]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux")
class TestMemory:
    def test_fused_linear_does_not_grow_with_the_rows(self):
        """2,048 rows of 16,384 classes: one matrix of logits alone would be 128 MiB."""
        assert extra_mebibytes(2048, 16384, "fused") < 80

    def test_the_loss_needs_one_gradient_and_a_chunk(self):
        """512 rows of 32,768 classes: two logits and one gradient of 64 MiB each."""
        assert extra_mebibytes(512, 32768, "loss") < 3 * 64 + 30


class TestHardCases:
    """Inputs on which an earlier form of the fast way went wrong."""

    def test_an_ignored_row_of_infinite_divergence_counts_as_zero_without_gradients(self):
        z, v = torch.tensor([[0.0, 1.0, 2.0], [0.0, -math.inf, 0.0]]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
        loss = renyi_kd_loss(z, v, 1.0, 1.0, labels=torch.tensor([0, -100]))
        assert loss == renyi_kd_loss(z[:1], v[:1], 1.0, 1.0)

    @pytest.mark.parametrize("gap", [1e4, 1e5])
    def test_the_gradient_of_order_0_where_its_terms_cancel(self, gap):
        z = torch.tensor([[0.0, -27.6]], requires_grad=True)
        renyi_kd_loss(z, torch.tensor([[-gap, 0.0]]), 0.0, 1.0, "T2/alpha").backward()
        wide = z.detach().double()
        exact = (
            wide.softmax(-1).prod() * (wide[0, 0] - wide[0, 1] + gap) * torch.tensor([[1.0, -1.0]], dtype=torch.float64)
        )  # q₀q₁ times the difference of log(q/p)
        torch.testing.assert_close(z.grad.double(), exact, rtol=5e-6, atol=0)

    def test_a_gradient_whose_mixture_lies_far_down(self):
        z = torch.tensor([[-2000.3, -2000.0, -26000.0]], requires_grad=True)
        v = torch.tensor([[1.0, -2.0, 0.5]])
        renyi_kd_loss(z, v, 1.0, 1.0).backward()
        exact = z.detach().double().softmax(-1) - v.double().softmax(-1)
        assert (z.grad - exact).abs().max() <= 1e-6 * exact.abs().max()

    def test_infinite_however_small_the_teacher_is(self):
        z, v = torch.tensor([[0.0, -math.inf, 0.0]]), torch.tensor([[0.0, -760.0, 1.0]])
        assert renyi_kd_loss(z, v, 1.0, 1.0) == math.inf
        assert renyi_kd_loss(v.clone().requires_grad_(), z, 0.0, 1.0, "T2/alpha") == math.inf

    def test_second_derivatives_beside_an_ignored_row_of_nan(self):
        z = torch.randn(4, 6)
        z[1] = math.nan
        z.requires_grad_()
        loss = renyi_kd_loss(z, torch.randn(4, 6), 2.0, labels=torch.tensor([0, -100, 1, 2]))
        (slope,) = torch.autograd.grad(loss**2, z, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.square().sum(), z)
        assert curvature.isfinite().all()
        assert not curvature[1].any()

    def test_results_may_be_changed_in_place(self):
        z, v = torch.randn(2, 4, 6)
        renyi_kd_loss(z, v, reduction="none").add_(torch.zeros((), requires_grad=True))
        renyi_kd_loss(z.requires_grad_(), v, reduction="none").mul_(2).sum().backward()
        fused_linear_renyi_kd_loss(v, v, v, v).add_(torch.zeros((), requires_grad=True))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_a_trace_holds_for_other_batches(self):
        traced = torch.jit.trace(
            lambda a, b: renyi_kd_loss(a, b, 2.0), (torch.randn(4, 6), torch.randn(4, 6)), check_trace=False
        )
        a, b = torch.randn(2, 9, 6)
        torch.testing.assert_close(traced(a, b), renyi_kd_loss(a, b, 2.0))

    def test_float16_leaves_room_for_the_scale_of_the_gradient(self):
        hidden, weight, taught, layer = (
            (torch.randn(*shape) * size).half()
            for shape, size in (((3000, 8), 30), ((50, 8), 1), ((3000, 8), 30), ((50, 8), 1))
        )
        weight.requires_grad_()
        loss = fused_linear_renyi_kd_loss(hidden, weight, taught, layer, 2.0, 4.0, reduction="sum")
        (slope,) = torch.autograd.grad(loss / 30000, weight)
        wide = weight.detach().float().requires_grad_()
        held = renyi_kd_loss(hidden.float() @ wide.T, taught.float() @ layer.float().T, 2.0, 4.0, reduction="sum")
        (exact,) = torch.autograd.grad(held / 30000, wide)
        assert (slope.float() - exact).norm() <= 5e-3 * exact.norm()

    def test_doubles_stay_doubles_under_autocast(self):
        hidden, weight = torch.randn(2, 64, 8, dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            chunked = fused_linear_renyi_kd_loss(hidden, weight, weight, hidden, 2.0)
        torch.testing.assert_close(chunked, renyi_kd_loss(hidden @ weight.T, weight @ hidden.T, 2.0))
