"""The residual networks of the distillation literature, for colour images of 32×32 pixels (CIFAR-10, CIFAR-100).

Layout and initialisation are those of the CRD benchmark (Y. Tian, D. Krishnan & P. Isola, Contrastive Representation
Distillation, ICLR 2020, and its code RepDistiller), from which published accuracies come. Parameters and buffers follow
one another as they do there, so that its checkpoints load entry by entry, and one seed gives both the same weights.
A network here draws its weights from the global random state; `rkd.models.build` makes it from a seed.

Book: 2.2, "Experiments".
"""

import itertools

import torch.nn.functional as F
from torch import Tensor, nn


def resnet(depth: int, widths: tuple[int, int, int, int], classes: int) -> nn.Sequential:
    """A residual network: 3×3 stem, three stages of equally many blocks at 32², 16² and 8² pixels, mean, linear layer.

    Args:
        depth: 6n + 2 with n blocks a stage: 20 and 56 are ResNet-20 and -56, 8 and 32 are ResNet-8x4 and -32x4.
        widths: channels of the stem and of the three stages: (16, 16, 32, 64), and (32, 64, 128, 256) for the "x4".
        classes: number of logits.

    Raises:
        ValueError: `depth` is none of these.

    Source: K. He, X. Zhang, S. Ren & J. Sun, Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2, but
    where the width changes the shortcut is a 1×1 convolution with batch norm (their option B; for CIFAR they used A).
    """
    blocks = _blocks_per_stage(depth, 2)
    stem = [_convolution(3, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    stages = [_stage(Block, before, after, blocks, stride) for before, after, stride in _transitions(widths)]
    return _initialised(nn.Sequential(*stem, *stages, *_head(widths[3], classes)))


def wide_resnet(depth: int, widening: int, classes: int) -> nn.Sequential:
    """A wide residual network WRN-depth-widening, without dropout: batch norm and ReLU come before each convolution.

    Args:
        depth: 6n + 4 with n blocks a stage.
        widening: k; the stages have 16k, 32k and 64k channels, the stem 16.
        classes: number of logits.

    Raises:
        ValueError: `depth` is none of these.

    Source: S. Zagoruyko & N. Komodakis, Wide Residual Networks, BMVC 2016.
    """
    blocks, widths = _blocks_per_stage(depth, 4), (16, 16 * widening, 32 * widening, 64 * widening)
    stem = _convolution(3, widths[0])
    stages = [_stage(WideBlock, before, after, blocks, stride) for before, after, stride in _transitions(widths)]
    head = [nn.BatchNorm2d(widths[3]), nn.ReLU(), *_head(widths[3], classes)]
    network = _initialised(nn.Sequential(stem, *stages, *head))
    nn.init.zeros_(network[-1].get_parameter("bias"))
    return network


class Block(nn.Module):
    """relu(f(x) + shortcut(x)), f two 3×3 convolutions with batch norm; the first has the block's stride."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        first, second = _convolution(before, after, 3, stride), _convolution(after, after)
        self.body = nn.Sequential(first, nn.BatchNorm2d(after), nn.ReLU(), second, nn.BatchNorm2d(after))
        self.shortcut = nn.Sequential()
        if (before, stride) != (after, 1):
            self.shortcut.extend([_convolution(before, after, 1, stride), nn.BatchNorm2d(after)])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class WideBlock(nn.Module):
    """f(a) + x with a = relu(norm(x)), or f(a) + projection(a) where the width changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        first, second = _convolution(before, after, 3, stride), _convolution(after, after)
        self.activation = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.body = nn.Sequential(first, nn.BatchNorm2d(after), nn.ReLU(), second)
        self.projection = None if (before, stride) == (after, 1) else _convolution(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        a = self.activation(x)
        return self.body(a) + (x if self.projection is None else self.projection(a))


def _blocks_per_stage(depth: int, outside: int) -> int:
    """Blocks of two convolutions in each of three stages, where `outside` of the layers belong to no block."""
    blocks, rest = divmod(depth - outside, 6)
    if blocks < 1 or rest:
        raise ValueError(f"depth must be 6n + {outside} with n at least 1, got {depth}")
    return blocks


def _transitions(widths: tuple[int, int, int, int]) -> list[tuple[int, int, int]]:
    """Width before, width after and stride of the three stages."""
    return [(*pair, stride) for pair, stride in zip(itertools.pairwise(widths), (1, 2, 2), strict=True)]


def _stage(block: type[Block] | type[WideBlock], before: int, after: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(block(before, after, stride), *[block(after, after, 1) for _ in range(blocks - 1)])


def _head(width: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def _convolution(before: int, after: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)


def _initialised(network: nn.Sequential) -> nn.Sequential:
    """Convolutions normal with variance 2/(k²·channels out); PyTorch's defaults elsewhere (batch norm at 1 and 0)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
