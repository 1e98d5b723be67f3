"""The losses that the benchmark sets side by side, and the tables of logits that it gives them.

Kullback–Leibler as PyTorch's users write it (log_softmax, softmax, F.kl_div), the same compiled, and compiled with a
logarithmic target, its fastest form; the Rényi divergence as three logsumexps, which lose their digits near α = 1 and
near the teacher, eager and compiled; the careful path of `rkd.logits`; `rkd.renyi_kd_loss` at three orders; on CUDA
also Liger-Kernel's KL with the log_softmaxes that it leaves to its caller, its JSD, and its fused linear JSD.
Book: A.7, "How fast the loss is".
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rkd.fused import fused_linear_renyi_kd_loss
from rkd.logits import renyi_from_logits
from rkd.loss import renyi_kd_loss

TEMPERATURE = 4.0
CAREFUL_UP_TO = 2**24  # logits; beyond, the careful path takes minutes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Loss = Callable[..., Tensor]


class Case(NamedTuple):
    """One table of logits; with `hidden` > 0 they come from hidden states of that size and a last layer."""

    rows: int
    classes: int
    hidden: int = 0
    dtype: str = "float32"


_CPU = [Case(128, 10), Case(512, 100), Case(512, 1000), Case(512, 4096), Case(512, 32768), Case(64, 262144)]
_CPU += [Case(512, 32768, 256)]
_SIZES = [(128, 10), (1024, 100), (4096, 1000), (16384, 4096), (16384, 32768), (16384, 131072), (4096, 262144)]
_CUDA = [Case(r, c, 0, dtype) for r, c in _SIZES for dtype in ("bfloat16", "float32")]
_CUDA += [Case(rows, 128256, 4096, "bfloat16") for rows in (1024, 2048, 4096)]
CASES = {"cpu": _CPU, "cuda": _CUDA}


def kl(z: Tensor, v: Tensor) -> Tensor:
    """What most people write."""
    log_q, p = (z.float() / TEMPERATURE).log_softmax(-1), (v.float() / TEMPERATURE).softmax(-1)
    return TEMPERATURE**2 * F.kl_div(log_q, p, reduction="batchmean")


def kl_log_target(z: Tensor, v: Tensor) -> Tensor:
    """The same with log p, which needs no guard at p = 0."""
    log_q, log_p = (x.float().div(TEMPERATURE).log_softmax(-1) for x in (z, v))
    return TEMPERATURE**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def three_logsumexps(z: Tensor, v: Tensor, alpha: float = 2.0) -> Tensor:
    """The Rényi divergence as its definition reads."""
    a, b = z.float() / TEMPERATURE, v.float() / TEMPERATURE
    mixed = (alpha * b + (1.0 - alpha) * a).logsumexp(-1)
    rows = (mixed - alpha * b.logsumexp(-1) - (1.0 - alpha) * a.logsumexp(-1)) / (alpha - 1.0)
    return TEMPERATURE**2 * rows.mean()


def careful(z: Tensor, v: Tensor) -> Tensor:
    """The way that suits every row and every transform."""
    return TEMPERATURE**2 * renyi_from_logits(z.float(), v.float(), 2.0, TEMPERATURE, False).mean()


def _liger_kl(z: Tensor, v: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerKLDIVLoss

    log_q, log_p = (x.float().div(TEMPERATURE).log_softmax(-1) for x in (z, v))
    return TEMPERATURE**2 * LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_q, log_p)


def _liger_jsd(z: Tensor, v: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerJSD

    log_q, log_p = (x.float().div(TEMPERATURE).log_softmax(-1) for x in (z, v))
    return LigerJSD(beta=0.5)(log_q, log_p)


def _liger_fused_jsd(h: Tensor, w: Tensor, g: Tensor, u: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.5, temperature=TEMPERATURE)(h, w, g, u)


def _after_the_layer(loss: Loss) -> Loss:
    return lambda h, w, g, u: loss(F.linear(h, w), F.linear(g, u))


RKD: dict[str, Loss] = {
    f"rkd, order {name}": partial(renyi_kd_loss, alpha=alpha, temperature=TEMPERATURE)
    for name, alpha in {"1": 1.0, "1/2": 0.5, "2": 2.0}.items()
}
LOSSES: dict[str, Loss] = {
    "KL, eager": kl,
    "KL, compiled": kl,
    "KL of log target, compiled": kl_log_target,
    "Rényi, eager": three_logsumexps,
    "Rényi, compiled": three_logsumexps,
    "Rényi, careful": careful,
    "Liger KL": _liger_kl,
    "Liger JSD": _liger_jsd,
    **RKD,
}
OF_HIDDEN: dict[str, Loss] = {
    "KL, eager": _after_the_layer(kl),
    "KL of log target, compiled": _after_the_layer(kl_log_target),
    "rkd, order 2": _after_the_layer(RKD["rkd, order 2"]),
    "rkd, fused linear": partial(fused_linear_renyi_kd_loss, alpha=2.0, temperature=TEMPERATURE),
    "Liger fused linear JSD": _liger_fused_jsd,
}


def names(case: Case, device: str) -> list[str]:
    """The losses to measure in a case: Liger's need CUDA, and the careful path is left out where it takes minutes."""
    few = case.rows * case.classes < CAREFUL_UP_TO
    every = OF_HIDDEN if case.hidden else LOSSES
    return [x for x in every if (device == "cuda" or "Liger" not in x) and (few or x != "Rényi, careful")]


def draw(case: Case, device: str) -> list[Tensor]:
    """Logits of student and teacher, or hidden states and weights of both; gradients for the student's."""
    make = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=make, device=device)
    if not case.hidden:
        z = 3 * random(case.rows, case.classes)
        student, teacher = [z], [z + random(case.rows, case.classes)]
    else:
        h, w = random(case.rows, case.hidden), 3 * random(case.classes, case.hidden) / case.hidden**0.5
        student, teacher = [h, w], [h + 0.3 * random(*h.shape), w]
    typed = [[x.to(DTYPES[case.dtype]) for x in side] for side in (student, teacher)]
    return [x.requires_grad_() for x in typed[0]] + [x.detach() for x in typed[1]]
