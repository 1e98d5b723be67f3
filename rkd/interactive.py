"""Figures that a reader can move: charts, sliders and numbers as static HTML, computed in the browser by Vega.

The module owns the frame: controls with labels, charts, the numbers they show, and a still picture for paper and for
pages without scripts. `rkd.charts` and `rkd.maps` say what the charts compute. A chart is a Vega-Altair chart; here it
is compiled to Vega, so that the page needs Vega's runtime alone. Every control names a signal; charts and numbers of
one page that know a signal of that name follow it. Needs the extra ``rkd[book]``.
Book: 2.1.8, "Try It", and 2.2.12, "Maps to Explore".
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any


@dataclass(frozen=True)
class Slider:
    """A number that the reader moves.

    Attributes:
        signal: name of the parameter of the charts that it sets.
        label: HTML, what a reader calls it.
        low, high, step, value: of the parameter; `value` is where it starts.
        text: name of the signal that says the value in words, shown and read aloud; the number itself where empty.
    """

    signal: str
    label: str
    low: float
    high: float
    step: float
    value: float
    text: str = ""

    def html(self, identity: str) -> str:
        says = self.text or self.signal
        return (
            f'<div class="rkd-control"><label for="{identity}">{self.label}</label>'
            f'<input type="range" id="{identity}" data-signal="{self.signal}" data-text="{says}" '
            f'min="{self.low:g}" max="{self.high:g}" step="{self.step:g}" value="{self.value:g}">'
            f'<span class="rkd-value" data-signal="{says}" aria-hidden="true"></span></div>'
        )


@dataclass(frozen=True)
class Choice:
    """One of a few words that the reader picks: `options` are the values of `signal`, and what is shown for each."""

    signal: str
    label: str
    options: Mapping[str, str]
    value: str

    def html(self, identity: str) -> str:
        options = "".join(
            f'<option value="{escape(value)}"{" selected" if value == self.value else ""}>{escape(shown)}</option>'
            for value, shown in self.options.items()
        )
        select = f'<select id="{identity}" data-signal="{self.signal}">{options}</select>'
        return f'<div class="rkd-control"><label for="{identity}">{self.label}</label>{select}</div>'


@dataclass(frozen=True)
class Interactive:
    """A figure that moves. Notebooks show it by itself.

    Attributes:
        name: of the figure, unique on its page.
        alt: text in place of the still picture.
        charts: Altair charts whose width is "container", with a text each that says what it shows.
        still: the Altair chart, of fixed size, that stands on paper and where scripts are off.
        controls: groups of sliders and choices, by the group's heading.
        numbers: HTML with elements such as ``<span data-signal="kl_text"></span>``, filled from signals; `data-index`
            picks one entry of a signal that is a list.
        presets: what a button says, and the values that it sets.
        more: HTML below the charts that is there without scripts too, such as a table.
    """

    name: str
    alt: str
    charts: Mapping[str, Any]
    still: Any
    controls: Mapping[str, Sequence[Slider | Choice]]
    numbers: str = ""
    presets: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    more: str = ""

    def picture(self) -> str:
        """The still picture as SVG."""
        import vl_convert

        drawn = vl_convert.vegalite_to_svg(self.still.to_dict())
        # the converter counts the clips of all its pictures; the same picture shall have the same bytes
        counted = {clip: f"clip-{i}" for i, clip in enumerate(dict.fromkeys(re.findall(r"clip\d+", drawn)))}
        return re.sub(r"clip\d+", lambda clip: counted[clip[0]], drawn)

    def html(self) -> str:
        """What the page's script brings to life; the still picture until then."""
        groups = "".join(
            f"<fieldset><legend>{escape(heading)}</legend>"
            + "".join(control.html(f"rkd-{self.name}-{control.signal}") for control in group)
            + "</fieldset>"
            for heading, group in self.controls.items()
        )
        buttons = "".join(
            f"<button type=\"button\" data-set='{escape(json.dumps(values))}'>{escape(words)}</button>"
            for words, values in self.presets.items()
        )
        charts = "".join(
            f'<div class="rkd-chart" role="img" aria-label="{escape(says)}">'
            f'<script type="application/json">{_json(chart)}</script></div>'
            for says, chart in self.charts.items()
        )
        picture = base64.b64encode(self.picture().encode()).decode()
        return (
            f'<div class="rkd-interactive" id="rkd-{self.name}">'
            f'<img class="rkd-still" alt="{escape(self.alt)}" src="data:image/svg+xml;base64,{picture}">'
            f'<div class="rkd-live" hidden><div class="rkd-controls">{groups}</div>'
            + (f'<div class="rkd-presets">{buttons}</div>' if buttons else "")
            + f'<div class="rkd-charts">{charts}</div><div class="rkd-numbers">{self.numbers}</div></div>'
            + f"{self.more}</div>"
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {
            "text/html": self.html(),
            "image/svg+xml": self.picture(),
            "text/plain": f"<interactive figure {self.name}>",
        }


def _json(chart: Any) -> str:
    """A chart as a Vega specification that may stand inside a script element."""
    import vl_convert

    return json.dumps(vl_convert.vegalite_to_vega(chart.to_dict()), separators=(",", ":")).replace("</", "<\\/")
