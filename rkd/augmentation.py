"""Random changes of a batch that leave its labels true, all images at once on the batch's device.

What happens to each image is drawn first, from a CPU generator, so it is the same on every device; then the images are
looked up, moved. Borders are filled with the value that a black pixel has after normalisation, as if the image had been
shifted first and normalised then.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Augmentation(NamedTuple):
    """Shifts of up to `pixels` along each axis; where `flips`, also mirrored left to right with probability ½."""

    pixels: int
    flips: bool


AUGMENTATIONS: Mapping[str, Augmentation] = {
    "none": Augmentation(0, False),
    "jitter": Augmentation(2, False),
    "crop-flip": Augmentation(4, True),
}


class Moves(NamedTuple):
    """What happens to each of B samples.

    Attributes:
        start: shape (B, axes), int64 in 0 … 2·pixels: where the sample begins in itself padded; `pixels` is no shift.
        mirrored: shape (B,), boolean; or empty where nothing is mirrored.
    """

    start: Tensor
    mirrored: Tensor


def augment(name: str, x: Tensor, blank: Tensor, generator: Generator) -> Tensor:
    """`AUGMENTATIONS[name]` of x.

    Args:
        name: "none"; "jitter", a shift of up to two pixels (G. Hinton, O. Vinyals & J. Dean, Distilling the Knowledge
            in a Neural Network, 2015, section 3); "crop-flip", a shift of up to four pixels and a flip (K. He, X.
            Zhang, S. Ren & J. Sun, Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2).
        x, blank, generator: as for `translate`.

    Raises:
        ValueError: unknown name, or as `translate` and `flip`.
    """
    if name not in AUGMENTATIONS:
        raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {name!r}")
    kind = AUGMENTATIONS[name]
    return x if kind == AUGMENTATIONS["none"] else _augment(kind, x, blank, generator)


def translate(x: Tensor, pixels: int, blank: Tensor, generator: Generator) -> Tensor:
    """Each sample moved along each axis by a whole number of pixels, uniform in [-pixels, pixels].

    The same as padding with `pixels` on every side and cropping at random.

    Args:
        x: shape (N, C, H, W), or (N, C, L) for signals.
        pixels: at least 0.
        blank: shape (C,), what fills the border.
        generator: on the CPU; for each axis it gives N integers.

    Returns:
        A tensor of the shape, type and device of x.

    Raises:
        ValueError: a shape other than these, or `pixels` negative.
    """
    if pixels < 0:
        raise ValueError(f"pixels must be at least 0, got {pixels}")
    return _augment(Augmentation(pixels, False), x, blank, generator)


def flip(x: Tensor, generator: Generator) -> Tensor:
    """Each image of x, shape (N, C, H, W), mirrored left to right with probability ½; the generator is on the CPU.

    Raises:
        ValueError: x has another shape.
    """
    _check_images(x)
    mirrored = torch.randint(2, (len(x), 1, 1, 1), generator=generator, device="cpu").bool()
    return torch.where(mirrored.to(x.device), x.flip(-1), x)


def draw(kind: Augmentation, count: int, axes: int, generator: Generator) -> Moves:
    """Moves of `count` samples with so many axes; from a CPU generator, axis by axis, then the flips."""
    starts = [torch.randint(2 * kind.pixels + 1, (count,), generator=generator, device="cpu") for _ in range(axes)]
    flips = torch.randint(2, (count if kind.flips else 0,), generator=generator, device="cpu").bool()
    return Moves(torch.stack(starts, 1), flips)


def moved(x: Tensor, index: Tensor, moves: Moves, pixels: int, blank: Tensor) -> Tensor:
    """Samples `index` of x, each with its move; no step of it waits for the device.

    Args:
        x: shape (N, C, H, W) or (N, C, L).
        index: shape (B,), int64, on the device of x, as are the moves.
        moves: of these B samples.
        pixels: the largest shift, that of the augmentation which the moves were drawn for.
        blank: shape (C,).

    Returns:
        Shape (B, C, ...), in memory with the channels last.
    """
    where: list[Tensor | slice] = [index.view(-1, *[1] * (x.ndim - 2)), slice(None)]
    inside = x.new_ones((), dtype=torch.bool)
    for axis, size in enumerate(x.shape[2:]):
        source = moves.start[:, axis, None] + torch.arange(-pixels, size - pixels, device=x.device)  # (B, size)
        if len(moves.mirrored) and axis == x.ndim - 3:
            source = torch.where(moves.mirrored[:, None], source.flip(1), source)
        view = [len(source), *[1] * (x.ndim - 2)]
        view[axis + 1] = size
        inside = inside & (source.view(view) >= 0) & (source.view(view) < size)
        where.append(source.clamp(0, size - 1).view(view))
    picked = x[tuple(where)]  # (B, ..., C)
    return torch.where(inside[..., None], picked, blank.to(x)).movedim(-1, 1)


def _augment(kind: Augmentation, x: Tensor, blank: Tensor, generator: Generator) -> Tensor:
    if x.ndim not in (3, 4):
        raise ValueError(f"x must have shape (N, C, H, W) or (N, C, L), got {tuple(x.shape)}")
    if kind.flips:
        _check_images(x)
    if blank.shape != x.shape[1:2]:
        raise ValueError(f"blank must have shape ({x.shape[1]},), one value a channel, got {tuple(blank.shape)}")
    drawn = draw(kind, len(x), x.ndim - 2, generator)
    moves = Moves(drawn.start.to(x.device), drawn.mirrored.to(x.device))
    return moved(x, torch.arange(len(x), device=x.device), moves, kind.pixels, blank).contiguous()


def _check_images(x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")
