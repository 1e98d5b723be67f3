"""Value and gradient of the loss in one visit to the logits, a cacheful of rows at a time.

Single precision promises six digits and float64 has sixteen, so most rows may be computed as the formulas read: with
a = z/T, b = v/T and A = log Σe^a, B = log Σe^b, M = log Σe^{αb + (1−α)a},

    D_α = (M − αB − (1−α)A)/(α − 1),        D_1 = Σ p(b − a) − (B − A),        ∂D_α/∂z = (q − w)/T

lose some 8 units in the last place of float64 times (64 + |A| + |B| + |M|)/min(1, |α − 1|). A row keeps the
result where value and gradient lie a million times above that. The others (nearly equal logits, impossible classes,
enormous logits), other orders, float64 logits and accelerators take the way of `rkd.logits`, which suits every row.
Exponentials are powers of 2, the fastest there are. The gradient is made in the forward pass, while its row is in the
cache, so nothing but the gradient is kept for the backward pass.
Book: 2.1.1, "The Objective".
"""

import math
import threading
from typing import Any

import torch
from torch import Tensor

from rkd.arguments import Order
from rkd.divergence import settle
from rkd.logits import renyi_from_logits, value_and_gradient

_Settings = tuple[Order, Order, bool, Order]  # alpha, temperature, per_order, weight
_BITS = math.log2(math.e)  # bits in a nat
_ORDERS = (1e-3, 64.0)  # where the formulas above are used
_MARGIN = 1e6 * 8 * 2.0**-53
_LARGEST_SIZE = 900.0  # |A| + |B| + |M|: sums of powers between 2^±900 are far from overflow and underflow
_LOWEST_EXPONENT = -1e5  # of the student, which α > 1 turns upside down
_BYTES_IN_CACHE = 2**21  # of a thread
_BYTES_ON_DEVICE = 2**28
_SMALL = 2**14  # numbers in float64 that cost no system call
_thread = threading.local()


def can_visit(student: Tensor, teacher: Tensor) -> bool:
    """Whether `weighted_divergence` applies: a CPU, no gradient for the teacher, no transform of functions."""
    return (
        student.device.type == "cpu"
        and not (teacher.requires_grad and torch.is_grad_enabled())
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch.autograd.forward_ad._current_level < 0
    )


def weighted_divergence(
    student: Tensor, teacher: Tensor, alpha: Order, temperature: Order, per_order: bool, weight: Order, total: bool
) -> Tensor:
    """weight·D_α of each row (D_α/α if `per_order`), or its sum over all rows if `total`; differentiable in `student`.

    Logits (..., n) of one shape, both in float64 or neither; `alpha`, `temperature` and `weight` >= 0 are numbers or
    broadcast against the leading axes. A row of weight 0 counts as 0 and gets zero gradient, whatever it holds. The
    result is float32, or float64 for float64 logits. Not for use inside `torch.func`.
    """
    settings = (alpha, temperature, per_order, weight)
    if student.requires_grad and torch.is_grad_enabled():
        return _WeightedDivergence.apply(student, teacher, settings, total)
    with torch.no_grad():
        return _shape(visit(student, teacher, *settings, False)[0], student, total)


def visit(
    student: Tensor,
    teacher: Tensor,
    alpha: Order,
    temperature: Order,
    per_order: bool,
    weight: Order,
    gradient: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """weight·D_α of each row, (rows,), float64 on a CPU; if asked for, its gradient, of the student's shape.

    Arguments as in `weighted_divergence`; `dtype` is that of the gradient, the student's if not given. To be called
    where no gradients are recorded.
    """
    leading, n = student.shape[:-1], student.shape[-1]
    z, v = (student, teacher) if student.dim() == 2 else (student.reshape(-1, n), teacher.reshape(-1, n))
    temperature, weight = column(temperature, leading), column(weight, leading)
    alpha = column(alpha, leading) if isinstance(alpha, Tensor) else settle(alpha)
    slope = torch.empty_like(z, dtype=dtype, memory_format=torch.contiguous_format) if gradient else None
    parts: list[Any] = []
    if z.device.type == "cpu" and z.dtype != torch.float64 and z.numel() and _is_direct(alpha, per_order):
        values, kept = _direct(z, v, alpha, temperature, per_order, weight, slope)
        if kept is not None:
            rest = (~kept).nonzero().squeeze(-1)
            parts = [rest[part] for part in _slices(z, 160)]
    else:
        exact = torch.float64 if z.device.type == "cpu" else torch.promote_types(z.dtype, torch.float32)
        values = torch.empty(z.shape[0], dtype=exact, device=z.device)
        parts = list(_slices(z, 160))
    for part in parts:
        _by_every_means(z, v, (alpha, temperature, weight), per_order, part, values, slope)
    return values, slope if slope is None or slope.shape == student.shape else slope.view(student.shape)


def _by_every_means(
    z: Tensor,
    v: Tensor,
    settings: tuple[Order, Order, Order],
    per_order: bool,
    part: Any,
    values: Tensor,
    slope: Tensor | None,
) -> None:
    """Fills the rows `part` of `values` and `slope` by the way of `rkd.logits`."""
    wide = torch.promote_types(z.dtype, torch.float32)
    alpha, temperature, weight = (x[part].to(wide) if isinstance(x, Tensor) else x for x in settings)
    rows = z[part].to(wide)
    if not len(rows):
        return
    value, by_z = value_and_gradient(rows, v[part].to(wide), alpha, temperature, weight, per_order, slope is not None)
    values[part] = value.to(values.dtype)
    if slope is not None and by_z is not None:
        slope[part] = by_z.to(slope.dtype)


class _WeightedDivergence(torch.autograd.Function):
    """Keeps the gradient, and hands it over to the first backward pass; a second one computes it anew."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, settings: _Settings, total: bool) -> Tensor:
        values, ctx.gradient = visit(z, v, *settings, True, _until_weighed(z.dtype))
        ctx.settings = settings
        ctx.save_for_backward(z, v)
        return _shape(values, z, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, v = ctx.saved_tensors
        settings: _Settings = ctx.settings
        if torch.is_grad_enabled():  # create_graph
            return _differentiable_gradient(z, v, grad, *settings), None, None, None
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            gradient = visit(z, v, *settings, True, _until_weighed(z.dtype))[1]
        return weigh(gradient, grad).to(z.dtype), None, None, None


def _until_weighed(dtype: torch.dtype) -> torch.dtype:
    """float16 waits for the incoming gradient, the loss scale of mixed precision, lest it underflows."""
    return torch.float32 if dtype == torch.float16 else dtype


def weigh(gradient: Tensor, grad: Tensor) -> Tensor:
    """grad·gradient, in place where possible, with 0 where the incoming `grad` is 0 even if the row is NaN."""
    if torch._C._functorch.is_legacy_batchedtensor(grad) or torch._C._functorch.is_functorch_wrapped_tensor(grad):
        grad = grad.unsqueeze(-1) if gradient.dim() > 1 and grad.dim() else grad
        return torch.where(grad == 0, 0.0, grad * gradient)
    if grad.dim() == 0 and grad.device.type == "cpu":
        factor = float(grad)
        return gradient if factor == 1.0 else gradient.mul_(factor) if factor else gradient.zero_()
    grad = grad.unsqueeze(-1) if grad.dim() else grad
    return gradient.mul_(grad).masked_fill_(grad == 0, 0.0)


def _differentiable_gradient(
    z: Tensor, v: Tensor, grad: Tensor, alpha: Order, temperature: Order, per_order: bool, weight: Order
) -> Tensor:
    z = z.view_as(z)  # hooks of the logits are not to run here
    wide = torch.promote_types(z.dtype, torch.float32)
    rows = renyi_from_logits(z.to(wide), v.to(wide), alpha, temperature, per_order)
    if isinstance(weight, Tensor):
        rows = torch.where(weight == 0.0, 0.0, rows)
    return torch.autograd.grad(rows, z, (weight * grad).to(wide).expand(rows.shape), create_graph=True)[0]


def _shape(values: Tensor, logits: Tensor, total: bool) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return values.sum().to(dtype) if total else values.view(logits.shape[:-1]).to(dtype, copy=True)


# --------------------------------------------------------------------------- as the formulas read


def _is_direct(alpha: Order, per_order: bool) -> bool:
    return isinstance(alpha, Tensor) or _ORDERS[0] <= alpha <= _ORDERS[1] or (alpha == 0.0 and per_order)


def _direct(
    z: Tensor, v: Tensor, alpha: Any, temperature: Order, per_order: bool, weight: Order, slope: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """weight·D_α of each row by the formulas, (rows,), and which rows may keep it, None for all; fills `slope`."""
    varied, ignored = isinstance(alpha, Tensor), weight == 0.0 if isinstance(weight, Tensor) else None
    if varied:
        alpha = alpha.double()
    if per_order and (varied or alpha):
        weight = weight / alpha
    bits, per_logit = _BITS / temperature, weight / temperature
    parts = _slices(z, 24)
    logits = _scratch(3, min(parts[0].stop, z.shape[0]), z.shape[1])
    if len(parts) == 1:
        divergence, logs, steepest, lowest = _direct_rows(z, v, logits, alpha, bits, per_logit, slope)
    else:
        columns, lowest = [], math.inf
        for part in parts:
            rows, by_z = z[part], None if slope is None else slope[part]
            settings = pick(alpha, part), pick(bits, part), pick(per_logit, part)
            *results, lower = _direct_rows(rows, v[part], logits[:, : rows.shape[0]], *settings, by_z)
            columns.append(results)
            lowest = min(lowest, lower)
        divergence, logs, steepest = (torch.cat(x, -2) for x in zip(*columns, strict=True))
    values = (divergence * (weight / _BITS)).view(-1)
    if ignored is not None:
        values.masked_fill_(ignored.view(-1), 0.0)
    if varied:
        loss_of_digits = _MARGIN / (alpha - 1.0).abs().clamp_(max=1.0)
    else:
        loss_of_digits = _MARGIN / (min(1.0, abs(alpha - 1.0)) or 1.0)
    if not (varied or isinstance(per_logit, Tensor)) and lowest >= _LOWEST_EXPONENT:  # all rows at once
        bottom, top = logs.aminmax()
        largest = len(logs) * max(-bottom.item(), top.item())
        least = loss_of_digits * (64.0 + largest)
        valued = largest < _LARGEST_SIZE and divergence.amin().item() >= least
        if valued and (slope is None or steepest.amin().item() >= least * per_logit):
            return values, None
    size = logs.abs().sum(0)
    quality = divergence if slope is None else torch.minimum(divergence, steepest / per_logit)
    kept = (quality >= (64.0 + size) * loss_of_digits) & (size < _LARGEST_SIZE)
    if not lowest >= _LOWEST_EXPONENT:
        kept &= z.amin(-1, keepdim=True) * bits >= _LOWEST_EXPONENT
    if varied:
        kept &= (alpha >= _ORDERS[0]) & (alpha <= _ORDERS[1])
    if ignored is not None:
        kept |= ignored
        if slope is not None:
            slope.masked_fill_(ignored, 0.0)
    return values, kept.view(-1)


def _direct_rows(
    z: Tensor, v: Tensor, logits: Tensor, alpha: Any, bits: Order, per_logit: Order, slope: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """D_α, the logarithms A, B and M, and the largest entry of `slope`, which is filled: (rows, 1), in bits.

    Last, the lowest exponent of the student if it matters. `logits`, (3, rows, n), are scratch. D_α/α and (q − w)/α for
    α = 0.
    """
    q, p, third = logits.unbind()
    q.copy_(z)
    p.copy_(v)
    ends, lowest, varied = logits[:2].mul_(bits), math.inf, isinstance(alpha, Tensor)
    if varied or 0.0 < alpha != 1.0:
        torch.lerp(q, p, alpha, out=third)
        if varied or alpha > 1.0:
            lowest = q.amin().item()
        sums = logits.exp2_().sum(-1, keepdim=True)
        logs = sums.log2()
        log_q, log_p, log_w = logs.unbind()
        divergence = torch.lerp(log_q, log_p, alpha).sub_(log_w).mul_(1.0 / (1.0 - alpha))
        w = third
    else:
        torch.sub(p, q, out=third)
        sums = ends.exp2_().sum(-1, keepdim=True)
        logs = sums.log2()
        log_q, log_p = logs.unbind()
        own = int(alpha)
        mean = third.mul_(p if own else q).sum(-1, keepdim=True).div_(sums[own])
        divergence = log_q.sub(log_p).add_(mean) if own else log_p.sub(log_q).sub_(mean)
        if not own:  # the gradient is a difference of terms of this size
            logs = torch.cat((logs, mean.unsqueeze(0)))
        w = p
    if slope is None:
        return divergence, logs, divergence, lowest
    if varied or alpha:
        factors = per_logit / sums
        slope.copy_(q.mul_(factors[0]).addcmul_(w, factors[-1], value=-1.0))
    else:
        slope.copy_(q.mul_(mean).sub_(third).mul_(per_logit / sums[0] / _BITS))
    return divergence, logs, slope.amax(-1, keepdim=True), lowest


def _scratch(*shape: int) -> Tensor:
    """Uninitialised float64 memory of this shape: between 128 KiB and a cacheful, the same for every call of a thread.

    New memory of that size comes from the system page by page, which takes as long as the loss.
    """
    size = math.prod(shape)
    cheap = size < _SMALL or 8 * size > _BYTES_IN_CACHE * torch.get_num_threads()
    if cheap or torch._C._len_torch_dispatch_stack():
        return torch.empty(shape, dtype=torch.float64, device="cpu")
    memory = getattr(_thread, "memory", None)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):
            memory = _thread.memory = torch.empty(size, dtype=torch.float64, device="cpu")
    return memory[:size].view(shape)


def _slices(z: Tensor, bytes_per_logit: int) -> list[slice]:
    """The rows in pieces whose working set fits the cache of the threads (or a part of an accelerator's memory)."""
    budget = _BYTES_IN_CACHE * torch.get_num_threads() if z.device.type == "cpu" else _BYTES_ON_DEVICE
    step = max(1, budget // (bytes_per_logit * z.shape[1]))
    return [slice(i, i + step) for i in range(0, z.shape[0], step)]


def pick(x: Order, part: Any) -> Order:
    return x[part] if isinstance(x, Tensor) else x


def column(x: Order, leading: torch.Size) -> Order:
    """(rows, 1) of what broadcasts against the leading axes."""
    return x.expand(leading).reshape(-1, 1) if isinstance(x, Tensor) else x
