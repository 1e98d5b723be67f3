"""How fast residual networks are trained, and what keeps them from being faster: images a second, and where time goes.

Cases are teachers alone and bundles of students with their teacher, in each way of using the device. Data are random.
Each row says how many images a second went through the networks that learn, and what part that is of the arithmetic
which the device does in one large product of the way's own type, measured in the same run. Written as
training-DEVICE.csv after every row; `--profile` prints where the time of a case goes instead. All cases take long:
choose with `--cases`, `--ways`, `--batch` and `--steps`.

The arithmetic counted is that of convolutions and linear layers: a multiplication and an addition are two operations,
a training step is three forward passes, the teacher's answer one.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rkd.acceleration import Acceleration
from rkd.data import Split
from rkd.models import build
from rkd.objectives import Student
from rkd.provenance import hardware
from rkd.schedule import Schedule
from rkd.training import train_students, train_teacher

SHAPE, CLASSES, REPETITIONS = (3, 32, 32), 100, 3
# what learns, how many at once, and who teaches them
CASES: dict[str, tuple[str, int, str | None]] = {
    "teacher wrn_40_2": ("wrn_40_2", 1, None),
    "teacher resnet56": ("resnet56", 1, None),
    "teacher resnet32x4": ("resnet32x4", 1, None),
    "1 × wrn_16_2": ("wrn_16_2", 1, "wrn_40_2"),
    "4 × wrn_16_2": ("wrn_16_2", 4, "wrn_40_2"),
    "10 × wrn_16_2": ("wrn_16_2", 10, "wrn_40_2"),
    "28 × wrn_16_2": ("wrn_16_2", 28, "wrn_40_2"),
    "10 × resnet20": ("resnet20", 10, "resnet56"),
    "10 × resnet8x4": ("resnet8x4", 10, "resnet32x4"),
    "4 × wrn_10_1": ("wrn_10_1", 4, "resnet8"),
}


def ways(device: str) -> dict[str, Acceleration]:
    """How the device may be used, by name."""
    found = {"float32": Acceleration(), "bf16": Acceleration(mixed=True)}
    if device == "cuda":
        graphs = {f"bf16, graphs, {n} streams": Acceleration(True, False, True, n) for n in (1, 2, 4, 8)}
        return found | graphs | {"bf16, compiled, graphs, 4 streams": Acceleration(True, True, True, 4)}
    return found


def operations(model: str) -> int:
    """Of one forward pass of one image."""
    with FlopCounterMode(display=False) as counter:
        build(model, SHAPE, CLASSES, 0).to("meta")(torch.empty(1, *SHAPE, device="meta"))
    return counter.get_total_flops()


def peak(device: str, kind: torch.dtype) -> float:
    """Operations a second of a large square product: the median of ten."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    times = [_seconds(lambda: a @ b, device) for _ in range(13)][3:]
    return 2 * size**3 / statistics.median(times)


def runner(case: str, device: str, way: Acceleration, batch: int, most: int) -> Callable[[int], None]:
    """Trains a case for so many steps, `most` at most, as a study does."""
    model, count, teacher = CASES[case]
    generator = torch.Generator().manual_seed(0)
    blank = torch.zeros(3, device=device)
    x = torch.randn(batch * most, *SHAPE, generator=generator).to(device)
    y = torch.randint(CLASSES, (len(x),), generator=generator).to(device)

    def run(steps: int) -> None:
        train = Split(x[: batch * steps], y[: batch * steps])
        schedule = Schedule(1, batch, 0.05, 5e-4, "sgd", "step", "crop-flip")
        if teacher is None:
            train_teacher(build(model, SHAPE, CLASSES, 0).to(device), train, schedule, 0, blank, way)
            return
        says = build(teacher, SHAPE, CLASSES, 1).to(device).eval()
        students = [Student(alpha=0.25 * 2 ** (i % 5), temperature=1 + i % 7, scale="T2/alpha") for i in range(count)]
        train_students(
            lambda seed: build(model, SHAPE, CLASSES, seed), students, [0], train, says, schedule, blank, None, way
        )

    return run


def measure(case: str, name: str, device: str, batch: int, steps: int, ceiling: float) -> dict[str, object]:
    """A row: the time that `steps` more steps take, so that set-up, warm-up and recording do not count."""
    model, count, teacher = CASES[case]
    short = 5
    run = runner(case, device, ways(device)[name], batch, short + steps)
    run(short)  # compiles
    differences = [
        _seconds(lambda: run(short + steps), device) - _seconds(lambda: run(short), device) for _ in range(REPETITIONS)
    ]
    seconds = statistics.median(differences) / steps
    rate = count * batch / seconds
    work = count * 3 * operations(model) + (operations(teacher) if teacher else 0)
    return {
        "case": case,
        "way": name,
        "batch": batch,
        "steps": steps,
        "milliseconds_per_step": round(1e3 * seconds, 3),
        "images_per_second": round(rate),
        "teraflops": round(work * batch / seconds / 1e12, 3),
        "part_of_peak": round(work * batch / seconds / ceiling, 4),
        "peak_teraflops": round(ceiling / 1e12, 2),
        "repetitions": REPETITIONS,
        "device": device,
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **asdict(ways(device)[name]),
    }


def profile(case: str, name: str, device: str, batch: int, steps: int) -> str:
    """Where the time goes: the twenty dearest kinds of work."""
    run = runner(case, device, ways(device)[name], batch, max(5, steps))
    run(5)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=kinds) as record:
        run(steps)
    order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return record.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60)


def _seconds(work: Callable[[], Tensor | None], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure, print as it comes, and write the table after every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--ways", nargs="*", help="all of the device if not given")
    parser.add_argument("--batch", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)
    known = ways(device)
    if unknown := set(arguments.ways or ()) - set(known):
        parser.error(f"--ways must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    chosen, rows = arguments.ways or list(known), list[dict[str, object]]()
    ceilings = {kind: peak(device, kind) for kind in (torch.float32, torch.bfloat16)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for case in arguments.cases:
        for batch in arguments.batch:
            for name in chosen:
                if arguments.profile:
                    print(case, name, batch, profile(case, name, device, batch, arguments.steps), sep="\n", flush=True)
                    continue
                ceiling = ceilings[torch.bfloat16 if known[name].mixed else torch.float32]
                rows.append(measure(case, name, device, batch, arguments.steps, ceiling))
                print({key: rows[-1][key] for key in list(rows[-1])[:8]}, flush=True)
                with (arguments.out / f"training-{device}.csv").open("w", newline="", encoding="utf-8") as file:
                    table = csv.DictWriter(file, rows[0], lineterminator="\n")
                    table.writeheader()
                    table.writerows(rows)


if __name__ == "__main__":
    main()
