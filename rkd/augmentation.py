"""Random changes of a batch that leave its labels true, all images at once on the batch's device.

Draws come from a CPU generator, so they are the same on every device. Borders are filled with the value that a black
pixel has after normalisation, as if the image had been shifted first and normalised then.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor


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
    return AUGMENTATIONS[name](x, blank, generator)


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
    if x.ndim not in (3, 4):
        raise ValueError(f"x must have shape (N, C, H, W) or (N, C, L), got {tuple(x.shape)}")
    if blank.shape != x.shape[1:2]:
        raise ValueError(f"blank must have shape ({x.shape[1]},), one value a channel, got {tuple(blank.shape)}")
    if pixels < 0:
        raise ValueError(f"pixels must be at least 0, got {pixels}")
    fill = blank.to(x).view(-1, *[1] * (x.ndim - 2))
    for axis in range(2, x.ndim):
        start = torch.randint(2 * pixels + 1, (len(x),), generator=generator, device="cpu")
        source = start[:, None] + torch.arange(x.shape[axis], device="cpu")  # (N, size): positions in the padded batch
        border = fill.expand(*x.shape[:axis], pixels, *x.shape[axis + 1 :])
        view = [len(x), *[1] * (x.ndim - 1)]
        view[axis] = x.shape[axis]
        x = torch.cat([border, x, border], axis).gather(axis, source.to(x.device).view(view).expand(x.shape))
    return x


def flip(x: Tensor, generator: Generator) -> Tensor:
    """Each image of x, shape (N, C, H, W), mirrored left to right with probability ½; the generator is on the CPU.

    Raises:
        ValueError: x has another shape.
    """
    if x.ndim != 4:
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")
    mirrored = torch.randint(2, (len(x), 1, 1, 1), generator=generator, device="cpu").bool()
    return torch.where(mirrored.to(x.device), x.flip(-1), x)


AUGMENTATIONS: Mapping[str, Callable[[Tensor, Tensor, Generator], Tensor]] = {
    "none": lambda x, blank, generator: x,
    "jitter": lambda x, blank, generator: translate(x, 2, blank, generator),
    "crop-flip": lambda x, blank, generator: flip(translate(x, 4, blank, generator), generator),
}
