"""Microseconds a student and step: a bundle of students against training them one after another.

Peers, in one run and interleaved: the plain PyTorch loop that a reader would write, with `rkd.DistillationLoss`; the
same with `F.kl_div`, the cheapest distillation there is; and the first one compiled, where there is a C++ compiler. The
loops are measured on one student, since the next one costs the same. Inputs and teacher logits are random, of the
shapes of digits, MNIST-1D and Fashion-MNIST: speed does not depend on what the images show. Peak memory is measured
apart, each method in a process of its own.

    python benchmarks/students.py [--device cpu] [--out benchmarks/results] [--only memory]
"""

import argparse
import csv
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd import DistillationLoss
from rkd.benchmark import added_mebibytes
from rkd.data import Split
from rkd.models import build
from rkd.objectives import Student
from rkd.provenance import hardware
from rkd.training import Schedule, train_students

BATCH, SAMPLES, SEEDS = 128, 1280, 12
CASES = {
    "digits, MLP 64-12-10": ((1, 8, 8), {"model": "mlp", "hidden": [12]}, (1, 12, 84, 504)),
    "MNIST-1D, CNN of width 8": ((1, 40), {"model": "cnn1d", "width": 8}, (1, 12, 84)),
    "Fashion-MNIST, MLP 784-64-10": ((1, 28, 28), {"model": "mlp", "hidden": [64]}, (1, 12, 84)),
}


def workload(case: str, device: str, **options: Any) -> tuple[Callable[[int], nn.Module], Split, Tensor]:
    """The network of a case by seed, with other options where given; random data; random teacher logits."""
    shape, own, _ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, *shape, generator=generator).to(device)
    train = Split(x, torch.randint(10, (SAMPLES,), generator=generator).to(device))
    teacher = 3 * torch.randn(SAMPLES, 10, generator=generator).to(device)
    return partial(_build, shape, own | options), train, teacher


def _build(shape: tuple[int, ...], options: dict[str, Any], seed: int) -> nn.Module:
    return build(shape=shape, classes=10, seed=seed, **options)


def bundle_seconds(
    make: Callable[[int], nn.Module], students: int, train: Split, teacher: Tensor, epochs: int
) -> float:
    """Seconds a student and step of `students` at once: up to twelve seeds, and losses of several orders."""
    seeds = min(SEEDS, students)
    losses = [
        Student(alpha=0.25 * 2 ** (i % 6), temperature=1 + i % 7, scale="T2/alpha") for i in range(students // seeds)
    ]
    start = time.perf_counter()
    train_students(make, losses, range(seeds), train, teacher, Schedule(epochs, BATCH))
    _wait(train.x)
    return (time.perf_counter() - start) / (epochs * SAMPLES // BATCH) / students


class Loop:
    """One student, trained as anyone would."""

    def __init__(
        self, make: Callable[[int], nn.Module], train: Split, teacher: Tensor, kl: bool, compiled: bool
    ) -> None:
        self.model, self.train, self.teacher = make(0).to(train.x.device), train, teacher
        self.loss = self._kl if kl else self._renyi
        self.compile_seconds = 0.0
        self._distil = DistillationLoss(alpha=2.0, temperature=4.0, scale="T2/alpha")
        self._forward: Callable[..., Tensor] = self._objective
        if compiled:
            self._forward = torch.compile(self._objective)
            start = time.perf_counter()
            self.seconds(1)
            self.compile_seconds = time.perf_counter() - start

    def _kl(self, z: Tensor, v: Tensor, y: Tensor) -> Tensor:
        soft = F.kl_div((z / 4).log_softmax(-1), (v / 4).softmax(-1), reduction="batchmean")
        return 0.1 * F.cross_entropy(z, y) + 0.9 * 16 * soft

    def _renyi(self, z: Tensor, v: Tensor, y: Tensor) -> Tensor:
        return self._distil(z, v, y)

    def _objective(self, x: Tensor, v: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.model(x), v, y)

    def seconds(self, epochs: int) -> float:
        """Seconds a step."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3, weight_decay=0.0)
        steps = epochs * SAMPLES // BATCH
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        start = time.perf_counter()
        for _ in range(epochs):
            for batch in torch.randperm(SAMPLES, device=self.train.x.device).split(BATCH):
                optimizer.zero_grad()
                self._forward(self.train.x[batch], self.teacher[batch], self.train.y[batch]).backward()
                optimizer.step()
                decay.step()
        _wait(self.train.x)
        return (time.perf_counter() - start) / steps


def measure(case: str, device: str, repetitions: int) -> list[dict[str, object]]:
    """Rows of one case: medians over interleaved repetitions, after one that warms up."""
    make, train, teacher = workload(case, device)
    methods: dict[tuple[str, int], Callable[[], float]] = {
        ("bundle", n): partial(bundle_seconds, make, n, train, teacher, 1 if n > 100 else 3) for n in CASES[case][2]
    }
    loops = {"loop": Loop(make, train, teacher, False, False), "loop, KL": Loop(make, train, teacher, True, False)}
    try:
        loops["loop, compiled"] = Loop(make, train, teacher, False, True)
    except Exception as error:  # no compiler: that peer is left out
        print(f"torch.compile failed, left out: {type(error).__name__}", file=sys.stderr)
    methods |= {(name, 1): partial(loop.seconds, 10) for name, loop in loops.items()}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in methods}
    for repetition in range(repetitions + 1):
        for key, method in methods.items():
            seconds = method()
            if repetition:
                times[key].append(seconds)
        if sys.stderr.isatty():
            print(f"{case}: {repetition}/{repetitions}", file=sys.stderr)
    median = {key: statistics.median(values) for key, values in times.items()}
    return [
        {
            "case": case,
            "method": method,
            "students": students,
            "microseconds_per_student_step": round(1e6 * seconds, 2),
            "faster_than_loop": round(median["loop", 1] / seconds, 2),
            "compile_seconds": round(loops[method].compile_seconds, 1) if "compiled" in method else "",
            "repetitions": repetitions,
            **_where(device),
        }
        for (method, students), seconds in median.items()
    ]


def measure_memory(case: str, device: str) -> list[dict[str, object]]:
    """Rows of one case: what one epoch adds at its peak, each method in a fresh process."""
    methods = [*(("bundle", n) for n in CASES[case][2]), ("loop", 1), ("loop, KL", 1)]
    rows: list[dict[str, object]] = []
    for method, students in methods:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            added = pool.submit(_added_mebibytes, case, method, students, device).result()
        rows.append(
            {"case": case, "method": method, "students": students, "peak_mebibytes": round(added, 1), **_where(device)}
        )
    return rows


def _where(device: str) -> dict[str, object]:
    return {
        "device": device,
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _added_mebibytes(case: str, method: str, students: int, device: str) -> float:
    """What was there before does not count: libraries, data, what one epoch of the narrowest network leaves."""
    if device == "cpu":
        torch.set_num_threads(1)
    narrow = {"width": 1} if "width" in CASES[case][1] else {"hidden": [1]}
    _epoch(method, 1, *workload(case, device, **narrow))
    load = workload(case, device)
    return added_mebibytes(lambda: _epoch(method, students, *load), device)


def _epoch(method: str, students: int, make: Callable[[int], nn.Module], train: Split, teacher: Tensor) -> None:
    if method == "bundle":
        bundle_seconds(make, students, train, teacher, 1)
    else:
        Loop(make, train, teacher, "KL" in method, False).seconds(1)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def main() -> None:
    """Write students-DEVICE.csv and students-memory-DEVICE.csv, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--only", choices=["speed", "memory"])
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)
    if arguments.only != "memory":
        rows = [row for case in CASES for row in measure(case, device, arguments.repetitions)]
        _write(arguments.out / f"students-{device}.csv", rows)
    if arguments.only != "speed":
        rows = [row for case in CASES for row in measure_memory(case, device)]
        _write(arguments.out / f"students-memory-{device}.csv", rows)


if __name__ == "__main__":
    main()
