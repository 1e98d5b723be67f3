"""`rkd.training`: a bundle is its students one by one, each trained as a plain PyTorch loop would; teachers learn."""

import pytest
import torch

from rkd import DistillationLoss
from rkd.data import Split, digits
from rkd.models import mlp
from rkd.training import Schedule, Student, train_students, train_teacher

SHORT = Schedule(epochs=3, batch_size=32, learning_rate=5e-3, weight_decay=1e-2)
BUNDLE = [
    Student(seed=0, beta=0.0),
    Student(seed=0, alpha=1.0, temperature=2.0),
    Student(seed=1, alpha=0.0, temperature=8.0),
    Student(seed=2, alpha=3.0, temperature=4.0, beta=0.5),
    Student(seed=1, alpha=0.5, temperature=1.0, beta=1.0),
]


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def few(data):
    return Split(data.train.x[:80], data.train.y[:80])


@pytest.fixture(scope="module")
def teacher_logits(few):
    return 4 * torch.randn(80, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def build(seed):
    return mlp([64, 7, 10], seed)


def test_a_student_is_the_same_alone_and_in_any_bundle(data, few, teacher_logits):
    together = train_students(build, BUNDLE, few, teacher_logits, SHORT)(data.test.x)
    assert together.shape == (5, 800, 10)
    for logits, student in zip(together, BUNDLE, strict=True):
        alone = train_students(build, [student], few, teacher_logits, SHORT)(data.test.x)[0]
        torch.testing.assert_close(logits, alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("student", BUNDLE[:1] + BUNDLE[3:])
def test_a_student_is_a_plain_training_loop(data, few, teacher_logits, student):
    """The loop that a user would write, with `DistillationLoss`, an ordinary module and an ordinary optimiser."""
    model, loss = build(student.seed), DistillationLoss(student.alpha, student.temperature, student.beta, "T2/alpha")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    generator = torch.Generator().manual_seed(student.seed)
    for _ in range(3):
        for batch in torch.randperm(80, generator=generator).split(32):
            optimizer.zero_grad()
            loss(model(few.x[batch]), teacher_logits[batch], few.y[batch]).backward()
            optimizer.step()
            decay.step()
    ours = train_students(build, [student], few, teacher_logits, SHORT)(data.test.x)[0]
    torch.testing.assert_close(ours, model(data.test.x).detach(), rtol=1e-9, atol=1e-10)


def test_seeds_are_paired(data, few, teacher_logits):
    """Without soft targets the order cannot matter, so equal seeds give equal students, and other seeds do not."""
    bundle = [Student(seed=0, beta=0.0, alpha=0.5), Student(seed=0, beta=0.0, alpha=2.0), Student(seed=1, beta=0.0)]
    one, two, other = train_students(build, bundle, few, teacher_logits, SHORT)(data.test.x)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(one, other, atol=0.1)


def test_teacher_learns_and_repeats(data):
    make = lambda: train_teacher(  # noqa: E731
        mlp([64, 64, 10], seed=0, dropout=0.2), data.train, Schedule(epochs=15, learning_rate=2e-3), seed=0
    )
    teacher = make()
    accuracy = (teacher(data.validation.x).argmax(-1) == data.validation.y).double().mean()
    assert accuracy > 0.94
    assert not teacher.training
    torch.testing.assert_close(make()(data.test.x), teacher(data.test.x), rtol=0, atol=0)


def test_global_random_state_is_left_alone(data, few, teacher_logits):
    state = torch.get_rng_state()
    train_students(build, BUNDLE[:1], few, teacher_logits, SHORT)
    train_teacher(mlp([64, 4, 10], 0, dropout=0.5), few, SHORT, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_bad_input(few, teacher_logits):
    with pytest.raises(ValueError, match="at least one student, got none"):
        train_students(build, [], few, teacher_logits, SHORT)
    with pytest.raises(ValueError, match="teacher_logits must hold 80 rows, one a sample, got 79"):
        train_students(build, BUNDLE, few, teacher_logits[1:], SHORT)
