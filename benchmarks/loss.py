"""Milliseconds and memory of the distillation loss: forward, backward and both, from 10 to 262,144 classes.

Peers, in one run and interleaved: Kullback–Leibler as PyTorch's users write it (log_softmax, softmax, F.kl_div); the
same compiled, and compiled with a logarithmic target, the fastest form of it, where there is a C++ compiler; the Rényi
loss by the plain path of `rkd.logits`; and `rkd.renyi_kd_loss` at orders 1, 1/2 and 2. Logits are random, the teacher's
those of the student plus noise. Bytes per second count what has to move: two logits read, one gradient written; the
machine's own are those of a copy between two arrays. Memory is the growth of the peak above the logits, in a process of
its own. Liger-Kernel's losses run on GPUs only and are left out; so far `--device cuda` is untested.

    python benchmarks/loss.py [--device cpu] [--threads 2] [--out benchmarks/results]
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from memory import added_mebibytes
from torch import Tensor

from rkd import renyi_kd_loss
from rkd.logits import renyi_from_logits
from rkd.provenance import hardware

TEMPERATURE = 4.0
SHAPES = [(128, 10), (512, 100), (512, 1000), (512, 4096), (512, 32768), (64, 262144)]
PLAIN_UP_TO = 2**24  # logits; beyond, the plain path takes minutes
Loss = Callable[[Tensor, Tensor], Tensor]


def kl(z: Tensor, v: Tensor) -> Tensor:
    """What most people write."""
    log_q, p = (z / TEMPERATURE).log_softmax(-1), (v / TEMPERATURE).softmax(-1)
    return TEMPERATURE**2 * F.kl_div(log_q, p, reduction="batchmean")


def kl_log_target(z: Tensor, v: Tensor) -> Tensor:
    """The same with log p, which needs no guard at p = 0."""
    log_q, log_p = (z / TEMPERATURE).log_softmax(-1), (v / TEMPERATURE).log_softmax(-1)
    return TEMPERATURE**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def plain_renyi(z: Tensor, v: Tensor) -> Tensor:
    """The way that suits every row and every transform."""
    return TEMPERATURE**2 * renyi_from_logits(z, v, 2.0, TEMPERATURE, False).mean()


LOSSES: dict[str, Loss] = {
    "KL, eager": kl,
    "KL, compiled": kl,
    "KL of log target, compiled": kl_log_target,
    "Rényi, plain": plain_renyi,
    "rkd, order 1": partial(renyi_kd_loss, alpha=1.0, temperature=TEMPERATURE),
    "rkd, order 1/2": partial(renyi_kd_loss, alpha=0.5, temperature=TEMPERATURE),
    "rkd, order 2": partial(renyi_kd_loss, alpha=2.0, temperature=TEMPERATURE),
}


def logits(rows: int, classes: int, device: str) -> tuple[Tensor, Tensor]:
    z = 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))
    v = z + torch.randn(rows, classes, generator=torch.Generator().manual_seed(1))
    return z.to(device).requires_grad_(), v.to(device)


def prepare(name: str, z: Tensor, v: Tensor) -> tuple[Loss, float] | None:
    """The loss, ready to run, and the seconds that compiling took; None where it cannot be compiled."""
    loss = LOSSES[name]
    if "compiled" not in name:
        return loss, 0.0
    start = time.perf_counter()
    try:
        torch._dynamo.reset()
        loss = torch.compile(loss, dynamic=False)
        loss(z, v).backward()
    except Exception as error:  # no compiler: that peer is left out
        print(f"torch.compile failed, left out: {type(error).__name__}", file=sys.stderr)
        return None
    return loss, time.perf_counter() - start


def step_seconds(loss: Loss, z: Tensor, v: Tensor, steps: int) -> tuple[float, float]:
    """Seconds of one forward and of one backward pass."""
    forward = backward = 0.0
    for _ in range(steps):
        z.grad = None
        start = time.perf_counter()
        value = loss(z, v)
        _wait(z)
        middle = time.perf_counter()
        value.backward()
        _wait(z)
        forward, backward = forward + middle - start, backward + time.perf_counter() - middle
    return forward / steps, backward / steps


def copy_bandwidth(device: str, repetitions: int) -> float:
    """GB/s of a copy of 256 MiB, read and written."""
    source = torch.ones(2**26, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        target.copy_(source)
        _wait(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds) / 1e9


def peak_mebibytes(name: str, rows: int, classes: int, device: str) -> float:
    """Growth of the peak by one step above the logits; a step on a tenth of the rows has loaded the code before."""
    z, v = logits(rows, classes, device)
    few = max(1, rows // 10)
    prepared = prepare(name, z[:few].detach().requires_grad_(), v[:few])
    if prepared is None:
        return float("nan")
    small = z[:few].detach().requires_grad_()
    LOSSES[name](small, v[:few]).backward()
    return added_mebibytes(lambda: prepared[0](z, v).backward(), device)


def peak_in_a_child(name: str, rows: int, classes: int, device: str) -> float:
    command = [sys.executable, __file__, "--device", device, "--peak", name, str(rows), str(classes)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(rows: int, classes: int, device: str, repetitions: int, bandwidth: float) -> list[dict[str, object]]:
    """Rows of one shape: medians over interleaved repetitions, after one that warms up."""
    z, v = logits(rows, classes, device)
    steps = max(1, min(200, 2**21 // z.numel()))
    names = [x for x in LOSSES if x != "Rényi, plain" or z.numel() < PLAIN_UP_TO]
    ready = {name: x for name in names if (x := prepare(name, z, v)) is not None}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    for repetition in range(repetitions + 1):
        for name, (loss, _) in ready.items():
            seconds = step_seconds(loss, z, v, steps)
            if repetition:
                times[name].append(seconds)
        if sys.stderr.isatty():
            print(f"{rows} x {classes}: {repetition}/{repetitions}", file=sys.stderr)
    median = {name: [statistics.median(x) for x in zip(*pairs, strict=True)] for name, pairs in times.items()}
    full = {name: statistics.median(map(sum, pairs)) for name, pairs in times.items()}
    large = z.nbytes >= 2**23
    return [
        {
            "rows": rows,
            "classes": classes,
            "loss": name,
            "forward_ms": round(1e3 * median[name][0], 4),
            "backward_ms": round(1e3 * median[name][1], 4),
            "full_ms": round(1e3 * full[name], 4),
            "faster_than_eager_kl": round(full["KL, eager"] / full[name], 2),
            "peak_mib": round(peak_in_a_child(name, rows, classes, device)) if large else "",
            "gradient_mib": round(z.nbytes / 2**20, 2),
            "gb_per_s": round(3 * z.nbytes / full[name] / 1e9, 2),
            "copy_gb_per_s": round(bandwidth, 1),
            "compile_seconds": round(ready[name][1], 1) if "compiled" in name else "",
            "repetitions": repetitions,
            "device": device,
            "hardware": hardware(device),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
            "torch": torch.__version__,
        }
        for name in ready
    ]


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """Write loss-DEVICE.csv."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--peak", nargs=3, metavar=("LOSS", "ROWS", "CLASSES"), help="print that peak memory, no more")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        name, rows, classes = arguments.peak
        print(peak_mebibytes(name, int(rows), int(classes), arguments.device))
        return
    bandwidth = copy_bandwidth(arguments.device, arguments.repetitions)
    table_rows = [x for shape in SHAPES for x in measure(*shape, arguments.device, arguments.repetitions, bandwidth)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / f"loss-{arguments.device}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, table_rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(table_rows)


if __name__ == "__main__":
    main()
