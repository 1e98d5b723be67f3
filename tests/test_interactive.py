"""Interactive figures as they are stored: controls and charts fit together, nothing breaks out, numbers of the maps."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from rkd import charts
from rkd.interactive import Choice, Interactive, Slider
from rkd.maps import METRICS, Maps
from rkd.statistics import mean_interval, paired_difference

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "book" / "renyi-distillation"


@pytest.fixture(scope="module")
def maps():
    draw = np.random.default_rng(0)
    columns = pd.MultiIndex.from_product([[0.5, 1, 2], [1, 4]])
    tables = {
        study: {metric: pd.DataFrame(draw.normal(90, 1, (8, 6)), columns=columns) for metric in METRICS}
        for study in ("first <set>", "second")
    }
    return Maps(tables, [0.5, 1, 2], [1, 4])


@pytest.fixture(scope="module", params=["example", "chords", "maps"])
def figure(request, maps):
    return maps.figure("map", "A map.") if request.param == "maps" else getattr(charts, request.param)("name")


def specifications(html):
    return [json.loads(script.string) for script in html.select("script[type='application/json']")]


class TestFigure:
    def test_shown_as_page_picture_and_text(self, figure):
        bundle = figure._repr_mimebundle_()
        assert set(bundle) == {"text/html", "image/svg+xml", "text/plain"}
        assert bundle == figure._repr_mimebundle_()
        assert sum(map(len, bundle.values())) < 100_000
        assert bundle["image/svg+xml"].startswith("<svg")
        assert not re.search(r"NaN|undefined|https?://(?!www\.w3\.org)", bundle["image/svg+xml"])

    def test_every_control_and_number_has_its_signal(self, figure):
        html = BeautifulSoup(figure.html(), "html.parser")
        known = {signal["name"] for chart in specifications(html) for signal in chart["signals"]}
        named = [element[key] for key in ("data-signal", "data-text") for element in html.select(f"[{key}]")]
        sets = [signal for button in html.select("button") for signal in json.loads(button["data-set"])]
        assert len(named) > 4
        assert {*named, *sets} <= known

    def test_every_control_has_a_label_and_starts_where_the_charts_do(self, figure):
        html = BeautifulSoup(figure.html(), "html.parser")
        start = {s["name"]: s.get("value") for chart in specifications(html) for s in chart["signals"]}
        for control in html.select("input, select"):
            assert html.select_one(f"label[for={control['id']}]").get_text()
            value = control["value"] if control.name == "input" else control.select_one("[selected]")["value"]
            assert start[control["data-signal"]] in (value, float(value) if control.name == "input" else value)

    def test_markup_is_closed_in(self, maps):
        html = BeautifulSoup(maps.figure("map", 'with "quotes" & <tags>').html(), "html.parser")
        assert html.img["alt"] == 'with "quotes" & <tags>'
        assert html.select("option")[0]["value"] == "first <set>"
        assert not html.find("set")

    def test_a_chart_cannot_end_its_script(self):
        chart = charts.finished(charts.gradients(), {**charts.START, "evil": "</script><b>"}, charts.DIVERGENCE)
        figure = Interactive(
            "n", "alt", {"says": chart}, charts.finished(charts.chord(200), charts.START, charts.DIVERGENCE), {}
        )
        html = BeautifulSoup(figure.html(), "html.parser")
        assert not html.find("b")
        assert {"name": "evil", "value": "</script><b>"} in specifications(html)[0]["signals"]

    def test_controls_say_their_value(self):
        slider = BeautifulSoup(Slider("a", "A", 0, 2, 0.5, 1, "a_text").html("i"), "html.parser")
        assert slider.input.attrs.items() >= {"id": "i", "min": "0", "max": "2", "step": "0.5", "value": "1"}.items()
        assert slider.span["data-signal"] == "a_text"
        choice = BeautifulSoup(Choice("c", "C", {"x": "X", "y": "Y"}, "y").html("i"), "html.parser")
        assert [option.get_text() for option in choice.select("option")] == ["X", "Y"]
        assert choice.select_one("[selected]")["value"] == "y"


class TestMaps:
    def test_cells_are_the_book_s_intervals(self, maps):
        table = maps.tables["second"]["test_nll"]
        rows = maps.cells()["second"]["test_nll"]
        assert (maps.means, maps.comparisons) == (2 * 4 * 6, 2 * 4 * 4)
        assert rows[5][:3] == pytest.approx(mean_interval(table[2, 4], 48)[:3], abs=1e-5)
        assert rows[5][3:] == pytest.approx(paired_difference(table[2, 4], table[1, 4], 32)[:3], abs=1e-5)
        assert rows[2][3:] == [0, 0, 0]

    def test_tables_hold_every_cell(self, maps):
        html = BeautifulSoup(maps.html(), "html.parser")
        assert len(html.select("table")) == 8
        assert [len(table.select("tbody td")) for table in html.select("table")] == [6] * 8
        mean, low, high = maps.cells()["second"]["test_accuracy"][0][3:]
        found = html.find("caption", string="second, accuracy in %").parent.select("tbody td")[0].get_text()
        assert found.split("; ")[1] == f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")


class TestBook:
    @pytest.mark.parametrize(("page", "figures"), [("explorer", 2), ("map-explorer", 1)])
    def test_one_alt_text_for_page_and_paper(self, page, figures):
        cells = nbformat.read(PAGES / f"{page}.ipynb", as_version=4).cells
        shown = [cell for cell in cells if "rkd-interactive" in str(cell.get("outputs", ""))]
        assert len(shown) == figures
        for cell in shown:
            html = BeautifulSoup(cell.outputs[0].data["text/html"], "html.parser")
            assert html.img["alt"] == cell.metadata.mystnb.image.alt

    def test_only_pages_with_a_figure_load_the_scripts(self):
        site = ROOT / "_build" / "html" / "book"
        names = {path.stem for path in site.rglob("*.html") if "interactive.js" in path.read_text(encoding="utf-8")}
        assert names == {"explorer", "map-explorer"}

    def test_altair_is_imported_where_it_is_used(self):
        code = "import sys, rkd.charts, rkd.maps; print('altair' in sys.modules, 'vl_convert' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"
