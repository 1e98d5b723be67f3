"""Where the rows of a table come from: hardware, versions, commit, source, time. Kept beside it as provenance.json.

Explained in the book: A.5, "Running a study".
"""

import hashlib
import json
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rkd.spec import Study
from rkd.study import write_whole


def execution(engine: str, device: str, workers: int) -> dict[str, Any]:
    """What is known of an execution before its first bundle."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "engine": engine,
        "device": device,
        "hardware": "",
        "nodes": [],
        "workers": workers,
        "rkd_sha256": _own_source(),
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "command": Path(sys.argv[0]).name,
        "students": 0,
        "wall_seconds": 0.0,
    }


@lru_cache
def hardware(device: str) -> str:
    """The GPU's name, or the processor's where the system tells it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError, subprocess.CalledProcessError, StopIteration):
        text = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
        return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("Model name"))
    return platform.processor() or platform.machine()


def record(out: Path, study: Study, execution: dict[str, Any]) -> None:
    """Write `out`/provenance.json: one entry an execution, which is replaced while it lasts."""
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
