"""The distillation loss of eq. (1.13) with the Rényi divergence in place of (1.11): scales, masks, reductions.

The divergence and its gradient come from `rkd.rows`, a cacheful at a time, where it can be used: on a CPU, for the
student's gradient alone, outside `torch.func` and `torch.compile`; on a GPU with Triton they come from `rkd.operators`,
cross-entropy included. Elsewhere they come from `rkd.logits`.
Book: 2.1.1, "The Objective".
"""

import math
import warnings
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd.arguments import (
    Order,
    check_class_mask,
    check_fits,
    check_labels,
    check_logits,
    check_order,
    check_temperature,
    widen,
)
from rkd.logits import renyi_from_logits
from rkd.operators import can_launch, weighted_loss
from rkd.rows import can_visit, weighted_divergence

REDUCTIONS = ("batchmean", "sum", "none")
Scale = str | float


def renyi_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float | Tensor = 1.0,
    temperature: float | Tensor = 4.0,
    scale: Scale = "T2",
    reduction: str = "batchmean",
    *,
    class_mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Soft-target loss s·D_α(P‖Q), P = softmax(teacher/T), Q = softmax(student/T), in nats. Eq. (1.11) at α = 1.

    Args:
        student_logits, teacher_logits: shape (..., n), floating. -inf marks a class as impossible. Half precision is
            computed in float32, also under autocast.
        alpha: order in [0, inf], a number or a tensor that broadcasts against the leading axes (one order a sample).
            1 is Hinton's KL(P‖Q). Order 0 is 0 for full supports: train it with ``scale="T2/alpha"``.
        temperature: T > 0, a number or a tensor that broadcasts against the leading axes.
        scale: "T2" (Hinton's T²), "T2/alpha" (T²/α: at high temperature all orders then share one gradient; at α = 0
            it is T² times the reverse KL(Q‖P)), or a positive number.
        reduction: "batchmean" (mean over the samples, that is over all leading axes), "sum" or "none".
        class_mask: boolean, broadcastable to the logits; False removes a class from both distributions.
        labels, ignore_index: integer labels of the leading shape; samples labelled `ignore_index` count neither in the
            sum nor in the mean, and receive zero gradient. If all are ignored the loss is 0.

    Returns:
        A scalar, or the leading shape for ``reduction="none"``; float32, or float64 for float64 logits. Never
        negative; exactly 0 for equal logits. +inf where α >= 1 and the student gives 0 to a class that the teacher
        does not; other rows keep their values and gradients. NaN or +inf logits give NaN in their row alone.
        Differentiable in both logits, twice in the student's.

    Raises:
        TypeError: logits are not floating tensors; `alpha` or `temperature` require gradients.
        ValueError: shapes differ, or an argument lies outside what is accepted above.

    Source: van Erven & Harremoës, arXiv:1206.2459, theorem 30 (the mixture w).

    Book: 2.1.1, "The Objective".
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if can_launch(student_logits, teacher_logits):
        settings = (alpha, temperature, scale, reduction, class_mask, labels, ignore_index)
        return _launched(student_logits, teacher_logits, *settings)
    student_logits, teacher_logits = check_logits(student_logits, teacher_logits)
    order = check_order(alpha, student_logits)
    temperature = check_temperature(temperature, student_logits)
    for name, setting in (("alpha", order), ("temperature", temperature)):
        if isinstance(setting, Tensor):
            check_fits(name, setting, student_logits.shape[:-1])
    factor, per_order = parse_scale(scale, order, temperature)
    if class_mask is not None:
        check_class_mask(class_mask, student_logits)
        student_logits = student_logits.masked_fill(~class_mask, -math.inf)
        teacher_logits = teacher_logits.masked_fill(~class_mask, -math.inf)
    if labels is not None:
        check_labels(labels, student_logits, ignore_index)
    if can_visit(student_logits, teacher_logits):
        weight = row_weights(factor, reduction, student_logits.shape[:-1], labels, ignore_index)
        return weighted_divergence(
            student_logits, teacher_logits, order, temperature, per_order, weight, reduction != "none"
        )
    student_logits, teacher_logits = widen(student_logits, teacher_logits)
    rows = factor * renyi_from_logits(student_logits, teacher_logits, order, temperature, per_order)
    if labels is None:
        return _reduce(rows, reduction, rows.numel())
    counted = labels != ignore_index
    return _reduce(torch.where(counted, rows, 0.0), reduction, counted.sum())


class DistillationLoss(nn.Module):
    """Distillation loss (1 − β)·L_CE + β·L_α, eq. (1.13), with the KL term (1.11) replaced by s·D_α(P‖Q).

    L_CE is the cross-entropy with the true labels at T = 1 (1.9); L_α is `renyi_kd_loss`. Both are means over the
    samples whose label is not `ignore_index`.

    Args:
        alpha, temperature, scale: as in `renyi_kd_loss`.
        beta: weight β in [0, 1] of the soft targets; common choice 0.9.
        ignore_index: label of samples that do not count.

    Shapes: student_logits and teacher_logits (..., n) floating, labels (...) int64, class_mask broadcastable to the
    logits; the result is a scalar in float32 (float64 for float64 logits).

    Raises: as `renyi_kd_loss`; ValueError for `beta` outside [0, 1] or labels outside [0, n).

    Book: 1.1, "Knowledge Distillation"; 2.1.1, "The Objective".
    """

    def __init__(
        self,
        alpha: float | Tensor = 1.0,
        temperature: float | Tensor = 4.0,
        beta: float = 0.9,
        scale: Scale = "T2",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if isinstance(beta, bool) or not isinstance(beta, Real) or not 0 <= float(beta) <= 1:
            raise ValueError(f"beta must be a number in [0, 1], got {beta!r}")
        probe = torch.zeros(())
        order = check_order(alpha, probe)
        parse_scale(scale, order, check_temperature(temperature, probe))
        if isinstance(order, float) and order == 0 and scale != "T2/alpha" and beta > 0:
            warnings.warn(
                "alpha=0 has zero gradient for logits without -inf; scale='T2/alpha' gives its limit, the reverse KL",
                stacklevel=2,
            )
        self.alpha: float | Tensor = alpha
        self.temperature: float | Tensor = temperature
        self.beta: float = float(beta)
        self.scale: Scale = scale
        self.ignore_index: int = ignore_index

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, class_mask: Tensor | None = None
    ) -> Tensor:
        """The loss of one batch, a scalar in nats."""
        if can_launch(student_logits, teacher_logits):
            settings = (self.alpha, self.temperature, self.scale, "batchmean", class_mask, labels, self.ignore_index)
            return _launched(student_logits, teacher_logits, *settings, beta=self.beta)
        student_logits, teacher_logits = check_logits(student_logits, teacher_logits)
        check_labels(labels, student_logits, self.ignore_index)
        soft = renyi_kd_loss(
            student_logits,
            teacher_logits,
            self.alpha,
            self.temperature,
            self.scale,
            class_mask=class_mask,
            labels=labels,
            ignore_index=self.ignore_index,
        )
        if class_mask is not None:
            student_logits = student_logits.masked_fill(~class_mask, -math.inf)
        (student_logits,) = widen(student_logits)
        flat, targets = student_logits.reshape(-1, student_logits.shape[-1]), labels.reshape(-1)
        ignored = targets == self.ignore_index
        flat = flat.masked_fill(ignored.unsqueeze(-1), 0.0)  # else NaN logits of an ignored sample reach its gradient
        hard = F.cross_entropy(flat, targets, ignore_index=self.ignore_index, reduction="sum")
        hard = hard / (~ignored).sum().clamp_min(1)
        return (1.0 - self.beta) * hard + self.beta * soft

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, temperature={self.temperature}, beta={self.beta}, scale={self.scale!r}"


def _launched(
    student: Tensor,
    teacher: Tensor,
    alpha: float | Tensor,
    temperature: float | Tensor,
    scale: Scale,
    reduction: str,
    class_mask: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    beta: float = 1.0,
) -> Tensor:
    """(1 − β)·L_CE + β·s·D_α of logits for which `can_launch` holds."""
    leading = student.shape[:-1]
    like = student.new_empty(0, dtype=torch.float32)
    order, heat = check_order(alpha, like), check_temperature(temperature, like)
    for name, setting in (("alpha", order), ("temperature", heat)):
        if isinstance(setting, Tensor):
            check_fits(name, setting, leading)
    factor, per_order = parse_scale(scale, order, heat)
    if class_mask is not None:
        check_class_mask(class_mask, student)
    if labels is not None:
        check_labels(labels, student, ignore_index)
    soft, hard = (row_weights(x, reduction, leading, labels, ignore_index) for x in (beta * factor, 1.0 - beta))
    return weighted_loss(
        student,
        teacher,
        order,
        heat,
        per_order,
        soft,
        hard=0.0 if beta == 1.0 else hard,
        labels=None if beta == 1.0 else labels,
        class_mask=class_mask,
        total=reduction != "none",
    )


def row_weights(
    factor: Order, reduction: str, leading: torch.Size, labels: Tensor | None = None, ignore_index: int = -100
) -> Order:
    """What each row's divergence is multiplied by in the reduced loss: 0 for ignored samples."""
    count = leading.numel()
    if labels is not None:
        counted = labels != ignore_index
        factor = counted.double() * factor
        if reduction == "batchmean":
            return factor / counted.sum().clamp_min(1)
    return factor / max(count, 1) if reduction == "batchmean" else factor


def _reduce(rows: Tensor, reduction: str, count: int | Tensor) -> Tensor:
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    return total / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))


def parse_scale(scale: Scale, alpha: Order, temperature: Order) -> tuple[Order, bool]:
    """(factor, whether D_α is divided by α)."""
    if scale == "T2":
        return temperature**2, False
    if scale == "T2/alpha":
        if isinstance(alpha, float) and alpha == math.inf:
            raise ValueError("scale='T2/alpha' needs a finite alpha, got inf")
        return temperature**2, True
    if isinstance(scale, Real) and not isinstance(scale, bool) and 0 < float(scale) < math.inf:
        return float(scale), False
    raise ValueError(f"scale must be 'T2', 'T2/alpha' or a positive finite number, got {scale!r}")
