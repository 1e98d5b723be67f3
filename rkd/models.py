"""Teachers and students. A network is made from a seed, so that two students of one seed start from one set of weights.

All take a batch of shape (N, *shape) to logits of shape (N, classes). They are made on the CPU, whatever the default
device, and the seed alone decides their initial weights (PyTorch's default initialisation where none is named); global
random states, the CPU's and the accelerators', are neither read nor moved.
Book: 2.2, "Experiments".
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rkd.resnets import resnet, wide_resnet

Shape = tuple[int, ...]


def build(
    model: str, shape: Shape, classes: int, seed: int, dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """The network called `model`, with weights from `seed`.

    Args:
        model: a key of `MODELS`.
        shape: of one input: any for "mlp", (C, H, W) for "cnn", (C, L) for "cnn1d", (3, 32, 32) for the others.
        classes: number of logits.
        seed: seed of the initial weights.
        dtype: of parameters and buffers.
        options: those of the model, see `options_of`.

    Raises:
        ValueError: unknown model or option, an option missing or outside its range, or a shape that the model does not
            take.
    """
    accepted = options_of(model)
    if unknown := [name for name in options if name not in accepted]:
        raise ValueError(f"options of {model} must be among [{', '.join(accepted)}], got {', '.join(unknown)}")
    required = [name for name, option in accepted.items() if option.default is option.empty]
    if missing := [name for name in required if name not in options]:
        raise ValueError(f"options of {model} must include {', '.join(missing)}, got [{', '.join(options)}]")
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must hold positive sizes, got {shape}")
    _check_positive("classes", classes)
    return MODELS[model](tuple(shape), classes, seed, dtype, **options)


def options_of(model: str) -> Mapping[str, inspect.Parameter]:
    """The options of a model by name, each with its type, `.annotation`, and `.default`, `.empty` if it is required.

    Raises:
        ValueError: no such model.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    parameters = inspect.signature(MODELS[model]).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}


def mlp(sizes: Sequence[int], seed: int, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A multilayer perceptron with ReLU between its layers, from `sizes[0]` features to `sizes[-1]` logits.

    Inputs of any shape are flattened, sample by sample.

    Args:
        sizes: widths of the layers, input first, e.g. [64, 12, 10]. Hinton's teacher is [784, 1200, 1200, 10].
        seed: seed of the initial weights.
        dropout: probability in [0, 1) with which a hidden unit is dropped in training; at 0 there are no such modules.

    Raises:
        ValueError: fewer than two sizes, or one that is not positive; `dropout` outside [0, 1).
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must be at least two positive widths, got {sizes}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    layers: list[nn.Module] = [nn.Flatten()]
    with _weights_from(seed):
        for width, next_width in itertools.pairwise(sizes[:-1]):
            layers += [nn.Linear(width, next_width, dtype=dtype), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
        layers.append(nn.Linear(sizes[-2], sizes[-1], dtype=dtype))
    return nn.Sequential(*layers)


def cnn(shape: Shape, classes: int, seed: int, dtype: torch.dtype = torch.float32, *, width: int = 32) -> nn.Sequential:
    """A small convolutional network for images of shape (C, H, W), H and W at least 4, without batch norm.

    LeNet's plan (Y. LeCun, L. Bottou, Y. Bengio & P. Haffner, Gradient-Based Learning Applied to Document Recognition,
    1998) in today's parts: twice a padded 3×3 convolution, ReLU and 2×2 maximum, with `width` and 2·`width` channels,
    then one linear layer. For 28×28 grey images it sees 7×7 pixels, and has 50,186 parameters at width 32, 10 classes.

    Raises:
        ValueError: another shape, or `width` < 1.
    """
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise ValueError(f"shape must be (channels, height, width), 4×4 pixels at least, for cnn, got {shape}")
    _check_positive("width", width)
    channels, height, breadth = shape
    layers: list[nn.Module] = []
    with _weights_from(seed):
        for before, after in [(channels, width), (width, 2 * width)]:
            layers += [nn.Conv2d(before, after, 3, padding=1, dtype=dtype), nn.ReLU(), nn.MaxPool2d(2)]
        linear = nn.Linear(2 * width * (height // 4) * (breadth // 4), classes, dtype=dtype)
    return nn.Sequential(*layers, nn.Flatten(), linear)


def cnn1d(
    shape: Shape, classes: int, seed: int, dtype: torch.dtype = torch.float32, *, width: int = 25
) -> nn.Sequential:
    """The convolutional network of MNIST-1D, for signals of shape (C, L), L at least 3: 5,210 parameters for (1, 40).

    Three convolutions of `width` channels, kernels 5, 3 and 3, stride 2, padding 1, each with ReLU, and a linear layer.

    Raises:
        ValueError: another shape, or `width` < 1.

    Source: S. Greydanus & D. Kobak, Scaling Down Deep Learning with MNIST-1D, ICML 2024; `ConvBase` in its code.
    """
    if len(shape) != 2 or shape[1] < 3:
        raise ValueError(f"shape must be (channels, length), length at least 3, for cnn1d, got {shape}")
    _check_positive("width", width)
    channels, length = shape
    layers: list[nn.Module] = []
    with _weights_from(seed):
        for before, kernel in [(channels, 5), (width, 3), (width, 3)]:
            layers += [nn.Conv1d(before, width, kernel, stride=2, padding=1, dtype=dtype), nn.ReLU()]
            length = (length + 2 - kernel) // 2 + 1
        linear = nn.Linear(width * length, classes, dtype=dtype)
    return nn.Sequential(*layers, nn.Flatten(), linear)


def _mlp(
    shape: Shape, classes: int, seed: int, dtype: torch.dtype, *, hidden: list[int], dropout: float = 0.0
) -> nn.Module:
    if hidden and min(hidden) < 1:
        raise ValueError(f"hidden must be positive widths, got {hidden}")
    return mlp([torch.Size(shape).numel(), *hidden, classes], seed, dropout, dtype)


def _cifar(network: Callable[[int], nn.Module]) -> Callable[..., nn.Module]:
    def make(shape: Shape, classes: int, seed: int, dtype: torch.dtype) -> nn.Module:
        if shape != (3, 32, 32):
            raise ValueError(f"shape must be (3, 32, 32) for a CIFAR network, got {shape}")
        with _weights_from(seed):
            return network(classes).to(dtype)

    return make


MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": _mlp,
    "cnn": cnn,
    "cnn1d": cnn1d,
    "resnet8": _cifar(lambda classes: resnet(8, (16, 16, 32, 64), classes)),
    "resnet20": _cifar(lambda classes: resnet(20, (16, 16, 32, 64), classes)),
    "resnet56": _cifar(lambda classes: resnet(56, (16, 16, 32, 64), classes)),
    "resnet8x4": _cifar(lambda classes: resnet(8, (32, 64, 128, 256), classes)),
    "resnet32x4": _cifar(lambda classes: resnet(32, (32, 64, 128, 256), classes)),
    "wrn_10_1": _cifar(lambda classes: wide_resnet(10, 1, classes)),
    "wrn_16_2": _cifar(lambda classes: wide_resnet(16, 2, classes)),
    "wrn_40_2": _cifar(lambda classes: wide_resnet(40, 2, classes)),
}
"""Makers by name, called (shape, classes, seed, dtype, **options): the keyword-only parameters are the options."""


def parameter_count(module: nn.Module) -> int:
    """Number of trainable and frozen parameters; buffers such as running statistics do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def stackable(module: nn.Module) -> bool:
    """Whether copies with different weights run as one batched model under `torch.func`, in training too.

    Batch norm (buffers that change) and dropout with p > 0 (random draws) rule it out.
    """
    norm, dropout = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd
    return not any(isinstance(m, norm) or (isinstance(m, dropout) and m.p > 0) for m in module.modules())


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


@contextmanager
def _weights_from(seed: int) -> Iterator[None]:
    """Modules made inside draw from `seed`. `torch.manual_seed` would reseed the accelerators as well."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
