"""Run a study's bundles on this machine: plan, progress, provenance, and one writer of the table.

On a CPU every core is a process with one thread, which is faster than threads for small networks and leaves each result
independent of how many there are; on a GPU one process trains bundle after bundle.
Explained in the book: A.5, "Running a study".
"""

import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rkd.sources import optional
from rkd.spec import Bundle, Study, run_key, teacher_key
from rkd.study import Probe, Row, missing, prepare, read_rows, run_bundle, write_rows, write_whole

Log = Callable[[str], None]


class StudyError(RuntimeError):
    """A study cannot run in this folder now; says why."""


def run_study(study: Study, out: Path, device: str = "auto", workers: int | None = None, log: Log = print) -> None:
    """Train what has no row in `out`/runs.csv yet.

    Args:
        study: from `rkd.spec.read_study`.
        out: folder of runs.csv and provenance.json; made if needed.
        device: "auto" is a GPU where there is one; or "cpu", "cuda".
        workers: processes on a CPU; as many as it has cores if None.
        log: takes a line of text.

    Raises:
        StudyError: another process is running a study in this folder, or its table holds runs that this study does not
            ask for.
    """
    filelock = optional("filelock")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / ".lock", timeout=0):
            where = choose_device(device)
            _run(study, out, where, 1 if where == "cuda" else workers or _cores(), log)
    except filelock.Timeout as error:
        raise StudyError(f"another process is running a study in {out}; wait for it, or give another folder") from error


def choose_device(device: str) -> str:
    """ "cpu" or "cuda".

    Raises:
        StudyError: "cuda" where there is none, or another name.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise StudyError(f"device must be auto, cpu or cuda, got {device!r}")
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


def _run(study: Study, out: Path, device: str, workers: int, log: Log) -> None:
    table = out / "runs.csv"
    done = read_rows(table)
    order = [run_key(run, study.precision) for bundle in study.bundles for _, _, run in bundle.runs()]
    if foreign := len(done.keys() - set(order)):
        raise StudyError(
            f"{table} holds {foreign} runs that this study does not ask for; "
            "give another folder with --out, or move the table away: nothing was changed"
        )
    rest = missing(study, done)
    log(describe(study, done))
    if not rest:
        return
    seconds = max(1, round(_estimate(study, rest, device) / workers))
    log(f"about {seconds:,} s on {workers} × {device}, after the teachers")
    start = time.perf_counter()
    execution = _execution(device, workers)
    rows: dict[str, Row] = dict(done)
    with _Pool(device, workers) as pool:
        teachers = {teacher_key(bundle.settings, study.precision): bundle for bundle in rest}
        for text in pool.map(_train_teacher, [(b.settings, study.precision, device) for b in teachers.values()]):
            log(text)
        with _progress(sum(map(len, rest))) as bar:
            for new, notes in pool.map(_train_bundle, [(b, study.precision, study.curves, device) for b in rest]):
                for note in notes:
                    log(note)
                rows |= {row["key"]: row for row in new}
                write_rows(table, [rows[key] for key in order if key in rows])
                execution |= {
                    "students": execution["students"] + len(new),
                    "wall_seconds": round(time.perf_counter() - start, 3),
                }
                _record(out, study, execution)
                bar.update(len(new))
    log(f"{len(rows):,} runs in {table}, {execution['wall_seconds']:.1f} s")


def _estimate(study: Study, rest: Sequence[Bundle], device: str) -> float:
    """Seconds of one worker for these bundles, from a few steps of the first of each kind; looks at all settings."""
    total, cost = 0.0, {}
    for bundle in rest:
        kind = (
            len(bundle.losses),
            len(bundle.seeds),
            repr(bundle.settings["student"]),
            repr(bundle.settings["training"]),
        )
        probe = Probe(bundle, study.precision, device)
        if kind not in cost:
            cost[kind] = (probe.step_seconds(), probe.test_seconds() if study.curves else 0.0)
        step, test = cost[kind]
        total += probe.steps * step + probe.epochs * test
    return total


def _train_teacher(task: tuple[Any, ...]) -> str:
    settings, precision, device = task
    data, _, teacher = prepare(settings, precision, device)
    teacher.eval()
    with torch.no_grad():
        guesses = torch.cat([teacher(part).argmax(-1) for part in data.test.x.split(1000)])
    right = float((guesses == data.test.y).double().mean())
    return (
        f"teacher {settings['teacher']['model']}, seed {settings['teacher']['seed']}: {right:.2%} of {data.name} test"
    )


def _train_bundle(task: tuple[Bundle, str, bool, str]) -> tuple[list[Row], list[str]]:
    notes: list[str] = []
    return run_bundle(*task, notes.append), notes


class _Pool:
    """Worker processes that end with their parent, however it ends; none for a GPU or a single worker."""

    def __init__(self, device: str, workers: int) -> None:
        self._executor = None
        if device == "cpu" and workers > 1:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(workers, context, initializer=_start_worker)

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        """Results in the order in which they come."""
        if self._executor is None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                yield from map(function, tasks)
            finally:
                torch.set_num_threads(threads)
            return
        for future in as_completed([self._executor.submit(function, task) for task in tasks]):
            yield future.result()

    def __enter__(self) -> "_Pool":
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


# --------------------------------------------------------------------------- provenance


def _execution(device: str, workers: int) -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "hardware": hardware(device),
        "workers": workers,
        "rkd_sha256": _own_source(),
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "command": Path(sys.argv[0]).name,
        "students": 0,
        "wall_seconds": 0.0,
    }


def hardware(device: str) -> str:
    """The GPU's name, or the processor's where the system tells it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError, subprocess.CalledProcessError, StopIteration):
        text = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
        return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("Model name"))
    return platform.processor() or platform.machine()


def _record(out: Path, study: Study, execution: dict[str, Any]) -> None:
    """One entry an execution: the last one is replaced while it lasts."""
    path = out / "provenance.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"executions": []}
    executions = [e for e in content["executions"] if e["started"] != execution["started"]]
    content = {
        "study": study.name,
        "spec_sha256": study.digest,
        "spec": study.source,
        "executions": [*executions, execution],
    }
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _own_source() -> str:
    """SHA-256 of the package's files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
