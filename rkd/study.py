"""Run a study: prepare data and teacher, train bundles, record one row a student. What is recorded is never lost.

`runs.csv` is rewritten as a whole, atomically, each time a bundle is done; `provenance.json` says what ran where. A
bundle or a teacher that was interrupted goes on from its last state, and bundles depend on the study's file only, so a
study that was killed and continued gives the same table, bit for bit on one machine's CPU, apart from the seconds.
Book: A.5, "Running a study".
"""

import csv
import io
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rkd.acceleration import Acceleration, storage
from rkd.checkpoint import NOTHING, Keeping, Stopped, write_whole
from rkd.data import DataSet, Split, generated, load, subset, with_label_noise, without
from rkd.evaluation import accuracy, agreement, ece, nll
from rkd.fields import Settings, schedule_of, student_of
from rkd.models import build
from rkd.objectives import Gradient
from rkd.sources import cache_folder, optional
from rkd.spec import Bundle, Study, bundle_key, flatten, run_key, teacher_key
from rkd.stacking import Stack
from rkd.training import gradient_norms, train_students, train_teacher

Row = dict[str, Any]
_NORM_SAMPLES = 256


# --------------------------------------------------------------------------- one bundle


def prepare(
    settings: Settings, precision: str, device: str, mode: str = "auto", keeping: Keeping = NOTHING
) -> tuple[DataSet, Split, nn.Module]:
    """Data set, transfer set and trained teacher of a bundle.

    The teacher's weights are kept in `rkd.sources.cache_folder`, by its settings and seed, and used again.

    Raises:
        ValueError: the settings ask for more samples or other shapes than the data has. And as `rkd.data.load`.
        Stopped: the time is up before the teacher is trained.
    """
    data, transfer = _samples(settings, precision, device)
    return data, transfer, _teacher(settings, data, precision, device, mode, keeping)


def teacher_file(settings: Settings, precision: str) -> Path:
    """Where a teacher's weights are kept, in the cache folder."""
    return Path("teachers") / f"{teacher_key(settings, precision)}.safetensors"


def bundle_name(keys: Sequence[str]) -> str:
    """What the state of a bundle is called, by the keys of its runs in order."""
    return f"bundle-{bundle_key(keys)}"


def run_bundle(
    bundle: Bundle,
    precision: str,
    curves: bool,
    device: str,
    log: Callable[[str], None],
    mode: str = "auto",
    keeping: Keeping = NOTHING,
) -> list[Row]:
    """Train a bundle and measure each student: one row a run. Where memory runs out, in halves.

    The test and validation figures are those after the last epoch; with curves, `test_accuracy_best` is that of the
    epoch which is best on the test images, as the literature reports it. A student whose weights are no longer finite
    gets the status "diverged".

    Raises:
        Stopped: the time is up; the state is kept.
    """
    try:
        return _train_and_measure(bundle, precision, curves, device, mode, keeping)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error) or len(bundle) == 1:
            raise
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    log(f"out of memory with {len(bundle)} students: going on with half as many")
    rows: list[Row] = []
    for half in _halves(bundle):
        try:
            rows += run_bundle(half, precision, curves, device, log, mode, keeping)
        except Stopped:
            if not rows:
                raise
            break
    return rows


def _train_and_measure(
    bundle: Bundle, precision: str, curves: bool, device: str, mode: str, keeping: Keeping
) -> list[Row]:
    start = time.perf_counter()
    settings, acceleration = bundle.settings, Acceleration.of(precision, device, mode)
    keeper = keeping.of(bundle_name([run_key(run, precision) for _, _, run in bundle.runs()]))
    data, transfer, teacher = prepare(settings, precision, device, mode, keeping)
    schedule = schedule_of(settings["training"], len(transfer.y))
    fixed = schedule.augmentation == "none"
    students = [student_of(loss) for loss in bundle.losses]
    gradient = Gradient(students, transfer.x)
    with torch.no_grad():
        seen = _in_parts(teacher, transfer.x if fixed else transfer.x[:_NORM_SAMPLES])
        on_test = _in_parts(teacher, data.test.x)
    few = (transfer.x[:_NORM_SAMPLES], seen[:_NORM_SAMPLES], transfer.y[:_NORM_SAMPLES])
    make = lambda seed: _network(settings["student"], data, seed, precision)  # noqa: E731
    measured: dict[str, Tensor] = {}
    for term, norm in zip(
        ("hard", "soft"), gradient_norms(Stack(make, bundle.seeds, len(students), device), gradient, *few), strict=True
    ):
        measured[f"{term}_gradient_first"] = norm
    parts = [(name, part) for name, part in (("validation", data.validation), ("test", data.test)) if len(part.y)]
    history = {name: keeper.history.setdefault(name, []) for name, _ in parts}

    def watch(epoch: int, stack: Stack) -> None:
        for name, part in parts:
            history[name].append(accuracy(stack.predict(part.x), part.y).cpu())

    stack = train_students(
        make,
        students,
        bundle.seeds,
        transfer,
        seen if fixed else teacher,
        schedule,
        data.blank,
        watch if curves else None,
        acceleration,
        keeper,
    )
    for name, part in parts:
        logits = stack.predict(part.x)
        measured |= {f"{name}_accuracy": accuracy(logits, part.y), f"{name}_nll": nll(logits, part.y)}
        if name == "test":
            measured |= {"test_ece": ece(logits, part.y), "test_agreement": agreement(logits, on_test)}
            if rows := history["test"]:
                measured["test_accuracy_best"] = torch.stack(rows).amax(0)
            if hidden := settings["transfer"]["without"]:
                unseen = torch.isin(part.y, part.y.new_tensor(hidden))
                measured["test_accuracy_unseen"] = accuracy(logits[..., unseen], part.y[unseen])
    for term, norm in zip(("hard", "soft"), gradient_norms(stack, gradient, *few), strict=True):
        measured[f"{term}_gradient_last"] = norm
    table = {name: values.double().cpu().tolist() for name, values in measured.items()}
    curve = {name: torch.stack(rows, -1).cpu().tolist() if rows else None for name, rows in history.items()}
    finite = stack.finite().tolist()
    of_teacher = float(accuracy(on_test.T, data.test.y))
    seconds = (time.perf_counter() - start + keeper.seconds) / len(bundle)
    table_rows = []
    for k, c, run in bundle.runs():
        row = {"key": run_key(run, precision), **flatten(run), "precision": precision}
        row["status"] = "ok" if finite[k][c] else "diverged"
        row |= {name: values[k][c] for name, values in table.items()}
        row["teacher_test_accuracy"] = of_teacher
        for name, values in curve.items():
            row[f"{name}_curve"] = " ".join(f"{value:.4f}" for value in values[k][c]) if values else None
        table_rows.append(row | {"seconds": round(seconds, 4)})
    return table_rows


class Probe:
    """A few steps of a bundle, on its data and an idle teacher: how long it takes, and whether its settings fit."""

    def __init__(self, bundle: Bundle, precision: str, device: str) -> None:
        settings = bundle.settings
        self._data, self._transfer = _samples(settings, precision, device)
        self._schedule = schedule_of(settings["training"], len(self._transfer.y))
        self._students, self._seeds = [student_of(loss) for loss in bundle.losses], bundle.seeds
        self._make = lambda seed: _network(settings["student"], self._data, seed, precision)
        self._acceleration = Acceleration.of(precision, device, "eager")
        _network(settings["teacher"], self._data, 0, precision)
        self.epochs, self.steps = self._schedule.epochs, self._schedule.steps(len(self._transfer.y))

    def step_seconds(self, steps: int = 3) -> float:
        """Seconds a step; augmentation and the teacher on augmented images are left out."""
        few = Split(*(part[: steps * self._schedule.batch_size] for part in self._transfer))
        schedule = replace(self._schedule, epochs=1, augmentation="none")
        zeros = few.x.new_zeros(len(few.y), len(self._data.classes))
        for _ in range(2):  # the first time warms up
            start = time.perf_counter()
            self._stack = train_students(
                self._make, self._students, self._seeds, few, zeros, schedule, acceleration=self._acceleration
            )
            seconds = (time.perf_counter() - start) / schedule.steps(len(few.y))
        return seconds

    def test_seconds(self) -> float:
        """Seconds of one look at the validation and test images."""
        part = self._data.test.x[:500]
        start = time.perf_counter()
        self._stack.predict(part)
        seen = len(self._data.test.y) + len(self._data.validation.y)
        return (time.perf_counter() - start) * seen / len(part)


def _samples(settings: Settings, precision: str, device: str) -> tuple[DataSet, Split]:
    """Data set and transfer set."""
    data = _data(settings["data"]["name"], settings["data"]["validation"], precision, device)
    wanted, transfer = settings["transfer"], data.train
    if wanted["generated"]:
        transfer = generated(data, wanted["size"])
    elif wanted["size"] is not None:
        transfer = subset(data.train, wanted["size"])
    return data, _damaged(transfer, wanted, len(data.classes))


@lru_cache(maxsize=2)
def _data(name: str, validation: int | None, precision: str, device: str) -> DataSet:
    return load(name, validation, storage(precision), device)


def _teacher(settings: Settings, data: DataSet, precision: str, device: str, mode: str, keeping: Keeping) -> nn.Module:
    safetensors = optional("safetensors.torch")
    wanted = settings["teacher"]
    teacher = _network(wanted, data, wanted["seed"], precision).to(device)
    path = cache_folder() / teacher_file(settings, precision)
    with suppress(FileNotFoundError, optional("safetensors").SafetensorError):  # no such file, or a damaged one
        teacher.load_state_dict(safetensors.load_file(path, device=device))
        return teacher.eval()
    train = _damaged(data.train, wanted, len(data.classes))
    name = f"teacher-{path.stem}"
    acceleration = Acceleration.of(precision, device, mode)
    train_teacher(teacher, train, schedule_of(wanted), wanted["seed"], data.blank, acceleration, keeping.of(name))
    write_whole(path, safetensors.save({name: tensor.cpu() for name, tensor in teacher.state_dict().items()}))
    keeping.discard(name)
    return teacher


def _network(wanted: Settings, data: DataSet, seed: int, precision: str) -> nn.Module:
    options = {key: value for key, value in wanted.items() if key in ("hidden", "dropout", "width")}
    shape = tuple(data.train.x.shape[1:])
    return build(wanted["model"], shape, len(data.classes), seed, storage(precision), **options)


def _damaged(split: Split, wanted: Settings, classes: int) -> Split:
    split = without(split, wanted["without"]) if wanted["without"] else split
    return with_label_noise(split, wanted["label_noise"], classes) if wanted["label_noise"] else split


def _in_parts(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(1000)])


def _halves(bundle: Bundle) -> Iterable[Bundle]:
    if len(bundle.seeds) > 1:
        half = len(bundle.seeds) // 2
        return [Bundle(bundle.settings, bundle.losses, seeds) for seeds in (bundle.seeds[:half], bundle.seeds[half:])]
    half = len(bundle.losses) // 2
    return [Bundle(bundle.settings, losses, bundle.seeds) for losses in (bundle.losses[:half], bundle.losses[half:])]


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


# --------------------------------------------------------------------------- the table


def read_rows(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a `runs.csv` by key, as text; none if there is no such file."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """All rows at once, atomically; numbers in the shortest form that reads back to the same double."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def missing(study: Study, done: dict[str, dict[str, str]]) -> list[Bundle]:
    """The bundles, or their parts, that have no row yet. Seeds that lack a loss are run for the losses they lack."""
    rest = []
    for bundle in study.bundles:
        lacking: dict[int, list[int]] = {}
        for k, c, run in bundle.runs():
            if run_key(run, study.precision) not in done:
                lacking.setdefault(k, []).append(c)
        alike: dict[tuple[int, ...], list[int]] = {}
        for k, columns in lacking.items():
            alike.setdefault(tuple(columns), []).append(k)
        for columns_of, members in alike.items():
            losses = tuple(bundle.losses[c] for c in columns_of)
            rest.append(Bundle(bundle.settings, losses, tuple(bundle.seeds[k] for k in members)))
    return rest
