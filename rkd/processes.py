"""Tasks over the cores of this machine, or on its GPU.

On a CPU every core is a process with one thread, which is faster than threads for small networks and leaves each result
independent of how many there are; on a GPU one process does task after task. Nothing here knows what a task does.
Book: A.5, "Running a study".
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from itertools import takewhile
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from rkd.cluster import LostError


class LocalPool:
    """Worker processes that end with their parent, however it ends; none for a GPU or a single worker.

    Attributes:
        device: "cpu" or "cuda".
        workers: how many tasks run at once; as many as there are cores if None, and one on a GPU.
    """

    def __init__(self, device: str, workers: int | None) -> None:
        self.device = device
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
