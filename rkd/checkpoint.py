"""The state of a training run on disk, so that a machine may be taken away at any moment, or after a known time.

A state is one file, replaced in one move: weights, optimiser, random generators and what was measured so far, as
safetensors, which hold numbers only. From it training goes on as if it had never stopped.
Book: A.5, "Running a study".
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rkd.sources import optional

State = Mapping[str, Tensor]
_HISTORY = "history/"


class Stopped(Exception):
    """The time is up in the middle of a training run, and its state is kept."""


@dataclass(frozen=True)
class Keeping:
    """Where states go, how often, and until when to train.

    Attributes:
        folder: of the state files; None keeps nothing, and then no run is stopped in its middle either.
        every: seconds between two states of a run, at least 0.
        deadline: in seconds since 1970, as `time.time`; or None.
    """

    folder: Path | None = None
    every: float = 60.0
    deadline: float | None = None

    def of(self, name: str) -> "Keeper":
        """The keeper of the run called `name`, which is also the name of its file."""
        return Keeper(self, self._path(name))

    def discard(self, name: str) -> None:
        """The run called `name` is over, and its result is kept elsewhere."""
        if path := self._path(name):
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"


NOTHING = Keeping()


class Keeper:
    """Keeps the state of one training run.

    Attributes:
        history: lists of tensors by name, which go into the state and come out of it: what was measured on the way.
        step: of the state that was there at first; 0 if none was.
        seconds: how long the run took before this execution.
    """

    def __init__(self, keeping: Keeping = NOTHING, path: Path | None = None) -> None:
        self.history: dict[str, list[Tensor]] = {}
        self.step, self.seconds = 0, 0.0
        self._keeping, self._path, self._state = keeping, path, dict[str, Tensor]()
        self._began = self._saved = time.monotonic()
        if path is not None:
            for half_written in path.parent.glob(f".{path.name}.*"):
                half_written.unlink()
            if path.exists():
                self._load(path)

    def state(self) -> State:
        """What was there at first, once; empty if nothing was."""
        state, self._state = self._state, {}
        return state

    def offer(self, step: int, state: Callable[[], State]) -> None:
        """To be called after every step; keeps the state where it is time to.

        Args:
            step: how many steps are done.
            state: gives the state now.

        Raises:
            Stopped: the deadline is over; the state is kept.
        """
        if self._path is None:
            return
        late = self._keeping.deadline is not None and time.time() >= self._keeping.deadline
        if late or time.monotonic() - self._saved >= self._keeping.every:
            self._save(self._path, step, state())
        if late:
            raise Stopped

    def elapsed(self) -> float:
        """Seconds that the run took, in all executions."""
        return self.seconds + time.monotonic() - self._began

    def _save(self, path: Path, step: int, state: State) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        tensors |= {_HISTORY + name: torch.stack(rows).cpu() for name, rows in self.history.items() if rows}
        about = {"step": str(step), "seconds": repr(self.elapsed())}
        write_whole(path, optional("safetensors.torch").save(tensors, metadata=about))
        self._saved = time.monotonic()

    def _load(self, path: Path) -> None:
        safetensors = optional("safetensors")
        with suppress(safetensors.SafetensorError), safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            self.step, self.seconds = int(about["step"]), float(about["seconds"])
            for name in [name for name in tensors if name.startswith(_HISTORY)]:
                self.history[name.removeprefix(_HISTORY)] = list(tensors.pop(name))
            self._state = tensors


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there with all its content or not at all, whenever the process or the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
