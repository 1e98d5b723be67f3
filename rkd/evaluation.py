"""How good many students are at once: accuracy, negative log-likelihood, calibration, agreement with the teacher.

Book: 2.2.1, "How Methods Are Compared".
"""

import torch
from torch import Tensor

BINS = 15


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Part of M samples whose largest logit is the label's; logits (..., n, M), labels (M,): (...), in [0, 1]."""
    return (logits.argmax(-2) == y).double().mean(-1)


def agreement(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Part of M samples on which student (..., n, M) and teacher (M, n) name the same class: (...), in [0, 1]."""
    return accuracy(logits, teacher_logits.argmax(-1))


def nll(logits: Tensor, y: Tensor) -> Tensor:
    """Mean negative log-likelihood of the labels (M,) under softmax(logits), (..., n, M), at T = 1: (...), in nats."""
    chosen = y.expand(*logits.shape[:-2], 1, -1)
    return -logits.double().log_softmax(-2).gather(-2, chosen).mean((-2, -1))


def ece(logits: Tensor, y: Tensor, bins: int = BINS) -> Tensor:
    """Expected calibration error of logits (..., n, M) against labels (M,): (...), in [0, 1].

    Samples are sorted into `bins` equal intervals ((b − 1)/bins, b/bins] of their confidence, the largest probability;
    the error is the mean over the samples of the absolute difference of accuracy and mean confidence in their bin.

    Source: C. Guo, G. Pleiss, Y. Sun & K. Weinberger, On Calibration of Modern Neural Networks, ICML 2017, eq. (3).
    """
    confidence, guess = logits.double().softmax(-2).max(-2)
    excess = (guess == y).double() - confidence
    bin_of = (confidence * bins).ceil().clamp(1, bins).nan_to_num(1).long() - 1
    sums = torch.zeros(*excess.shape[:-1], bins, dtype=excess.dtype, device=excess.device)
    return sums.scatter_add(-1, bin_of, excess).abs().sum(-1) / y.numel()
