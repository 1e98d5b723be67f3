"""What a piece of work adds to memory at its peak."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def added_mebibytes(work: Callable[[], object], device: str) -> float:
    """Peak less what was there before, of the GPU's allocations, or of this process's resident memory on Linux."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    _RESET.write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    """VmRSS, now, or VmHWM, the peak since the last reset: in MiB."""
    found = re.search(rf"{key}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) / 2**10
