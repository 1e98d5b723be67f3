"""Tasks over a Ray cluster: sent with the file that they read, and repeated where a worker or a node is lost.

Ray decides where and when a task runs. Every node gets this package's source and the variables RKD_* from the driver,
the process that asks. Nothing here knows what a task does.
Explained in the book: A.5, "Running a study".
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rkd.sources import cache_folder, optional
from rkd.study import write_whole

RETRIES = 3


class LostError(RuntimeError):
    """Tasks gave no result, since their processes ended; says how many and why."""


class RayPool:
    """Runs tasks on a Ray cluster, each on a CPU core with one thread, or on a GPU.

    Attributes:
        device: "cpu" or "cuda", what the tasks run on.
        workers: how many the cluster has room for when the pool is made, `workers` at most.
    """

    def __init__(self, device: str = "auto", workers: int | None = None, address: str | None = None) -> None:
        """Connect, or start Ray on this machine. A connection that this process has already is used as it is.

        Args:
            device: "auto" is the cluster's GPUs if it has any; or "cpu", "cuda".
            workers: most tasks at once; as many as the cluster has room for now if None.
            address: of the cluster's head, such as 10.0.0.1:6379. If None, what RAY_ADDRESS says, or the cluster that
                this machine belongs to, or a new one on this machine that ends with the pool.

        Raises:
            ImportError: Ray is not installed; says how to.
            ConnectionError: no cluster answers, or it lacks the device.
        """
        self._ray = _import_ray()
        self._connected_here = not self._ray.is_initialized()
        if self._connected_here:
            _connect(self._ray, address)
        resources = self._ray.cluster_resources()
        self.device = "cuda" if device == "cuda" or (device == "auto" and "GPU" in resources) else "cpu"
        self._kind = "GPU" if self.device == "cuda" else "CPU"
        room = int(resources.get(self._kind, 0))
        self.workers = min(room, workers or room)
        self._running: dict[Any, int] = {}
        if not room:
            self._leave()
            raise ConnectionError(f"the Ray cluster has no {self._kind}")

    def map(
        self,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        files: Sequence[Path] = (),
        more: Callable[[], bool] = lambda: True,
    ) -> Iterator[tuple[str, Any]]:
        """`function(*task)` for each task, again up to three times where its process or its node is lost.

        An exception that a task raises comes out at once and unchanged; it is not tried again.

        Args:
            function: one that is found by its module and name on every node.
            tasks: arguments that can be pickled.
            files: for each task the file that it reads, relative to `rkd.sources.cache_folder`; none if empty. The
                driver's copy takes its place in the node's cache before the task starts; one that the driver lacks is
                left to the task.
            more: asked before a task is begun; once it says no, those that run are waited for and the others dropped.

        Yields:
            The node's name in Ray and the result, in the order in which results come.

        Raises:
            LostError: tasks were lost four times; after the results of all others.
        """
        copies: dict[Path | None, Any] = {
            file: self._ray.put(path.read_bytes()) for file in set(files) if (path := _at(file)).is_file()
        }
        options = {"num_cpus": 1, "num_gpus": int(self._kind == "GPU"), "max_retries": RETRIES}
        call = self._ray.remote(**options)(_call)
        left, lost, reason = list(enumerate(tasks)), 0, ""
        while left or self._running:
            while left and len(self._running) < self.workers and more():
                i, task = left.pop(0)
                file = files[i] if files else None
                self._running[call.remote(function, task, file, copies.get(file))] = i
            if not self._running:
                break
            (done,), _ = self._ray.wait(list(self._running))
            del self._running[done]
            try:
                result = self._ray.get(done)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            except self._ray.exceptions.RayError as error:
                lost, reason = lost + 1, str(error).strip().splitlines()[0]
            else:
                yield result
        if lost:
            raise LostError(f"{lost} of {len(tasks)} tasks gave no result, each tried {RETRIES + 1} times: {reason}")

    def _leave(self) -> None:
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._running.clear()
        if self._connected_here:
            self._ray.shutdown()

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()


def keep(file: Path, content: bytes) -> None:
    """Put a file into the cache folder, unless it is there with the same content."""
    path = _at(file)
    if not path.is_file() or path.read_bytes() != content:
        write_whole(path, content)


def _at(file: Path) -> Path:
    return cache_folder() / file


def _call(
    function: Callable[..., Any], task: tuple[Any, ...], file: Path | None, content: bytes | None
) -> tuple[str, Any]:
    """What a worker does; Ray puts the content in the place of its reference."""
    ray = _import_ray()
    torch.set_num_threads(1)
    if file is not None and content is not None:
        keep(file, content)
    return ray.get_runtime_context().get_node_id(), function(*task)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # where memory runs out Ray would try for ever
    return optional("ray", "ray")


def _connect(ray: Any, address: str | None) -> None:
    address = address or os.environ.get("RAY_ADDRESS")
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself would wait two minutes for a host that does not answer, and end the process
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(
            address=address,
            runtime_env={
                "py_modules": [str(Path(__file__).parent)],
                "env_vars": {name: value for name, value in os.environ.items() if name.startswith("RKD_")},
            },
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError, SystemExit) as error:
        raise ConnectionError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
