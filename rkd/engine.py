"""Run a study's bundles, on this machine or a cluster: plan, progress, provenance, and one writer of the table.

Where bundles run is a pool's business, `rkd.processes.LocalPool` or `rkd.cluster.RayPool`; what is written is written
here.
Book: A.5, "Running a study".
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rkd.acceleration import MODES, Acceleration
from rkd.checkpoint import NOTHING, Keeping, Stopped
from rkd.cluster import LostError, RayPool, keep
from rkd.fields import Settings
from rkd.processes import LocalPool
from rkd.provenance import execution, hardware, record
from rkd.sources import cache_folder, optional
from rkd.spec import Bundle, Study, run_key, teacher_key
from rkd.study import Probe, Row, bundle_name, missing, prepare, read_rows, run_bundle, teacher_file, write_rows

Log = Callable[[str], None]
ENGINES = ("local", "ray")
DEVICES = ("auto", "cpu", "cuda")
_AGAIN = "run the study again to go on"


class StudyError(RuntimeError):
    """A study cannot run in this folder now; says why."""


def run_study(
    study: Study,
    out: Path,
    device: str = "auto",
    workers: int | None = None,
    log: Log = print,
    engine: str = "local",
    address: str | None = None,
    budget: float | None = None,
    mode: str = "auto",
    every: float = 60.0,
) -> None:
    """Train what has no row in `out`/runs.csv yet.

    Engine local keeps the state of what it trains in `out`/state, and goes on from there.

    Args:
        study: from `rkd.spec.read_study`.
        out: folder of runs.csv and provenance.json; made if needed.
        device: "auto" is a GPU where there is one; or "cpu", "cuda".
        workers: bundles at once on CPUs or on a cluster; as many as there are cores, or room in the cluster, if None.
        log: takes a line of text.
        engine: "local" is this machine, "ray" a Ray cluster.
        address: of the cluster, as `rkd.cluster.RayPool` takes it.
        budget: seconds from now after which to stop, in place of the study's own: engine local in the middle of a
            bundle, whose state it keeps; on a cluster no bundle is begun any more.
        mode: how to use the device, as `rkd.acceleration.Acceleration.of` takes it.
        every: seconds between two states of one training run.

    Raises:
        StudyError: another process is running a study in this folder; its table holds runs that this study does not
            ask for; the device or the cluster is not there; or worker processes ended before their bundles, after all
            others were recorded.
        ValueError: `budget` is not positive, or `mode` is not one that the device has.
        ImportError: Ray is asked for and is not installed.
    """
    filelock = optional("filelock")
    budget = study.budget if budget is None else budget
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, got {budget!r}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    keeping = Keeping(
        out / "state" if engine == "local" else None, every, None if budget is None else time.time() + budget
    )
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / ".lock", timeout=0):
            order, rows = _recorded(study, out / "runs.csv")
            log(describe(study, rows))
            if rest := missing(study, rows):
                with _pool(engine, device, workers, address) as pool:
                    Acceleration.of(study.precision, pool.device, mode)
                    entry = execution(engine, pool.device, pool.workers) | {"precision": study.precision, "mode": mode}
                    _train(study, rest, out, order, rows, pool, entry, log, mode, keeping)
                    if left := len(order) - len(rows):
                        log(f"the budget of {budget:g} s is used up, {left:,} students are left: {_AGAIN}")
                    else:
                        shutil.rmtree(out / "state", ignore_errors=True)
    except filelock.Timeout as error:
        raise StudyError(f"another process is running a study in {out}; wait for it, or give another folder") from error
    except LostError as error:
        kept = len(read_rows(out / "runs.csv"))
        raise StudyError(f"{error}; {kept:,} finished runs are kept: {_AGAIN}") from error


def choose_device(device: str) -> str:
    """ "cpu" or "cuda".

    Raises:
        StudyError: "cuda" where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise StudyError("device cuda was asked for, but PyTorch finds no GPU; use --device cpu")
    return "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"


def describe(study: Study, done: dict[str, dict[str, str]]) -> str:
    """The plan in a line: students, bundles, what is left."""
    total, rest = sum(map(len, study.bundles)), missing(study, done)
    left = sum(map(len, rest))
    teachers = len({teacher_key(bundle.settings, study.precision) for bundle in study.bundles})
    return (
        f"{study.name}: {total:,} students, {total - left:,} done, {left:,} to train in {len(rest):,} bundles; "
        f"{teachers} teacher{'s' * (teachers > 1)}"
    )


def _recorded(study: Study, table: Path) -> tuple[list[str], dict[str, Row]]:
    """The keys of all runs in order, and the rows that there are."""
    order = [run_key(run, study.precision) for bundle in study.bundles for _, _, run in bundle.runs()]
    rows = read_rows(table)
    if foreign := len(rows.keys() - set(order)):
        raise StudyError(
            f"{table} holds {foreign} runs that this study does not ask for; "
            "give another folder with --out, or move the table away: nothing was changed"
        )
    return order, dict(rows)


def _train(
    study: Study,
    rest: Sequence[Bundle],
    out: Path,
    order: Sequence[str],
    rows: dict[str, Row],
    pool: LocalPool | RayPool,
    entry: dict[str, Any],
    log: Log,
    mode: str,
    keeping: Keeping,
) -> None:
    """The bundles of `rest`: each adds its runs to `rows`, and the table is written anew, in the order of the keys."""
    table, device, precision = out / "runs.csv", pool.device, study.precision
    ((_, seconds),) = pool.map(_estimate, [(rest, precision, study.curves, device)])
    log(f"about {max(1, round(seconds / pool.workers)):,} s on {pool.workers} × {device}, after the teachers")
    start = time.perf_counter()
    in_time = lambda: keeping.deadline is None or time.time() < keeping.deadline  # noqa: E731
    files = [teacher_file(bundle.settings, precision) for bundle in rest]
    how = (mode, keeping)
    teachers = {file: (bundle.settings, precision, device, *how) for file, bundle in zip(files, rest, strict=True)}
    for _, (text, file, content) in pool.map(_train_teacher, list(teachers.values()), list(teachers), in_time):
        if content:
            keep(file, content)
        log(text)
    nodes: dict[str, dict[str, Any]] = {}
    with _progress(sum(map(len, rest))) as bar:
        tasks = [(bundle, precision, study.curves, device, *how) for bundle in rest]
        for node, (new, notes, machine) in pool.map(_train_bundle, tasks, files, in_time):
            for note in notes:
                log(note)
            rows |= {row["key"]: row for row in new}
            if new:
                write_rows(table, [rows[key] for key in order if key in rows])
            keeping.discard(bundle_name([row["key"] for row in new]))
            nodes.setdefault(node, {"hardware": machine, "bundles": 0})["bundles"] += bool(new)
            entry |= {
                "hardware": ", ".join(sorted({n["hardware"] for n in nodes.values()})),
                "nodes": list(nodes.values()),
                "students": entry["students"] + len(new),
                "wall_seconds": round(time.perf_counter() - start, 3),
            }
            record(out, study, entry)
            bar.update(len(new))
    if not nodes:
        entry |= {"hardware": hardware(device), "wall_seconds": round(time.perf_counter() - start, 3)}
        record(out, study, entry)
    log(f"{len(rows):,} runs in {table}, {entry['wall_seconds']:.1f} s")


def _estimate(rest: Sequence[Bundle], precision: str, curves: bool, device: str) -> float:
    """Seconds of one worker for these bundles, from a few steps of the first of each kind; looks at all settings."""
    total, cost = 0.0, {}
    for bundle in rest:
        kind = (
            len(bundle.losses),
            len(bundle.seeds),
            repr(bundle.settings["student"]),
            repr(bundle.settings["training"]),
        )
        probe = Probe(bundle, precision, device)
        if kind not in cost:
            cost[kind] = (probe.step_seconds(), probe.test_seconds() if curves else 0.0)
        step, test = cost[kind]
        total += probe.steps * step + probe.epochs * test
    return total


def _train_teacher(
    settings: Settings, precision: str, device: str, mode: str = "auto", keeping: Keeping = NOTHING
) -> tuple[str, Path, bytes]:
    """A line about the teacher, its file, and what that holds; nothing if the time was too short."""
    wanted, file = settings["teacher"], teacher_file(settings, precision)
    try:
        data, _, teacher = prepare(settings, precision, device, mode, keeping)
    except Stopped:
        return f"teacher {wanted['model']}, seed {wanted['seed']}: not ready yet", file, b""
    teacher.eval()
    with torch.no_grad():
        guesses = torch.cat([teacher(part).argmax(-1) for part in data.test.x.split(1000)])
    right = float((guesses == data.test.y).double().mean())
    text = f"teacher {wanted['model']}, seed {wanted['seed']}: {right:.2%} of {data.name} test"
    return text, file, (cache_folder() / file).read_bytes()


def _train_bundle(
    bundle: Bundle, precision: str, curves: bool, device: str, mode: str, keeping: Keeping
) -> tuple[list[Row], list[str], str]:
    """Rows, notes, and the hardware that they come from; no rows if the time was too short."""
    notes: list[str] = []
    try:
        return run_bundle(bundle, precision, curves, device, notes.append, mode, keeping), notes, hardware(device)
    except Stopped:
        return [], [*notes, f"stopped in a bundle of {len(bundle)} students, whose state is kept"], hardware(device)


def _pool(engine: str, device: str, workers: int | None, address: str | None) -> LocalPool | RayPool:
    for name, value, accepted in (("engine", engine, ENGINES), ("device", device, DEVICES)):
        if value not in accepted:
            raise StudyError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
    if engine == "local":
        if address is not None:
            raise StudyError(f"address {address!r} was given, which is for engine ray")
        return LocalPool(choose_device(device), workers)
    try:
        return RayPool(device, workers, address)
    except ConnectionError as error:
        raise StudyError(str(error)) from error


def _progress(total: int) -> Any:
    return optional("tqdm").tqdm(total=total, unit=" students", disable=None)
