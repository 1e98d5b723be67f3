"""`rkd.objectives`: closed-form gradients against automatic differentiation of the public losses; what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rkd import renyi_kd_loss
from rkd.objectives import Gradient, Student

N, CLASSES = 9, 7


def values(student, z, v, y):
    """The loss of each sample in plain PyTorch; logits (B, n)."""
    t = student.temperature
    hard = F.cross_entropy(z, y, reduction="none")
    kl = lambda log_input, target: F.kl_div(log_input, target, reduction="none").sum(-1)  # noqa: E731
    log_q, log_p = (z / t).log_softmax(-1), (v / t).log_softmax(-1)
    if student.loss == "renyi":
        soft = renyi_kd_loss(z, v, student.alpha, t, student.scale, "none")
        return (1 - student.beta) * hard + student.beta * soft
    if student.loss == "kl":
        soft = kl(log_q, log_p.exp())
    elif student.loss == "reverse_kl":
        soft = kl(log_p, log_q.exp())
    elif student.loss == "js":
        m = student.mixture * log_p.exp() + (1 - student.mixture) * log_q.exp()
        soft = student.mixture * kl(m.log(), log_p.exp()) + (1 - student.mixture) * kl(m.log(), log_q.exp())
    elif student.loss == "mse":
        soft = F.mse_loss(z, v, reduction="none").mean(-1) / 2
    elif student.loss == "ttm":
        soft = kl(z.log_softmax(-1), log_p.exp())
    else:
        soft = 0 * hard
    scale = t**2 if student.scale == "T2" else student.scale
    return (1 - student.beta) * hard + student.beta * scale * soft


def samples(dtype, spread=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, v = (spread * torch.randn(N, CLASSES, generator=generator, dtype=torch.float64) for _ in "zv")
    return z.to(dtype), v.to(dtype), torch.randint(CLASSES, (N,), generator=generator)


def closed(students, z, v, y):
    rows = z.T.expand(1, len(students), -1, -1).contiguous()
    hard, soft = Gradient(students, z).terms(rows, v.T.expand(1, 1, -1, -1), y[None])
    return (hard + soft)[0].transpose(1, 2)


def by_autograd(student, z, v, y):
    leaf = z.double().requires_grad_()
    return torch.autograd.grad(values(student, leaf, v.double(), y).sum(), leaf)[0]


STUDENTS = [
    *(
        Student(alpha=a, temperature=t, beta=0.7)
        for a in (0.0, 0.03, 0.5, 1.0, 2.0, 20.0, math.inf)
        for t in (1.0, 8.0)
    ),
    *(Student(alpha=a, temperature=2.0, beta=1.0, scale="T2/alpha") for a in (0.0, 1e-6, 0.49, 0.5, 1.0, 5.0)),
    *(Student(alpha=a, temperature=2.0, scale=3.0) for a in (0.25, 1.0, 4.0)),
    *(Student(loss=loss, temperature=3.0, beta=0.4) for loss in ("kl", "reverse_kl", "js")),
    Student(loss="js", mixture=0.1, scale=2.0),
    Student(loss="mse", scale=1.0),
    Student(loss="ttm", scale=2.5, beta=0.5),
    Student(loss="hard", beta=0.0),
    Student(beta=0.0),
]


@pytest.mark.parametrize("student", STUDENTS, ids=lambda s: f"{s.loss}-{s.alpha:g}-{s.temperature:g}-{s.scale}")
def test_gradient_is_that_of_the_loss(student):
    z, v, y = samples(torch.float64)
    torch.testing.assert_close(closed([student], z, v, y)[0], by_autograd(student, z, v, y), rtol=1e-10, atol=1e-12)


def test_a_mixed_bundle_is_its_members():
    z, v, y = samples(torch.float64, seed=1)
    for row, student in zip(closed(STUDENTS, z, v, y), STUDENTS):
        torch.testing.assert_close(row, by_autograd(student, z, v, y), rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    alpha=st.floats(0, 20),
    temperature=st.floats(0.5, 20),
    spread=st.floats(1e-3, 30),
    per_order=st.booleans(),
    seed=st.integers(0, 99),
)
def test_single_precision(alpha, temperature, spread, per_order, seed):
    """To 2e-5 of the largest entry of the two distributions' own gradient, T: what rounding the logits would do."""
    student = Student(alpha=alpha, temperature=temperature, beta=1.0, scale="T2/alpha" if per_order else "T2")
    z, v, y = samples(torch.float32, spread, seed)
    exact = by_autograd(student, z, v, y)
    order = 1 if per_order else max(alpha, 1)
    allowed = 2e-5 * temperature * order * max(1.0, spread * max(alpha, 1) / temperature)
    assert (closed([student], z, v, y)[0] - exact).abs().max() <= allowed


def test_extreme_logits_stay_finite():
    students = [Student(alpha=a, temperature=1.0) for a in (0.0, 0.04, 0.4, 1.0, 3.0, math.inf)]
    students += [Student(alpha=a, temperature=1.0, scale="T2/alpha") for a in (0.0, 0.04, 0.4, 3.0)]
    z, v, y = samples(torch.float32, spread=2000.0)
    assert closed(students, z, v, y).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "euclid"}, "loss must be one of renyi, kl, .*, got 'euclid'"),
        ({"alpha": -1.0}, r"alpha must be in \[0, inf\], got -1.0"),
        ({"alpha": math.nan}, "alpha must be"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"loss": "hard"}, "beta must be 0 for loss hard, got 0.9"),
        ({"scale": "T3"}, "scale must be 'T2', 'T2/alpha' or a positive number, got 'T3'"),
        ({"scale": "T2/alpha", "alpha": math.inf}, "scale must be 'T2' or a number unless"),
        ({"scale": "T2/alpha", "loss": "kl"}, "scale must be 'T2' or a number unless"),
        ({"loss": "mse"}, "scale must be a positive number for loss mse, got 'T2'"),
        ({"scale": 0.0}, "scale must be 'T2', 'T2/alpha' or a positive number, got 0.0"),
        ({"mixture": 1.0}, r"mixture must be in \(0, 1\), got 1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive or None, got 0.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Student(**settings)
