"""The interactive map of recorded studies: orders against temperatures, in each cell the difference to order 1.

All numbers travel with the chart as the parameter `cells`: the reader's choices pick from it, nothing is fetched.
Altair is imported where it is used (extra ``rkd[book]``). Book: 2.2.12, "Maps to Explore".
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

from rkd.charts import finished
from rkd.interactive import Choice, Interactive, Slider
from rkd.statistics import mean_interval, number_text, paired_difference


@dataclass(frozen=True)
class Metric:
    """A column of a study's results as a reader sees it: name, unit, format of numbers, and which way is better."""

    shown: str
    unit: str
    form: str
    better: int


METRICS = {
    "test_accuracy": Metric("accuracy", "%", ".1f", 1),
    "test_nll": Metric("negative log-likelihood", "nats", ".3f", -1),
    "test_ece": Metric("calibration error", "%", ".1f", -1),
    "test_agreement": Metric("agreement with the teacher", "%", ".1f", 1),
}
Tables = Mapping[str, Mapping[str, pd.DataFrame]]


@dataclass(frozen=True)
class Maps:
    """Cells of several studies, each a mean over seeds and its paired difference to order 1 at the same temperature.

    Attributes:
        tables: by the study's name and the metric, tables of `rkd.results.scores`: a row a seed, a column (order,
            temperature). Order 1 is among the orders.
        orders, temperatures: what the columns name, ascending.
    """

    tables: Tables
    orders: Sequence[float]
    temperatures: Sequence[float]

    @property
    def comparisons(self) -> int:
        """How many differences a reader can look at; the intervals of all hold together with 95 %."""
        return self.means - sum(map(len, self.tables.values())) * len(self.temperatures)

    @property
    def means(self) -> int:
        """How many means a reader can look at, which is what their intervals are corrected for."""
        return sum(map(len, self.tables.values())) * len(self.orders) * len(self.temperatures)

    def cells(self) -> dict[str, dict[str, list[list[float]]]]:
        """By study and metric, one entry a cell, row by row: mean, low, high; mean, low, high of the difference."""
        return {
            study: {metric: list(self._row_by_row(table)) for metric, table in of.items()}
            for study, of in self.tables.items()
        }

    def _row_by_row(self, table: pd.DataFrame) -> Iterator[list[float]]:
        for order in self.orders:
            for t in self.temperatures:
                own, reference = table[order, t], table[1, t]
                mean, low, high, _ = mean_interval(own, self.means)
                difference = paired_difference(own, reference, self.comparisons)[:3]
                yield [round(float(x), 5) for x in (mean, low, high, *difference)]

    def signals(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What the map's controls set, together with its numbers; and expressions that build on them."""
        cells = self.cells()
        inputs = {
            **{"study": next(iter(cells)), "metric": next(iter(METRICS)), "row": len(self.orders) - 1, "column": 0},
            **{"cells": cells, "orders": list(self.orders), "temperatures": list(self.temperatures)},
            **{
                name: {key: getattr(m, name) for key, m in METRICS.items()}
                for name in ("shown", "unit", "form", "better")
            },
            "seeds": {study: len(next(iter(of.values()))) for study, of in self.tables.items()},
            "widest": {
                study: {metric: max(abs(cell[3]) for cell in rows) for metric, rows in of.items()}
                for study, of in cells.items()
            },
        }
        signals = {
            "table": "cells[study][metric]",
            "limit": "1.8 * widest[study][metric]",
            "cursor": f"row * {len(self.temperatures)} + column",
            "row_text": "'' + orders[row]",
            "column_text": "'' + temperatures[column]",
            "cell_text": self._said("cursor"),
        }
        return inputs, signals

    def _said(self, n: str) -> str:
        """An expression that says a cell in words."""

        def interval(first: int, form: str) -> str:
            mean, low, high = (f"format(table[{n}][{i}], {form})" for i in range(first, first + 3))
            return f"{mean} + ' [' + {low} + ', ' + {high} + ']'"

        order, t = self._place(n)
        mean, difference = interval(0, "form[metric]"), interval(3, "'+' + form[metric]")
        return (
            f"study + ', α = ' + {order} + ', T = ' + {t} + ': ' + shown[metric] + ' ' + {mean}"
            f" + ' ' + unit[metric] + ({order} == 1 ? '' : '; against α = 1: ' + {difference})"
            f" + '; ' + seeds[study] + ' seeds'"
        )

    def _place(self, n: str) -> tuple[str, str]:
        columns = len(self.temperatures)
        return f"orders[floor(({n}) / {columns})]", f"temperatures[({n}) % {columns}]"

    def chart(self, width: int | str = "container") -> Any:
        """The map of the chosen study and metric. Purple is better than order 1, orange worse, bold certain."""
        import altair as alt

        order, t = self._place("datum.n")
        cell = "table[datum.n]"
        base = (
            alt.Chart(alt.sequence(0, len(self.orders) * len(self.temperatures), as_="n"))
            .transform_calculate(
                order=order,
                temperature=t,
                value=f"better[metric] * {cell}[3]",
                certain=f"{cell}[4] > 0 || {cell}[5] < 0",
                number=f"{order} == 1 ? format({cell}[0], form[metric]) : format({cell}[3], '+' + form[metric])",
                said=self._said("datum.n"),
            )
            .encode(
                x=alt.X("temperature:O", title="temperature T", axis=alt.Axis(labelAngle=0)),
                y=alt.Y("order:O", title="order α"),
                tooltip="said:N",
            )
        )
        domain = [{"expr": "-limit"}, {"expr": "limit"}]
        colour = alt.Color("value:Q", scale=alt.Scale(scheme="purpleorange", domain=domain, reverse=True), legend=None)
        bold = {"expr": "datum.certain ? 'bold' : 'normal'"}
        ring = base.transform_filter("datum.n == cursor").mark_rect(fillOpacity=0, stroke="#0072B2", strokeWidth=3)
        text = base.mark_text(fontSize=12, fontWeight=bold, color="#222222").encode(text="number:N")
        return (base.mark_rect().encode(color=colour) + text + ring).properties(width=width, height=260)

    def figure(self, name: str, alt: str) -> Interactive:
        """The map with its choices, and all its numbers as tables."""
        inputs, signals = self.signals()
        rows, columns = len(self.orders) - 1, len(self.temperatures) - 1
        return Interactive(
            name=name,
            alt=alt,
            charts={
                "Map of orders against temperatures, as in the tables below": finished(self.chart(), inputs, signals)
            },
            still=finished(self.chart(480), inputs, signals, still=True),
            controls={
                "Map": [
                    Choice("study", "study", {study: study for study in self.tables}, inputs["study"]),
                    Choice("metric", "metric", {key: m.shown for key, m in METRICS.items()}, inputs["metric"]),
                ],
                "Cell": [
                    Slider("row", "order α", 0, rows, 1, inputs["row"], "row_text"),
                    Slider("column", "temperature T", 0, columns, 1, inputs["column"], "column_text"),
                ],
            },
            numbers='<p role="status" data-signal="cell_text"></p>',
            more=self.html(),
        )

    def html(self) -> str:
        """The same numbers as tables, one for each study and metric, folded away."""
        tables = "".join(
            f'<div class="rkd-scroll" role="region" tabindex="0" aria-label="{escape(study)}, {METRICS[metric].shown}">'
            f"{self._table(rows, f'{escape(study)}, {METRICS[metric].shown}', METRICS[metric])}</div>"
            for study, of in self.cells().items()
            for metric, rows in of.items()
        )
        return f"<details><summary>All numbers as tables</summary>{tables}</details>"

    def _table(self, rows: list[list[float]], caption: str, metric: Metric) -> str:
        def said(cell: list[float], order: float) -> str:
            if order == 1:
                return interval(cell[:3], metric.form)
            return f"{number_text(cell[0], metric.form)}; {interval(cell[3:], '+' + metric.form)}"

        def interval(of: list[float], form: str) -> str:
            mean, low, high = (number_text(x, form) for x in of)
            return f"{mean} [{low}, {high}]"

        columns, lines = len(self.temperatures), []
        head = "".join(f'<th scope="col">T = {t:g}</th>' for t in self.temperatures)
        for i, order in enumerate(self.orders):
            row = "".join(f"<td>{said(cell, order)}</td>" for cell in rows[columns * i : columns * (i + 1)])
            lines.append(f'<tr><th scope="row">α = {order:g}</th>{row}</tr>')
        head = f"<caption>{caption} in {metric.unit}</caption><thead><tr><td></td>{head}</tr></thead>"
        return f"<table>{head}<tbody>{''.join(lines)}</tbody></table>"
