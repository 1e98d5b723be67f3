"""What a student is trained on: gradients of hard and soft losses in the student's logits, in closed form.

Training needs gradients only, and many small students at once need them fast, so nothing here computes a value. Logits
have the shape (seeds, students, classes, samples): with the classes second to last, a softmax over ten of them is some
thirty times faster on a CPU than with the classes last. The tests hold every gradient to automatic differentiation of
`rkd.renyi_kd_loss` and of PyTorch's own losses.
Book: 2.1.6, "Relatives"; A.5, "Running a study".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Scale = str | float
_TINY = 1e-20  # an order this small gives the limit α → 0 to rounding
_LOW = 0.5  # from here on a plain difference q − w keeps its digits after the division by α


@dataclass(frozen=True)
class Student:
    """One student's loss (1 − β)·cross-entropy + β·s·D, eq. (1.13) with another divergence D where `loss` says so.

    Attributes:
        loss: a key of `LOSSES`: "renyi", D_α(P‖Q); "kl" and "reverse_kl", KL(P‖Q) and KL(Q‖P); "js", the generalised
            Jensen–Shannon divergence π·KL(P‖M) + (1−π)·KL(Q‖M), M = πP + (1−π)Q; "mse", half the mean square of the
            difference of the logits; "ttm", KL(P‖Q) with only the teacher at temperature T; "hard", no soft targets.
        alpha: order in [0, inf], of "renyi".
        temperature: T > 0; "mse" and "hard" do not use it.
        beta: weight in [0, 1] of the soft targets; 0 for "hard".
        scale: s: "T2", "T2/alpha" (of "renyi", finite order), or a positive number; a number for "mse" and "ttm", whose
            gradients do not shrink with T (the literature's is 1).
        mixture: π in (0, 1), of "js".
        learning_rate: in place of the schedule's, positive, or None.

    Raises:
        ValueError: an attribute lies outside what is accepted above.

    Sources: G. Hinton, O. Vinyals & J. Dean, 2015 (kl); T. Kim et al., IJCAI 2021 (mse); K. Zheng & E.-H. Yang, ICLR
    2024 (ttm); R. Agarwal et al., ICLR 2024 (js).
    """

    loss: str = "renyi"
    alpha: float = 1.0
    temperature: float = 4.0
    beta: float = 0.9
    scale: Scale = "T2"
    mixture: float = 0.5
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, accepted: str) -> None:
            if not holds:
                raise ValueError(f"{name} must be {accepted}, got {getattr(self, name)!r}")

        check("loss", self.loss in LOSSES, f"one of {', '.join(LOSSES)}")
        check("alpha", self.alpha >= 0, "in [0, inf]")
        check("temperature", 0 < self.temperature < math.inf, "positive and finite")
        check("beta", 0 <= self.beta <= 1, "in [0, 1]")
        check("beta", self.loss != "hard" or self.beta == 0, "0 for loss hard")
        check("mixture", 0 < self.mixture < 1, "in (0, 1)")
        check("learning_rate", self.learning_rate is None or 0 < self.learning_rate < math.inf, "positive or None")
        if isinstance(self.scale, str):
            check("scale", self.scale in ("T2", "T2/alpha"), "'T2', 'T2/alpha' or a positive number")
            finite = self.loss == "renyi" and self.alpha < math.inf
            check("scale", self.scale == "T2" or finite, "'T2' or a number unless the loss is renyi of finite alpha")
            check("scale", self.loss not in ("mse", "ttm"), f"a positive number for loss {self.loss}")
        else:
            check("scale", 0 < self.scale < math.inf, "'T2', 'T2/alpha' or a positive number")

    @property
    def order(self) -> float:
        """α of "renyi", and of the two losses that are members of its family."""
        return {"kl": 1.0, "reverse_kl": 0.0}.get(self.loss, self.alpha)

    @property
    def form(self) -> str:
        """Which closed form gives the soft gradient."""
        if self.loss not in ("renyi", "kl", "reverse_kl"):
            return self.loss
        return "highest" if self.order == math.inf else "low" if self.order < _LOW else "high"


class Gradient:
    """Gradients of the losses of C students, the same ones under each of K seeds."""

    def __init__(self, students: Sequence[Student], like: Tensor) -> None:
        column = lambda values: like.new_tensor(list(values)).view(-1, 1, 1)  # noqa: E731 - (C, 1, 1)
        self.soft_weight = column(s.beta for s in students)
        self._any_soft = any(s.beta > 0 for s in students)
        forms = sorted({s.form for s in students if s.beta > 0})
        self._groups = []
        for form in forms:
            members = [i for i, s in enumerate(students) if s.form == form and s.beta > 0]
            group = [students[i] for i in members]
            settings = (
                column(s.order for s in group),
                column(s.temperature for s in group),
                column(s.mixture for s in group),
            )
            where = slice(None) if len(group) == len(students) else torch.tensor(members, device=like.device)
            self._groups.append((_FORMS[form], where, settings, column(_factor(s) for s in group)))

    def terms(self, z: Tensor, v: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(hard, soft): the gradient in z of each term as it enters the loss, for each sample.

        Args:
            z: the students' logits, shape (K, C, n, B).
            v: the teacher's, shape (K, 1, n, B).
            y: labels, shape (K, B), int64.

        Returns:
            Two tensors of the shape of z; their sum is the gradient of (1 − β)·cross-entropy + β·s·D.
        """
        hard = z.softmax(2)
        hard.scatter_add_(2, y[:, None, None].expand(-1, z.shape[1], 1, -1), -torch.ones_like(hard[:, :, :1]))
        hard.mul_(1 - self.soft_weight)
        soft = torch.zeros_like(z) if self._any_soft else z.new_zeros(()).expand_as(z)
        for form, where, settings, factor in self._groups:
            part = form(z[:, where], v, *settings).mul_(factor)
            if isinstance(where, slice):
                soft = part
            else:
                soft[:, where] = part
        return hard, soft


def _factor(s: Student) -> float:
    """β times the scale, times what its closed form leaves out: ∂/∂z is 1/T of ∂/∂(z/T), and "low" is of D_α/α."""
    scale = {"T2": s.temperature**2, "T2/alpha": s.temperature**2 / (s.alpha or 1.0)}.get(str(s.scale), s.scale)
    if s.loss in ("mse", "ttm"):
        return s.beta * float(scale)
    if s.form == "low" and s.loss == "renyi":
        scale = s.temperature**2 if s.scale == "T2/alpha" else float(scale) * s.alpha
    return s.beta * float(scale) / s.temperature


# --------------------------------------------------------------------------- closed forms, up to the factor


def _log_q_and_p(z: Tensor, v: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    return (z / temperature).log_softmax(2), (v / temperature).log_softmax(2)


def _high(z: Tensor, v: Tensor, alpha: Tensor, temperature: Tensor, mixture: Tensor) -> Tensor:
    """q − w of D_α, w = softmax((αv + (1 − α)z)/T)."""
    log_q, log_p = _log_q_and_p(z, v, temperature)
    q = log_q.exp()
    return q.sub_(log_q.lerp_(log_p, alpha).softmax(2))


def _low(z: Tensor, v: Tensor, alpha: Tensor, temperature: Tensor, mixture: Tensor) -> Tensor:
    """(q − w)/α of D_α/α; KL(Q‖P)'s own at 0. Where p and q are close, no difference is divided by a small order."""
    log_q, log_p = _log_q_and_p(z, v, temperature)
    order = alpha.clamp_min(_TINY)
    exponent = order * (log_p - log_q)
    q = log_q.exp()
    excess = exponent.clamp(-1, 1).expm1_().div_(order)  # ((p/q)^α − 1)/α
    mean = (q * excess).sum(2, keepdim=True)
    close = q * (mean - excess) / (1 + order * mean)
    apart = (q - (log_q + exponent).softmax(2)) / order
    return torch.where(exponent.abs().amax(2, keepdim=True) <= 1, close, apart)


def _highest(z: Tensor, v: Tensor, alpha: Tensor, temperature: Tensor, mixture: Tensor) -> Tensor:
    """q − w of D_∞, w on the classes of largest p/q."""
    log_q, log_p = _log_q_and_p(z, v, temperature)
    ratio = log_p - log_q
    top = torch.where(ratio == ratio.amax(2, keepdim=True), log_q, -math.inf)
    return log_q.exp() - top.softmax(2)


def _js(z: Tensor, v: Tensor, alpha: Tensor, temperature: Tensor, mixture: Tensor) -> Tensor:
    """(1 − π)·q·(log(q/m) − Σ q log(q/m)), m = πp + (1 − π)q."""
    log_q, log_p = _log_q_and_p(z, v, temperature)
    ratio = log_q - torch.logaddexp(log_p + mixture.log(), log_q + (1 - mixture).log())
    q = log_q.exp()
    return (1 - mixture) * q * (ratio - (q * ratio).sum(2, keepdim=True))


def _mse(z: Tensor, v: Tensor, alpha: Tensor, temperature: Tensor, mixture: Tensor) -> Tensor:
    return (z - v) / z.shape[2]


def _ttm(z: Tensor, v: Tensor, alpha: Tensor, temperature: Tensor, mixture: Tensor) -> Tensor:
    return z.softmax(2) - (v / temperature).softmax(2)


LOSSES = ("renyi", "kl", "reverse_kl", "js", "mse", "ttm", "hard")
_FORMS: dict[str, Callable[..., Tensor]] = {
    "high": _high,
    "low": _low,
    "highest": _highest,
    "js": _js,
    "mse": _mse,
    "ttm": _ttm,
}
