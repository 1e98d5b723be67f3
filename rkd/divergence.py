"""D_α(P‖Q) between probability vectors: definitions 1 and 2 of the thesis, their conventions, the extended orders.

The module owns one formula, shared with `rkd.loss`. With r = log(p/q), h = α − 1 and the non-negative generator

    ψ_α(r) = (e^{αr} − 1 − α(e^r − 1)) / (α − 1),        ψ_1(r) = r e^r − e^r + 1,

every order is D_α = log(1 + h·H_α)/h with H_α = Σ q ψ_α(r), a sum of terms that are never negative. That sum does
not cancel near α = 1 or near P = Q, where the textbook formula (1.16) loses every digit. Orders below 1/2 are reached
by skew symmetry, D_α(P‖Q)/α = D_{1−α}(Q‖P)/(1−α), so no division by a small α occurs either.
All values are in nats.

Book: 1.2, "Rényi Divergence"; 2.1.1, "The Objective".
"""

import math
from typing import Any

import torch
from torch import Tensor

from rkd.arguments import ArrayLike, Order, as_floating, as_probabilities, check_order, check_positive

# r is cut here: the terms of the generator have long reached their limit, and no e^{hr} with h >= -1/2 overflows
_LOWEST_R = -160.0
# below this |r| and |hr| the generator is summed as a series; balances truncation against cancellation
_SERIES_RADIUS = {torch.float32: 0.25, torch.float64: 2.0**-6}
# below this log1p(x) is x(1 − x/2) to rounding, and x may be too small a number to carry its digits
_SMALL_SHIFT = 1e-8
# orders below this count as 0, beyond its inverse as inf: the difference is far below rounding
_TINY_ORDER = 1e-30


def renyi_divergence(p: ArrayLike, q: ArrayLike, alpha: ArrayLike) -> Any:
    """Rényi divergence D_α(P‖Q) of order α, eq. (1.16), with the extended orders (1.21)-(1.23). In nats.

    Args:
        p, q: probability vectors, shape (..., n), NumPy arrays, sequences or tensors. Leading axes broadcast. Rows
            must be non-negative and sum to 1 (within 1e-2 for half precision, 1e-4 for float32, 1e-8 for float64);
            they are normalised before use, so that rounding in their sum cannot make the divergence negative.
        alpha: order(s) in [0, inf], a number or an array that broadcasts against the leading axes.

    Returns:
        D_α of shape (...), a tensor if either argument is one, else NumPy. Half precision is computed and
        returned in float32. Tensors are differentiable in `p` and `q`; slopes of -inf, at the border of the simplex,
        are given as the largest finite number, and rows of infinite divergence get zero gradient.
        Conventions: 0·log(0/0) = 0; x/0 = inf. So D_α = inf where α >= 1 and some q_i = 0 < p_i, and for every α where
        P and Q have disjoint supports. D_0 = -log Q(p > 0) (1.27), D_1 = KL (1.31), D_inf = max log(p/q) (1.33).

    Raises:
        TypeError: an argument is not numeric, or gradients with respect to `alpha` are asked for.
        ValueError: `p` or `q` is negative, not finite or does not sum to 1; shapes differ; `alpha` is negative or NaN.

    Source: van Erven & Harremoës, arXiv:1206.2459, definitions 1-2, theorems 4-6.

    Book: 1.2, "Rényi Divergence".
    """
    as_numpy = not (isinstance(p, Tensor) or isinstance(q, Tensor))
    p_row, q_row = as_probabilities("p", p), as_probabilities("q", q)
    if p_row.shape[-1] != q_row.shape[-1]:
        raise ValueError(f"p and q must have the same number of classes, got {p_row.shape[-1]} and {q_row.shape[-1]}")
    dtype = torch.promote_types(p_row.dtype, q_row.dtype)
    try:
        p_row, q_row = torch.broadcast_tensors(p_row.to(dtype), q_row.to(dtype))
    except RuntimeError:
        raise ValueError(
            f"the leading axes of p and q must broadcast, got shapes {tuple(p_row.shape)} and {tuple(q_row.shape)}"
        ) from None
    order = check_order(alpha, p_row)
    if isinstance(order, Tensor):
        try:
            batch = torch.broadcast_shapes(p_row.shape[:-1], order.shape)
        except RuntimeError:
            raise ValueError(
                f"alpha of shape {tuple(order.shape)} does not broadcast against the leading axes "
                f"{tuple(p_row.shape[:-1])}"
            ) from None
        p_row, q_row = (row.expand(*batch, row.shape[-1]) for row in (p_row, q_row))
        order = order.expand(batch)
    value = _DivergenceOfProbabilities.apply(p_row, q_row, order)[0]
    return value.numpy()[()] if as_numpy else value


def kl_divergence(p: ArrayLike, q: ArrayLike) -> Any:
    """Kullback-Leibler divergence D_KL(P‖Q) = Σ p log(p/q), eq. (1.4), in nats: `renyi_divergence` at order 1.

    Arguments, shapes, conventions and errors are those of `renyi_divergence`.

    Book: 1.1, "Knowledge Distillation".
    """
    return renyi_divergence(p, q, 1.0)


def softmax(logits: ArrayLike, temperature: float = 1.0) -> Any:
    """Probabilities exp(z_c/T) / Σ exp(z_k/T) over the last axis, eq. (1.3); T = 1 is eq. (1.2).

    Args:
        logits: shape (..., n), NumPy or tensor; -inf marks an impossible class.
        temperature: T > 0.

    Returns:
        Probabilities, same shape and kind as `logits`.

    Raises:
        ValueError: `temperature` is not positive and finite, or `logits` hold NaN or +inf.

    Book: 1.1, "Knowledge Distillation".
    """
    scores = as_floating("logits", logits)
    temperature = check_positive("temperature", temperature)
    if bool((scores.isnan() | (scores == math.inf)).any()):
        raise ValueError("logits must be finite or -inf, got NaN or +inf")
    shifted = scores - scores.amax(-1, keepdim=True)
    result = torch.softmax(shifted / temperature, -1)
    return result if isinstance(logits, Tensor) else result.numpy()


# --------------------------------------------------------------------------- the formula


def divergence_per_order(r: Tensor, log_p: Tensor, log_q: Tensor, alpha: Order) -> tuple[Tensor, Tensor]:
    """(D_α, D_α/α) of each row from r = log(p/q), log p and log q, all of shape (..., n) and normalised.

    D_α/α is the reverse KL(Q‖P) at α = 0 and, where D_α is finite, 0 at α = inf. `alpha` is a float, or a tensor that
    broadcasts against (..., 1). Impossible classes have log p = -inf, log q = -inf, and r = ∓inf, or 0 where both are.
    Each result has relative error of a few units in the last place; neither is ever negative.
    """
    dead_p, dead_q = log_p == -math.inf, log_q == -math.inf
    flip = alpha < 0.5
    h = where(flip, -alpha, alpha - 1.0)
    if flip is not False:
        r_, log_p_ = where(flip, -r, r), where(flip, log_q, log_p)
        log_q_, dead_p_ = where(flip, log_p, log_q), where(flip, dead_q, dead_p)
    else:
        r_, log_p_, log_q_, dead_p_ = r, log_p, log_q, dead_p
    infinite = alpha == math.inf
    order = where(infinite, 1.0, 1.0 + h)
    value = _from_half_up(r_, log_p_, log_q_, dead_p_, where(infinite, 0.0, h))
    ratio = value / _row(order)
    divergence = where(_row(flip), ratio * _row(alpha), value)
    if infinite is not False:
        largest = r.masked_fill(dead_p, -math.inf).amax(-1).clamp_min(0.0)
        divergence = where(_row(infinite), largest, divergence)
        ratio = where(_row(infinite), torch.where(largest == math.inf, largest, 0.0), ratio)
    zero = alpha == 0.0
    if zero is not False:
        lost = (log_q.exp() * dead_p).sum(-1)
        kept = log_q.masked_fill(dead_p, -math.inf).logsumexp(-1)
        divergence = where(_row(zero), torch.where(lost < 0.5, -torch.log1p(-lost), -kept), divergence)
    return divergence, ratio


def _from_half_up(r: Tensor, log_p: Tensor, log_q: Tensor, dead_p: Tensor, h: Order) -> Tensor:
    """D_{1+h} for orders >= 1/2: log1p(h·H)/h, or the log-sum-exp of (1.16) where that sum is far from 1."""
    at_one = h == 0.0
    safe_h = where(at_one, 1.0, h)
    excess = _generator_terms(r, log_p, log_q, h).sum(-1).clamp_min(0.0)  # H
    if at_one is True:
        return excess
    shift = where(_row(at_one), 0.0, _row(h) * excess)  # S - 1, S = Σ p^{1+h} q^{-h}
    log_s = torch.where(dead_p, -math.inf, log_p + h * r).logsumexp(-1)
    log_s = torch.where(shift.abs() > 0.5, log_s, torch.log1p(shift))
    small = shift.abs() < _SMALL_SHIFT
    return torch.where(small, excess * (1.0 - 0.5 * shift), log_s / _row(safe_h)).clamp_min(0.0)


def _generator_terms(r: Tensor, log_p: Tensor, log_q: Tensor, h: Order) -> Tensor:
    """q·ψ_{1+h}(r), each >= 0, for h >= -1/2, scaled by whichever of p and q is larger so that nothing overflows."""
    p, q = log_p.exp(), log_q.exp()
    rises = r >= 0
    fall = -r.abs()
    decay = torch.expm1(fall)
    growth = _expm1_ratio(r.clamp_min(_LOWEST_R), h, torch.where(rises, 1.0, fall.exp()))
    outer = torch.where(rises, p, q) * (growth + torch.where(rises, decay, -decay))
    if isinstance(h, Tensor) or h > 0.0:
        steep = (h * r > 1.0) & rises
        outer = torch.where(
            steep, ((log_p + h * r).exp() - p) / where(h == 0.0, 1.0, h) + p * decay, outer
        )  # p·e^{hr} in one exponent
    y = h * r
    radius = _SERIES_RADIUS[r.dtype]
    e2_r, e2_y = _exp_series_2(r), _exp_series_2(y)
    inner = q * r.square() * ((1.0 + r * e2_r) * (1.0 + y * e2_y) + h * e2_y - e2_r)
    terms = torch.where((r.abs() < radius) & (y.abs() < radius), inner, outer)
    return where(h >= 0.0, terms.masked_fill(r == math.inf, math.inf), terms)  # however small p is


def _expm1_ratio(x: Tensor, h: Order, weight: Tensor | float = 1.0) -> Tensor:
    """weight·(e^{hx} − 1)/h, which is weight·x at h = 0."""
    at_zero = h == 0.0
    if at_zero is True:
        return weight * x
    return where(at_zero, weight * x, weight * torch.expm1(h * x) / where(at_zero, 1.0, h))


def _exp_series_2(x: Tensor) -> Tensor:
    """(e^x − 1 − x)/x² by its Taylor polynomial of degree 5, for |x| <= 1/4."""
    total = torch.full_like(x, 1.0 / 5040.0)
    for factorial in (720.0, 120.0, 24.0, 6.0, 2.0):
        total = total * x + 1.0 / factorial
    return total


def where(condition: bool | Tensor, yes: Any, no: Any) -> Any:
    """`torch.where`, decided in Python when the condition is: a fixed order then costs only its own branch."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def settle(alpha: Order) -> Order:
    """The order, broadcastable against (..., n), with what is 0 or inf to rounding put there."""
    alpha = keep_class_axis(alpha)
    return where(alpha < _TINY_ORDER, 0.0, where(alpha > 1.0 / _TINY_ORDER, math.inf, alpha))


def keep_class_axis(x: Order) -> Order:
    return x.unsqueeze(-1) if isinstance(x, Tensor) else x


def _row(x: Any) -> Any:
    """Drop the class axis of a per-row quantity that was kept broadcastable against (..., n)."""
    return x.squeeze(-1) if isinstance(x, Tensor) else x


# --------------------------------------------------------------------------- gradients of the probability form


class _DivergenceOfProbabilities(torch.autograd.Function):
    """D_α of the normalised rows; ∂D/∂q_i = (1 − w_i/q_i)/Σq and ∂D/∂p_i = α(w_i/p_i − 1)/((α − 1)Σp)."""

    @staticmethod
    def forward(p: Tensor, q: Tensor, alpha: Order) -> tuple[Tensor, Tensor]:
        return divergence_per_order(*_log_ratio_of_probabilities(p, q), settle(alpha))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        p, q, alpha = inputs
        ctx.order = alpha
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(p, q, output[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        p, q, divergence = ctx.saved_tensors
        divergence = divergence.unsqueeze(-1)
        alpha = settle(ctx.order)
        r, log_p, log_q = _log_ratio_of_probabilities(p, q)
        infinite = alpha == math.inf
        finite = where(infinite, 1.0, alpha)
        largest = torch.finfo(p.dtype).max
        log_w_q = torch.where(p == 0, -math.inf, finite * r.clamp_max(largest)) + (1.0 - finite) * divergence
        by_q = -torch.expm1(log_w_q)
        by_p = where(alpha == 0.0, torch.zeros_like(r), finite * _expm1_ratio(r - divergence, finite - 1.0))
        if infinite is not False:
            top = r.masked_fill(p == 0, -math.inf)
            w = torch.where(top == top.amax(-1, keepdim=True), log_q, -math.inf).softmax(-1)
            by_q = where(infinite, 1.0 - torch.where(w > 0, w / log_q.exp(), 0.0), by_q)
            by_p = where(infinite, torch.where(w > 0, w / log_p.exp(), 0.0) - 1.0, by_p)
        grad = torch.where(divergence == math.inf, 0.0, grad.unsqueeze(-1))
        by_p = (by_p / p.sum(-1, keepdim=True)).clamp(-largest, largest)
        by_q = (by_q / q.sum(-1, keepdim=True)).clamp(-largest, largest)
        return torch.where(grad == 0, 0.0, grad * by_p), torch.where(grad == 0, 0.0, grad * by_q), None


def _log_ratio_of_probabilities(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r = log(p/q), log p and log q of the normalised rows; log1p of the exact difference where p is close to q."""
    mass_p, mass_q = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
    difference = p - q
    close = difference.abs() < 0.5 * q
    r = torch.where(close, torch.log1p(difference / q), p.log() - q.log())
    r = r - torch.log1p(difference.sum(-1, keepdim=True) / mass_q)
    r = torch.where((p == 0) & (q == 0), 0.0, r)
    return r, p.log() - mass_p.log(), q.log() - mass_q.log()
