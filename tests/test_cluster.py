"""`rkd.cluster`: over a cluster the table is the same as on one machine, whatever happens to workers and nodes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from small_study import SPEC, quiet, table

from rkd import engine
from rkd.cluster import LostError, RayPool, keep
from rkd.engine import StudyError, run_study
from rkd.provenance import hardware
from rkd.spec import read_study

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'rkd[ray]'")
cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: pip install 'rkd[ray]'")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file


def start(folder, cpus):
    """A cluster of one node, which keeps its teachers in `folder`, as if it were another machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RKD_CACHE_DIR", raising=False)
        quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
        return cluster_utils.Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": cpus, "include_dashboard": False, "_system_config": quick},
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = start(tmp_path_factory.mktemp("node"), 2)
    yield cluster
    cluster.shutdown()


@pytest.fixture(autouse=True)
def driver(tmp_path, monkeypatch):
    monkeypatch.delenv("RKD_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "driver"))
    monkeypatch.setenv("RKD_TRACE", str(tmp_path / "trace"))
    (tmp_path / "trace").mkdir()


@pytest.fixture
def study(tmp_path):
    (tmp_path / "s.yaml").write_text(SPEC, encoding="utf-8")
    return read_study(tmp_path / "s.yaml")


@pytest.fixture
def expected(study, tmp_path):
    run_study(study, tmp_path / "local", "cpu", workers=1, log=quiet)
    return table(tmp_path / "local")


def over(cluster, study, out):
    run_study(study, out, log=quiet, engine="ray", address=cluster.address)


def last_execution(out):
    return json.loads((out / "provenance.json").read_text(encoding="utf-8"))["executions"][-1]


# What workers are given in the place of `rkd.engine._train_bundle`; each call leaves a file in the folder RKD_TRACE.


def trace(name):
    (Path(os.environ["RKD_TRACE"]) / f"{name}-{os.getpid()}-{time.monotonic_ns()}").touch()


def traces(name):
    return list(Path(os.environ["RKD_TRACE"]).glob(f"{name}-*"))


def wait_for(name, seconds=120):
    end = time.monotonic() + seconds
    while not traces(name):
        assert time.monotonic() < end, f"{name} has not come about"
        time.sleep(0.02)


def is_last(bundle):
    return (bundle.settings["transfer"]["size"], bundle.seeds) == (120, (3,))


def deadly(bundle, *rest):
    if is_last(bundle):
        trace("died")
        os._exit(1)
    return engine._train_bundle(bundle, *rest)


def mistaken(bundle, *rest):
    if is_last(bundle):
        trace("raised")
        raise ValueError("an impossible value")
    return engine._train_bundle(bundle, *rest)


def stalling(*task):
    """On the node RKD_DOOMED the first bundle is trained, and the second never ends; the other node waits for that."""
    if ray.get_runtime_context().get_node_id() != os.environ["RKD_DOOMED"]:
        wait_for("stalled")
    elif traces("trained"):
        trace("stalled")
        time.sleep(300)
    else:
        trace("trained")
    return engine._train_bundle(*task)


def test_the_table_is_that_of_one_machine(cluster, study, tmp_path):
    """And the teacher, which a node has trained, is on this machine afterwards."""
    over(cluster, study, tmp_path / "out")
    (kept,) = (tmp_path / "driver/rkd/teachers").glob("*.safetensors")
    content = kept.read_bytes()
    run_study(study, tmp_path / "local", "cpu", workers=1, log=quiet)
    assert kept.read_bytes() == content
    assert table(tmp_path / "out") == table(tmp_path / "local")
    execution = last_execution(tmp_path / "out")
    assert (execution["engine"], execution["device"], execution["workers"]) == ("ray", "cpu", 2)
    assert execution["nodes"] == [{"hardware": hardware("cpu"), "bundles": 8}]
    assert not ray.is_initialized()


def test_all_students_learn_from_the_drivers_teacher(cluster, study, expected, tmp_path):
    """It goes before the one that a node would train, or has."""
    (kept,) = (tmp_path / "driver/rkd/teachers").glob("*.safetensors")
    (tmp_path / "other.yaml").write_text(SPEC.replace("epochs: 8", "epochs: 1"), encoding="utf-8")
    _, other, _ = engine._train_teacher(read_study(tmp_path / "other.yaml").bundles[0].settings, "float32", "cpu")
    shutil.move(tmp_path / "driver/rkd" / other, kept)
    over(cluster, study, tmp_path / "out")
    run_study(study, tmp_path / "again", "cpu", workers=1, log=quiet)
    assert table(tmp_path / "out") == table(tmp_path / "again") != expected


def test_a_node_that_dies_loses_no_finished_run(study, expected, tmp_path, monkeypatch):
    """Two nodes of one core; the second is removed after it finished a bundle and while it trains another."""
    cluster, out, left = start(tmp_path / "head", 1), tmp_path / "out", []
    doomed = cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RKD_DOOMED", doomed.node_id)
    monkeypatch.setattr(engine, "_train_bundle", stalling)

    def remove():
        wait_for("stalled")
        left.append(32 - len(table(out)))
        cluster.remove_node(doomed, allow_graceful=False)

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        over(cluster, study, out)
        thread.join()
    finally:
        cluster.shutdown()
    assert left == [28]
    assert table(out) == expected
    assert sorted(node["bundles"] for node in last_execution(out)["nodes"]) == [1, 7]


def test_a_bundle_that_always_kills_its_worker_is_reported(cluster, study, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_train_bundle", deadly)
        with pytest.raises(StudyError) as caught:
            over(cluster, study, out)
    assert "1 of 8 tasks gave no result, each tried 4 times" in str(caught.value)
    assert "28 finished runs are kept" in str(caught.value)
    assert len(traces("died")) == 4
    assert table(out) == [row for row in expected if (row["transfer.size"], row["seed"]) != ("120", "3")]
    run_study(study, out, "cpu", workers=1, log=quiet)
    assert table(out) == expected


def test_an_exception_comes_out_and_is_not_repeated(cluster, study, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_train_bundle", mistaken)
    with pytest.raises(ValueError, match="^an impossible value$") as caught:
        over(cluster, study, tmp_path / "out")
    assert type(caught.value) is ValueError
    assert len(traces("raised")) == 1


def test_data_that_a_node_lacks_are_reported_as_on_one_machine(cluster, tmp_path):
    (tmp_path / "s.yaml").write_text(SPEC.replace("digits", "cifar10"), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="^no files of cifar10 in "):
        over(cluster, read_study(tmp_path / "s.yaml"), tmp_path / "out")


def test_where_there_is_no_such_cluster(cluster, study, tmp_path):
    def refused(message, **options):
        with pytest.raises(StudyError, match=message):
            run_study(study, tmp_path / "out", log=quiet, **options)

    refused("engine must be one of local, ray, got 'dask'", engine="dask")
    refused("device must be one of auto, cpu, cuda, got 'tpu'", engine="ray", device="tpu")
    refused("address '10.0.0.1:6379' was given, which is for engine ray", address="10.0.0.1:6379")
    refused("no Ray cluster at 127.0.0.1:1: ", engine="ray", address="127.0.0.1:1")
    refused("the Ray cluster has no GPU", engine="ray", address=cluster.address, device="cuda")
    assert not ray.is_initialized()


def test_the_pool(cluster, monkeypatch, tmp_path):
    """Variables RKD_* reach the workers; no more tasks at once than asked for; local workers that end are reported."""
    monkeypatch.setenv("RKD_CACHE_DIR", "/somewhere")
    with RayPool("cpu", workers=1, address=cluster.address) as pool:
        assert pool.workers == 1
        ((node, value),) = pool.map(os.getenv, [("RKD_CACHE_DIR",)])
        assert (node, value) == (cluster.head_node.node_id, "/somewhere")
        spans = sorted(span for _, span in pool.map(span, [(0.05,)] * 4))
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    with engine.LocalPool("cpu", 2) as pool, pytest.raises(LostError, match="ended with 1 of 1 tasks left"):
        list(pool.map(os._exit, [(1,)]))


def span(seconds):
    begin = time.monotonic()
    time.sleep(seconds)
    return begin, time.monotonic()


def test_a_file_that_is_there_is_not_written_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RKD_CACHE_DIR", str(tmp_path))
    keep(Path("a/b"), b"old")
    before = (tmp_path / "a/b").stat()
    keep(Path("a/b"), b"old")
    assert (tmp_path / "a/b").stat() == before
    keep(Path("a/b"), b"new")
    assert (tmp_path / "a/b").read_bytes() == b"new"


def test_command_line_and_a_driver_that_is_killed(cluster, study, tmp_path):
    """Nothing but the plan is written; and tasks end with their driver, so that the cluster is free again."""
    command = [sys.executable, "-m", "rkd.cli", "study", "run", "--engine", "ray", "--address"]
    wrong = subprocess.run([*command, "127.0.0.1:1", str(tmp_path / "s.yaml")], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("rkd: no Ray cluster at 127.0.0.1:1")
    assert wrong.stderr.count("\n") == 1
    (tmp_path / "s.yaml").write_text(SPEC.replace("epochs: 6", "epochs: 1000000"), encoding="utf-8")
    with subprocess.Popen(
        [*command, cluster.address, str(tmp_path / "s.yaml")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("teacher"):
                break
        time.sleep(1)
        process.send_signal(signal.SIGKILL)
        assert process.stderr.read() == ""
    with RayPool("cpu", address=cluster.address) as pool:
        assert len(list(pool.map(span, [(0.1,)] * 2))) == 2
