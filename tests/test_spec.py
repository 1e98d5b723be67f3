"""`rkd.fields`: what a study's file may say, and messages that name the key. `rkd.spec`: the runs it asks for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkd.fields import schedule_of
from rkd.spec import SpecError, flatten, read_study, run_key, teacher_key

SMALL = """
seeds: 3
data: {name: digits}
teacher: {model: mlp, hidden: [16], epochs: 2}
student: {model: mlp, hidden: [4]}
loss:
  - {loss: hard}
  - {alpha: [0, 0.5, 1, .inf], temperature: [2, 8]}
training: {epochs: 2}
"""


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "small.yaml"
        path.write_text(text, encoding="utf-8")
        return read_study(path)

    return read


def runs(study):
    return [run for bundle in study.bundles for _, _, run in bundle.runs()]


def test_a_list_is_an_axis(read):
    study = read(SMALL.replace("epochs: 2}\nstudent", "epochs: [2, 5]}\ntransfer: {size: [50, 100]}\nstudent"))
    assert study.name == "small"
    assert len(study.bundles) == 4
    assert len(runs(study)) == 4 * 9 * 3
    assert {(r["teacher"]["epochs"], r["transfer"]["size"]) for r in runs(study)} == {
        (2, 50),
        (2, 100),
        (5, 50),
        (5, 100),
    }
    assert {r["loss"]["alpha"] for r in runs(study)} == {None, 0.0, 0.5, 1.0, math.inf}
    assert len({run_key(r, "float32") for r in runs(study)}) == len(runs(study))
    assert len({teacher_key(r, "float32") for r in runs(study)}) == 2


def test_alternatives_and_lists_of_widths(read):
    study = read(
        SMALL.replace("{model: mlp, hidden: [4]}", "[{model: mlp, hidden: [[4], [8, 8]]}, {model: cnn, width: 2}]")
    )
    assert [flatten(b.settings)["student.model"] for b in study.bundles] == ["mlp", "mlp", "cnn"]
    assert [flatten(b.settings).get("student.hidden") for b in study.bundles] == ["4", "8-8", None]


def test_what_a_loss_does_not_use_makes_no_runs(read):
    losses = "loss:\n  - {loss: [hard, mse], temperature: [1, 2], scale: 1, alpha: [1, 2]}\ntraining"
    study = read(SMALL[: SMALL.index("loss:")] + losses + ": {epochs: 2}\n")
    assert len(runs(study)) == 2 * 3
    hard = runs(study)[0]["loss"]
    assert hard == dict.fromkeys(hard) | {"loss": "hard"}


def test_steps_make_epochs(read):
    study = read(SMALL.replace("training: {epochs: 2}", "training: {steps: 100, batch_size: 32}"))
    training = study.bundles[0].settings["training"]
    assert training["epochs"] is None
    assert {n: schedule_of(training, n).epochs for n in (10, 64, 65, 3200, 3201, 9999)} == {
        10: 100,
        64: 50,
        65: 34,
        3200: 1,
        3201: 1,
        9999: 1,
    }


@given(seeds=st.integers(1, 9), most=st.integers(1, 40))
def test_bundles_hold_every_run_once(tmp_path_factory, seeds, most):
    path = tmp_path_factory.mktemp("spec") / "s.yaml"
    path.write_text(SMALL.replace("seeds: 3", f"seeds: {seeds}\nbundle: {most}"), encoding="utf-8")
    study = read_study(path)
    keys = [run_key(run, "float32") for run in runs(study)]
    assert len(set(keys)) == len(keys) == 9 * seeds
    assert max(map(len, study.bundles)) <= most


def test_keys_depend_on_settings_only(read):
    one, two = read(SMALL), read("# a remark\nname: other\n" + SMALL.replace("seeds: 3", "seeds: [0, 1, 2]\nbundle: 1"))
    assert {run_key(r, "float32") for r in runs(one)} == {run_key(r, "float32") for r in runs(two)}
    assert {run_key(r, "float32") for r in runs(one)}.isdisjoint({run_key(r, "float64") for r in runs(one)})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: 3", "seed: 3", "seed: unknown key; accepted are name, seeds"),
        ("seeds: 3", "", "seeds: is required"),
        ("seeds: 3", "seeds: 0", "seeds: must be how many, at least 1, or a list of different numbers"),
        ("seeds: 3", "seeds: [1, 1]", "seeds: must be how many"),
        ("seeds: 3", "seeds: 3\nprecision: half", "precision: must be one of float32, float64, bf16, got 'half'"),
        ("seeds: 3", "seeds: 3\nbudget: 0", "budget: must be a positive number of seconds, got 0"),
        ("seeds: 3", "seeds: 3\nbudget: soon", "budget: must be a number, got 'soon'"),
        ("seeds: 3", "seeds: 3\nbundle: 0", "bundle: must be at least 1 student, got 0"),
        ("digits", "cifar", "data.name: must be one of digits, mnist1d,.* got 'cifar'"),
        ("{name: digits}", "{}", "data.name: is required"),
        ("model: mlp, hidden: [16]", "model: lenet", "teacher.model: must be one of mlp, cnn,.* got 'lenet'"),
        ("hidden: [16]", "width: 3", "teacher.width: unknown key; accepted are model, seed, epochs"),
        ("hidden: [4]", "hidden: 4", "student.hidden: must be a list of integers, got 4"),
        ("hidden: [4]", "hidden: [4], dropout: 0.5", "student.model: must be a network without dropout"),
        ("alpha: [", "alpha: [-1, ", r"loss.alpha must be in \[0, inf\], got -1.0"),
        ("alpha: [0, 0.5, 1, .inf]", "alpha: []", "loss.alpha: must hold at least one value, got an empty list"),
        ("alpha: [0, ", "alpha: [one, ", "loss.alpha: must be a number, got 'one'"),
        ("alpha: [0, ", "alhpa: [0, ", "loss.alhpa: unknown key; accepted are loss, alpha"),
        ("{loss: hard}", "{loss: soft}", "loss.loss must be one of renyi, kl"),
        ("{loss: hard}", "{loss: mse}", "loss.scale must be a positive number for loss mse, got 'T2'"),
        ("{loss: hard}", "{scale: true}", "loss.scale must be 'T2', 'T2/alpha' or a positive number, got True"),
        ("training: {epochs: 2}", "training: {epochs: 0}", "training.epochs must be at least 1, got 0"),
        ("training: {epochs: 2}", "training: {epochs: 2.5}", "training.epochs: must be an integer, got 2.5"),
        ("training: {epochs: 2}", "training: {steps: 0}", "training.steps: must be at least 1, got 0"),
        ("training: {epochs: 2}", "training: {epochs: 2, steps: 9}", "training.steps: must not be given together"),
        ("training: {epochs: 2}", "training: {optimizer: adam}", "training.optimizer must be one of adamw, sgd"),
        ("training: {epochs: 2}", "training: 3", "training: must be a mapping or a list of mappings, got 3"),
        ("training:", "transfer: {generated: true}\ntraining:", "transfer.generated: only mnist1d has a generator"),
        ("training:", "transfer: {label_noise: 2}\ntraining:", r"transfer.label_noise: must be in \[0, 1\], got 2.0"),
        ("seeds: 3", "seeds: [", "cannot be read as YAML"),
        (SMALL, "- 1", "a study must be a mapping with the keys name, seeds"),
    ],
)
def test_mistakes_are_named(read, old, new, message):
    assert old in SMALL
    with pytest.raises(SpecError, match="small.yaml: .*" + message):
        read(SMALL.replace(old, new))


def test_no_file(tmp_path):
    with pytest.raises(SpecError, match="nothing.yaml: cannot be read"):
        read_study(tmp_path / "nothing.yaml")
