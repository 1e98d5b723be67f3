"""Recorded studies as tables: read them, choose settings on validation, line up seeds. Trains and tests nothing.

A study's file is book/studies/NAME.yaml; what running it gave is book/results/NAME: runs.csv, one row a student, and
provenance.json. Book: 2.2.1, "How Methods Are Compared"; A.5, "Running a study".
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import Markdown


@dataclass(frozen=True)
class Record:
    """A study that was run.

    Attributes:
        name: of the study.
        source: the text of its file, as it was run.
        runs: one row a student that did not diverge, with the columns of runs.csv; those of sections lose the prefix
            `loss.` (alpha, temperature, beta, scale, learning_rate), others keep it (teacher.width).
        diverged: how many students are not in `runs`, because their weights did not stay finite.
        executions: hardware, versions, commit and time of every execution, from provenance.json.
    """

    name: str
    source: str
    runs: pd.DataFrame
    diverged: int
    executions: list[dict[str, Any]]

    def shown(self) -> Markdown:
        """File and provenance for the reader, folded away."""
        last = self.executions[-1]
        seconds = sum(e["wall_seconds"] for e in self.executions)
        where = " and ".join(sorted({f"{e['workers']} × {e['device']}, {e['hardware']}" for e in self.executions}))
        students = len(self.runs) + self.diverged
        return Markdown(
            f":::{{dropdown}} The study {self.name}: {students:,} students in {_duration(seconds)}\n\n"
            f"```yaml\n{self.source.strip()}\n```\n\n"
            f"Recorded on {last['started'][:10]} ({where}), PyTorch {last['versions']['torch']}, commit "
            f"`{last['git'][:7]}`, {self.diverged} diverged. To run it again: "
            f"`rkd study run book/studies/{self.name}.yaml --out again`.\n:::"
        )


def read(name: str, results: str | Path = "../results") -> Record:
    """The record of a study.

    Raises:
        FileNotFoundError: it was not run yet; says how.
    """
    folder = Path(results) / name
    if not (folder / "runs.csv").exists():
        raise FileNotFoundError(f"{folder} holds no runs.csv; make it with: rkd study run book/studies/{name}.yaml")
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    text = dict.fromkeys(("key", "teacher.without", "transfer.without"), str)
    runs = pd.read_csv(folder / "runs.csv", index_col="key", dtype=text)
    good = runs[runs["status"] == "ok"]
    good = good.rename(columns=lambda c: c.removeprefix("loss.") if c != "loss.loss" else "loss")
    return Record(name, provenance["spec"], good, len(runs) - len(good), provenance["executions"])


def tuned(
    runs: pd.DataFrame, cell: Sequence[str], over: Sequence[str], by: str = "validation_accuracy"
) -> pd.DataFrame:
    """For each cell the rows of one setting: the one whose mean over the seeds is best on validation.

    Args:
        runs: `Record.runs`, or a part of it.
        cell: columns that name what is compared, e.g. alpha and temperature.
        over: columns of the settings to choose from, e.g. learning_rate.
        by: a column of the validation split; the largest mean wins, or the smallest of a likelihood (`_nll`). Of equal
            ones the first in the order of `over`.

    Raises:
        ValueError: `by` is not a figure of the validation split.
    """
    if not by.startswith("validation_"):
        raise ValueError(f"by must be a column of the validation split, got {by!r}")
    means = runs.groupby([*cell, *over], dropna=False)[by].mean().round(12).reset_index()
    means = means.sort_values([by, *over], ascending=[by.endswith("_nll"), *(True for _ in over)], kind="stable")
    best = means.drop_duplicates(list(cell)).drop(columns=by)
    return runs.reset_index().merge(best, on=[*cell, *over]).set_index("key")


def by_seed(runs: pd.DataFrame, cell: str | Sequence[str], metric: str) -> pd.DataFrame:
    """A metric as a table: one row a seed, one column a cell. Numbers in one row are a pair.

    Accuracies, calibration errors and agreements come in per cent, the rest as recorded: likelihoods in nats.

    Args:
        cell: column or columns that name the cell; all others must be the same within it.

    Raises:
        ValueError: a cell holds a seed twice, which means that `cell` does not name it, or lacks a seed.
    """
    columns = [cell] if isinstance(cell, str) else list(cell)
    if (twice := runs.duplicated([*columns, "seed"])).any():
        raise ValueError(f"cell must name one run a seed, got several for {dict(runs.loc[twice, columns].iloc[0])}")
    index = runs.set_index([*columns, "seed"])[metric]
    table = index.unstack(columns if len(columns) > 1 else columns[0])
    if table.isna().any().any():
        raise ValueError(f"cell must have every seed, but {list(table.columns[table.isna().any()])[:3]} lack some")
    part = metric.endswith(("accuracy", "accuracy_unseen", "ece", "agreement"))
    return 100 * table if part else table


def scores(
    runs: pd.DataFrame,
    loss: str,
    cell: str | Sequence[str],
    metric: str,
    over: Sequence[str] = (),
    where: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One loss's `by_seed` table, every cell with a setting of its own: that of `over` which is best on validation.

    Args:
        runs: `Record.runs`, or a part of it.
        loss: value of the column `loss`, such as "renyi" or "hard".
        cell: column or columns that name what is compared.
        metric: column of figures, such as "test_accuracy"; in per cent or as recorded, as `by_seed` says.
        over: columns of the settings that `tuned` chooses from, by accuracy on validation.
        where: columns and the value that each must have.

    Raises:
        ValueError: no run is left; or as `by_seed`.
    """
    left = runs[runs["loss"] == loss]
    for column, value in (where or {}).items():
        left = left[left[column] == value]
    if left.empty:
        losses = ", ".join(sorted(runs["loss"].unique()))
        raise ValueError(
            f"no run has the loss {loss!r} and {dict(where or {})}; the losses of these runs are: {losses}"
        )
    columns = [cell] if isinstance(cell, str) else cell
    return by_seed(tuned(left, columns, over) if over else left, cell, metric)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
