"""Train a teacher; train a bundle of students at once.

A bundle is C students, each with its own loss, under K seeds. No student's gradient sees another and the optimiser
works entry by entry: a student's result is the one it would have alone. Students of one seed share initial weights and
batch order, whatever their loss, which is what makes their differences paired.
Book: 2.2, "Experiments"; A.5, "Running a study".
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd.acceleration import PLAIN, Acceleration, Replayed
from rkd.checkpoint import Keeper
from rkd.data import Split
from rkd.objectives import Gradient, Student
from rkd.schedule import Batch, Batches, Schedule
from rkd.stacking import Optimizer, Stack

_RUN_AHEAD = 32  # steps that may wait on a GPU: a clock looked at here is then not far from the work's


def train_teacher(
    model: nn.Module,
    train: Split,
    schedule: Schedule,
    seed: int,
    blank: Tensor | None = None,
    acceleration: Acceleration = PLAIN,
    keeper: Keeper | None = None,
) -> nn.Module:
    """`model` trained in place on hard labels; `seed` decides batch order, augmentation and dropout.

    In mixed precision a teacher without dropout is trained as a bundle of one student is, and as fast.

    Args:
        blank: `DataSet.blank`, needed where the schedule augments.
        acceleration: what of the machine to use.
        keeper: of the state; the training goes on from the one that it has.

    Returns:
        The model in evaluation mode.

    Raises:
        Stopped: the keeper's deadline is over.
    """
    drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    if acceleration.mixed and not drops:
        hard, silent = [Student("hard", beta=0.0)], lambda x: x.new_zeros(())
        stack = train_students(
            lambda _: model, hard, [seed], train, silent, schedule, blank, None, acceleration, keeper
        )
        model.load_state_dict({name: tensor[0, 0] for name, tensor in stack.state().items()})
        return model.eval()
    batches = Batches([seed], train, schedule, blank)
    teacher = _Teacher(model.train(), batches, schedule, acceleration)
    with torch.random.fork_rng(devices=[train.x.device] if train.x.is_cuda else []):
        torch.manual_seed(seed)
        _train(teacher, batches, schedule, keeper or Keeper())
    return model.eval()


def train_students(
    build: Callable[[int], nn.Module],
    students: Sequence[Student],
    seeds: Sequence[int],
    train: Split,
    teacher: Tensor | Callable[[Tensor], Tensor],
    schedule: Schedule,
    blank: Tensor | None = None,
    after_epoch: Callable[[int, Stack], None] | None = None,
    acceleration: Acceleration = PLAIN,
    keeper: Keeper | None = None,
) -> Stack:
    """Train every student under every seed, all together.

    Args:
        build: makes a student network from a seed; without dropout.
        students: C losses.
        seeds: K seeds, of the initial weights, the batch order and the augmentation.
        train: N transfer samples with their labels.
        teacher: its logits on `train.x`, shape (N, n); or, where the schedule augments, a function that gives the
            logits of a batch: all students of a seed share what it says of the same augmented images.
        blank: `DataSet.blank`, needed where the schedule augments.
        after_epoch: called with the number of epochs done and the stack.
        acceleration: what of the machine to use.
        keeper: of the state; the training goes on from the one that it has.

    Returns:
        The trained networks. A student whose parameters are no longer finite has diverged; the others are untouched.

    Raises:
        ValueError: the bundle is empty, the teacher's logits do not match the samples or are given for images that the
            schedule changes, or the network has dropout.
        Stopped: the keeper's deadline is over.
    """
    if not students:
        raise ValueError("students must hold at least one student, got none")
    if isinstance(teacher, Tensor):
        if len(teacher) != len(train.y):
            raise ValueError(f"teacher must hold {len(train.y)} rows of logits, one a sample, got {len(teacher)}")
        if schedule.augmentation != "none":
            raise ValueError(f"teacher must be a function where the augmentation is {schedule.augmentation!r}")
    stack = Stack(build, seeds, len(students), train.x.device, acceleration)
    batches = Batches(seeds, train, schedule, blank, acceleration.mixed)
    bundle = _Bundle(stack, students, batches, teacher, schedule, acceleration)
    watch = None if after_epoch is None else lambda epoch: after_epoch(epoch, stack)
    _train(bundle, batches, schedule, keeper or Keeper(), watch)
    return stack


def gradient_norms(
    stack: Stack, gradient: Gradient, x: Tensor, teacher_logits: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Euclidean norms (K, C) of the parameters' gradient of the hard and of the soft term, as they enter the loss.

    Args:
        x, y: B samples (B, ...) and labels (B,), the same for all students.
        teacher_logits: (B, n).
    """
    seeds, parameters = stack.shape[0], list(stack.parameters.values())
    z = stack.logits(x.expand(seeds, *x.shape))
    v = teacher_logits.T.expand(seeds, 1, -1, -1)
    norms = []
    for term in gradient.terms(z.detach(), v, y.expand(seeds, -1)):
        parts = torch.autograd.grad(z, parameters, term / len(y), retain_graph=True)
        norms.append(torch.stack([g.flatten(2).square().sum(2) for g in parts]).sum(0).sqrt())
    return norms[0], norms[1]


def teacher_rows(teacher: Tensor | Callable[[Tensor], Tensor], batch: Tensor, x: Tensor) -> Tensor:
    """The teacher's logits of a batch (K, B) with inputs x (K, B, ...), classes before samples: (K, 1, n, B)."""
    if isinstance(teacher, Tensor):
        rows = teacher[batch]
    else:
        with torch.no_grad():
            rows = teacher(x.flatten(0, 1)).unflatten(0, batch.shape)
    return rows.transpose(1, 2).unsqueeze(1).contiguous()


class _Trainee(Protocol):
    """What is trained: it makes steps, and its state can be had and put back."""

    def step(self, batch: Batch, decay: float) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


class _Teacher:
    """A module with an optimiser of PyTorch's."""

    def __init__(self, model: nn.Module, batches: Batches, schedule: Schedule, acceleration: Acceleration) -> None:
        self._model, self._batches, self._acceleration = model, batches, acceleration
        self._rate = schedule.learning_rate
        settings: dict[str, Any] = {"lr": schedule.learning_rate, "weight_decay": schedule.weight_decay}
        self._optimizer: torch.optim.Optimizer
        if schedule.optimizer == "sgd":
            self._optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, **settings)
        else:
            self._optimizer = torch.optim.AdamW(model.parameters(), **settings)

    def step(self, batch: Batch, decay: float) -> None:
        x = self._batches.inputs(batch)[0].contiguous()
        self._optimizer.param_groups[0]["lr"] = self._rate * decay
        self._optimizer.zero_grad()
        with self._acceleration.autocast(x.device):
            logits = self._model(x).to(x.dtype)
        F.cross_entropy(logits, self._batches.train.y[batch.samples[0]]).backward()
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        moments = {
            f"optimizer/{i}/{name}": tensor
            for i, entries in self._optimizer.state_dict()["state"].items()
            for name, tensor in entries.items()
        }
        random = {"random/cpu": torch.get_rng_state()}
        if self._batches.train.x.is_cuda:
            random["random/cuda"] = torch.cuda.get_rng_state(self._batches.train.x.device)
        return {f"model/{name}": tensor for name, tensor in self._model.state_dict().items()} | moments | random

    def restore(self, state: Mapping[str, Tensor]) -> None:
        part = lambda prefix: {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}  # noqa: E731
        self._model.load_state_dict(part("model/"))
        entries: dict[int, dict[str, Tensor]] = {}
        for path, tensor in part("optimizer/").items():
            i, name = path.split("/")
            entries.setdefault(int(i), {})[name] = tensor
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": entries})
        torch.set_rng_state(state["random/cpu"])
        if "random/cuda" in state:
            torch.cuda.set_rng_state(state["random/cuda"], self._batches.train.x.device)


class _Bundle:
    """A stack of students with their losses and their optimiser."""

    def __init__(
        self,
        stack: Stack,
        students: Sequence[Student],
        batches: Batches,
        teacher: Tensor | Callable[[Tensor], Tensor],
        schedule: Schedule,
        acceleration: Acceleration,
    ) -> None:
        self._stack, self._batches = stack, batches
        self._parameters = list(stack.parameters.values())
        rates = torch.tensor([s.learning_rate or schedule.learning_rate for s in students], dtype=torch.float64)
        self._optimizer = Optimizer(schedule.optimizer, self._parameters, rates, schedule.weight_decay)
        self._gradient = Gradient(students, batches.train.x)
        self._teacher = acceleration.inference(teacher) if isinstance(teacher, nn.Module) else teacher
        self._soft = any(s.beta > 0 for s in students)
        self._replayed = Replayed(self._step_on_device) if acceleration.captured else None
        if acceleration.captured:
            torch.backends.cudnn.benchmark = True  # the shapes stay the same: cuDNN may look for the fastest way once

    def step(self, batch: Batch, decay: float) -> None:
        factors = self._optimizer.next_factors(decay)
        if self._replayed is None:
            self._step(batch, *factors)
        else:
            x = self._batches.train.x
            self._replayed(*batch, torch.tensor(factors, dtype=x.dtype).to(x.device, non_blocking=True))

    def state(self) -> dict[str, Tensor]:
        return {f"stack/{name}": tensor for name, tensor in self._stack.state().items()} | {
            f"optimizer/{name}": tensor for name, tensor in self._optimizer.state().items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._stack.restore({n.removeprefix("stack/"): t for n, t in state.items()})
        self._optimizer.restore({n.removeprefix("optimizer/"): t for n, t in state.items()})

    def _step_on_device(self, samples: Tensor, start: Tensor, mirrored: Tensor, factors: Tensor) -> None:
        self._step(Batch(samples, start, mirrored), *factors.unbind())

    def _step(self, batch: Batch, *factors: float | Tensor) -> None:
        x, y = self._batches.inputs(batch), self._batches.train.y[batch.samples]
        z = self._stack.logits(x)
        v = teacher_rows(self._teacher, batch.samples, x) if self._soft else z.new_zeros(())
        hard, soft = self._gradient.terms(z.detach(), v, y)
        grads = torch.autograd.grad(z, self._parameters, hard.add_(soft).div_(z.shape[-1]))
        self._optimizer.apply(grads, *factors)


def _train(
    trainee: _Trainee,
    batches: Batches,
    schedule: Schedule,
    keeper: Keeper,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """All steps that the keeper's state does not hold yet."""
    steps, per_epoch, done = schedule.epochs * len(batches), len(batches), keeper.step
    if state := keeper.state():
        batches.restore(state["batches"])
        trainee.restore(state)

    def whole(step: int) -> dict[str, Tensor]:
        return trainee.state() | {"batches": batches.state(within=step % per_epoch > 0)}

    for epoch in range(done // per_epoch, schedule.epochs):
        for step, batch in enumerate(batches.epoch(), epoch * per_epoch + 1):
            if step <= done:
                continue
            trainee.step(batch, schedule.rate(step - 1, steps))
            if batch.samples.is_cuda and step % _RUN_AHEAD == 0:
                torch.cuda.synchronize()
            if step % per_epoch == 0 and after_epoch:
                after_epoch(step // per_epoch)
            keeper.offer(step, lambda step=step: whole(step))  # type: ignore[misc]
