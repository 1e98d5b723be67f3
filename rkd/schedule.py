"""How long a network is trained, at which rate, and on which batches: orders and augmentations, drawn from seeds.

Book: 2.2, "Experiments".
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rkd.augmentation import AUGMENTATIONS, Moves, draw, moved
from rkd.data import Split

OPTIMIZERS = ("adamw", "sgd")
DECAYS = ("cosine", "step", "constant")


@dataclass(frozen=True)
class Schedule:
    """How a network is trained: epochs in batches of `batch_size` samples, the last, smaller batch kept.

    Attributes:
        optimizer: "adamw" or "sgd" (momentum 0.9).
        decay: of the learning rate: "cosine" to 0; "step", a tenth from 62.5, 75 and 87.5 % of the epochs on (150, 180
            and 210 of 240); "constant".
        augmentation: a key of `rkd.augmentation.AUGMENTATIONS`, drawn anew for each batch.

    Raises:
        ValueError: an attribute lies outside its range.
    """

    epochs: int = 60
    batch_size: int = 32
    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    decay: str = "cosine"
    augmentation: str = "none"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay!r}")
        for name, accepted in (("optimizer", OPTIMIZERS), ("decay", DECAYS), ("augmentation", tuple(AUGMENTATIONS))):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")

    def steps(self, samples: int) -> int:
        """Steps of the optimiser over all epochs."""
        return self.epochs * math.ceil(samples / self.batch_size)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0 ≤ `step` < `steps`, as a part of the first."""
        if self.decay == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / steps))
        if self.decay == "step":
            return 0.1 ** sum(step >= steps * part for part in (0.625, 0.75, 0.875))
        return 1.0


class Batch(NamedTuple):
    """One batch of K seeds.

    Attributes:
        samples: shape (K, B), int64: which ones.
        start, mirrored: as in `rkd.augmentation.Moves`, with the leading axis K; empty where nothing is moved.
    """

    samples: Tensor
    start: Tensor
    mirrored: Tensor


class Batches:
    """Batches of K seeds, each in an order and with moves of its own, drawn epoch by epoch.

    Args:
        seeds: K seeds.
        train: N samples.
        schedule: batch size and augmentation.
        blank: `DataSet.blank`, needed where the schedule augments.
        channels_last: moved inputs may have this layout in memory.

    Raises:
        ValueError: `blank` is missing where the schedule augments.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        train: Split,
        schedule: Schedule,
        blank: Tensor | None = None,
        channels_last: bool = False,
    ) -> None:
        if schedule.augmentation != "none" and blank is None:
            raise ValueError(f"blank must be given where the augmentation is {schedule.augmentation!r}")
        self.train, self._size, self._blank, self._channels_last = train, schedule.batch_size, blank, channels_last
        self._kind = AUGMENTATIONS[schedule.augmentation]
        self._plain = schedule.augmentation == "none"
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._before = self._states()

    def epoch(self) -> Iterator[Batch]:
        """The next epoch's batches, on the device; all is drawn before the first comes."""
        self._before = self._states()
        drawn = [self._draw(generator) for generator in self._generators]
        parts = [torch.stack(part).to(self.train.x.device) for part in zip(*drawn, strict=True)]
        for batch in zip(*(self._split(part) for part in parts), strict=True):
            yield Batch(*batch)

    def inputs(self, batch: Batch) -> Tensor:
        """Inputs (K, B, ...) of a batch, moved as it says."""
        flat = batch.samples.flatten()
        if self._plain:
            return self.train.x.index_select(0, flat).unflatten(0, batch.samples.shape)
        assert self._blank is not None
        moves = Moves(batch.start.flatten(0, 1), batch.mirrored.flatten())
        x = moved(self.train.x, flat, moves, self._kind.pixels, self._blank)
        return (x if self._channels_last else x.contiguous()).unflatten(0, batch.samples.shape)

    def state(self, within: bool) -> Tensor:
        """The generators, as they were before this epoch if we are `within` one, else as they are: (K, bytes)."""
        return self._before if within else self._states()

    def restore(self, state: Tensor) -> None:
        """Put the generators where they were."""
        for generator, row in zip(self._generators, state, strict=True):
            generator.set_state(row.clone())  # of a view it would read the wrong memory

    def __len__(self) -> int:
        return math.ceil(len(self.train.y) / self._size)

    def _draw(self, generator: torch.Generator) -> Batch:
        """One seed's epoch: N samples, batch after batch."""
        count, axes = len(self.train.y), self.train.x.ndim - 2
        order = torch.randperm(count, generator=generator)
        if self._plain:
            return Batch(order, torch.empty(0, 0, dtype=torch.int64), torch.empty(0, dtype=torch.bool))
        sizes = [len(part) for part in order.split(self._size)]
        moves = [draw(self._kind, size, axes, generator) for size in sizes]
        return Batch(order, *(torch.cat(part) for part in zip(*moves, strict=True)))

    def _split(self, part: Tensor) -> Sequence[Tensor]:
        return part.split(self._size, 1) if part.shape[1] else [part] * len(self)

    def _states(self) -> Tensor:
        return torch.stack([generator.get_state() for generator in self._generators])
