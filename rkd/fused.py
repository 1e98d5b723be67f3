"""The same loss over chunks of rows, from hidden states and the weights of the last layer: logits that never exist.

A chunk's logits are made, visited once for value and gradient (`rkd.rows`; on a GPU with Triton `rkd.operators`, which
puts the gradient in the place of the student's logits), folded into the gradients of the student's
hidden states and weights, and forgotten. The memory needed beside those gradients is that of one chunk, whatever the
number of samples times classes.
Book: 2.1.1, "The Objective".
"""

from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rkd.arguments import Order, check_fits, check_labels, check_order, check_temperature
from rkd.loss import REDUCTIONS, Scale, parse_scale, row_weights
from rkd.operators import can_launch, scale_, visit_in_place
from rkd.rows import column, pick, visit, weigh

# of both logits and the gradient of a chunk
_BYTES_OF_A_CHUNK = {"cpu": 3 * 2**24, "cuda": 3 * 2**28}


def fused_linear_renyi_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    alpha: float | Tensor = 1.0,
    temperature: float | Tensor = 4.0,
    scale: Scale = "T2",
    reduction: str = "batchmean",
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 1.0,
) -> Tensor:
    """(1 − β)·L_CE + β·s·D_α(P‖Q), eq. (1.13), of logits hidden @ weightᵀ + bias that are never held at once. In nats.

    The value and gradients are those of `renyi_kd_loss` (β = 1) and `DistillationLoss` on the logits.

    Args:
        student_hidden, teacher_hidden: shapes (..., d) and (..., e), floating; the leading axes agree.
        student_weight, teacher_weight: shapes (n, d) and (n, e), as in `torch.nn.Linear`; dtype of their hidden states.
        alpha, temperature, scale, reduction: as in `renyi_kd_loss`.
        student_bias, teacher_bias: shape (n,), or None.
        labels, ignore_index: integer labels of the leading shape; samples labelled `ignore_index` count neither in the
            sum nor in the mean, and receive zero gradient. If all are ignored the loss is 0.
        beta: weight β in [0, 1] of the soft targets; below 1 needs `labels`.

    Returns:
        A scalar, or the leading shape for ``reduction="none"``; float32, or float64 for float64 inputs. Half precision,
        and autocast, multiply matrices in half precision; the loss itself is computed in float32.
        Differentiable once, in the student's hidden states, weight and bias, whose gradients are summed over the chunks
        in float32 (float64 for float64); the teacher receives none. Gradients are made in the forward pass, or, for
        ``reduction="none"``, in the backward pass. Not for use inside `torch.func`.

    Raises:
        TypeError: an argument is not a floating tensor; `alpha` or `temperature` require gradients.
        ValueError: shapes do not fit, dtypes of one network differ, `labels` are missing, or an argument lies outside
            what is accepted above.

    Source: the chunks follow Liger-Kernel's fused linear losses (Hsu et al., arXiv:2410.10989).

    Book: 2.1.1, "The Objective".
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if isinstance(beta, bool) or not isinstance(beta, Real) or not 0 <= float(beta) <= 1:
        raise ValueError(f"beta must be a number in [0, 1], got {beta!r}")
    student = _check_layer("student", student_hidden, student_weight, student_bias)
    teacher = _check_layer("teacher", teacher_hidden, teacher_weight, teacher_bias)
    leading, n = student_hidden.shape[:-1], student_weight.shape[0]
    if teacher_hidden.shape[:-1] != leading or teacher_weight.shape[0] != n:
        raise ValueError(
            f"student and teacher must agree in samples and classes, got {tuple(leading)} and "
            f"{tuple(teacher_hidden.shape[:-1])}, {n} and {teacher_weight.shape[0]}"
        )
    wide = torch.promote_types(torch.promote_types(student_hidden.dtype, teacher_hidden.dtype), torch.float32)
    like = torch.empty(0, dtype=wide, device=student_hidden.device)
    order, temperature = check_order(alpha, like), check_temperature(temperature, like)
    for name, setting in (("alpha", order), ("temperature", temperature)):
        if isinstance(setting, Tensor):
            check_fits(name, setting, leading)
    factor, per_order = parse_scale(scale, order, temperature)
    if labels is not None:
        check_labels(labels, torch.empty(*leading, n, device="meta"), ignore_index)
    elif beta < 1:
        raise ValueError(f"beta={beta} needs labels for its cross-entropy")
    soft, hard = (
        row_weights(x, reduction, leading, labels, ignore_index) for x in (float(beta) * factor, 1.0 - float(beta))
    )
    task = _Task(
        *(x.expand(leading).flatten() if isinstance(x, Tensor) else x for x in (order, temperature)),
        per_order,
        soft.expand(leading).flatten() if isinstance(soft, Tensor) else soft,
        None if beta == 1 else column(hard, leading),
        None if labels is None else labels.reshape(-1, 1),
        ignore_index,
        reduction != "none",
        wide,
        _computing_dtype(student_hidden),
    )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student):
        return _FusedLinear.apply(*student, *teacher, task).view(() if task.total else leading)
    with torch.no_grad():
        result = _shape(_over_chunks((*student, *teacher), task)[0], task)
    return result.view(() if task.total else leading)


class _Task(NamedTuple):
    """What is done with each row; per-row tensors have shape (rows,), `hard` and `labels` (rows, 1)."""

    alpha: Order
    temperature: Order
    per_order: bool
    soft: Order
    hard: Order | None
    labels: Tensor | None
    ignore_index: int
    total: bool
    wide: torch.dtype
    narrow: torch.dtype | None


class _FusedLinear(torch.autograd.Function):
    """Keeps the gradients, and hands them over to the first backward pass; a second one computes them anew."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, task = arguments
        ctx.task, ctx.wanted = task, tuple(ctx.needs_input_grad[:3])
        values, ctx.gradients = _over_chunks(
            tensors, task, *([ctx.wanted] if task.total and not _underflows(tensors[0], task) else [])
        )
        ctx.save_for_backward(*tensors)
        return _shape(values, task)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        task, late = ctx.task, ctx.task.total and _underflows(tensors[0], ctx.task)
        if late:
            task = task._replace(
                soft=(task.soft * grad).expand(tensors[0].shape[:-1].numel()),
                hard=None if task.hard is None else task.hard * grad,
            )
        if gradients is None or late or not task.total:
            rows = None if task.total else grad.reshape(-1)
            gradients = _over_chunks(tensors, task, ctx.wanted, rows)[1]
        if task.total and not late:
            gradients = [None if x is None else _scaled(x, grad) for x in gradients]
        typed = [
            None if x is None else x.to(like.dtype).view_as(like)
            for x, like in zip(gradients, tensors[:3], strict=True)
        ]
        return *typed, None, None, None, None


def _underflows(hidden: Tensor, task: _Task) -> bool:
    """float16 needs the scale of the incoming gradient before it rounds."""
    return (task.narrow or hidden.dtype) == torch.float16


def _scaled(gradient: Tensor, grad: Tensor) -> Tensor:
    """grad·gradient for a number `grad`; on a GPU nothing is touched where it is 1, which only the device knows."""
    if not can_launch(gradient, gradient):
        return weigh(gradient, grad)
    rows = gradient if gradient.dim() == 2 else gradient.unsqueeze(0)
    scale_(rows, grad.expand(rows.shape[0]))
    return gradient


def _shape(values: Tensor, task: _Task) -> Tensor:
    return (values.sum() if task.total else values).to(task.wide)


def _over_chunks(
    tensors: Any, task: _Task, wanted: tuple[bool, ...] = (False,) * 3, upstream: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """The weighted loss of each row, (rows,), and the wanted gradients of hidden states, weight and bias."""
    narrow = task.narrow
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = (
        x if x is None or narrow is None else x.to(narrow) for x in tensors
    )
    hidden, teacher_hidden = (x.reshape(-1, x.shape[-1]) for x in (hidden, teacher_hidden))
    (rows, _), n = hidden.shape, weight.shape[0]
    sums = torch.promote_types(weight.dtype, torch.float32)
    by_hidden = torch.empty_like(hidden) if wanted[0] else None
    by_bias = torch.zeros(n, dtype=sums, device=weight.device) if wanted[2] else None
    values = torch.empty(rows, dtype=torch.float64 if weight.device.type == "cpu" else task.wide, device=weight.device)
    per_logit = 2 * weight.itemsize if can_launch(weight, weight) else 3 * task.wide.itemsize
    step = max(1, _BYTES_OF_A_CHUNK.get(weight.device.type, 3 * 2**28) // (per_logit * n))
    at_once = 0 < rows <= step  # then there is no sum to take
    by_weight = torch.zeros_like(weight, dtype=sums) if wanted[1] and not at_once else None
    with torch.autocast(weight.device.type, enabled=False):
        for start in range(0, rows, step):
            part = slice(start, start + step)
            x = hidden[part]
            if task.labels is not None:  # NaN in the hidden state of an ignored sample would reach the weight
                x = x.masked_fill(task.labels[part] == task.ignore_index, 0.0)
            z, v = F.linear(x, weight, bias), F.linear(teacher_hidden[part], teacher_weight, teacher_bias)
            values[part], by_z = _visit_chunk(z, v.to(z.dtype), task, part, any(wanted))
            if by_z is None:
                continue
            if upstream is not None:
                by_z = weigh(by_z, upstream[part])
            if by_hidden is not None:
                torch.mm(by_z, weight, out=by_hidden[part])
            if wanted[1] and at_once:
                by_weight = by_z.t() @ x
            elif by_weight is not None and by_z.dtype == sums:
                by_weight.addmm_(by_z.t(), x)
            elif by_weight is not None:
                by_weight += by_z.t() @ x
            if by_bias is not None:
                by_bias += by_z.sum(0, dtype=sums)
    return values, [by_hidden, by_weight, by_bias]


def _visit_chunk(z: Tensor, v: Tensor, task: _Task, part: slice, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Soft and hard loss of a chunk's rows, and their gradient in its logits."""
    alpha, temperature, soft = (pick(x, part) for x in (task.alpha, task.temperature, task.soft))
    if can_launch(z, v):
        hard: Order = 0.0
        labels = None
        if task.hard is not None and task.labels is not None:
            hard, labels = _flat(pick(task.hard, part)), task.labels[part].squeeze(-1)
        value = visit_in_place(z, v, alpha, temperature, task.per_order, soft, hard, labels, gradient)
        return value, z if gradient else None
    value, by_z = visit(z, v, alpha, temperature, task.per_order, soft, gradient)
    if task.hard is None or task.labels is None:
        return value, by_z
    targets, hard = task.labels[part], pick(task.hard, part)
    log_q = z.to(task.wide).log_softmax(-1)
    ignored = targets == task.ignore_index
    targets = targets.masked_fill(ignored, 0)
    value = value + (-hard * log_q.gather(-1, targets)).masked_fill(ignored, 0.0).squeeze(-1)
    if by_z is not None:
        by_hard = log_q.exp_().scatter_add_(-1, targets, log_q.new_full((), -1.0).expand(targets.shape))
        by_z += by_hard.mul_(hard).masked_fill_(ignored, 0.0).to(by_z.dtype)
    return value, by_z


def _flat(x: Order) -> Order:
    return x.squeeze(-1) if isinstance(x, Tensor) else x


def _computing_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for, or None to leave everything as it is."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else None


def _check_layer(name: str, hidden: Any, weight: Any, bias: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    for suffix, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is None and suffix == "bias":
            continue
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}_{suffix} must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dtype != hidden.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name}_{suffix} must be {hidden.dtype} like {name}_hidden, got {x.dtype}")
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{name}_hidden (..., d) must fit {name}_weight (n, d), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}_bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    return hidden, weight, bias
