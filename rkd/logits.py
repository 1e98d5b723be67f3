"""D_α(P‖Q) of each row from teacher and student logits, differentiable: value, closed-form gradient, curvature.

Probabilities are never formed on the way to a logarithm. With teacher logits v, student logits z, the gap
δ = (v − z)/T is taken exactly (difference plus its rounding error) and measured from one class j, so that
r = log(p/q) = δ − δ_j + r_j keeps its relative accuracy however close the student is to the teacher; `rkd.divergence`
turns r into D_α. The gradient in z is (q − w)/T, with w = softmax((αv + (1−α)z)/T) the geometric mixture of P and Q;
it is bounded (its absolute values sum to at most 2/T) and needs no division by α − 1.
Rows so wide that a value or a gradient is e^{-x}, x >> 1, carry the rounding of x, a few ulps times the |αv| + |(1−α)z|
over T that cancel in it: rounding the logits and α would move such entries about as far (float32: 1e-5 at sums of 100).
Book: 2.1.1, "The Objective"; 2.1.3, "Gradient and Curvature".
"""

import math
from typing import Any

import torch
from torch import Tensor

from rkd.arguments import Order
from rkd.divergence import divergence_per_order, keep_class_axis, settle, where

# log(w/m) = t·gap − log Σ is used while t·gap is at most this; larger terms leave too few digits in the difference
_TILT_LIMIT = 8.0
# (w − m)/t has reached its limit t → 0 here, to rounding
_SMALL_STEP = {torch.float32: 1e-11, torch.float64: 1e-20}
_NO_STEP = 1e-30


def renyi_from_logits(student: Tensor, teacher: Tensor, alpha: Order, temperature: Order, per_order: bool) -> Tensor:
    """D_α(P‖Q) of each row, or D_α/α if `per_order`; logits (..., n) of one shape in float32 or float64."""
    return _RenyiFromLogits.apply(student, teacher, settle(alpha), keep_class_axis(temperature), per_order)[
        int(per_order)
    ]


def value_and_gradient(
    z: Tensor, v: Tensor, alpha: Order, temperature: Order, weight: Order, per_order: bool, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(weight·D_α, its gradient in `z` if asked for) of each row, outside autograd; 0 where the weight is 0.

    Logits (rows, n); `alpha`, `temperature` and `weight` are numbers or of shape (rows, 1).
    """
    alpha = settle(alpha.squeeze(-1) if isinstance(alpha, Tensor) else alpha)
    divergence, ratio, anchor = _RenyiFromLogits.forward(z, v, alpha, temperature, per_order)
    divergence, ratio = divergence.unsqueeze(-1), ratio.unsqueeze(-1)
    column = torch.as_tensor(weight, dtype=z.dtype, device=z.device).expand(divergence.shape)
    value = _weigh(column, ratio if per_order else divergence).squeeze(-1)
    if not gradient:
        return value, None
    return value, _StudentGradient.forward(z, v, divergence, ratio, anchor, column, alpha, temperature, per_order)


class _RenyiFromLogits(torch.autograd.Function):
    """Saves the logits and, of each row, D_α, D_α/α and the reference class j."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor, v: Tensor, alpha: Order, temperature: Order, per_order: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_q, log_p = _log_softmax(z, temperature), _log_softmax(v, temperature)
        # class j: heavy under both, and not far from p_j = q_j, lest r_i = δ_i − δ_j + r_j cancels
        both = log_q + log_p
        distance = (log_p - log_q).abs() + torch.finfo(z.dtype).eps
        overlap, anchor = torch.where(both == -math.inf, both, both - distance.log()).max(-1, keepdim=True)
        gap = _gap(z, v, log_q, log_p, temperature, anchor)
        anchor_log_q = log_q.gather(-1, anchor)
        towards_p = ((v - v.gather(-1, anchor)) / temperature + anchor_log_q).exp()  # q·e^gap without e^gap
        q = log_q.exp()
        excess = torch.where(gap > 1.0, towards_p - q, q * torch.expm1(gap)).sum(-1, keepdim=True)  # q_j/p_j - 1
        near = excess.abs() < 0.5
        anchor_r = torch.where(near, -torch.log1p(excess), log_p.gather(-1, anchor) - anchor_log_q)
        anchor_r = torch.where(overlap == -math.inf, 0.0, anchor_r)  # disjoint supports: every gap is infinite or 0
        divergence, ratio = divergence_per_order(gap + anchor_r, log_p, log_q, alpha)
        return divergence, ratio, anchor

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        z, v, alpha, temperature, per_order = inputs
        divergence, ratio, anchor = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(divergence if per_order else ratio, anchor)
        ctx.options = (alpha, temperature, per_order)
        ctx.save_for_backward(z, v, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[int(ctx.options[2])]
        if grad is None:
            return (None,) * 5
        z, v, divergence, ratio, anchor = ctx.saved_tensors
        args = (z, v, divergence.unsqueeze(-1), ratio.unsqueeze(-1), anchor, grad.unsqueeze(-1), *ctx.options)
        by_z = _StudentGradient.apply(*args) if ctx.needs_input_grad[0] else None
        by_v = _TeacherGradient.apply(*args) if ctx.needs_input_grad[1] else None
        return by_z, by_v, None, None, None


class _StudentGradient(torch.autograd.Function):
    """grad·(q − w)/T, where w ∝ q·e^{α·gap}; differentiable once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor,
        v: Tensor,
        divergence: Tensor,
        ratio: Tensor,
        anchor: Tensor,
        grad: Tensor,
        alpha: Order,
        temperature: Order,
        per_order: bool,
    ) -> Tensor:
        log_q, _, gap, w = _row_of(z, v, anchor, alpha, temperature)
        infinite = alpha == math.inf
        step = where(infinite, 1.0, where(alpha == 0.0, _SMALL_STEP[z.dtype], alpha))
        scale = where(infinite, 0.0 if per_order else 1.0, 1.0 if per_order else alpha)
        unbounded = ratio == math.inf  # no 1/α applies: w − q itself, at α = 0 the limit of w
        step = torch.where(unbounded, torch.full_like(ratio, _NO_STEP), step)
        scale = torch.where(unbounded, step, scale)
        by_z = -scale * _slope(log_q, w, gap, step, where(infinite, math.inf, divergence))
        return _weigh(grad, _balance(by_z, log_q.exp(), w) / temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        z, v, _, _, anchor, grad, *ctx.options = inputs
        ctx.save_for_backward(z, v, anchor, grad)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        """With f = (q − w)/T: ∂f/∂z = (Cov_q − (1−α)Cov_w)/T² and ∂f/∂v = −α Cov_w/T², both symmetric."""
        z, v, anchor, grad = ctx.saved_tensors
        alpha, temperature, per_order = ctx.options
        if bool(torch.as_tensor((alpha == 0.0) | (alpha == math.inf)).any()):
            raise RuntimeError("second derivatives are available for orders 0 < alpha < inf only")
        factor = 1.0 / (alpha if per_order else 1.0)
        log_q, _, _, w = _row_of(z, v, anchor, alpha, temperature)
        q = log_q.exp()
        cov_q, cov_w = (m * (x - (m * x).sum(-1, keepdim=True)) for m in (q, w))
        by_z = _weigh(grad, factor * (cov_q - (1.0 - alpha) * cov_w) / temperature**2)
        by_v = _weigh(grad, -factor * alpha * cov_w / temperature**2)
        by_grad = (x * factor * (q - w) / temperature).sum(-1, keepdim=True)
        return by_z, by_v, None, None, None, by_grad, None, None, None


class _TeacherGradient(torch.autograd.Function):
    """grad·α(w − p)/((α − 1)T), where w ∝ p·e^{(α−1)·gap}; once only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor,
        v: Tensor,
        divergence: Tensor,
        ratio: Tensor,
        anchor: Tensor,
        grad: Tensor,
        alpha: Order,
        temperature: Order,
        per_order: bool,
    ) -> Tensor:
        _, log_p, gap, w = _row_of(z, v, anchor, alpha, temperature)
        infinite = alpha == math.inf
        h = where(infinite, 1.0, alpha - 1.0)
        step = where(h == 0.0, _SMALL_STEP[z.dtype], h)
        scale = where(infinite, 0.0 if per_order else 1.0, 1.0 if per_order else alpha)
        by_v = scale * _slope(log_p, w, gap, step, where(infinite, math.inf, divergence))
        return _weigh(grad, _balance(by_v, log_p.exp(), w) / temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("second derivatives through the gradient of the teacher's logits are not available")


# --------------------------------------------------------------------------- pieces of a row


def _row_of(
    z: Tensor, v: Tensor, anchor: Tensor, alpha: Order, temperature: Order
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log q, log p, the gap from the mode of the mixture w, and w = softmax((αv + (1−α)z)/T) itself.

    Exponents are taken from that mode, and from q for α < 1/2, else from p, so that neither a large α nor a wide row
    costs digits. Limits: at α = inf the classes of largest p/q, in proportion to q; where α > 1 and only q vanishes,
    those classes in proportion to p^α; for disjoint supports and α < 1, P.
    """
    log_q, log_p = _log_softmax(z, temperature), _log_softmax(v, temperature)
    infinite = alpha == math.inf
    order = where(infinite, 1.0, alpha)
    low = order < 0.5
    first_gap = _gap(z, v, log_q, log_p, temperature, anchor)
    mode = _mixture_exponent(where(low, log_q, log_p), log_p, first_gap, order).argmax(-1, keepdim=True)
    gap = _gap(z, v, log_q, log_p, temperature, mode)
    base = where(low, z, v)
    exponent = _mixture_exponent((base - base.gather(-1, mode)) / temperature, log_p, gap, order)
    if infinite is not False:
        top = first_gap == first_gap.amax(-1, keepdim=True)
        exponent = where(infinite, torch.where(top, log_q.clamp_min(-1e30), -math.inf), exponent)
    empty = (exponent == -math.inf).all(-1, keepdim=True)
    return log_q, log_p, gap, torch.where(empty | (alpha == 1.0), log_p.exp(), exponent.softmax(-1))


def _log_softmax(logits: Tensor, temperature: Order) -> Tensor:
    """log softmax(logits/T), shifted before the division so that a common offset costs no digits."""
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).log_softmax(-1)


def _gap(z: Tensor, v: Tensor, log_q: Tensor, log_p: Tensor, temperature: Order, anchor: Tensor) -> Tensor:
    """((v_i − z_i) − (v_j − z_j))/T with j = `anchor`, from the exact differences (Knuth's two-sum).

    −inf where only p vanishes, +inf where only q does, 0 where both do.
    """
    s = v - z
    t = s - v
    error = torch.where(torch.isfinite(s), (v - (s - t)) - (z + t), 0.0)
    gap = ((s - s.gather(-1, anchor)) + (error - error.gather(-1, anchor))) / temperature
    dead_q, dead_p = log_q == -math.inf, log_p == -math.inf
    gap = torch.where(dead_p, -math.inf, torch.where(dead_q, math.inf, gap))
    return gap.masked_fill(dead_p & dead_q, 0.0)


def _slope(log_m: Tensor, w: Tensor, gap: Tensor, t: Order, divergence: Tensor | float) -> Tensor:
    """(w − m)/t for w ∝ m·e^{t·gap}, as m·expm1(log(w/m))/t where w is close to m; plainly where D_α is infinite."""
    m = log_m.exp()
    y = torch.where(gap.isinf(), -math.inf, t * gap).masked_fill(log_m == -math.inf, 0.0)
    excess = torch.where(y > 1.0, (log_m + y).exp() - m, m * torch.expm1(y)).sum(-1, keepdim=True)  # Σ m·e^y − 1
    log_sum = torch.where(excess.abs() < 0.5, torch.log1p(excess), (log_m + y).logsumexp(-1, keepdim=True))
    log_ratio = y - log_sum
    carried = (w * y.abs()).nan_to_num(0.0).sum(-1, keepdim=True)  # the rounding that log_sum is made of
    exact = (y.abs() <= _TILT_LIMIT) & (carried <= _TILT_LIMIT)
    near = (log_ratio.abs() <= 1.0) & exact & (divergence < math.inf)
    return torch.where(near, m * (torch.expm1(log_ratio) / t), (w - m) / t)


def _mixture_exponent(base: Tensor, log_p: Tensor, gap: Tensor, order: Order) -> Tensor:
    only_p = gap == math.inf
    exponent = torch.where(log_p == -math.inf, -math.inf, base + where(order < 0.5, order, order - 1.0) * gap)
    exponent = torch.where(only_p, where(order < 1.0, -math.inf, order * log_p), exponent)
    blocked = only_p.any(-1, keepdim=True) & ~only_p & (order > 1.0)
    return exponent.masked_fill(blocked, -math.inf)


def _balance(rows: Tensor, m: Tensor, w: Tensor) -> Tensor:
    """Rows ∝ m − w sum to 0: a class that holds most of both takes its entry from the others, where nothing cancels."""
    dominant = (m > 0.5) & (w > 0.5)
    return torch.where(dominant, -rows.masked_fill(dominant, 0.0).sum(-1, keepdim=True), rows)


def _weigh(grad: Tensor, rows: Tensor) -> Tensor:
    """grad·rows, with 0 where the incoming gradient is 0 even if the row is NaN: ignored samples stay ignored."""
    return torch.where(grad == 0, 0.0, grad * rows)
