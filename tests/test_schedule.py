"""`rkd.schedule`: rates of the literature; batches as a loop would draw them one by one, from any epoch on."""

import dataclasses

import pytest
import torch

from rkd.augmentation import augment
from rkd.data import Split
from rkd.schedule import Batches, Schedule

BLANK = torch.tensor([-0.4, 0.3, 7.0])
SCHEDULE = Schedule(epochs=2, batch_size=8, augmentation="crop-flip")


def images(n=21, size=(6, 5)):
    generator = torch.Generator().manual_seed(3)
    return Split(torch.randn(n, 3, *size, generator=generator), torch.randint(4, (n,), generator=generator))


@pytest.mark.parametrize("augmentation", ["none", "jitter", "crop-flip"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_are_drawn_one_by_one(augmentation, channels_last):
    """Order first, then each batch's moves from the same generator, seed by seed."""
    train, schedule = images(), dataclasses.replace(SCHEDULE, augmentation=augmentation)
    batches = Batches([4, 9], train, schedule, BLANK, channels_last)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 9)]
    assert len(batches) == 3
    for _ in range(2):
        orders = [torch.randperm(21, generator=g).split(8) for g in generators]
        for i, batch in enumerate(batches.epoch()):
            x = batches.inputs(batch)
            assert x.shape == (2, len(orders[0][i]), 3, 6, 5)
            for k, (order, g) in enumerate(zip(orders, generators)):
                assert torch.equal(batch.samples[k], order[i])
                assert torch.equal(x[k], augment(augmentation, train.x[order[i]], BLANK, g))
                assert x[k].is_contiguous() or channels_last


def test_signals():
    train = Split(torch.randn(10, 3, 7), torch.zeros(10, dtype=torch.int64))
    batches = Batches([0], train, dataclasses.replace(SCHEDULE, augmentation="jitter"), BLANK)
    assert [batches.inputs(batch).shape for batch in batches.epoch()] == [(1, 8, 3, 7), (1, 2, 3, 7)]


@pytest.mark.parametrize("augmentation", ["none", "crop-flip"])
def test_an_epoch_can_be_drawn_again_from_its_state(augmentation):
    schedule = dataclasses.replace(SCHEDULE, augmentation=augmentation)
    first, second = (Batches([1, 2], images(), schedule, BLANK) for _ in range(2))
    list(first.epoch())
    between = first.state(within=False)
    drawn = [first.inputs(batch) for batch in first.epoch()]
    for state in (between, first.state(within=True)):
        second.restore(state)
        assert all(torch.equal(a, second.inputs(batch)) for a, batch in zip(drawn, second.epoch(), strict=True))
    assert not torch.equal(first.state(within=True), first.state(within=False))


def test_step_decay_is_the_literatures():
    rates = [Schedule(epochs=240, decay="step").rate(epoch, 240) for epoch in (0, 149, 150, 179, 180, 209, 210, 239)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_bad_input():
    with pytest.raises(ValueError, match="blank must be given where the augmentation is 'crop-flip'"):
        Batches([0], images(), SCHEDULE)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        Schedule(epochs=0)
    with pytest.raises(ValueError, match="optimizer must be one of adamw, sgd, got 'adam'"):
        Schedule(optimizer="adam")
