"""Run a study's bundles, on this machine or a cluster: plan, progress, provenance, and one writer of the table.

On a CPU every core is a process with one thread, which is faster than threads for small networks and leaves each result
independent of how many there are; on a GPU one process trains bundle after bundle. Where bundles run is a pool's
business, `LocalPool` or `rkd.cluster.RayPool`; what is written is written here.
Explained in the book: A.5, "Running a study".
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from itertools import takewhile
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from rkd.cluster import LostError, RayPool, keep
from rkd.fields import Settings
from rkd.provenance import execution, hardware, record
from rkd.sources import cache_folder, optional
from rkd.spec import Bundle, Study, run_key, teacher_key
from rkd.study import Probe, Row, missing, prepare, read_rows, run_bundle, teacher_file, write_rows

Log = Callable[[str], None]
ENGINES = ("local", "ray")
DEVICES = ("auto", "cpu", "cuda")


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
) -> None:
    """Train what has no row in `out`/runs.csv yet.

    Args:
        study: from `rkd.spec.read_study`.
        out: folder of runs.csv and provenance.json; made if needed.
        device: "auto" is a GPU where there is one; or "cpu", "cuda".
        workers: bundles at once on CPUs or on a cluster; as many as there are cores, or room in the cluster, if None.
        log: takes a line of text.
        engine: "local" is this machine, "ray" a Ray cluster.
        address: of the cluster, as `rkd.cluster.RayPool` takes it.

    Raises:
        StudyError: another process is running a study in this folder; its table holds runs that this study does not
            ask for; the device or the cluster is not there; or worker processes ended before their bundles, after all
            others were recorded.
        ImportError: Ray is asked for and is not installed.
    """
    filelock = optional("filelock")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / ".lock", timeout=0):
            order, rows = _recorded(study, out / "runs.csv")
            log(describe(study, rows))
            if rest := missing(study, rows):
                with _pool(engine, device, workers, address) as pool:
                    _train(study, rest, out, order, rows, pool, execution(engine, pool.device, pool.workers), log)
    except filelock.Timeout as error:
        raise StudyError(f"another process is running a study in {out}; wait for it, or give another folder") from error
    except LostError as error:
        kept = len(read_rows(out / "runs.csv"))
        raise StudyError(f"{error}; {kept:,} finished runs are kept: run the study again to go on") from error


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
    pool: "LocalPool | RayPool",
    entry: dict[str, Any],
    log: Log,
) -> None:
    """The bundles of `rest`: each adds its runs to `rows`, and the table is written anew, in the order of the keys."""
    table, device, precision = out / "runs.csv", pool.device, study.precision
    ((_, seconds),) = pool.map(_estimate, [(rest, precision, study.curves, device)])
    log(f"about {max(1, round(seconds / pool.workers)):,} s on {pool.workers} × {device}, after the teachers")
    start = time.perf_counter()
    files = [teacher_file(bundle.settings, precision) for bundle in rest]
    teachers = {file: (bundle.settings, precision, device) for file, bundle in zip(files, rest, strict=True)}
    for _, (text, file, content) in pool.map(_train_teacher, list(teachers.values()), list(teachers)):
        keep(file, content)
        log(text)
    nodes: dict[str, dict[str, Any]] = {}
    with _progress(sum(map(len, rest))) as bar:
        tasks = [(bundle, precision, study.curves, device) for bundle in rest]
        in_time = lambda: study.budget is None or time.perf_counter() - start < study.budget  # noqa: E731
        for node, (new, notes, machine) in pool.map(_train_bundle, tasks, files, in_time):
            for note in notes:
                log(note)
            rows |= {row["key"]: row for row in new}
            write_rows(table, [rows[key] for key in order if key in rows])
            nodes.setdefault(node, {"hardware": machine, "bundles": 0})["bundles"] += 1
            entry |= {
                "hardware": ", ".join(sorted({n["hardware"] for n in nodes.values()})),
                "nodes": list(nodes.values()),
                "students": entry["students"] + len(new),
                "wall_seconds": round(time.perf_counter() - start, 3),
            }
            record(out, study, entry)
            bar.update(len(new))
    log(f"{len(rows):,} runs in {table}, {entry['wall_seconds']:.1f} s")
    if left := len(order) - len(rows):
        log(f"the budget of {study.budget:g} s is used up, {left:,} students are left: run the study again to go on")


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


def _train_teacher(settings: Settings, precision: str, device: str) -> tuple[str, Path, bytes]:
    """A line about the teacher, its file, and what that holds."""
    data, _, teacher = prepare(settings, precision, device)
    teacher.eval()
    with torch.no_grad():
        guesses = torch.cat([teacher(part).argmax(-1) for part in data.test.x.split(1000)])
    right = float((guesses == data.test.y).double().mean())
    wanted, file = settings["teacher"], teacher_file(settings, precision)
    text = f"teacher {wanted['model']}, seed {wanted['seed']}: {right:.2%} of {data.name} test"
    return text, file, (cache_folder() / file).read_bytes()


def _train_bundle(bundle: Bundle, precision: str, curves: bool, device: str) -> tuple[list[Row], list[str], str]:
    """Rows, notes, and the hardware that they come from."""
    notes: list[str] = []
    return run_bundle(bundle, precision, curves, device, notes.append), notes, hardware(device)


def _pool(engine: str, device: str, workers: int | None, address: str | None) -> "LocalPool | RayPool":
    for name, value, accepted in (("engine", engine, ENGINES), ("device", device, DEVICES)):
        if value not in accepted:
            raise StudyError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
    if engine == "local":
        if address is not None:
            raise StudyError(f"address {address!r} was given, which is for engine ray")
        return LocalPool(device, workers)
    try:
        return RayPool(device, workers, address)
    except ConnectionError as error:
        raise StudyError(str(error)) from error


class LocalPool:
    """Worker processes that end with their parent, however it ends; none for a GPU or a single worker.

    Attributes:
        device: "cpu" or "cuda".
        workers: how many tasks run at once.
    """

    def __init__(self, device: str, workers: int | None) -> None:
        self.device = choose_device(device)
        self.workers = 1 if self.device == "cuda" else workers or _cores()
        self._executor = None
        if self.workers > 1:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.workers, context, initializer=_start_worker)

    def map(
        self,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        files: Sequence[Path] = (),
        more: Callable[[], bool] = lambda: True,
    ) -> Iterator[tuple[str, Any]]:
        """As `rkd.cluster.RayPool.map`, without retries; the node is "", and files are where the tasks find them.

        Raises:
            LostError: a worker process ended.
        """
        if self._executor is None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                yield from (("", function(*task)) for task in takewhile(lambda _: more(), tasks))
            finally:
                torch.set_num_threads(threads)
            return
        left, running, given = list(tasks), set[Future[Any]](), 0
        while True:
            while left and len(running) < self.workers and more():
                running.add(self._executor.submit(function, *left.pop(0)))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                try:
                    result = future.result()
                except BrokenExecutor as error:
                    raise LostError(
                        f"a worker process ended with {len(tasks) - given} of {len(tasks)} tasks left"
                    ) from error
                given += 1
                yield "", result

    def __enter__(self) -> "LocalPool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _progress(total: int) -> Any:
    return optional("tqdm").tqdm(total=total, unit=" students", disable=None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
