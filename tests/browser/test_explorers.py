"""The figures that move, in a browser: their numbers against `rkd`, controls, keyboard, colours, width, no scripts."""

import json
import math
import re

import numpy as np
import pytest
import torch
from test_accessibility import BEYOND, axe

import rkd

EXPLORER = "book/renyi-distillation/explorer.html"
MAP = "book/renyi-distillation/map-explorer.html"
LOGITS = {
    "horse": ([5.4, 0.2, -1.3], [-1.0, 1.0, 2.0]),
    "equal": ([1.0, -2.0, 0.5], [1.0, -2.0, 0.5]),
    "near": ([1.0, -2.0, 0.5], [1.1, -2.0, 0.5]),
    "far": ([8.0, -8.0, 0.0], [-8.0, 8.0, 1.0]),
    "tied": ([2.0, 2.0, -1.0], [0.0, 0.0, 0.0]),
}
ORDERS = [-6.25, -6.0, -2.0, -0.25, 0.0, 0.25, 1.0, 3.0, 6.0, 6.25]  # logarithms; the ends are 0 and infinity


READ = """names => {
    const view = document.querySelectorAll('.rkd-chart')[1].view;
    return Object.fromEntries(names.map(name => [name, view.signal(name)]));
}"""
MOVE = """values => {
    for (const [signal, value] of Object.entries(values)) {
        const control = document.querySelector(`[data-signal="${signal}"]:is(input, select)`);
        control.value = value;
        if (Number(control.value) !== Number(value) && control.value !== value) throw Error(signal);
        control.dispatchEvent(new Event('input', { bubbles: true }));
    }
}"""


def move(page, logits, log_order, log_temperature, scaling):
    v, z = LOGITS[logits]
    values = {f"v{i}": x for i, x in enumerate(v)} | {f"z{i}": x for i, x in enumerate(z)}
    page.evaluate(MOVE, values | {"log_order": log_order, "log_temperature": log_temperature, "scaling": scaling})


def expected(logits, log_order, log_temperature, scaling):
    v, z = (torch.tensor(row, dtype=torch.float64) for row in LOGITS[logits])
    order = 0.0 if log_order < -6 else math.inf if log_order > 6 else 2.0**log_order
    t = 2.0**log_temperature
    p, q = rkd.softmax(v, t), rkd.softmax(z, t)
    student = z.clone().requires_grad_()
    if order == math.inf and scaling == "T2/alpha":  # nothing is left, and rkd refuses it
        loss = 0.0 * student.sum()
    else:
        loss = rkd.renyi_kd_loss(student, v, order, t, 1.0 if scaling == "1" else scaling, "sum")
    loss.backward()
    return {
        "p": p.tolist(),
        "q": q.tolist(),
        "divergence": rkd.renyi_divergence(p, q, order).item(),
        "forward": rkd.kl_divergence(p, q).item(),
        "reverse": rkd.kl_divergence(q, p).item(),
        "loss": loss.item(),
        "gradient": student.grad.tolist(),
    }


CASES = [
    *(("horse", order, 2.0, scaling) for order in ORDERS for scaling in ("1", "T2", "T2/alpha")),
    *((logits, order, -1.0, "T2/alpha") for logits in ("equal", "near", "far", "tied") for order in ORDERS),
    *((logits, order, 6.0, "T2") for logits in ("near", "far") for order in ORDERS),
]


def test_numbers_are_those_of_rkd(visit):
    page = visit(EXPLORER)
    for case in CASES:
        move(page, *case)
        truth = expected(*case)
        found = page.evaluate(READ, list(truth))
        for name, value in truth.items():
            scale = np.abs(value).max() if name == "gradient" else 0
            error = np.abs(np.subtract(found[name], value))
            assert (error <= 1e-9 * np.maximum(np.abs(value), scale) + 1e-11).all(), (case, name, found[name], value)


def test_the_mixture_is_the_geometric_one(visit):
    page = visit(EXPLORER)
    for log_order in ORDERS[:-1]:
        move(page, "horse", log_order, 2.0, "T2")
        v, z = map(np.array, LOGITS["horse"])
        order = 0.0 if log_order < -6 else 2.0**log_order
        w = rkd.softmax(order * v + (1 - order) * z, 4.0)
        assert page.evaluate(READ, ["w"])["w"] == pytest.approx(w, rel=1e-9, abs=1e-15)
    move(page, "tied", 6.25, 0.0, "T2")
    assert page.evaluate(READ, ["w"])["w"] == [0.5, 0.5, 0]


def test_the_line_is_the_limit_of_high_temperature(visit):
    page = visit(EXPLORER)
    v, z = map(np.array, LOGITS["horse"])
    hot = (z - z.mean() - (v - v.mean())) / 3
    for log_order, scaling, weight in ((1, "T2/alpha", 1), (1, "T2", 2), (-6.25, "T2/alpha", 1), (-1, "1", 0.5 / 16)):
        move(page, "horse", log_order, 2.0, scaling)
        assert page.evaluate(READ, ["limit"])["limit"] == pytest.approx(weight * hot, rel=1e-12)


DRAWN = """([chart, name]) => document.querySelectorAll('.rkd-chart')[chart].view.data(name)"""


def test_bars_and_chord_show_the_numbers(visit):
    page = visit(EXPLORER)
    for case in (
        ("horse", -6.25, 2.0, "T2"),
        ("horse", 0.0, 0.0, "T2"),
        ("far", 6.25, 3.0, "1"),
        ("near", 1.0, 2.0, "T2"),
    ):
        move(page, *case)
        truth = expected(*case)
        bars = page.evaluate(DRAWN, [0, bars_of(page, 0)])
        assert [row["value"] for row in bars if row["k"] == 0] == pytest.approx(truth["p"], rel=1e-9, abs=1e-15)
        assert [row["value"] for row in bars if row["k"] == 1] == pytest.approx(truth["q"], rel=1e-9, abs=1e-15)
        bars = page.evaluate(DRAWN, [1, bars_of(page, 1)])
        assert [row["value"] for row in bars] == pytest.approx(truth["gradient"], rel=1e-9, abs=1e-11)
        (foot,) = page.evaluate(DRAWN, [2, data_of(page, 2, "'D = '")])
        assert foot["K"] == pytest.approx(-truth["divergence"], rel=1e-9, abs=1e-11)


def data_of(page, chart, formula):
    """The data set that a formula fills."""
    specification = json.loads(page.locator(".rkd-chart script").nth(chart).text_content())
    return next(data["name"] for data in specification["data"] if formula in json.dumps(data.get("transform", [])))


def bars_of(page, chart):
    """The data set behind the bars."""
    script = page.locator(".rkd-chart script").nth(chart).text_content()
    return next(mark for mark in json.loads(script)["marks"] if mark["type"] == "rect")["from"]["data"]


def test_nothing_is_ever_undefined(visit):
    page = visit(EXPLORER)
    bad = page.evaluate(
        """logits => {
        const view = document.querySelectorAll('.rkd-chart')[2].view, bad = [];
        const names = 'p q w r divergence forward reverse loss gradient limit reach slope low high'.split(' ');
        for (const [v, z] of logits)
          for (let log_order = -6.25; log_order <= 6.25; log_order += 0.25)
            for (const log_temperature of [-1, 0, 2.25, 6])
              for (const scaling of ['1', 'T2', 'T2/alpha']) {
                [0, 1, 2].forEach(i => view.signal('v' + i, v[i]).signal('z' + i, z[i]));
                view.signal('log_order', log_order).signal('log_temperature', log_temperature);
                view.signal('scaling', scaling);
                view.run();
                for (const name of names)
                  if (![view.signal(name)].flat().every(Number.isFinite)) bad.push([name, v, z, log_order, scaling]);
                if (view.signal('reach') <= 0 || view.signal('low') >= 0 || view.signal('high') <= 0) bad.push('range');
              }
        return bad;
    }""",
        list(LOGITS.values()),
    )
    assert bad == []


def test_keyboard_words_and_both_figures_follow(visit):
    page = visit(EXPLORER)
    order = page.get_by_label("order α", exact=True).first
    order.focus()
    for key in ("Home", "End", "ArrowLeft"):
        page.keyboard.press(key)
        says = {"Home": "0", "End": "∞", "ArrowLeft": "64"}[key]
        assert order.get_attribute("aria-valuetext") == says
        assert page.get_by_label("order α", exact=True).nth(1).get_attribute("aria-valuetext") == says
        assert page.locator("#rkd-chord .rkd-numbers [data-signal=order_text]").text_content() == says
    shown = page.locator("#rkd-example [data-signal=divergence_text]").text_content()
    assert float(shown) == pytest.approx(expected("horse", 6.0, 2.0, "T2")["divergence"], abs=6e-5)


def test_buttons_set_what_they_say(visit):
    page = visit(EXPLORER)
    page.get_by_role("button", name="a lost zebra").click()
    assert page.evaluate(READ, ["v0", "z1", "temperature"]) == {"v0": 4, "z1": -6, "temperature": 1}
    assert page.get_by_label("zebra", exact=True).nth(1).input_value() == "-6"
    page.get_by_role("button", name="the horse").click()
    assert page.evaluate(READ, ["z1", "temperature"]) == {"z1": 1, "temperature": 4}


@pytest.mark.parametrize("name", [EXPLORER, MAP])
def test_colours_follow_the_theme(visit, name):
    page = visit(name, color_scheme="light")
    axis = page.locator(".rkd-chart .role-axis-title text").first
    assert axis.get_attribute("fill") == "#222222"
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function(
        "document.querySelector('.rkd-chart .role-axis-title text').getAttribute('fill') == '#e6e6e6'"
    )


@pytest.mark.parametrize("name", [EXPLORER, MAP])
@pytest.mark.parametrize("width", [360, 420, 768, 1280])
def test_fits_the_width(visit, name, width):
    page = visit(name, viewport={"width": width, "height": 800})
    assert page.evaluate(BEYOND) <= 0
    for chart in page.locator(".rkd-chart").all():
        box, drawn = chart.bounding_box(), chart.locator("svg").bounding_box()
        assert drawn["width"] <= box["width"] + 1
        assert drawn["width"] > 200


@pytest.mark.parametrize("name", [EXPLORER, MAP])
def test_without_scripts_a_picture_stands_still(visit, name):
    page = visit(name, java_script_enabled=False)
    for figure in page.locator(".rkd-interactive").all():
        assert figure.locator("img").is_visible()
        assert not figure.locator(".rkd-controls").is_visible()
        assert figure.locator("img").bounding_box()["width"] > 400


def test_the_map_says_what_was_recorded(visit):
    page = visit(MAP)
    said = page.locator("#rkd-map .rkd-numbers p")
    seen = set()
    for study in ("digits", "MNIST-1D", "Fashion-MNIST"):
        page.get_by_label("study", exact=True).select_option(study)
        for metric in ("accuracy", "negative log-likelihood", "calibration error", "agreement with the teacher"):
            page.get_by_label("metric", exact=True).select_option(label=metric)
            assert said.text_content().startswith(f"{study}, α = 16, T = 1: {metric} ")
            seen.add(said.text_content())
    assert len(seen) == 12
    page.get_by_label("order α", exact=True).focus()
    page.keyboard.press("Home")
    assert ", α = 0, T = 1: " in said.text_content()


def test_the_map_shows_a_cell_to_the_mouse(visit):
    page = visit(MAP)
    page.locator(".rkd-chart svg").hover(position={"x": 300, "y": 100})
    tip = page.locator(".rkd-tip")
    assert tip.is_visible()
    assert "20 seeds" in tip.text_content()


@pytest.mark.parametrize("name", [EXPLORER, MAP])
def test_every_slider_has_a_name_and_follows_the_keys(visit, name):
    page = visit(name)
    sliders = page.get_by_role("slider")
    assert sliders.count() == page.locator("input[type=range]").count() > 0
    assert page.get_by_role("slider", name=re.compile(r"\S")).count() == sliders.count()
    for slider in sliders.all():
        slider.focus()
        page.keyboard.press("End")
        end = slider.input_value()
        page.keyboard.press("ArrowLeft")
        assert float(slider.input_value()) < float(end) == float(slider.get_attribute("max"))


@pytest.mark.parametrize("name", [EXPLORER, MAP])
def test_figures_follow_good_practice(visit, name):
    """More than the rules of WCAG, to which test_accessibility.py holds every page."""
    page = visit(name)
    page.evaluate(axe())
    found = page.evaluate("axe.run('.rkd-interactive', {runOnly: ['best-practice'], preload: false})")["violations"]
    assert [(rule["id"], rule["nodes"][0]["html"][:200]) for rule in found] == []
