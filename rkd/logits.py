"""D_α(P‖Q) of each row from teacher and student logits, differentiable: value, closed-form gradient, curvature.

Probabilities are never formed on the way to a logarithm. With teacher logits v, student logits z, the gap
δ = (v − z)/T is taken exactly (difference plus its rounding error) and measured from one class j, so that
r = log(p/q) = δ − δ_j + r_j keeps its relative accuracy however close the student is to the teacher; `rkd.divergence`
turns r into D_α. The gradient in z is (q − w)/T, with w = softmax((αv + (1−α)z)/T) the geometric mixture of P and Q;
it is bounded (its absolute values sum to at most 2/T) and needs no division by α − 1.
Explained in the book: section 2.1, "The objective".
"""

import math
from typing import Any

import torch
from torch import Tensor

from rkd.arguments import Order
from rkd.divergence import divergence_per_order, expm1_ratio, where

# log(w/q) = αr − log S is used while αr is at most this; larger terms would leave too few digits in the difference
_TILT_LIMIT = 8.0


def renyi_from_logits(student: Tensor, teacher: Tensor, alpha: Order, temperature: Order, per_order: bool) -> Tensor:
    """D_α(P‖Q) of each row, or D_α/α if `per_order`; logits (..., n) of one shape in float32 or float64."""
    return _RenyiFromLogits.apply(student, teacher, _keep_class_axis(alpha), _keep_class_axis(temperature), per_order)[
        int(per_order)
    ]


class _RenyiFromLogits(torch.autograd.Function):
    """Saves the logits and three numbers a row: the reference class j, r_j = log(p_j/q_j), and D_α or D_α/α."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor, v: Tensor, alpha: Order, temperature: Order, per_order: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_q, log_p = _log_softmax(z, temperature), _log_softmax(v, temperature)
        anchor = (log_q + log_p).argmax(-1, keepdim=True)
        gap = _gap(z, v, temperature, anchor)
        anchor_log_q = log_q.gather(-1, anchor)
        towards_p = ((v - v.gather(-1, anchor)) / temperature + anchor_log_q).exp()  # q·e^gap without e^gap
        q = log_q.exp()
        excess = torch.where(gap > 1.0, towards_p - q, q * torch.expm1(gap)).sum(-1, keepdim=True)  # q_j/p_j - 1
        near = excess.abs() < 0.5
        anchor_r = torch.where(near, -torch.log1p(excess), log_p.gather(-1, anchor) - anchor_log_q)
        r = _log_ratio(gap, anchor_r, log_p, log_q)
        divergence, ratio = divergence_per_order(r, log_p, log_q, alpha)
        return divergence, ratio, anchor, anchor_r

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        z, v, alpha, temperature, per_order = inputs
        divergence, ratio, anchor, anchor_r = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(divergence if per_order else ratio, anchor, anchor_r)
        ctx.options = (alpha, temperature, per_order)
        ctx.save_for_backward(z, v, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[int(ctx.options[2])]
        if grad is None:
            return (None,) * 5
        args = (*ctx.saved_tensors, grad.unsqueeze(-1), *ctx.options)
        by_z = _StudentGradient.apply(*args) if ctx.needs_input_grad[0] else None
        by_v = _TeacherGradient.apply(*args) if ctx.needs_input_grad[1] else None
        return by_z, by_v, None, None, None


class _StudentGradient(torch.autograd.Function):
    """grad·(q − w)/T, as −(q/T)·expm1(log(w/q)) where w is close to q; differentiable once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor,
        v: Tensor,
        divergence: Tensor,
        ratio: Tensor,
        anchor: Tensor,
        anchor_r: Tensor,
        grad: Tensor,
        alpha: Order,
        temperature: Order,
        per_order: bool,
    ) -> Tensor:
        log_q, log_p = _log_softmax(z, temperature), _log_softmax(v, temperature)
        r = _log_ratio(_gap(z, v, temperature, anchor), anchor_r, log_p, log_q)
        divergence, ratio = divergence.unsqueeze(-1), ratio.unsqueeze(-1)
        infinite = alpha == math.inf
        order = where(infinite, 1.0, alpha)
        q, w = log_q.exp(), _mixture(z, v, log_p, log_q, r, divergence, alpha, temperature)
        u = r + (1.0 - order) * ratio  # log(w/q)/α
        near = ((order * u).abs() <= 1.0) & ((order * r).abs() <= _TILT_LIMIT)
        if infinite is not False:
            near = torch.where(infinite, False, near) if isinstance(infinite, Tensor) else torch.zeros_like(near)
        # on rows of infinite divergence, and at order 0 beyond `near`, w is the limit and no 1/α applies
        divisor = where(torch.isfinite(ratio) & (alpha > 0), order if per_order else 1.0, 1.0)
        by_z = torch.where(near, -q * expm1_ratio(u, order) * (1.0 if per_order else order), (q - w) / divisor)
        if infinite is not False and per_order:
            by_z = where(infinite, by_z * 0.0, by_z)
        return _weigh(grad, _balance(by_z, q, w) / temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        z, v, _, _, _, _, grad, *ctx.options = inputs
        ctx.save_for_backward(z, v, grad)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        """With f = (q − w)/T: ∂f/∂z = (Cov_q − (1−α)Cov_w)/T² and ∂f/∂v = −α Cov_w/T², both symmetric."""
        z, v, grad = ctx.saved_tensors
        alpha, temperature, per_order = ctx.options
        if bool(torch.as_tensor((alpha == 0.0) | (alpha == math.inf)).any()):
            raise RuntimeError("second derivatives are available for orders 0 < alpha < inf only")
        factor = 1.0 / (alpha if per_order else 1.0)
        q = (z / temperature).softmax(-1)
        w = ((alpha * v + (1.0 - alpha) * z) / temperature).softmax(-1)
        cov_q, cov_w = (m * (x - (m * x).sum(-1, keepdim=True)) for m in (q, w))
        by_z = grad * factor * (cov_q - (1.0 - alpha) * cov_w) / temperature**2
        by_v = -grad * factor * alpha * cov_w / temperature**2
        by_grad = (x * factor * (q - w) / temperature).sum(-1, keepdim=True)
        return by_z, by_v, None, None, None, None, by_grad, None, None, None


class _TeacherGradient(torch.autograd.Function):
    """grad·α(w − p)/((α − 1)T), as p·expm1((α − 1)(r − D))/(α − 1) where w is close to p; once only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor,
        v: Tensor,
        divergence: Tensor,
        ratio: Tensor,
        anchor: Tensor,
        anchor_r: Tensor,
        grad: Tensor,
        alpha: Order,
        temperature: Order,
        per_order: bool,
    ) -> Tensor:
        log_q, log_p = _log_softmax(z, temperature), _log_softmax(v, temperature)
        r = _log_ratio(_gap(z, v, temperature, anchor), anchor_r, log_p, log_q)
        divergence = divergence.unsqueeze(-1)
        infinite = alpha == math.inf
        order = where(infinite, 2.0, alpha)
        p, w = log_p.exp(), _mixture(z, v, log_p, log_q, r, divergence, alpha, temperature)
        h = order - 1.0
        y = h * (r - divergence)  # log(w/p)
        near = (y.abs() <= 1.0) & ((h * r).abs() <= _TILT_LIMIT)
        growth = torch.where(near, p * expm1_ratio(r - divergence, h), (w - p) / where(h == 0.0, 1.0, h))
        by_v = growth * (1.0 if per_order else order)
        if infinite is not False:
            by_v = where(infinite, torch.zeros_like(w) if per_order else w - p, by_v)
        return _weigh(grad, _balance(by_v, p, w) / temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("second derivatives through the gradient of the teacher's logits are not available")


# --------------------------------------------------------------------------- pieces of a row


def _log_softmax(logits: Tensor, temperature: Order) -> Tensor:
    """log softmax(logits/T), shifted before the division so that a common offset costs no digits."""
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).log_softmax(-1)


def _gap(z: Tensor, v: Tensor, temperature: Order, anchor: Tensor) -> Tensor:
    """((v_i − z_i) − (v_j − z_j))/T with j = `anchor`, from the exact differences (Knuth's two-sum)."""
    s = v - z
    t = s - v
    error = torch.where(torch.isfinite(s), (v - (s - t)) - (z + t), 0.0)
    return ((s - s.gather(-1, anchor)) + (error - error.gather(-1, anchor))) / temperature


def _log_ratio(gap: Tensor, anchor_r: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """r = log(p/q): −inf where only p vanishes, +inf where only q does, 0 where both do."""
    dead_p, dead_q = log_p == -math.inf, log_q == -math.inf
    r = torch.where(dead_p, -math.inf, torch.where(dead_q, math.inf, gap + anchor_r))
    return torch.where(dead_p & dead_q, 0.0, r)


def _mixture(
    z: Tensor, v: Tensor, log_p: Tensor, log_q: Tensor, r: Tensor, divergence: Tensor, alpha: Order, temperature: Order
) -> Tensor:
    """w = softmax((αv + (1−α)z)/T), exponents taken from w's own mode so that a large α costs no digits.

    Limits: at α = inf the classes of largest p/q, in proportion to q; where α > 1 and only q vanishes, those classes
    in proportion to p^α; for disjoint supports and α < 1, P.
    """
    infinite = alpha == math.inf
    order = where(infinite, 1.0, alpha)
    dead_p, dead_q = log_p == -math.inf, log_q == -math.inf
    exponent = _mixture_exponent(log_q, order * r, dead_p, dead_q, log_p, order)
    mode = exponent.argmax(-1, keepdim=True)
    exponent = _mixture_exponent(
        log_q - log_q.gather(-1, mode), order * _gap(z, v, temperature, mode), dead_p, dead_q, log_p, order
    )
    if infinite is not False:
        exponent = where(infinite, torch.where(r == divergence, log_q.clamp_min(-1e30), -math.inf), exponent)
    w = exponent.softmax(-1)
    empty = (exponent == -math.inf).all(-1, keepdim=True)
    return torch.where(empty, log_p.exp(), w)


def _mixture_exponent(
    log_q: Tensor, tilt: Tensor, dead_p: Tensor, dead_q: Tensor, log_p: Tensor, order: Order
) -> Tensor:
    only_p = dead_q & ~dead_p
    exponent = torch.where(dead_p, -math.inf, log_q + tilt)
    exponent = torch.where(only_p, where(order < 1.0, -math.inf, order * log_p), exponent)
    blocked = only_p.any(-1, keepdim=True) & ~only_p & (order > 1.0)
    return exponent.masked_fill(blocked | (dead_p & dead_q), -math.inf)


def _balance(rows: Tensor, m: Tensor, w: Tensor) -> Tensor:
    """Rows ∝ m − w sum to 0: a class that holds most of both takes its entry from the others, where nothing cancels."""
    dominant = (m > 0.5) & (w > 0.5)
    return torch.where(dominant, -rows.masked_fill(dominant, 0.0).sum(-1, keepdim=True), rows)


def _weigh(grad: Tensor, rows: Tensor) -> Tensor:
    """grad·rows, with 0 where the incoming gradient is 0 even if the row is NaN: ignored samples stay ignored."""
    return torch.where(grad == 0, 0.0, grad * rows)


def _keep_class_axis(x: Order) -> Order:
    return x.unsqueeze(-1) if isinstance(x, Tensor) else x
