"""What the book's interactive figures compute and draw: Vega-Altair charts, whose arithmetic the browser does.

The formulas are those of `rkd`, written as Vega expressions for three classes: log-probabilities from logits, their
difference r = log p − log q, and D_α = LSE(log q + αr)/(α − 1). That form loses digits near α = 1, so the orders of the
slider are powers of 2^¼: none but 1 itself lies nearer to 1 than 0.15, and an error of some 1e-14 is left. Orders 0, 1
and ∞ have formulas of their own. Altair is imported where it is used (extra ``rkd[book]``).
Book: 2.1.8, "Try It".
"""

from collections.abc import Mapping
from typing import Any

from rkd.interactive import Choice, Interactive, Slider

CLASSES = ("horse", "zebra", "car")
SCALES = {"1": "none", "T2": "T²", "T2/alpha": "T²/α"}
# the sliders of order and temperature are logarithms to base 2; a step beyond these ends the order is 0, and ∞
LOWEST, HIGHEST, STEP = -6.0, 6.0, 0.25
START: dict[str, float | str] = {
    **{"v0": 5.4, "v1": 0.2, "v2": -1.3, "z0": -1.0, "z1": 1.0, "z2": 2.0},
    **{"log_order": 1.0, "log_temperature": 2.0, "scaling": "T2/alpha"},
}
SHOWN = (-1.0, 3.0)  # the part of the axis t on which K is drawn
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"  # those of rkd.figures
_STEADY: Any = {"minExtent": 44, "maxExtent": 44}  # room for labels, so that nothing moves when they grow
_FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
_LOOK = {"ink": "dark ? '#e6e6e6' : '#222222'", "faint": "dark ? '#4d4d4d' : '#dddddd'"}


def _terms(term: str) -> list[str]:
    return [term.replace("#", str(i)) for i in range(len(CLASSES))]


def _each(term: str) -> str:
    """A list with one entry a class, from a term with # for its number."""
    return f"[{', '.join(_terms(term))}]"


def _total(term: str) -> str:
    """The sum over the classes."""
    return f"({' + '.join(_terms(term))})"


def _cumulant(t: str) -> str:
    """K(t) of the logit gap, eq. (2.9), centred so that K′(0) = 0."""
    return f"(log({_total(f'exp(log_q[#] + ({t}) * r[#])')}) + ({t}) * reverse)"


# signals by name: each builds on those before it
_PROBABILITIES = {
    "order": f"log_order < {LOWEST} ? 0 : log_order > {HIGHEST} ? 1 / 0 : pow(2, log_order)",
    "finite": "order < 1 / 0 ? order : 1",
    "temperature": "pow(2, log_temperature)",
    "v": _each("v# / temperature"),
    "z": _each("z# / temperature"),
    "v_top": "max(v[0], v[1], v[2])",
    "z_top": "max(z[0], z[1], z[2])",
    "v_log_sum": f"v_top + log({_total('exp(v[#] - v_top)')})",
    "z_log_sum": f"z_top + log({_total('exp(z[#] - z_top)')})",
    "log_p": _each("v[#] - v_log_sum"),
    "log_q": _each("z[#] - z_log_sum"),
    "p": _each("exp(log_p[#])"),
    "q": _each("exp(log_q[#])"),
    "r": _each("log_p[#] - log_q[#]"),
    "r_top": "max(r[0], r[1], r[2])",
    "tilted": _each("log_q[#] + finite * r[#]"),
    "tilted_top": "max(tilted[0], tilted[1], tilted[2])",
    "log_sum": f"tilted_top + log({_total('exp(tilted[#] - tilted_top)')})",
    "extreme": _each("(r[#] > r_top - 1e-9 ? q[#] : 0)"),
    "extreme_sum": _total("extreme[#]"),
    "w": f"order < 1 / 0 ? {_each('exp(tilted[#] - log_sum)')} : {_each('extreme[#] / extreme_sum')}",
}
_DIVERGENCES = {
    "forward": f"max(0, {_total('p[#] * r[#]')})",
    "reverse": f"max(0, -{_total('q[#] * r[#]')})",
    "divergence": "max(0, order == 0 ? 0 : order == 1 ? forward : order < 1 / 0 ? log_sum / (order - 1) : r_top)",
    "per_order": "order == 0 ? reverse : order < 1 / 0 ? divergence / order : 0",
    "square": "temperature * temperature",
    "loss": "scaling == '1' ? divergence : scaling == 'T2' ? square * divergence : square * per_order",
}
_GRADIENT = {
    "to_mixture": _each("q[#] - w[#]"),
    "to_reverse": _each("q[#] * (-r[#] - reverse)"),
    "factor": "(scaling == '1' ? 1 : square) / temperature",
    "divisor": "scaling == 'T2/alpha' ? order : 1",
    "gradient": f"divisor == 0 ? {_each('factor * to_reverse[#]')} : {_each('factor * to_mixture[#] / divisor')}",
    # the limit of high temperature, eq. (2.4), which with the scale T²/α is the same for every order
    "weight": "finite * factor / temperature / (divisor == 0 ? 1 : divisor) + (divisor == 0 ? 1 : 0)",
    "gap": _each("(z# - v#)"),
    "limit": _each("weight * (gap[#] - (gap[0] + gap[1] + gap[2]) / 3) / 3"),
    # no gradient of a scaled loss is longer, since w moves by a quarter of the gap's range at most as α grows by one
    "quarter": "(max(gap[0], gap[1], gap[2]) - min(gap[0], gap[1], gap[2])) / 4",
    "unmatched": "order < 1 / 0 ? min(temperature, quarter * max(1, order)) : temperature",
    "bound": "scaling == 'T2/alpha' ? quarter : scaling == 'T2' ? unmatched : unmatched / square",
    "reach": "1.2 * max(0.01 / square, bound)",
}
_CHORD = {
    "slope": "reverse + divergence",  # K(1) is the reverse divergence
    "high": f"1.1 * max(0.02, r_top, {_cumulant('2.2')})",
    "low": "-1.25 * max(0.01, r_top)",
}
_WORDS = {
    "order_text": "order < 1 / 0 ? format(order, '.3~g') : '∞'",
    "temperature_text": "format(temperature, '.3~g')",
    **{f"{name}_text": f"format({name}, '.1f')" for name in START if name[0] in "vz"},
    **{f"{name}_text": f"format({name}, '.4f')" for name in ("divergence", "forward", "reverse", "loss")},
    **{f"{name}_text": _each(f"format({name}[#], '.3f')") for name in ("p", "q", "w")},
    "gradient_text": _each("format(gradient[#], '+.3f')"),
}
DIVERGENCE = {**_PROBABILITIES, **_DIVERGENCES, **_GRADIENT, **_CHORD, **_WORDS}


def probabilities(width: int | str = "container") -> Any:
    """Bars of the teacher's, the student's and the mixture's probability of each class."""
    import altair as alt

    names = ["teacher P", "student Q", "mixture w"]
    rows = [{"class": c, "i": i, "of": of, "k": k} for i, c in enumerate(CLASSES) for k, of in enumerate(names)]
    base = (
        alt.Chart(alt.Data(values=rows))
        .transform_calculate(value="[p, q, w][datum.k][datum.i]")
        .encode(
            x=alt.X("class:N", sort=CLASSES, title=None, axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("of:N", sort=names),
            y=alt.Y("value:Q", title="probability", scale=alt.Scale(domain=[0, 1.08], nice=False)),
        )
    )
    colour = alt.Color("of:N", sort=names, title=None, scale=alt.Scale(domain=names, range=[_BLUE, _ORANGE, _GREEN]))
    number = base.mark_text(dy=-6, fontSize=10, color={"expr": "ink"}).encode(text=alt.Text("value:Q", format=".2f"))
    return (base.mark_bar().encode(color=colour) + number).properties(width=width, height=220)


def gradients(width: int | str = "container") -> Any:
    """Bars of the scaled loss's gradient in each logit of the student; lines at its limit for high temperature."""
    import altair as alt

    rows = [{"class": c, "i": i} for i, c in enumerate(CLASSES)]
    domain = alt.Scale(domain=[{"expr": "-reach"}, {"expr": "reach"}], nice=False)
    base = (
        alt.Chart(alt.Data(values=rows))
        .transform_calculate(
            value="gradient[datum.i]",
            limit="limit[datum.i]",
            up="max(0, datum.value, abs(datum.limit - datum.value) < reach / 4 ? datum.limit : 0)",
            shown="gradient_text[datum.i]",
        )
        .encode(
            x=alt.X("class:N", sort=CLASSES, title=None, axis=alt.Axis(labelAngle=0)),
            y=alt.Y("value:Q", title="gradient of the scaled loss", scale=domain, axis=_STEADY),
        )
    )
    number = base.mark_text(dy=-6, fontSize=11, color={"expr": "ink"}).encode(y="up:Q", text="shown:N")
    limit = (
        base.transform_filter("order < 1 / 0")
        .mark_tick(thickness=3, bandSize=60, color=_RED, opacity=1)
        .encode(y="limit:Q")
    )
    zero = alt.Chart(alt.Data(values=[{"value": 0}])).mark_rule(color={"expr": "ink"}).encode(y="value:Q")
    return (base.mark_bar(color=_BLUE, size=36) + zero + limit + number).properties(width=width, height=220)


def chord(width: int | str = "container") -> Any:
    """The convex curve K, its chord through 1 and α, and how deep that meets the vertical axis: D_α."""
    import altair as alt

    left, right = SHOWN
    across = alt.X("t:Q", title="t", scale=alt.Scale(domain=SHOWN, nice=False), axis=alt.Axis(values=[-1, 0, 1, 2, 3]))
    upright = alt.Y(
        "K:Q", title="K(t)", axis=_STEADY, scale=alt.Scale(domain=[{"expr": "low"}, {"expr": "high"}], nice=False)
    )

    def drawn(rows: Any, **calculated: str) -> Any:
        return alt.Chart(rows).transform_calculate(**calculated).encode(x=across, y=upright)

    curve = drawn(alt.sequence(left, right + 0.01, 0.05, as_="t"), K=_cumulant("datum.t"))
    line = drawn(alt.Data(values=[{"t": 0.0}, {"t": right}]), K="reverse + slope * (datum.t - 1)")
    depth = drawn(alt.Data(values=[{"at": 0}, {"at": 1}]), t="0", K="-datum.at * divergence")
    points = drawn(
        alt.Data(values=[{"at": 0}, {"at": 1}]),
        t="datum.at ? finite : 1",
        K="datum.at ? log_sum + finite * reverse : reverse",
    ).transform_filter(f"datum.t <= {right}")
    foot = depth.transform_filter("datum.at == 1").transform_calculate(shown="'D = ' + divergence_text")
    axes = [
        drawn(alt.Data(values=[{"t": 0.0, "K": 0.0}])).mark_rule(color={"expr": "ink"}).encode(**bare)
        for bare in ({"x": alt.value(0), "x2": alt.value("width")}, {"y": alt.value(0), "y2": alt.value("height")})
    ]
    return alt.layer(
        *axes,
        curve.mark_line(clip=True, color={"expr": "ink"}, strokeWidth=2.5),
        line.mark_line(clip=True, color=_RED, strokeWidth=1.8),
        depth.mark_line(color=_BLUE, strokeWidth=6),
        points.mark_point(clip=True, filled=True, size=70, opacity=1, color=_RED),
        foot.mark_point(filled=True, size=70, opacity=1, shape="diamond", color=_BLUE),
        foot.mark_text(align="right", baseline="top", dx=-8, dy=4, fontSize=12, color={"expr": "ink"}).encode(
            text="shown:N"
        ),
    ).properties(width=width, height=300)


def finished(chart: Any, inputs: Mapping[str, Any], signals: Mapping[str, str], still: bool = False) -> Any:
    """A chart with its parameters and the book's look.

    Args:
        inputs: what controls set, and where it starts.
        signals: Vega expressions by name, each in terms of those before it.
        still: for paper: on white, with the widths of its parts. Otherwise the chart is as wide as its place on the
            page, and the page sets the signal `dark`, which turns the ink light.
    """
    import altair as alt

    start = [alt.param(name=name, value=value) for name, value in {"dark": False, **inputs}.items()]
    rest = [alt.param(name=name, expr=expression) for name, expression in {**_LOOK, **signals}.items()]
    ink, faint = {"expr": "ink"}, {"expr": "faint"}
    axis = {"labelColor": ink, "titleColor": ink, "domainColor": ink, "tickColor": ink, "gridColor": faint}
    fit = alt.AutoSizeParams(type="pad" if still else "fit-x", contains="padding")
    return (
        chart.add_params(*start, *rest)
        .properties(autosize=fit, background="white" if still else "transparent")
        .configure(font=_FONT, aria=False)
        .configure_axis(**axis, labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
        .configure_legend(labelColor=ink, titleColor=ink, orient="top", labelFontSize=12)
        .configure_view(stroke=None)
    )


_LOSS = [
    Slider("log_order", "order α", LOWEST - STEP, HIGHEST + STEP, STEP, 1, "order_text"),
    Slider("log_temperature", "temperature T", -1, 6, STEP, 2, "temperature_text"),
]
PRESETS: dict[str, dict[str, float | str]] = {
    "the horse": START,
    "exchanged": {"v0": -1.0, "v1": 1.0, "v2": 2.0, "z0": 5.4, "z1": 0.2, "z2": -1.3},
    "nearly learned": {"v0": 5.4, "v1": 0.2, "v2": -1.3, "z0": 5.0, "z1": 0.2, "z2": -1.0},
    "a lost zebra": {"v0": 4.0, "v1": 4.0, "v2": -4.0, "z0": 4.0, "z1": -6.0, "z2": -4.0, "log_temperature": 0.0},
}
EXAMPLE_ALT = (
    "Bars for horse, zebra and car at order 2 and temperature 4. Left, probabilities: the teacher favours the horse, "
    "the student the car, and the mixture is more certain of the horse than the teacher is. Right, the gradient of the "
    "loss: negative for the horse, positive for zebra and car, with red lines at its limit for high temperature."
)
CHORD_ALT = (
    "The convex curve K with K(0) = 0. A red chord runs through its points at 1 and at 2, and meets the vertical axis "
    "below the origin. A thick blue line from the origin down to that point is the divergence of order 2."
)


def example(name: str) -> Interactive:
    """Teacher and student on one image: from six logits to probabilities, divergences and the loss's gradient."""
    import altair as alt

    cells = "".join(
        f'<tr><th scope="row">{says}</th>'
        + "".join(f'<td data-signal="{signal}" data-index="{i}"></td>' for i in range(len(CLASSES)))
        + "</tr>"
        for says, signal in {
            **{"teacher P": "p_text", "student Q": "q_text", "mixture w<sub>α</sub>": "w_text"},
            "gradient": "gradient_text",
        }.items()
    )
    head = "".join(f'<th scope="col">{c}</th>' for c in CLASSES)
    values = "".join(
        f'<tr><th scope="row">{says}</th><td data-signal="{signal}"></td></tr>'
        for says, signal in {
            "D<sub>α</sub>(P‖Q)": "divergence_text",
            "scaled loss": "loss_text",
            "KL(P‖Q), forward": "forward_text",
            "KL(Q‖P), reverse": "reverse_text",
        }.items()
    )
    return Interactive(
        name=name,
        alt=EXAMPLE_ALT,
        charts={
            "Bars of the probabilities, as in the table below": finished(probabilities(), START, DIVERGENCE),
            "Bars of the gradient, as in the table below": finished(gradients(), START, DIVERGENCE),
        },
        still=finished(alt.hconcat(probabilities(330), gradients(230)), START, DIVERGENCE, still=True),
        controls={
            "Logits of the teacher": _logits("v"),
            "Logits of the student": _logits("z"),
            "Loss": [*_LOSS, Choice("scaling", "scale", SCALES, "T2/alpha")],
        },
        numbers=f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{cells}</tbody></table>"
        f"<table><tbody>{values}</tbody></table>",
        presets=PRESETS,
    )


def _logits(letter: str) -> list[Slider]:
    names = {c: f"{letter}{i}" for i, c in enumerate(CLASSES)}
    return [Slider(name, c, -8, 8, 0.1, float(START[name]), f"{name}_text") for c, name in names.items()]


def chords(name: str) -> Interactive:
    """The chord of K, for the logits that the page's example has."""
    return Interactive(
        name=name,
        alt=CHORD_ALT,
        charts={
            "The curve K, its chord and the depth of it, which is the divergence": finished(chord(), START, DIVERGENCE)
        },
        still=finished(chord(480), START, DIVERGENCE, still=True),
        controls={"Loss": _LOSS},
        numbers='<p>The chord through 1 and α = <span data-signal="order_text"></span> meets the axis at depth '
        'D<sub>α</sub> = <span data-signal="divergence_text"></span>; the tangent at 1 at KL(P‖Q) = '
        '<span data-signal="forward_text"></span>.</p>',
    )
