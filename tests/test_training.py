"""`rkd.training`: a bundle is its students one by one, each as in a plain loop; stopped or not, and in bfloat16."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from fake_graphs import fake_graphs
from torch import nn

from rkd import DistillationLoss, renyi_kd_loss
from rkd.acceleration import PLAIN, Acceleration
from rkd.checkpoint import Keeper, Keeping, Stopped
from rkd.data import Split, digits
from rkd.models import build, mlp
from rkd.objectives import Gradient, Student
from rkd.resnets import resnet
from rkd.schedule import Batches
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


# --------------------------------------------------------------------------- left and taken up again


@pytest.fixture(scope="module")
def coloured():
    """Forty-five images of 8×8 pixels in three channels, and what is black in them. One thread, as the engine has."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(45, 3, 8, 8, generator=generator), torch.randint(10, (45,), generator=generator)
    return Split(x, y), torch.tensor([-0.4, 0.3, 1.0])


IMAGES = Schedule(
    epochs=3, batch_size=16, learning_rate=0.05, weight_decay=5e-4, optimizer="sgd", augmentation="crop-flip"
)
STOPS = [1, 3, 5, 6, 9]  # of three steps an epoch: after the first, at an epoch's end, within one, after the last
MIXED = Acceleration(mixed=True)
PAIR = [Student("hard", beta=0.0), Student(alpha=2.0, temperature=2.0), Student(alpha=0.5, learning_rate=0.02)]


def residual(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return resnet(8, (4, 4, 8, 8), 10)


def in_parts(folder, stops, run):
    """`run` with a keeper, stopped after each of the steps in `stops`, and at last to its end."""

    class Until(Keeper):
        def offer(self, step, state):
            if step == self.last:
                self._save(self._path, step, state())
                raise Stopped

    for last in stops:
        keeper = Until(Keeping(folder), folder / "run.safetensors")
        keeper.last = last
        with pytest.raises(Stopped):
            run(keeper)
    return run(Keeping(folder).of("run"))


@pytest.mark.parametrize("acceleration", [PLAIN, MIXED])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_students_that_were_stopped_are_those_that_were_not(tmp_path, coloured, acceleration, optimizer):
    """Bit for bit."""
    (train, blank), schedule = coloured, dataclasses.replace(IMAGES, optimizer=optimizer)
    teacher = residual(9).eval()

    def run(keeper=None):
        seen = [] if keeper is None else keeper.history.setdefault("epochs", [])
        note = lambda epoch, stack: seen.append(stack.predict(train.x))  # noqa: E731
        stack = train_students(residual, PAIR, [0, 3], train, teacher, schedule, blank, note, acceleration, keeper)
        return stack.state(), seen

    (whole, history), (state, seen) = run(), in_parts(tmp_path, STOPS, run)
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())
    assert len(seen) == 3
    assert all(map(torch.equal, seen, history))


@pytest.mark.parametrize(
    ("network", "acceleration"),
    [(residual, PLAIN), (residual, MIXED), (lambda _: mlp([192, 9, 10], 0, 0.3, torch.float32), PLAIN)],
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_teacher_that_was_stopped_is_one_that_was_not(tmp_path, coloured, network, acceleration, optimizer):
    (train, blank), schedule = coloured, dataclasses.replace(IMAGES, optimizer=optimizer)

    def run(keeper=None):
        return train_teacher(network(0), train, schedule, 1, blank, acceleration, keeper).state_dict()

    whole, state = run(), in_parts(tmp_path, STOPS, run)
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


# --------------------------------------------------------------------------- mixed precision, replayed steps


def test_in_mixed_precision_a_student_is_the_same_alone_and_in_any_bundle(coloured):
    train, blank = coloured
    run = lambda students, seeds: train_students(  # noqa: E731
        residual, students, seeds, train, residual(9).eval(), IMAGES, blank, acceleration=MIXED
    ).state()
    together = run(PAIR, [0, 3])
    for k, seed in enumerate([0, 3]):
        for c, student in enumerate(PAIR):
            alone = run([student], [seed])
            assert all(torch.equal(alone[name][0, 0], tensor[k, c]) for name, tensor in together.items())


def test_mixed_precision_is_autocast_with_an_ordinary_loop(coloured):
    """Weights and statistics stay single; the rest is what `torch.autocast` does to a module and `DistillationLoss`."""
    train, blank = coloured
    teacher, student, schedule = residual(9).eval(), PAIR[1], dataclasses.replace(IMAGES, decay="constant")
    ours = train_students(residual, [student], [5], train, teacher, schedule, blank, acceleration=MIXED)
    assert {tensor.dtype for tensor in ours.parameters.values()} == {torch.float32}
    model, loss = residual(5), DistillationLoss(student.alpha, student.temperature, student.beta, student.scale)
    steps = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=5e-4, momentum=0.9)
    batches = Batches([5], train, schedule, blank)
    for _ in range(3):
        for batch in batches.epoch():
            x = batches.inputs(batch)[0].contiguous(memory_format=torch.channels_last)
            steps.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                z, v = model(x).float(), teacher(x).float().detach()
            loss(z, v, train.y[batch.samples[0]]).backward()
            steps.step()
    single = train_students(residual, [student], [5], train, teacher, schedule, blank)
    for name, tensor in model.named_parameters():
        distance = (ours.parameters[name][0, 0] - tensor).norm() / tensor.norm()
        from_single = (single.parameters[name][0, 0] - tensor).norm() / tensor.norm()
        assert distance < 2e-2
        assert distance <= max(from_single, 1e-3)


def test_mixed_precision_is_near_single(coloured):
    train, blank = coloured
    run = lambda acceleration: train_students(  # noqa: E731
        residual, PAIR, [0], train, residual(9).eval(), IMAGES, blank, acceleration=acceleration
    ).predict(train.x)
    single, mixed = run(PLAIN), run(MIXED)
    assert not torch.equal(single, mixed)
    assert (mixed - single).norm() / single.norm() < 0.05


def test_teachers_in_mixed_precision(coloured):
    """One without dropout is trained as a student of hard labels is; one with dropout by PyTorch's optimiser."""
    train, blank = coloured
    single = train_teacher(residual(0), train, IMAGES, 1, blank)(train.x)
    mixed = train_teacher(residual(0), train, IMAGES, 1, blank, MIXED)
    assert not mixed.training
    assert 0 < (mixed(train.x) - single).norm() / single.norm() < 0.05
    dropped = train_teacher(mlp([192, 9, 10], 0, 0.3, torch.float32), train, IMAGES, 1, blank, MIXED)
    assert torch.isfinite(dropped(train.x)).all()


@pytest.mark.parametrize("students", [PAIR, PAIR[:2]])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_reads_all_that_changes_from_its_arguments(coloured, monkeypatch, students, optimizer):
    """A recording that is faked here: it runs the step again on the tensors that it was made with."""
    train, blank = coloured
    schedule = dataclasses.replace(IMAGES, optimizer=optimizer, epochs=6)
    recordings = fake_graphs(monkeypatch)
    run = lambda acceleration: train_students(  # noqa: E731
        residual, students, [0, 3], train, residual(9).eval(), schedule, blank, acceleration=acceleration
    ).predict(train.x)
    expected, replayed = run(PLAIN), run(Acceleration(captured=True))
    assert [recording.replays for recording in recordings] == [9, 3]  # of 12 full and 6 smaller batches, 3 warm up
    torch.testing.assert_close(replayed, expected, rtol=1e-4, atol=1e-5)


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
