"""`rkd.training`: a bundle is its students one by one, each trained as a plain PyTorch loop would; teachers learn."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rkd import DistillationLoss, renyi_kd_loss
from rkd.data import Split, digits
from rkd.models import build, mlp
from rkd.objectives import Gradient, Student
from rkd.stacking import Stack
from rkd.training import Schedule, gradient_norms, train_students, train_teacher

SHORT = Schedule(epochs=3, batch_size=32, learning_rate=5e-3, weight_decay=1e-2)
STUDENTS = [
    Student(beta=0.0),
    Student(alpha=1.0, temperature=2.0),
    Student(alpha=0.0, temperature=8.0, scale="T2/alpha", learning_rate=1e-2),
    Student(alpha=3.0, temperature=4.0, beta=0.5),
    Student(alpha=0.5, temperature=1.0, beta=1.0),
]
SEEDS = [0, 5, 2]


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def few(data):
    return Split(data.train.x[:80], data.train.y[:80])


@pytest.fixture(scope="module")
def teacher_logits(few):
    return 4 * torch.randn(80, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def perceptron(seed):
    return mlp([64, 7, 9, 10], seed)


def convolutions(seed):
    return build("cnn", (1, 8, 8), 10, seed, torch.float64, width=2)


class Signals(nn.Module):
    """Digits read as signals, to run one-dimensional convolutions."""

    def __init__(self, seed):
        super().__init__()
        self.network = build("cnn1d", (1, 64), 10, seed, torch.float64, width=3)

    def forward(self, x):
        return self.network(x.flatten(2))


def normalised(seed):
    """Batch norm does not stack: such students run one after another."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 10)).double()


NETWORKS = [perceptron, convolutions, Signals, normalised]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_student_is_the_same_alone_and_in_any_bundle(data, few, teacher_logits, network):
    together = train_students(network, STUDENTS, SEEDS, few, teacher_logits, SHORT).predict(data.test.x)
    assert together.shape == (3, 5, 10, 800)
    for k, seed in enumerate(SEEDS):
        for c, student in enumerate(STUDENTS):
            alone = train_students(network, [student], [seed], few, teacher_logits, SHORT).predict(data.test.x)
            torch.testing.assert_close(together[k, c], alone[0, 0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("student", [STUDENTS[0], *STUDENTS[2:]])
def test_a_student_is_a_plain_training_loop(data, few, teacher_logits, network, student, optimizer):
    """The loop that a user would write, with `DistillationLoss`, an ordinary module and an ordinary optimiser."""
    model, loss = network(5), DistillationLoss(student.alpha, student.temperature, student.beta, student.scale)
    rate = student.learning_rate or 5e-3
    if optimizer == "adamw":
        steps = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    else:
        steps = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=1e-2, momentum=0.9)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(steps, 9)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        for batch in torch.randperm(80, generator=generator).split(32):
            steps.zero_grad()
            loss(model(few.x[batch]), teacher_logits[batch], few.y[batch]).backward()
            steps.step()
            decay.step()
    schedule = dataclasses.replace(SHORT, optimizer=optimizer)
    ours = train_students(network, [student], [5], few, teacher_logits, schedule).predict(data.test.x)[0, 0]
    torch.testing.assert_close(ours.T, model.eval()(data.test.x).detach(), rtol=1e-8, atol=1e-9)


def test_seeds_are_paired(data, few, teacher_logits):
    """Without soft targets the order cannot matter, so equal seeds give equal students, and other seeds do not."""
    students = [Student(beta=0.0, alpha=0.5), Student(beta=0.0, alpha=2.0)]
    logits = train_students(perceptron, students, [0, 1], few, teacher_logits, SHORT).predict(data.test.x)
    torch.testing.assert_close(logits[:, 0], logits[:, 1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(logits[0], logits[1], atol=0.1)


def test_all_students_of_a_seed_see_the_teacher_on_the_same_augmented_images(data, few):
    """With a teacher that is the student's own initial network, β = 1 leaves the student where it is."""
    teacher = perceptron(0)
    schedule = dataclasses.replace(SHORT, augmentation="jitter", weight_decay=0.0, optimizer="sgd")
    students = [Student(alpha=a, beta=1.0) for a in (0.2, 1.0, 3.0)]
    stack = train_students(perceptron, students, [0], few, teacher, schedule, data.blank)
    for logits in stack.predict(data.test.x)[0]:
        torch.testing.assert_close(logits.T, teacher(data.test.x).detach(), rtol=1e-9, atol=1e-9)


def test_a_student_that_diverges_leaves_the_others_alone(data, few, teacher_logits):
    wild = Student(beta=0.0, learning_rate=1e200)
    schedule = dataclasses.replace(SHORT, optimizer="sgd")
    stack = train_students(perceptron, [wild, STUDENTS[1]], [0], few, teacher_logits, schedule)
    assert stack.finite().tolist() == [[False, True]]
    alone = train_students(perceptron, STUDENTS[1:2], [0], few, teacher_logits, schedule)
    torch.testing.assert_close(stack.predict(data.test.x)[0, 1], alone.predict(data.test.x)[0, 0])


def test_gradient_norms(few, teacher_logits):
    stack = Stack(perceptron, [0, 1], 2)
    students = [Student(alpha=2.0, beta=0.3), Student(beta=0.0)]
    hard, soft = gradient_norms(stack, Gradient(students, few.x), few.x, teacher_logits, few.y)
    assert hard.shape == soft.shape == (2, 2)
    assert (soft[:, 1] == 0).all()
    model = perceptron(1)
    terms = {
        hard[1, 0]: 0.7 * F.cross_entropy(model(few.x), few.y),
        soft[1, 0]: 0.3 * renyi_kd_loss(model(few.x), teacher_logits, 2.0),
    }
    for norm, term in terms.items():
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(term, list(model.parameters()))])
        torch.testing.assert_close(norm, gradient.norm())


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
    jitter = dataclasses.replace(SHORT, augmentation="jitter")
    train_students(perceptron, STUDENTS[:1], [0], few, teacher_logits, SHORT)
    train_teacher(mlp([64, 4, 10], 0, dropout=0.5), few, jitter, seed=1, blank=data.blank)
    assert torch.equal(state, torch.get_rng_state())


def test_step_decay_is_the_literatures():
    rates = [Schedule(epochs=240, decay="step").rate(epoch, 240) for epoch in (0, 149, 150, 179, 180, 209, 210, 239)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_bad_input(few, teacher_logits):
    jitter = dataclasses.replace(SHORT, augmentation="jitter")
    for message, arguments in {
        "at least one student, got none": (perceptron, [], [0], few, teacher_logits, SHORT),
        "seeds and copies must be at least one": (perceptron, STUDENTS, [], few, teacher_logits, SHORT),
        "teacher must hold 80 rows of logits, one a sample, got 79": (
            *(perceptron, STUDENTS, [0], few, teacher_logits[1:], SHORT),
        ),
        "teacher must be a function": (perceptron, STUDENTS, [0], few, teacher_logits, jitter),
        "blank must be given": (perceptron, STUDENTS, [0], few, perceptron(0), jitter),
        "must not have dropout": (lambda s: mlp([64, 5, 10], s, 0.5), STUDENTS, [0], few, teacher_logits, SHORT),
    }.items():
        with pytest.raises(ValueError, match=message):
            train_students(*arguments)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        Schedule(epochs=0)
    with pytest.raises(ValueError, match="optimizer must be one of adamw, sgd, got 'adam'"):
        Schedule(optimizer="adam")
