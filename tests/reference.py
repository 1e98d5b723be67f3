"""Rényi divergence and its gradients in 50-digit arithmetic, straight from definition 2: the yardstick of the tests."""

import mpmath

mpmath.mp.dps = 50
INF = mpmath.inf


def softmax(logits, temperature=1):
    """Probabilities as mpf; -inf logits give exact zeros."""
    scores = [mpmath.mpf(float(x)) / mpmath.mpf(float(temperature)) for x in logits]
    top = max(scores)
    weights = [mpmath.mpf(0) if s == -INF else mpmath.exp(s - top) for s in scores]
    total = mpmath.fsum(weights)
    return [x / total for x in weights]


def renyi(p, q, alpha):
    """D_α(P‖Q) with the conventions of the thesis, working precision raised until cancellation cannot matter."""
    alpha = mpmath.mpf(float(alpha))
    with mpmath.workdps(120):
        if any(b == 0 < a for a, b in zip(p, q)) and alpha >= 1:
            return INF
        both = [(a, b) for a, b in zip(p, q) if a > 0 and b > 0]
        if not both:
            return INF
        if alpha == INF:
            return max(mpmath.log(a / b) for a, b in both)
        if alpha == 1:
            return mpmath.fsum(a * mpmath.log(a / b) for a, b in both)
        if alpha == 0:
            return -mpmath.log(mpmath.fsum(b for a, b in zip(p, q) if a > 0))
        return mpmath.log(
            mpmath.fsum(mpmath.exp(alpha * mpmath.log(a) + (1 - alpha) * mpmath.log(b)) for a, b in both)
        ) / (alpha - 1)


def mixture(p, q, alpha):
    """w ∝ p^α q^(1-α) for finite orders and full supports."""
    alpha = mpmath.mpf(float(alpha))
    logs = [-INF if a == 0 and b == 0 else alpha * mpmath.log(a) + (1 - alpha) * mpmath.log(b) for a, b in zip(p, q)]
    top = max(logs)
    weights = [mpmath.mpf(0) if s == -INF else mpmath.exp(s - top) for s in logs]
    total = mpmath.fsum(weights)
    return [x / total for x in weights]


def of_logits(student, teacher, alpha, temperature=1):
    """(D_α, its gradient in the student's logits) as mpf."""
    with mpmath.workdps(120):
        p, q = softmax(teacher, temperature), softmax(student, temperature)
        w = mixture(p, q, alpha) if 0 < alpha < INF else None
        gradient = [(b - c) / mpmath.mpf(float(temperature)) for b, c in zip(q, w)] if w else None
        return renyi(p, q, alpha), gradient


def teacher_gradient(student, teacher, alpha, temperature=1):
    """The gradient of D_α in the teacher's logits, 0 < α < inf: α(w − p)/((α − 1)T), p(log(p/q) − D)/T at α = 1."""
    with mpmath.workdps(120):
        p, q = softmax(teacher, temperature), softmax(student, temperature)
        order, scale = mpmath.mpf(float(alpha)), mpmath.mpf(float(temperature))
        if order == 1:
            value = renyi(p, q, 1)
            return [a * (mpmath.log(a / b) - value) / scale for a, b in zip(p, q)]
        w = mixture(p, q, alpha)
        return [order * (c - a) / ((order - 1) * scale) for a, c in zip(p, w)]
