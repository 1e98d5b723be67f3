"""The command line: `rkd study run | status | report`, `rkd data fetch`, `rkd bench`. Also as `python -m rkd.cli`.

Explained in the book: A.5, "Running a study".
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from rkd.engine import StudyError, describe, run_study
from rkd.sources import CorruptDataError, FetchError, fetch
from rkd.spec import SpecError, read_study
from rkd.statistics import mean_interval
from rkd.study import read_rows

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Rényi knowledge distillation.")
studies = typer.Typer(no_args_is_help=True, help="Train what a study's file asks for.")
data = typer.Typer(no_args_is_help=True, help="Image sets.")
app.add_typer(studies, name="study")
app.add_typer(data, name="data")

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="the study")]
Out = Annotated[Path | None, typer.Option(help="folder of the results; results/NAME beside the study if not given")]
_RESULTS = ("validation_accuracy", "test_accuracy", "test_nll", "test_ece", "test_agreement")


@studies.command()
def run(
    file: StudyFile,
    out: Out = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="bundles at once; one a core or GPU if not given")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for a Ray cluster")] = "local",
    address: Annotated[str | None, typer.Option(help="of the Ray cluster; found or started if not given")] = None,
    budget: Annotated[float | None, typer.Option(help="seconds after which to stop, with all states kept")] = None,
    mode: Annotated[str, typer.Option(help="auto, eager, graphs (CUDA graphs) or compiled (torch.compile)")] = "auto",
    every: Annotated[float, typer.Option(min=0, help="seconds between two states of a bundle")] = 60.0,
) -> None:
    """Train all students that have no row in runs.csv yet; stop and run again as you like."""
    study = read_study(file)
    run_study(study, out or _folder(file, study.name), device, workers, print, engine, address, budget, mode, every)


@studies.command()
def status(file: StudyFile, out: Out = None) -> None:
    """Say how much of a study is done."""
    study = read_study(file)
    done = read_rows((out or _folder(file, study.name)) / "runs.csv")
    print(describe(study, done))
    if diverged := sum(row["status"] == "diverged" for row in done.values()):
        print(f"{diverged:,} diverged")


@studies.command()
def report(file: StudyFile, out: Out = None) -> None:
    """Write means over the seeds, with 95 % intervals of the test accuracy, as CSV to the standard output."""
    study = read_study(file)
    folder = out or _folder(file, study.name)
    rows = list(read_rows(folder / "runs.csv").values())
    if not rows:
        raise StudyError(f"{folder} has no runs yet: run the study first")
    settings = [c for c in rows[0] if ("." in c) and len({row[c] for row in rows}) > 1]
    cells = defaultdict(list)
    for row in rows:
        cells[tuple(row[c] for c in settings)].append(row)
    results = [c for c in _RESULTS if c in rows[0]]
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow([*settings, "seeds", "diverged", *results, "test_accuracy_low", "test_accuracy_high"])
    for cell, members in cells.items():
        good = [row for row in members if row["status"] == "ok"]
        means = [f"{sum(float(row[c]) for row in good) / len(good):.4f}" if good else "" for c in results]
        interval = ["", ""]
        if len(good) > 1:
            _, low, high, _ = mean_interval([float(row["test_accuracy"]) for row in good])
            interval = [f"{low:.4f}", f"{high:.4f}"]
        table.writerow([*cell, len(good), len(members) - len(good), *means, *interval])


@data.command("fetch")
def fetch_data(name: Annotated[str, typer.Argument(help="mnist, fashion_mnist, cifar10 or cifar100")]) -> None:
    """Download an image set from its official source, and check it."""
    print(fetch(name))


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    out: Annotated[Path, typer.Option(help="folder of loss-DEVICE.csv; what it has is not measured again")] = Path(),
    classes: Annotated[list[int] | None, typer.Option(help="only these class counts; may be repeated")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="with --classes: tables of so many rows")] = None,
    dtype: Annotated[str | None, typer.Option(help="only float32, bfloat16 or float16")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of the CPU; PyTorch's choice if not given")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="medians are taken over so many")] = 15,
    budget: Annotated[float | None, typer.Option(help="seconds after which no further table is begun")] = None,
) -> None:
    """Measure the loss and its peers: milliseconds, memory, GB/s. Stop and run again as you like."""
    from rkd import benchmark

    cases = benchmark.choose(device, classes, rows, dtype)
    for row in benchmark.bench(out, device, cases, threads, repetitions, budget):
        what = f"{row['rows']:,} x {row['classes']:,}" + (f" of {row['hidden']:,}" if row["hidden"] else "")
        speed = f"{row['gb_per_s']} of {row['copy_gb_per_s']} GB/s" if row["gb_per_s"] else ""
        print(f"{what:>16} {row['dtype']:8} {row['loss']:26} {row['full_ms']:>10.3f} ms  {speed}", flush=True)


def _folder(file: Path, name: str) -> Path:
    """book/studies/a.yaml has its results in book/results/a."""
    return (file.parent.parent if file.parent.name == "studies" else file.parent) / "results" / name


def main() -> None:
    """Run the command line; mistakes of the user are one line on the standard error and exit status 2."""
    try:
        app()
    except (SpecError, StudyError, CorruptDataError, FetchError, FileNotFoundError, ImportError, ValueError) as error:
        print(f"rkd: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
