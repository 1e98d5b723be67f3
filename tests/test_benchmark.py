"""`rkd.benchmark`, `rkd.peers`, `rkd bench`: peers that compute the same, tables that go on where they stopped."""

import csv
import subprocess
import sys

import pytest
import torch

import rkd.benchmark
from rkd.benchmark import append, bench, choose, copy_bandwidth, measure, peak_mebibytes, step_seconds
from rkd.peers import CASES, LOSSES, OF_HIDDEN, Case, draw, names

SMALL = Case(8, 5)


@pytest.fixture
def few(monkeypatch):
    """Three losses and no compiler."""
    monkeypatch.setattr(rkd.benchmark, "names", lambda *_: ["KL, eager", "rkd, order 1", "rkd, order 2"])


class TestPeers:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_compute_the_same_value(self, dtype):
        z, v = draw(Case(64, 20, 0, dtype), "cpu")
        same = {name: loss(z, v).item() for name, loss in LOSSES.items() if "Liger" not in name}
        for one, other in [
            ("KL, eager", "rkd, order 1"),
            ("KL of log target, compiled", "rkd, order 1"),
            ("Rényi, eager", "rkd, order 2"),
            ("Rényi, careful", "rkd, order 2"),
        ]:
            assert same[one] == pytest.approx(same[other], rel=1e-4), one
        assert same["rkd, order 1/2"] < same["rkd, order 1"] < same["rkd, order 2"]

    def test_from_hidden_states(self):
        tensors = draw(Case(12, 20, 6), "cpu")
        assert [x.requires_grad for x in tensors] == [True, True, False, False]
        full, fused = (OF_HIDDEN[name](*tensors).item() for name in ("rkd, order 2", "rkd, fused linear"))
        assert full == pytest.approx(fused, rel=1e-4)
        assert full > 0.1

    def test_what_is_left_out_where(self):
        assert not any("Liger" in x for case in CASES["cpu"] for x in names(case, "cpu"))
        assert {"Liger KL", "Liger JSD"} <= set(names(SMALL, "cuda"))
        assert "Rényi, careful" in names(SMALL, "cpu")
        assert "Rényi, careful" not in names(Case(64, 2**18), "cpu")
        assert {10, 2**18} <= {case.classes for case in CASES["cpu"]} & {case.classes for case in CASES["cuda"]}


class TestMeasure:
    def test_rows(self, few):
        rows = measure(SMALL, "cpu", 2, bandwidth=10.0)
        assert [row["loss"] for row in rows] == ["KL, eager", "rkd, order 1", "rkd, order 2"]
        for row in rows:
            assert row["full_ms"] == pytest.approx(row["forward_ms"] + row["backward_ms"], rel=0.5)
            assert row["gb_per_s"] == pytest.approx(3 * 8 * 5 * 4 / row["full_ms"] / 1e6, abs=0.01)
            assert row["faster_than_eager_kl"] == pytest.approx(rows[0]["full_ms"] / row["full_ms"], abs=0.01)
            assert (row["dtype"], row["device"], row["torch"]) == ("float32", "cpu", torch.__version__)

    def test_what_fails_is_left_out_with_a_line(self, monkeypatch, capsys):
        def broken(z, v):
            raise RuntimeError("no compiler\nat all")

        monkeypatch.setitem(LOSSES, "broken", broken)
        monkeypatch.setattr(rkd.benchmark, "names", lambda *_: ["KL, eager", "broken"])
        assert [row["loss"] for row in measure(SMALL, "cpu", 1, 10.0)] == ["KL, eager"]
        assert capsys.readouterr().err == "left out: broken: RuntimeError: no compiler\n"

    def test_time_is_that_of_the_work(self):
        z, v = draw(SMALL, "cpu")
        with pytest.MonkeyPatch.context() as patch:
            ticks = iter([0.0, 2.0, 5.0, 10.0, 14.0, 19.0])
            patch.setattr(rkd.benchmark.time, "perf_counter", lambda: next(ticks))
            assert step_seconds(LOSSES["KL, eager"], [z, v], 2) == (3.0, 4.0)

    def test_bandwidth_is_positive(self, monkeypatch):
        monkeypatch.setattr(torch, "ones", lambda n, device: torch.zeros(2**20, device=device))
        assert copy_bandwidth("cpu", 2) > 0.1

    @pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell the peak")
    def test_peak_memory_holds_the_gradient(self):
        """64 MiB of logits: rkd adds little more than the gradient."""
        case = Case(512, 2**15)
        assert 60 < peak_mebibytes("rkd, order 2", case, "cpu") < 90


class TestTable:
    def test_goes_on_where_it_stopped(self, few, tmp_path):
        cases = [SMALL, Case(4, 7), SMALL._replace(dtype="bfloat16")]
        first = list(bench(tmp_path, "cpu", cases, repetitions=1, budget=0.0))
        assert first == []
        begun = bench(tmp_path, "cpu", cases, repetitions=1)
        next(begun)  # killed after the first table
        begun.close()
        kept = (tmp_path / "loss-cpu.csv").read_text(encoding="utf-8")
        again = list(bench(tmp_path, "cpu", cases, repetitions=1))
        assert {(x["rows"], x["classes"], x["dtype"]) for x in again} == {(4, 7, "float32"), (8, 5, "bfloat16")}
        text = (tmp_path / "loss-cpu.csv").read_text(encoding="utf-8")
        assert text.startswith(kept)
        assert len(list(csv.DictReader(text.splitlines()))) == 9
        assert list(bench(tmp_path, "cpu", cases, repetitions=1)) == []
        assert [x.name for x in tmp_path.iterdir()] == ["loss-cpu.csv"]

    def test_other_columns_are_refused(self, few, tmp_path):
        append(tmp_path / "t.csv", [{"a": 1}])
        with pytest.raises(ValueError, match="t.csv has other columns"):
            append(tmp_path / "t.csv", [{"b": 1}])
        assert (tmp_path / "t.csv").read_text() == "a\n1\n"

    def test_choice(self):
        assert choose("cpu", [10]) == [Case(128, 10)]
        assert choose("cpu", [10, 7], rows=3) == [Case(3, 10), Case(3, 7)]
        assert {x.hidden for x in choose("cpu", [32768])} == {0, 256}
        with pytest.raises(ValueError, match="none of the tables here"):
            choose("cpu", [11])
        with pytest.raises(ValueError, match="rows=3 needs classes"):
            choose("cpu", None, rows=3)
        with pytest.raises(ValueError, match="device must be one of .* here, got 'tpu'"):
            choose("tpu")

    def test_command(self, tmp_path):
        command = [sys.executable, "-m", "rkd.cli", "bench", "--device", "cpu", "--classes", "6", "--rows", "4"]
        ran = subprocess.run(
            [*command, "--repetitions", "1", "--threads", "1", "--out", str(tmp_path)], capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        rows = list(csv.DictReader((tmp_path / "loss-cpu.csv").read_text(encoding="utf-8").splitlines()))
        assert {row["loss"] for row in rows} >= {"KL, eager", "Rényi, eager", "rkd, order 2"}
        assert ran.stdout.count("4 x 6") == len(rows)
        wrong = subprocess.run([*command, "--device", "tpu"], capture_output=True, text=True)
        assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
