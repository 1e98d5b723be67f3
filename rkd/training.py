"""Train a teacher; train a bundle of students at once, as one batched model.

Students that share an architecture are stacked: every weight gains a leading axis, one entry a student, and one step of
the optimiser moves them all. The losses are added, so no student's gradient sees another, and the optimiser works entry
by entry: a student's result is the one it would have alone. Students of one seed share initial weights and batch order,
whatever their loss, which is what makes their differences paired.
Explained in the book: section 2.2, "Experiments".
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd.data import Split
from rkd.loss import renyi_kd_loss


@dataclass(frozen=True)
class Schedule:
    """Adam with a cosine from `learning_rate` to 0 over `epochs`, in batches of `batch_size` samples."""

    epochs: int = 60
    batch_size: int = 32
    learning_rate: float = 5e-3
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Student:
    """One student's loss, eq. (1.13) with scale T²/α, and its seed. β = 0 trains on hard labels alone."""

    seed: int
    beta: float = 0.9
    alpha: float = 1.0
    temperature: float = 4.0


def train_teacher(model: nn.Module, train: Split, schedule: Schedule, seed: int) -> nn.Module:
    """`model` trained in place on hard labels; `seed` decides batch order and dropout. Returned in evaluation mode."""
    model.train()
    with torch.random.fork_rng(devices=[train.x.device] if train.x.is_cuda else []):
        torch.manual_seed(seed)
        optimizer, decay = _optimizer(list(model.parameters()), schedule, len(train.y))
        for batch in _batches([seed], len(train.y), schedule):
            optimizer.zero_grad()
            F.cross_entropy(model(train.x[batch[0]]), train.y[batch[0]]).backward()
            optimizer.step()
            decay.step()
    return model.eval()


def train_students(
    build: Callable[[int], nn.Module],
    students: Sequence[Student],
    train: Split,
    teacher_logits: Tensor,
    schedule: Schedule,
) -> Callable[[Tensor], Tensor]:
    """Train all students together, each with its own loss, initial weights and batch order.

    Args:
        build: makes a student network from a seed; all of one architecture, without batch normalisation or dropout.
        students: the bundle, S of them.
        train: N transfer samples with their labels.
        teacher_logits: shape (N, n), the teacher's logits on `train.x`.

    Returns:
        A function from inputs (M, features) to the logits of all students, shape (S, M, n), after the last epoch.

    Raises:
        ValueError: the bundle is empty, or the teacher's logits do not match the samples.
    """
    if not students:
        raise ValueError("students must hold at least one student, got none")
    if len(teacher_logits) != len(train.y):
        raise ValueError(f"teacher_logits must hold {len(train.y)} rows, one a sample, got {len(teacher_logits)}")
    networks = [build(student.seed).to(train.x.device) for student in students]
    parameters, buffers = torch.func.stack_module_state(networks)
    skeleton = copy.deepcopy(networks[0]).to("meta")
    forward = torch.vmap(lambda p, b, x: torch.func.functional_call(skeleton, (p, b), (x,)), in_dims=(0, 0, 0))
    alpha, temperature, beta = (
        train.x.new_tensor([[getattr(student, name)] for student in students])  # (S, 1), against (S, B)
        for name in ("alpha", "temperature", "beta")
    )
    optimizer, decay = _optimizer(list(parameters.values()), schedule, len(train.y))
    for batch in _batches([student.seed for student in students], len(train.y), schedule):  # (S, B)
        z, v, y = forward(parameters, buffers, train.x[batch]), teacher_logits[batch], train.y[batch]
        hard = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        soft = renyi_kd_loss(z, v, alpha, temperature, "T2/alpha", "none")
        optimizer.zero_grad()
        ((1 - beta) * hard + beta * soft).mean(-1).sum().backward()
        optimizer.step()
        decay.step()
    trained = {name: p.detach() for name, p in parameters.items()}
    return lambda x: forward(trained, buffers, x.expand(len(students), *x.shape))


def _batches(seeds: Sequence[int], samples: int, schedule: Schedule) -> Iterator[Tensor]:
    """Indices of the batches, each (S, B): every epoch a permutation a seed. The last, smaller batch is kept."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(schedule.epochs):
        order = torch.stack([torch.randperm(samples, generator=generator) for generator in generators])
        yield from order.split(schedule.batch_size, dim=1)


def _optimizer(
    parameters: list[Tensor], schedule: Schedule, samples: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    steps = schedule.epochs * math.ceil(samples / schedule.batch_size)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
