"""Teachers and students. A network is made from a seed, so that two students of one seed start from one set of weights.

Explained in the book: section 2.2, "Experiments".
"""

import itertools

import torch
from torch import nn


def mlp(sizes: list[int], seed: int, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A multilayer perceptron with ReLU between its layers, from `sizes[0]` features to `sizes[-1]` logits.

    Args:
        sizes: widths of the layers, input first, e.g. [64, 12, 10].
        seed: seed of the initial weights (PyTorch's default initialisation).
        dropout: probability in [0, 1) with which a hidden unit is dropped in training.

    Raises:
        ValueError: fewer than two sizes, or one that is not positive.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must be at least two positive widths, got {sizes}")
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for width, next_width in itertools.pairwise(sizes):
            layers += [nn.Linear(width, next_width, dtype=dtype), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])
