"""Train a teacher; train a bundle of students at once.

A bundle is C students, each with its own loss, under K seeds. No student's gradient sees another and the optimiser
works entry by entry: a student's result is the one it would have alone. Students of one seed share initial weights and
batch order, whatever their loss, which is what makes their differences paired.
Explained in the book: section 2.2, "Experiments", and A.5, "Running a study".
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd.augmentation import AUGMENTATIONS, augment
from rkd.data import Split
from rkd.objectives import Gradient, Student
from rkd.stacking import Optimizer, Stack

OPTIMIZERS = ("adamw", "sgd")
DECAYS = ("cosine", "step", "constant")


@dataclass(frozen=True)
class Schedule:
    """How a network is trained: epochs in batches of `batch_size` samples, the last, smaller batch kept.

    Attributes:
        optimizer: "adamw" or "sgd" (momentum 0.9).
        decay: of the learning rate: "cosine" to 0; "step", a tenth from 62.5, 75 and 87.5 % of the epochs on (150, 180
            and 210 of 240); "constant".
        augmentation: a key of `rkd.augmentation.AUGMENTATIONS`, drawn anew for each batch.

    Raises:
        ValueError: an attribute lies outside its range.
    """

    epochs: int = 60
    batch_size: int = 32
    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    decay: str = "cosine"
    augmentation: str = "none"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay!r}")
        for name, accepted in (("optimizer", OPTIMIZERS), ("decay", DECAYS), ("augmentation", tuple(AUGMENTATIONS))):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")

    def steps(self, samples: int) -> int:
        """Steps of the optimiser over all epochs."""
        return self.epochs * math.ceil(samples / self.batch_size)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0 ≤ `step` < `steps`, as a part of the first."""
        if self.decay == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / steps))
        if self.decay == "step":
            return 0.1 ** sum(step >= steps * part for part in (0.625, 0.75, 0.875))
        return 1.0


def train_teacher(
    model: nn.Module, train: Split, schedule: Schedule, seed: int, blank: Tensor | None = None
) -> nn.Module:
    """`model` trained in place on hard labels; `seed` decides batch order, augmentation and dropout.

    Args:
        blank: `DataSet.blank`, needed where the schedule augments.

    Returns:
        The model in evaluation mode.
    """
    model.train()
    settings: dict[str, Any] = {"lr": schedule.learning_rate, "weight_decay": schedule.weight_decay}
    optimizer: torch.optim.Optimizer
    if schedule.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, **settings)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **settings)
    steps = schedule.steps(len(train.y))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.rate(step, steps))
    with torch.random.fork_rng(devices=[train.x.device] if train.x.is_cuda else []):
        torch.manual_seed(seed)
        for batch, x in _batches([seed], train, schedule, blank):
            optimizer.zero_grad()
            F.cross_entropy(model(x[0]), train.y[batch[0]]).backward()
            optimizer.step()
            decay.step()
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

    Returns:
        The trained networks. A student whose parameters are no longer finite has diverged; the others are untouched.

    Raises:
        ValueError: the bundle is empty, the teacher's logits do not match the samples or are given for images that the
            schedule changes, or the network has dropout.
    """
    if not students:
        raise ValueError("students must hold at least one student, got none")
    if isinstance(teacher, Tensor):
        if len(teacher) != len(train.y):
            raise ValueError(f"teacher must hold {len(train.y)} rows of logits, one a sample, got {len(teacher)}")
        if schedule.augmentation != "none":
            raise ValueError(f"teacher must be a function where the augmentation is {schedule.augmentation!r}")
    stack = Stack(build, seeds, len(students), train.x.device)
    parameters = list(stack.parameters.values())
    rates = torch.tensor([s.learning_rate or schedule.learning_rate for s in students], dtype=torch.float64)
    optimizer = Optimizer(schedule.optimizer, parameters, rates, schedule.weight_decay)
    gradient = Gradient(students, train.x)
    steps, per_epoch = schedule.steps(len(train.y)), math.ceil(len(train.y) / schedule.batch_size)
    for step, (batch, x) in enumerate(_batches(seeds, train, schedule, blank)):
        z = stack.logits(x)
        hard, soft = gradient.terms(z.detach(), teacher_rows(teacher, batch, x), train.y[batch])
        grads = torch.autograd.grad(z, parameters, hard.add_(soft).div_(z.shape[-1]))
        optimizer.step(grads, schedule.rate(step, steps))
        if after_epoch and (step + 1) % per_epoch == 0:
            after_epoch((step + 1) // per_epoch, stack)
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


def _batches(
    seeds: Sequence[int], train: Split, schedule: Schedule, blank: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices (K, B) and inputs (K, B, ...): every epoch a permutation a seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if schedule.augmentation != "none" and blank is None:
        raise ValueError(f"blank must be given where the augmentation is {schedule.augmentation!r}")
    for _ in range(schedule.epochs):
        order = torch.stack([torch.randperm(len(train.y), generator=generator) for generator in generators])
        for batch in order.to(train.x.device).split(schedule.batch_size, dim=1):
            x = train.x.index_select(0, batch.flatten()).unflatten(0, batch.shape)
            if blank is not None and schedule.augmentation != "none":
                parts = zip(x, generators, strict=True)
                x = torch.stack([augment(schedule.augmentation, part, blank, g) for part, g in parts])
            yield batch, x
