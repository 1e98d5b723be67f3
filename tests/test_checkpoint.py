"""`rkd.checkpoint`: states come back whole, as often as asked, and a deadline keeps one before it stops."""

import time

import pytest
import torch

from rkd.checkpoint import NOTHING, Keeping, Stopped


def state(value=1.0):
    return {"a": torch.full((2, 3), value, dtype=torch.float64), "random": torch.get_rng_state(), "n": torch.tensor(7)}


def never():
    pytest.fail("no state was due")


def test_a_state_comes_back(tmp_path):
    keeper = Keeping(tmp_path, every=0).of("run")
    assert (keeper.step, keeper.seconds, keeper.state(), keeper.history) == (0, 0.0, {}, {})
    keeper.history["accuracy"] = [torch.tensor([[0.1, 0.2]]), torch.tensor([[0.3, 0.4]])]
    time.sleep(0.01)
    keeper.offer(12, state)
    again = Keeping(tmp_path).of("run")
    assert again.step == 12
    assert again.seconds >= 0.01
    assert again.elapsed() >= again.seconds
    back = again.state()
    assert back.keys() == state().keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in state().items())
    assert torch.equal(torch.stack(again.history["accuracy"]), torch.tensor([[[0.1, 0.2]], [[0.3, 0.4]]]))
    assert again.state() == {}  # given once: it need not stay in memory


def test_states_are_kept_as_often_as_asked(tmp_path):
    keeper = Keeping(tmp_path, every=0.05).of("run")
    keeper.offer(1, never)
    time.sleep(0.06)
    keeper.offer(2, state)
    keeper.offer(3, never)
    assert Keeping(tmp_path).of("run").step == 2


def test_a_deadline_keeps_the_state_and_stops(tmp_path):
    Keeping(tmp_path, deadline=time.time() + 60).of("run").offer(1, never)
    with pytest.raises(Stopped):
        Keeping(tmp_path, deadline=time.time()).of("run").offer(5, state)
    assert Keeping(tmp_path).of("run").step == 5


def test_without_a_folder_nothing_is_kept_and_nothing_stops():
    keeper = Keeping(None, every=0, deadline=0.0).of("run")
    keeper.offer(1, never)
    NOTHING.discard("run")
    assert keeper.step == 0


def test_runs_do_not_meet_and_are_discarded(tmp_path):
    keeping = Keeping(tmp_path, every=0)
    for name, value in (("a", 1.0), ("b", 2.0)):
        keeping.of(name).offer(1, lambda value=value: state(value))
    assert keeping.of("b").state()["a"][0, 0] == 2
    keeping.discard("a")
    keeping.discard("never was")
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


@pytest.mark.parametrize("length", [0, 5, 200])
def test_a_damaged_state_is_none(tmp_path, length):
    keeping = Keeping(tmp_path, every=0)
    keeping.of("run").offer(3, state)
    path = tmp_path / "run.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    keeper = keeping.of("run")
    assert (keeper.step, keeper.state()) == (0, {})


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path):
    keeping = Keeping(tmp_path, every=0)
    keeping.of("run").offer(3, state)
    (tmp_path / ".run.safetensors.x1").write_bytes(b"half")
    (tmp_path / ".other.safetensors.x1").write_bytes(b"half")
    assert keeping.of("run").step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.safetensors.x1", "run.safetensors"]
