"""`rkd.augmentation` against one image at a time; every shift is drawn; draws come from the generator alone."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from rkd.augmentation import AUGMENTATIONS, augment, flip, translate

BLANK = torch.tensor([-0.4, 0.3, 7.0])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shifted(image, pixels, blank):
    """All translations of one image, by padding channel after channel and cropping."""
    axes = image.ndim - 1
    padded = torch.stack([F.pad(c, [pixels] * 2 * axes, value=float(b)) for c, b in zip(image, blank, strict=True)])
    for start in itertools.product(range(2 * pixels + 1), repeat=axes):
        yield padded[:, *(slice(s, s + size) for s, size in zip(start, image.shape[1:]))]


@given(
    n=st.integers(0, 4),
    channels=st.integers(1, 3),
    size=st.lists(st.integers(1, 6), min_size=1, max_size=2),
    pixels=st.integers(0, 4),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_each_image_is_one_of_its_translations(n, channels, size, pixels, seed, dtype):
    x = torch.randn(n, channels, *size, dtype=dtype, generator=generator(seed))
    kept = x.clone()
    moved = translate(x, pixels, BLANK[:channels].to(dtype), generator(seed))
    assert moved.dtype == dtype
    assert moved.shape == x.shape
    assert torch.equal(x, kept)
    for before, after in zip(x, moved, strict=True):
        assert any(torch.equal(after, candidate) for candidate in shifted(before, pixels, BLANK[:channels]))


@pytest.mark.parametrize("axes", [1, 2])
def test_every_shift_is_as_likely(axes):
    """The value in the middle tells which pixel has come there."""
    n, size = 4000, 9
    x = torch.arange(size**axes, dtype=torch.float64).view(1, 1, *[size] * axes).expand(n, -1, *[-1] * axes)
    middle = translate(x, 2, torch.zeros(1), generator())[(slice(None), 0, *[4] * axes)].long()
    middle = torch.stack([middle // size ** (axes - 1), middle % size])[:axes] - 4  # (axes, n)
    assert (middle.min(), middle.max()) == (-2, 2)
    counts = torch.unique(middle, dim=1, return_counts=True)[1]
    expected = n / 5**axes
    assert len(counts) == 5**axes
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_no_shift_is_no_change():
    x = torch.randn(3, 1, 4, 5)
    assert torch.equal(translate(x, 0, torch.zeros(1), generator()), x)


def test_flip_mirrors_about_half():
    x = torch.randn(1000, 2, 3, 4)
    y = flip(x, generator())
    same, mirrored = (y == x).flatten(1).all(1), (y == x.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 420 < mirrored.sum() < 580


def test_names():
    x, blank = torch.randn(50, 3, 8, 8), BLANK
    assert augment("none", x, blank, generator()) is x
    assert torch.equal(augment("jitter", x, blank, generator()), translate(x, 2, blank, generator()))
    shared = generator()
    assert torch.equal(
        augment("crop-flip", x, blank, generator()), flip(translate(x, 4, blank, shared), generator=shared)
    )
    assert torch.equal(augment("jitter", x[..., 0], blank, generator()), translate(x[..., 0], 2, blank, generator()))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_generator_decides(name):
    x, blank = torch.randn(50, 3, 8, 8), BLANK
    state = torch.get_rng_state()
    one, again, other = (augment(name, x, blank, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, again)
    assert torch.equal(one, other) == (name == "none")
    # the same draws whatever the type, and whatever the default device
    with torch.device("meta"):
        assert torch.equal(augment(name, x.double(), blank, generator(1)), one.double())


def test_bad_input():
    x, blank = torch.zeros(2, 3, 4, 4), torch.zeros(3)
    with pytest.raises(ValueError, match="augmentation must be one of none, jitter, crop-flip, got 'mixup'"):
        augment("mixup", x, blank, generator())
    with pytest.raises(ValueError, match=r"x must have shape \(N, C, H, W\) or \(N, C, L\), got \(2, 3\)"):
        translate(x[..., 0, 0], 1, blank, generator())
    with pytest.raises(ValueError, match=r"blank must have shape \(3,\), one value a channel, got \(1,\)"):
        translate(x, 1, blank[:1], generator())
    with pytest.raises(ValueError, match="pixels must be at least 0, got -1"):
        translate(x, -1, blank, generator())
    with pytest.raises(ValueError, match=r"x must have shape \(N, C, H, W\), got \(2, 3, 4\)"):
        augment("crop-flip", x[..., 0], blank, generator())
