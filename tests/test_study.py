"""`rkd.study`, `rkd.engine`, `rkd.cli`: tables that survive kills, crowds, shortage of memory and wild students."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from small_study import IMAGES, SPEC, quiet, table, write_images

from rkd import checkpoint
from rkd import study as study_module
from rkd.checkpoint import Keeper, Stopped
from rkd.data import digits, load
from rkd.engine import StudyError, run_study
from rkd.evaluation import accuracy, agreement, ece, nll
from rkd.models import build
from rkd.objectives import Student
from rkd.spec import read_study
from rkd.study import missing, prepare, read_rows, write_rows, write_whole
from rkd.training import Schedule, train_students


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RKD_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(SPEC, encoding="utf-8")
    return path


def command(spec, out, *options):
    return [sys.executable, "-m", "rkd.cli", "study", "run", str(spec), "--out", str(out), *options]


def test_rows_are_what_training_gives(spec, tmp_path):
    """One student of the table, trained and measured outside the engine."""
    study = read_study(spec)
    run_study(study, tmp_path / "out", "cpu", workers=1, log=quiet)
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 2 * 4 * 4
    row = next(
        r for r in rows if (r["transfer.size"], r["loss.alpha"], r["seed"], r["status"]) == ("60", "2.0", "3", "ok")
    )
    data, transfer, teacher = prepare(study.bundles[0].settings, "float32", "cpu")
    torch.testing.assert_close(data.test.x, load("digits").test.x)
    with torch.no_grad():
        seen, on_test = teacher(transfer.x), teacher(data.test.x)
    student = Student(alpha=2.0, temperature=2.0, scale="T2/alpha")
    make = lambda seed: build("mlp", (1, 8, 8), 10, seed, hidden=[8])  # noqa: E731
    schedule = Schedule(epochs=6, batch_size=20)
    logits = train_students(make, [student], [3], transfer, seen, schedule).predict(data.test.x)[0, 0]
    assert float(row["test_accuracy"]) == pytest.approx(float(accuracy(logits, data.test.y)), abs=2 / 800)
    assert float(row["test_nll"]) == pytest.approx(float(nll(logits, data.test.y)), rel=1e-3)
    assert float(row["test_ece"]) == pytest.approx(float(ece(logits, data.test.y)), abs=5e-3)
    assert float(row["test_agreement"]) == pytest.approx(float(agreement(logits, on_test)), abs=2 / 800)
    assert float(row["test_curve"].split()[-1]) == pytest.approx(float(row["test_accuracy"]), abs=1e-4)
    assert len(row["validation_curve"].split()) == 6
    assert float(row["soft_gradient_last"]) > 0


def test_classes_that_no_student_saw_have_an_accuracy_of_their_own(spec, tmp_path):
    text = SPEC.replace("transfer: {size: [60, 120]}", "transfer: {without: [3, 5]}").replace("seeds: 4", "seeds: 1")
    spec.write_text(text, encoding="utf-8")
    study = read_study(spec)
    run_study(study, tmp_path / "out", "cpu", workers=1, log=quiet)
    rows = {row["loss.loss"]: row for row in read_rows(tmp_path / "out" / "runs.csv").values()}
    assert float(rows["hard"]["test_accuracy_unseen"]) == 0
    assert float(rows["mse"]["test_accuracy_unseen"]) > 0
    unseen = float(torch.isin(load("digits").test.y, torch.tensor([3, 5])).double().mean())
    assert float(rows["hard"]["test_accuracy"]) <= 1 - unseen


def test_continued_after_kills_it_is_the_same_table(spec, tmp_path):
    """SIGKILL at random moments, among them while importing, estimating, training the teacher and writing."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(command(spec, whole, "--workers", "2"), check=True, stdout=subprocess.DEVNULL)
    draw, kills = random.Random(1), 0
    while kills < 6:
        process = subprocess.Popen(command(spec, parts, "--workers", "2"), stdout=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.5, 4.0))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
    subprocess.run(command(spec, parts, "--workers", "2"), check=True, stdout=subprocess.DEVNULL)
    assert kills > 0
    assert table(parts) == table(whole)


def test_two_processes_do_not_meet(spec, tmp_path):
    """Whichever comes second says so and changes nothing; or, if the first has finished, finds nothing to do."""
    out = tmp_path / "out"
    pair = [
        subprocess.Popen(command(spec, out), stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL) for _ in "ab"
    ]
    errors = [process.communicate()[1] for process in pair]
    codes = sorted(process.returncode for process in pair)
    assert codes in ([0, 0], [0, 2])
    if codes == [0, 2]:
        assert any("another process is running a study in" in error for error in errors)
    assert len(table(out)) == 32


def test_finished_runs_are_kept_when_the_study_grows(spec, tmp_path):
    out, lines = tmp_path / "out", []
    roomy = SPEC.replace("bundle: 4", "bundle: 64")
    spec.write_text(roomy, encoding="utf-8")
    run_study(read_study(spec), out, "cpu", workers=1, log=quiet)
    before = (out / "runs.csv").read_text(encoding="utf-8").splitlines()
    spec.write_text(roomy.replace("alpha: [0.5, 2]", "alpha: [0.5, 1, 2]"), encoding="utf-8")
    study = read_study(spec)
    assert sum(map(len, missing(study, read_rows(out / "runs.csv")))) == 2 * 4
    run_study(study, out, "cpu", workers=1, log=lines.append)
    after = (out / "runs.csv").read_text(encoding="utf-8").splitlines()
    assert set(before) < set(after)
    assert len(after) == 1 + 2 * 5 * 4
    assert lines[0] == "s: 40 students, 32 done, 8 to train in 2 bundles; 1 teacher"
    executions = json.loads((out / "provenance.json").read_text(encoding="utf-8"))["executions"]
    assert executions[-1]["students"] == 8


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A study of residual networks, and its images."""
    write_images(tmp_path / "data")
    monkeypatch.setenv("RKD_DATA_DIR", str(tmp_path / "data"))
    path = tmp_path / "images.yaml"
    path.write_text(IMAGES, encoding="utf-8")
    return path


@pytest.fixture
def kept(monkeypatch):
    """How many steps were done each time that a state was kept, by the name of its file."""
    steps, save = [], Keeper._save

    def note(self, path, step, state):
        steps.append((path.name.split("-")[0], step))
        save(self, path, step, state)

    monkeypatch.setattr(Keeper, "_save", note)
    return steps


def test_within_a_bundle_and_a_teacher_a_killed_study_goes_on(images, tmp_path, monkeypatch):
    """SIGKILL as soon as another state is there: of the teacher, then of each bundle. The table is the same."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_study(read_study(images), tmp_path / "whole", "cpu", workers=1, log=quiet)
    monkeypatch.setenv("RKD_CACHE_DIR", str(tmp_path / "another cache"))
    out, seen = tmp_path / "parts", set()
    while True:
        process = subprocess.Popen(command(images, out, "--workers", "1", "--every", "0"), stdout=subprocess.DEVNULL)
        while process.poll() is None:
            states = {path.name for path in (out / "state").glob("*.safetensors")} if out.exists() else set()
            if states - seen:
                seen |= states
                time.sleep(0.1)
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        if process.returncode == 0:
            break
    assert sorted(name.split("-")[0] for name in seen) == ["bundle", "bundle", "teacher"]
    assert table(out) == table(tmp_path / "whole")
    assert not (out / "state").exists()


def test_a_budget_stops_within_a_bundle_and_the_next_execution_goes_on(images, tmp_path, kept, monkeypatch):
    """A clock on which each step takes a second: the states are those of the steps at which the time was up."""
    run_study(read_study(images), tmp_path / "whole", "cpu", workers=1, log=quiet)
    assert kept == []
    monkeypatch.setenv("RKD_CACHE_DIR", str(tmp_path / "another cache"))
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "time", lambda: now[0])
    offer = Keeper.offer

    def second(self, step, state):
        now[0] += self._path is not None  # the estimate's steps keep nothing
        offer(self, step, state)

    monkeypatch.setattr(Keeper, "offer", second)
    out, lines, executions = tmp_path / "parts", [], 0
    while not lines or "s is used up" in lines[-1]:
        run_study(read_study(images), out, "cpu", workers=1, log=lines.append, budget=5.5)
        executions += 1
    # of the teacher 2 · 4 batches, of each of two bundles as many: all 24 steps, six an execution
    assert kept == [("teacher", 6), ("bundle", 4), ("bundle", 2), ("bundle", 8)]
    assert executions == 5
    assert "teacher resnet8, seed 0: not ready yet" in lines
    assert "stopped in a bundle of 2 students, whose state is kept" in lines
    assert table(out) == table(tmp_path / "whole")
    provenance = json.loads((out / "provenance.json").read_text(encoding="utf-8"))["executions"]
    assert provenance[0]["hardware"]
    assert provenance[-1]["precision"] == "bf16"
    assert not (out / "state").exists()


def test_the_best_epoch_is_recorded_beside_the_last(images, tmp_path):
    run_study(read_study(images), tmp_path / "out", "cpu", workers=1, log=quiet)
    for row in table(tmp_path / "out"):
        curve = [float(value) for value in row["test_curve"].split()]
        assert len(curve) == 2
        assert float(row["test_accuracy_best"]) == pytest.approx(max(curve), abs=1e-4)
        assert float(row["test_accuracy"]) == pytest.approx(curve[-1], abs=1e-4)
    images.write_text(IMAGES + "curves: false\n", encoding="utf-8")
    run_study(read_study(images), tmp_path / "other", "cpu", workers=1, log=quiet)
    assert "test_accuracy_best" not in table(tmp_path / "other")[0]


def test_residual_students_do_not_depend_on_their_bundle(images, tmp_path):
    run_study(read_study(images), tmp_path / "two", "cpu", workers=1, log=quiet)
    for size in (1, 4):
        images.write_text(IMAGES.replace("bundle: 2", f"bundle: {size}"), encoding="utf-8")
        run_study(read_study(images), tmp_path / str(size), "cpu", workers=1, log=quiet)
        rows = {row["key"]: row for row in table(tmp_path / str(size))}
        assert len(rows) == 4
        for other in table(tmp_path / "two"):
            row = rows[other["key"]]
            for column in ("test_accuracy", "test_nll", "validation_nll", "test_agreement", "soft_gradient_last"):
                assert float(row[column]) == pytest.approx(float(other[column]), rel=1e-4)


def test_in_halves_what_is_done_before_the_time_is_up_is_kept(images, tmp_path, monkeypatch):
    """Four students do not fit; the first two are finished, and the time is up in the midst of the others."""
    images.write_text(IMAGES.replace("bundle: 2", "bundle: 4"), encoding="utf-8")
    train, lines, calls = study_module._train_and_measure, [], []

    def narrow(bundle, *rest):
        if len(bundle) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        calls.append(bundle)
        if len(calls) == 2:
            raise Stopped
        return train(bundle, *rest)

    monkeypatch.setattr(study_module, "_train_and_measure", narrow)
    out = tmp_path / "out"
    run_study(read_study(images), out, "cpu", workers=1, log=lines.append, budget=1e6)
    assert len(table(out)) == 2
    assert "2 students are left" in lines[-1]
    run_study(read_study(images), out, "cpu", workers=1, log=lines.append)
    assert len(table(out)) == 4


def test_impossible_ways_are_refused(spec, tmp_path):
    study = read_study(spec)
    for message, ways in {
        "budget must be a positive number of seconds, got 0": {"budget": 0},
        "mode must be one of auto, eager, graphs, compiled, got 'fast'": {"mode": "fast"},
        "mode graphs needs a GPU, got device 'cpu'": {"mode": "graphs"},
    }.items():
        with pytest.raises(ValueError, match=message):
            run_study(study, tmp_path / "out", "cpu", workers=1, log=quiet, **ways)
    assert not (tmp_path / "out" / "runs.csv").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_budget_ends_an_execution_and_the_next_goes_on(spec, tmp_path, workers):
    spec.write_text(SPEC + "budget: 0.000001\n", encoding="utf-8")
    lines = []
    run_study(read_study(spec), tmp_path / "out", "cpu", workers, log=lines.append)
    assert lines[-1] == "the budget of 1e-06 s is used up, 32 students are left: run the study again to go on"
    spec.write_text(SPEC + "budget: 1000\n", encoding="utf-8")
    run_study(read_study(spec), tmp_path / "out", "cpu", workers, log=lines.append)
    assert lines[-1].startswith("32 runs in ")
    assert len(table(tmp_path / "out")) == 32


def test_a_table_of_another_study_is_left_alone(spec, tmp_path):
    out = tmp_path / "out"
    run_study(read_study(spec), out, "cpu", workers=1, log=quiet)
    before = (out / "runs.csv").read_bytes()
    spec.write_text(SPEC.replace("training: {epochs: 6", "training: {epochs: 7"), encoding="utf-8")
    with pytest.raises(StudyError, match="holds 32 runs that this study does not ask for"):
        run_study(read_study(spec), out, "cpu", workers=1, log=quiet)
    assert (out / "runs.csv").read_bytes() == before


def test_where_memory_runs_out_bundles_are_halved(spec, tmp_path, monkeypatch):
    spec.write_text(SPEC.replace("bundle: 4", "bundle: 64"), encoding="utf-8")
    run_study(read_study(spec), tmp_path / "roomy", "cpu", workers=1, log=quiet)
    train, lines = study_module._train_and_measure, []

    def narrow(bundle, *rest):
        if len(bundle) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return train(bundle, *rest)

    monkeypatch.setattr(study_module, "_train_and_measure", narrow)
    run_study(read_study(spec), tmp_path / "narrow", "cpu", workers=1, log=lines.append)
    assert "out of memory with 16 students: going on with half as many" in lines
    roomy, small = table(tmp_path / "roomy"), table(tmp_path / "narrow")
    assert [row["key"] for row in roomy] == [row["key"] for row in small]
    for a, b in zip(roomy, small):
        assert float(a["test_nll"]) == pytest.approx(float(b["test_nll"]), rel=1e-3)


def test_an_error_that_is_not_about_memory_is_raised(spec, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(study_module, "_train_and_measure", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_study(read_study(spec), tmp_path / "out", "cpu", workers=1, log=quiet)


def test_a_student_that_diverges_is_recorded(spec, tmp_path):
    text = SPEC.replace("{loss: hard}", "{loss: hard, learning_rate: [0.01, 1.0e+30]}").replace(
        "20}", "20, optimizer: sgd}"
    )
    spec.write_text(text.replace("bundle: 4", "bundle: 64"), encoding="utf-8")
    run_study(read_study(spec), tmp_path / "out", "cpu", workers=1, log=quiet)
    wild = [row for row in table(tmp_path / "out") if row["loss.learning_rate"] == "1e+30"]
    assert {row["status"] for row in wild} == {"diverged"}
    others = [row for row in table(tmp_path / "out") if row["loss.learning_rate"] != "1e+30"]
    assert {row["status"] for row in others} == {"ok"}
    assert len(wild) == 8


def test_teachers_are_kept_and_a_damaged_one_is_trained_again(spec, tmp_path):
    settings = read_study(spec).bundles[0].settings
    x = digits(torch.float32).test.x
    first = prepare(settings, "float32", "cpu")[2](x)
    (kept,) = (tmp_path / "cache" / "teachers").glob("*.safetensors")
    content = kept.read_bytes()
    torch.testing.assert_close(prepare(settings, "float32", "cpu")[2](x), first, rtol=0, atol=0)
    kept.write_bytes(content[: len(content) // 2])
    torch.testing.assert_close(prepare(settings, "float32", "cpu")[2](x), first, rtol=0, atol=0)
    assert kept.read_bytes() == content


def test_the_table_reads_back(tmp_path):
    rows = [{"key": "a", "x": 0.1 + 0.2, "y": '1,2 "quoted"\nline'}, {"key": "b", "x": float("inf"), "z": None}]
    write_rows(tmp_path / "runs.csv", rows)
    back = read_rows(tmp_path / "runs.csv")
    assert [float(row["x"]) for row in back.values()] == [0.1 + 0.2, float("inf")]
    assert back["a"]["y"] == rows[0]["y"]
    write_rows(tmp_path / "again.csv", back.values())
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "runs.csv").read_bytes()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"old")

    def full(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(list(tmp_path.glob(".a.*"))) == 0


def test_impossible_sizes_are_refused_before_anything_runs(spec, tmp_path):
    spec.write_text(SPEC.replace("[60, 120]", "[60, 5000]"), encoding="utf-8")
    with pytest.raises(ValueError, match="size must lie in 1 … 797, got 5000"):
        run_study(read_study(spec), tmp_path / "out", "cpu", workers=1, log=quiet)
    assert not (tmp_path / "cache").exists()


def test_command_line(spec, tmp_path):
    def rkd(*arguments):
        return subprocess.run([sys.executable, "-m", "rkd.cli", *arguments], capture_output=True, text=True)

    out = tmp_path / "results" / "s"  # the default: beside the study
    assert "32 to train in 8 bundles" in rkd("study", "status", str(spec)).stdout
    assert "has no runs yet" in rkd("study", "report", str(spec)).stderr
    ran = rkd("study", "run", str(spec))
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert [row["status"] for row in table(out)] == ["ok"] * 32
    report = list(csv.DictReader(rkd("study", "report", str(spec)).stdout.splitlines()))
    assert len(report) == 2 * 4
    assert all(
        float(r["test_accuracy_low"]) <= float(r["test_accuracy"]) <= float(r["test_accuracy_high"]) for r in report
    )
    wrong = rkd("study", "run", str(tmp_path / "nothing.yaml"))
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("rkd: ")
    assert rkd("data", "fetch", "imagenet").stderr.startswith("rkd: name must be one of")
