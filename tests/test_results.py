"""`rkd.results`, and the records of the book: complete, of the study shown, and what training gives."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rkd.engine import run_study
from rkd.results import by_seed, read, scores, tuned
from rkd.spec import read_study, run_key, teacher_key
from rkd.statistics import mean_interval

BOOK = Path(__file__).parent.parent / "book"
WAITING = {
    "map",
    "schedule",
    "small",
    "literature-wrn",
    "literature-resnet",
    "literature-x4",
}  # of CIFAR-100, for a GPU
NAMES = sorted({path.stem for path in (BOOK / "studies").glob("*.yaml")} - {f"cifar100-{name}" for name in WAITING})


def frame(rows):
    columns = ["alpha", "learning_rate", "seed", "validation_accuracy", "validation_nll", "test_accuracy", "test_nll"]
    return pd.DataFrame(rows, columns=columns, index=pd.Index(range(len(rows)), name="key"))


RUNS = frame(
    [
        [1.0, 0.1, 0, 0.6, 0.5, 0.1, 1.0],
        [1.0, 0.1, 1, 0.6, 0.5, 0.2, 2.0],
        [1.0, 0.2, 0, 0.5, 0.4, 0.9, 3.0],
        [1.0, 0.2, 1, 0.6, 0.4, 0.9, 4.0],
        [math.nan, 0.1, 0, 0.2, 0.9, 0.3, 5.0],
        [math.nan, 0.1, 1, 0.2, 0.9, 0.4, 6.0],
        [math.nan, 0.2, 0, 0.2, 0.8, 0.5, 7.0],
        [math.nan, 0.2, 1, 0.2, 0.8, 0.6, 8.0],
    ]
)


def test_settings_are_chosen_by_the_mean_on_validation():
    chosen = tuned(RUNS, ["alpha"], ["learning_rate"])
    assert sorted(chosen["test_nll"]) == [1.0, 2.0, 5.0, 6.0]  # of equal ones the first learning rate
    by_nll = tuned(RUNS, ["alpha"], ["learning_rate"], by="validation_nll")
    assert sorted(by_nll["test_nll"]) == [3.0, 4.0, 7.0, 8.0]


def test_nothing_is_chosen_on_the_test_split():
    with pytest.raises(ValueError, match="by must be a column of the validation split, got 'test_accuracy'"):
        tuned(RUNS, ["alpha"], ["learning_rate"], by="test_accuracy")


def test_seeds_are_lined_up_whatever_the_order_of_the_rows():
    table = by_seed(RUNS[RUNS.alpha == 1].sample(frac=1, random_state=0), "learning_rate", "test_accuracy")
    assert table.to_dict() == {0.1: {0: 10.0, 1: 20.0}, 0.2: {0: 90.0, 1: 90.0}}
    assert by_seed(RUNS[RUNS.alpha == 1], ["alpha", "learning_rate"], "test_nll")[1.0, 0.2].tolist() == [3.0, 4.0]


def test_a_cell_that_holds_a_seed_twice_or_lacks_one_is_refused():
    with pytest.raises(ValueError, match="cell must name one run a seed, got several for"):
        by_seed(RUNS, "alpha", "test_accuracy")
    with pytest.raises(ValueError, match="cell must have every seed"):
        by_seed(RUNS.iloc[[0, 1, 2]], "learning_rate", "test_accuracy")


def test_scores_are_those_of_one_loss_with_the_rate_that_validation_chose():
    runs = RUNS.assign(loss=["renyi"] * 4 + ["hard"] * 4)
    table = scores(runs, "renyi", ["alpha"], "test_accuracy", ["learning_rate"])
    assert table.to_dict() == {1.0: {0: 10.0, 1: 20.0}}
    hard = scores(runs, "hard", "loss", "test_nll", ["learning_rate"])
    assert hard["hard"].tolist() == [5.0, 6.0]
    at_rate = scores(runs, "hard", "loss", "test_nll", where={"learning_rate": 0.2})
    assert at_rate["hard"].tolist() == [7.0, 8.0]


def test_scores_of_no_run_and_of_runs_that_a_cell_does_not_tell_apart_are_refused():
    runs = RUNS.assign(loss=["renyi"] * 4 + ["hard"] * 4)
    with pytest.raises(ValueError, match="no run has the loss 'kl' and {}; the losses of these runs are: hard, renyi"):
        scores(runs, "kl", "alpha", "test_nll")
    with pytest.raises(ValueError, match="no run has the loss 'hard' and {'learning_rate': 3}"):
        scores(runs, "hard", "loss", "test_nll", where={"learning_rate": 3})
    with pytest.raises(ValueError, match="cell must name one run a seed"):
        scores(runs, "renyi", "alpha", "test_nll")


def test_a_study_that_was_not_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="rkd study run book/studies/nothing.yaml"):
        read("nothing", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_each_study_of_the_book_is_recorded_in_full(name):
    """The file shown is the one that ran, every student it asks for has a row, and nothing else has."""
    study = read_study(BOOK / "studies" / f"{name}.yaml")
    record = read(name, BOOK / "results")
    assert record.source == study.source
    wanted = [run_key(run, study.precision) for bundle in study.bundles for _, _, run in bundle.runs()]
    table = pd.read_csv(BOOK / "results" / name / "runs.csv", dtype={"key": str})
    assert table["key"].tolist() == wanted
    assert record.runs["seed"].nunique() >= 10
    executions = json.loads((BOOK / "results" / name / "provenance.json").read_text(encoding="utf-8"))["executions"]
    assert sum(e["students"] for e in executions) == len(wanted)
    assert not any(e["git_dirty"] for e in executions)
    assert all(e["hardware"] and e["versions"]["torch"] for e in executions)
    accuracies = record.runs.filter(like="accuracy").to_numpy(float)
    assert ((accuracies >= 0) & (accuracies <= 1)).all()


@pytest.mark.parametrize("name", sorted(WAITING))
def test_studies_that_wait_for_a_gpu_can_be_read_and_are_not_recorded(name):
    assert read_study(BOOK / "studies" / f"cifar100-{name}.yaml").name == f"cifar100-{name}"
    assert not (BOOK / "results" / f"cifar100-{name}" / "runs.csv").exists()


def test_the_map_and_the_literatures_table_share_a_teacher():
    """It is the dearest thing to train, and is trained once."""
    studies = [read_study(BOOK / "studies" / f"cifar100-{name}.yaml") for name in ("map", "literature-wrn")]
    assert len({teacher_key(study.bundles[0].settings, study.precision) for study in studies}) == 1


def test_what_is_recorded_is_small_enough_for_git():
    size = sum(path.stat().st_size for path in (BOOK / "results").rglob("*") if path.is_file())
    assert size <= 20 * 2**20


def test_a_cell_trained_again_here_agrees_with_the_record(tmp_path, monkeypatch):
    """On another processor single precision rounds differently; means over seeds must agree within their intervals."""
    monkeypatch.setenv("RKD_CACHE_DIR", str(tmp_path / "cache"))
    text = (BOOK / "studies" / "map-digits.yaml").read_text(encoding="utf-8")
    start, end = text.index("loss:"), text.index("training:")
    losses = "loss:\n  - {alpha: [0.25, 4], temperature: [2, 8], scale: T2/alpha, learning_rate: 0.01}\n"
    (tmp_path / "some.yaml").write_text(text[:start] + losses + text[end:], encoding="utf-8")
    run_study(read_study(tmp_path / "some.yaml"), tmp_path / "some", "cpu", workers=1, log=lambda line: None)
    cell = ["alpha", "temperature", "learning_rate"]
    again = by_seed(read("some", tmp_path).runs, cell, "test_accuracy")
    recorded = by_seed(read("map-digits", BOOK / "results").runs.dropna(subset="alpha"), cell, "test_accuracy")
    assert again.shape == (20, 4)
    for column in again:
        interval = mean_interval(again[column] - recorded[column], confidence=0.9999)
        assert interval.low <= 0 <= interval.high
        assert np.abs(again[column].mean() - recorded[column].mean()) < 1
