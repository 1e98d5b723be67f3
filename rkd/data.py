"""Image sets as tensors: train, validation and test, split once and for all, normalised by what the training part says.

Explained in the book: section 2.2, "Experiments".
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Inputs x of shape (N, features), floating, and labels y of shape (N,), int64."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class DataSet:
    """Three disjoint splits. Choices are made on `validation`; `test` is for the reported numbers only."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]


def digits(dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu") -> DataSet:
    """scikit-learn's handwritten digits: 1,797 grey images of 8×8 pixels in 10 classes, nothing to download.

    Returns:
        797 training, 200 validation and 800 test images, drawn once with the classes in proportion; x of shape (N, 64)
        with mean 0 and variance 1 over all training pixels.

    Raises:
        ImportError: scikit-learn is not installed.

    Source: E. Alpaydin & C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    rest = range(len(labels))
    test, rest = train_test_split(rest, train_size=800, random_state=0, stratify=labels)
    validation, train = train_test_split(rest, train_size=200, random_state=0, stratify=labels[rest])
    pixels, y = torch.tensor(images, dtype=dtype, device=device), torch.tensor(labels, device=device)
    x = (pixels - pixels[train].mean()) / pixels[train].std()
    parts = [Split(x[part], y[part]) for part in (train, validation, test)]
    return DataSet("digits", parts[0], parts[1], parts[2], classes=tuple("0123456789"))
