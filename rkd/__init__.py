"""Rényi knowledge distillation: the loss, its mathematics, and the experiments of the book."""

from rkd.divergence import kl_divergence, renyi_divergence, softmax
from rkd.fused import fused_linear_renyi_kd_loss
from rkd.loss import DistillationLoss, renyi_kd_loss

__all__ = [
    "DistillationLoss",
    "fused_linear_renyi_kd_loss",
    "kl_divergence",
    "renyi_divergence",
    "renyi_kd_loss",
    "softmax",
]
__version__ = "0.1.0"
