"""What the loss costs beside its peers, on the device at hand: milliseconds, memory, bytes a second.

The losses of `rkd.peers` run in one process and interleaved, on random logits; what cannot run here is left out with a
line on the standard error. Bytes a second count what has to move, two logits read and one gradient written, and stand
beside those of a copy between two arrays of the same machine.
Book: A.7, "How fast the loss is".
"""

import csv
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rkd.peers import CASES, LOSSES, OF_HIDDEN, Case, Loss, draw, names
from rkd.provenance import hardware


def prepare(name: str, tensors: list[Tensor]) -> tuple[Loss, float] | None:
    """The loss after one step, and the seconds that compiling took; None, and a line, where it cannot run."""
    loss, start = (LOSSES if len(tensors) == 2 else OF_HIDDEN)[name], time.perf_counter()
    try:
        if "compiled" in name:
            torch._dynamo.reset()
            loss = torch.compile(loss, dynamic=False)
        loss(*tensors).backward()
        _wait(tensors[0])
    except Exception as error:  # no compiler, no Liger, too little memory: that peer is left out
        print(f"left out: {name}: {type(error).__name__}: {str(error).splitlines()[0]:.80}", file=sys.stderr)
        return None
    finally:
        _forget(tensors)
    return loss, time.perf_counter() - start if "compiled" in name else 0.0


# --------------------------------------------------------------------------- time, bandwidth, memory


def step_seconds(loss: Loss, tensors: list[Tensor], steps: int, flush: Tensor | None = None) -> tuple[float, float]:
    """Mean seconds of a forward and of a backward pass; on CUDA by events, each step after `flush` has been written."""
    if tensors[0].is_cuda:
        return _event_seconds(loss, tensors, steps, flush)
    forward, backward = 0.0, 0.0
    for _ in range(steps):
        _forget(tensors)
        start = time.perf_counter()
        value = loss(*tensors)
        middle = time.perf_counter()
        value.backward()
        forward, backward = forward + middle - start, backward + time.perf_counter() - middle
    return forward / steps, backward / steps


def _event_seconds(loss: Loss, tensors: list[Tensor], steps: int, flush: Tensor | None) -> tuple[float, float]:
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(steps)]
    for start, middle, end in marks:
        _forget(tensors)
        if flush is not None:
            flush.zero_()
        start.record()
        value = loss(*tensors)
        middle.record()
        value.backward()
        end.record()
    torch.cuda.synchronize()
    forward = sum(start.elapsed_time(middle) for start, middle, _ in marks)
    backward = sum(middle.elapsed_time(end) for _, middle, end in marks)
    return forward / steps / 1e3, backward / steps / 1e3


def copy_bandwidth(device: str, repetitions: int) -> float:
    """GB/s of a copy, read and written: of 256 MiB on a CPU, of 1 GiB on CUDA."""
    source = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    target, seconds = torch.zeros_like(source), list[float]()
    for _ in range(repetitions + 1):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            before = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - before)
    return 2 * source.nbytes / statistics.median(seconds[1:]) / 1e9


def added_mebibytes(work: Callable[[], object], device: str) -> float:
    """Peak less what was there before, of the GPU's allocations, or of this process's resident memory on Linux."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    """VmRSS, now, or VmHWM, the peak since the last reset: in MiB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) / 2**10


def peak_mebibytes(name: str, case: Case, device: str) -> float:
    """Growth of the peak by one step above its inputs; a step on a tenth of the rows has loaded the code before."""
    tensors = draw(case, device)
    fewer = [x[: max(1, case.rows // 10)] if i % 2 == 0 or not case.hidden else x for i, x in enumerate(tensors)]
    few = [x.detach().requires_grad_(like.requires_grad) for x, like in zip(fewer, tensors, strict=True)]
    prepared = prepare(name, few)
    if prepared is None:
        return float("nan")
    with suppress(torch.OutOfMemoryError):
        return added_mebibytes(lambda: prepared[0](*tensors).backward(), device)
    return float("nan")


def peak_of_a_process(name: str, case: Case, threads: int) -> float:
    """`peak_mebibytes` on a CPU, in a process of its own, since memory given back is not seen to be."""
    code = (
        "import json, sys, torch, rkd.benchmark as b; name, case, threads = json.loads(sys.argv[1]); "
        "torch.set_num_threads(threads); print(b.peak_mebibytes(name, b.Case(*case), 'cpu'))"
    )
    command = [sys.executable, "-c", code, json.dumps([name, case, threads])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def _forget(tensors: list[Tensor]) -> None:
    for x in tensors:
        x.grad = None


# --------------------------------------------------------------------------- tables


def measure(case: Case, device: str, repetitions: int, bandwidth: float) -> list[dict[str, Any]]:
    """A row for each loss that runs: medians over interleaved repetitions, after one that warms up."""
    tensors = draw(case, device)
    steps = max(1, min(200, 2**21 // (case.rows * case.classes)))
    flush = torch.empty(2**28, dtype=torch.uint8, device=device) if device == "cuda" else None
    ready = {name: x for name in names(case, device) if (x := prepare(name, tensors)) is not None}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    for repetition in range(repetitions + 1):
        for name, (loss, _) in ready.items():
            seconds = step_seconds(loss, tensors, steps, flush)
            if repetition:
                times[name].append(seconds)
    del flush
    _forget(tensors)
    logits = case.rows * case.classes * tensors[0].element_size()
    moved = 0 if case.hidden else 3 * logits
    full = {name: statistics.median(map(sum, pairs)) for name, pairs in times.items()}
    eager = full.get("KL, eager", float("nan"))
    threads, on_cpu = torch.get_num_threads(), device == "cpu"
    inputs, tensors = sum(x.nbytes for x in tensors), []
    peaks: dict[str, float] = {}
    if not on_cpu or (sys.platform == "linux" and inputs >= 2**24):
        for name in ready:
            gc.collect()
            peaks[name] = peak_of_a_process(name, case, threads) if on_cpu else peak_mebibytes(name, case, device)
    return [
        {
            **case._asdict(),
            "loss": name,
            "forward_ms": round(1e3 * statistics.median(x for x, _ in times[name]), 4),
            "backward_ms": round(1e3 * statistics.median(x for _, x in times[name]), 4),
            "full_ms": round(1e3 * full[name], 4),
            "faster_than_eager_kl": round(eager / full[name], 2),
            "peak_mib": round(peaks[name]) if peaks.get(name, float("nan")) >= 0 else "",
            "gradient_mib": round(logits / 2**20, 2),
            "gb_per_s": round(moved / full[name] / 1e9, 2) if moved else "",
            "copy_gb_per_s": round(bandwidth, 1),
            "compile_seconds": round(ready[name][1], 1) if "compiled" in name else "",
            "repetitions": repetitions,
            "device": device,
            "hardware": hardware(device),
            "threads": threads,
            "load": round(os.getloadavg()[0], 1),
            "torch": torch.__version__,
            "triton": _version("triton") if device == "cuda" else "",
            "liger": _version("liger-kernel") if device == "cuda" else "",
        }
        for name in ready
    ]


def _version(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def choose(
    device: str = "auto", classes: list[int] | None = None, rows: int | None = None, dtype: str | None = None
) -> list[Case]:
    """The device's own cases, or those of them with these class counts and this dtype; `rows` makes new ones.

    Raises ValueError where nothing is left to measure.
    """
    cases = CASES[_device(device)]
    if rows is not None:
        if not classes:
            raise ValueError(f"rows={rows} needs classes")
        cases = [Case(rows, n, 0, kind) for n in classes for kind in dict.fromkeys(x.dtype for x in cases)]
    elif classes:
        cases = [x for x in cases if x.classes in classes]
    cases = [x for x in cases if dtype in (None, x.dtype)]
    if not cases:
        known = sorted({x.classes for x in CASES[_device(device)]})
        raise ValueError(f"classes={classes}, dtype={dtype!r}: none of the tables here, which have {known} classes")
    return cases


def bench(
    out: Path,
    device: str = "auto",
    cases: list[Case] | None = None,
    threads: int | None = None,
    repetitions: int = 15,
    budget: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure the cases that `out`/loss-DEVICE.csv does not have yet; each is written, then given, as it is done.

    Args:
        out: folder of the table; made if missing.
        device: "auto", "cpu" or "cuda".
        cases: what to measure; the device's own, `CASES`, if None.
        threads: of the CPU; PyTorch's choice if None.
        repetitions: medians are taken over so many.
        budget: seconds after which no further case is begun.

    Raises:
        ValueError: no such device here, or the table has other columns.
    """
    device = _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    start, path = time.monotonic(), out / f"loss-{device}.csv"
    done = read(path)
    missing = [x for x in cases or CASES[device] if x not in done]
    bandwidth = copy_bandwidth(device, repetitions) if missing else 0.0
    for case in missing:
        if budget is not None and time.monotonic() - start > budget:
            return
        if rows := measure(case, device, repetitions, bandwidth):
            append(path, rows)
            yield from rows


def _device(name: str) -> str:
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if name not in ["auto", *here]:
        raise ValueError(f"device must be one of {['auto', *here]} here, got {name!r}")
    return here[-1] if name == "auto" else name


def read(path: Path) -> set[Case]:
    """The cases that a table has."""
    if not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        return {Case(int(x["rows"]), int(x["classes"]), int(x["hidden"]), x["dtype"]) for x in table}


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a table, or begin it; the file is replaced as a whole. Raises if its columns are others."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    columns = ",".join(rows[0])
    if text and text.splitlines()[0] != columns:
        raise ValueError(f"{path} has other columns than this version writes: choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        file.write(text or columns + "\n")
        csv.DictWriter(file, rows[0], lineterminator="\n").writerows(rows)
    part.replace(path)
