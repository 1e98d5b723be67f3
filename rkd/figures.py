"""The book's pictures and tables: one style, and what more than one page shares. Reads arrays, computes nothing.

Figures are deterministic: SVG ids come from a fixed salt and no date is written, so that a stored picture can be
compared with a fresh one byte by byte. Faces are opaque white, legible on light and dark pages.
"""

from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython.display import Markdown
from matplotlib_inline.backend_inline import set_matplotlib_formats

Array = np.ndarray

# Okabe & Ito's palette: told apart with every common colour vision
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#222222",
)

_STYLE: Any = {
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "figure.figsize": (7.0, 3.2),
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "path",
    "svg.hashsalt": "rkd",
}


def style() -> None:
    """Set the book's look for all figures that follow, and store them as SVG (compared) and PNG (for print)."""
    plt.style.use("default")
    mpl.rcParams.update(_STYLE)
    set_matplotlib_formats("svg", "png", metadata={"Date": None})


def temperature_scaling(
    classes: list[str], logits: list[float], softened: dict[float, list[float]]
) -> list[list[float]]:
    """Figure 1.1: bars of the logits, then of the probabilities at each temperature. Returns the heights drawn."""
    rows = [("logits", logits), *((f"probabilities, T = {t:g}", row) for t, row in softened.items())]
    _, axes = plt.subplots(1, len(rows), figsize=(8.4, 2.9))
    drawn = []
    for axis, (title, row) in zip(axes, rows, strict=True):
        bars = axis.bar(classes, row, color=[BLUE, ORANGE, GREEN], width=0.65)
        axis.bar_label(bars, fmt="%.1f" if title == "logits" else "%.3f", padding=2, fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.grid(visible=False)
        axis.axhline(0, color=BLACK, linewidth=0.8)
        axis.margins(y=0.15)
        if title != "logits":
            axis.set_ylim(0, 1.12)
        drawn.append([bar.get_height() for bar in bars])
    return drawn


def error_slopes(temperatures: list[float], errors: dict[str, list[float]], ylabel: str) -> dict[str, float]:
    """Log-log lines of errors against temperature, labelled with their fitted slopes, which are returned."""
    _, axis = plt.subplots()
    slopes = {}
    for (label, row), line in zip(errors.items(), ("-o", "--s", "-.^"), strict=False):
        slopes[label] = float(np.polyfit(np.log(temperatures), np.log(row), 1)[0])
        axis.loglog(
            temperatures, row, line, markersize=4, label=f"{label}: slope {slopes[label]:.2f}".replace("-", "−")
        )
    axis.set_xlabel("temperature T")
    axis.set_ylabel(ylabel)
    axis.legend()
    return slopes


def order_curves(orders: dict[str, Array], curves: dict[str, Array]) -> None:
    """D_α against α on a logarithmic axis, one line a pair of distributions."""
    _, axis = plt.subplots()
    for label, row in curves.items():
        axis.semilogx(orders[label], row, label=label)
    axis.axvline(1, color=BLACK, linewidth=0.8, linestyle=":")
    axis.set_xlabel("order α")
    axis.set_ylabel("$D_\\alpha(P\\|Q)$ in nats")
    axis.set_ylim(0, 2.5)
    axis.legend()


def bound_on_limit(orders: Array, distance: Array, bound: Array) -> None:
    """D_∞ − D_α against α, below its bound."""
    _, axis = plt.subplots()
    axis.loglog(orders, distance, label="$D_\\infty - D_\\alpha$")
    axis.loglog(orders, bound, linestyle="--", label="bound")
    axis.set_xlabel("order α")
    axis.set_ylabel("nats")
    axis.legend()


def relative_errors(panels: dict[str, tuple[list[float], list[dict[str, float]]]]) -> None:
    """One log-log panel an x-axis label: (positions, {method: relative error} at each); zeros are drawn at 1e-9."""
    _, axes = plt.subplots(1, len(panels), figsize=(8.4, 3.2), sharey=True)
    for axis, (label, (positions, rows)) in zip(axes, panels.items(), strict=True):
        for method, style in zip(rows[0], ("--s", "-.^", "-o"), strict=True):
            axis.loglog(positions, [max(row[method], 1e-9) for row in rows], style, markersize=4, label=method)
        axis.set_xlabel(label)
    axes[0].set_ylabel("largest relative error, float32")
    axes[0].legend()


def against_order(
    orders: list[float],
    panels: dict[str, tuple[Any, dict[str, list[Any]]]],
    ylabel: str = "test accuracy in %",
    xlabel: str = "order α",
    baseline: str = "hard labels",
) -> list[list[float]]:
    """One panel a situation: (interval of the baseline or None, {label: an interval for each order}).

    Intervals have `mean`, `low` and `high`. Orders, or what else `xlabel` says, are spaced evenly, since 0 has no
    logarithm. Returns the means drawn.
    """
    _, axes = plt.subplots(1, len(panels), figsize=(8.4, 3.2), squeeze=False)
    drawn = []
    for axis, (title, (flat, lines)) in zip(axes[0], panels.items(), strict=True):
        if flat is not None:
            axis.axhspan(flat.low, flat.high, color=BLACK, alpha=0.12, linewidth=0)
            axis.axhline(flat.mean, color=BLACK, linewidth=1, linestyle=":", label=baseline)
        for shift, (label, intervals) in enumerate(lines.items()):
            x = np.arange(len(orders)) + 0.12 * (shift - (len(lines) - 1) / 2)
            means = [interval.mean for interval in intervals]
            reach = [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]
            axis.errorbar(x, means, reach, marker="os^Dv"[shift], markersize=4, capsize=3, label=label)
            drawn.append(means)
        axis.set_xticks(range(len(orders)), [f"{x:g}" if isinstance(x, int | float) else x for x in orders])
        axis.set_xlabel(xlabel)
        axis.set_title(title, fontsize=10)
    axes[0, 0].set_ylabel(ylabel)
    axes[0, 0].legend()
    return drawn


def order_maps(panels: dict[str, tuple[Array, Array]], orders: list[float], temperatures: list[float]) -> list[Array]:
    """One map a panel: (differences, which of them are certain), rows are orders and columns temperatures.

    Purple is above 0, orange below, on one scale for all panels; certain ones are printed bold. Returns what is drawn.
    """
    _, axes = plt.subplots(1, len(panels), figsize=(8.4, 3.4), sharey=True, squeeze=False)
    limit = max(float(np.abs(values).max()) for values, _ in panels.values())
    for axis, (title, (values, certain)) in zip(axes[0], panels.items(), strict=True):
        axis.imshow(values, cmap="PuOr", vmin=-1.8 * limit, vmax=1.8 * limit, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            weight = "bold" if certain[row, column] else "normal"
            text = f"{value:+.1f}".replace("-", "−") if abs(value) >= 0.05 else "0"
            axis.text(column, row, text, ha="center", va="center", fontsize=8.5, weight=weight, color=BLACK)
        axis.set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
        axis.set_yticks(range(len(orders)), [f"{order:g}" for order in orders])
        axis.grid(visible=False)
        axis.set_xlabel("temperature T")
        axis.set_title(title, fontsize=10)
    axes[0, 0].set_ylabel("order α")
    return [axis.images[0].get_array().data for axis in axes[0]]


def differences(panels: dict[str, dict[str, Any]], xlabel: str) -> list[float]:
    """One panel a situation, one horizontal interval a label; those that exclude 0 are filled. Returns the means."""
    height = 1.2 + 0.28 * max(map(len, panels.values()))
    _, axes = plt.subplots(1, len(panels), figsize=(8.4, height), squeeze=False, sharey=True)
    drawn = []
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        for y, interval in enumerate(rows.values()):
            color = BLUE if interval.low > 0 else RED if interval.high < 0 else BLACK
            axis.plot([interval.low, interval.high], [y, y], color=color, linewidth=1.6)
            face = color if interval.certain else "white"
            axis.plot(interval.mean, y, "o", color=color, markerfacecolor=face, markersize=5)
            drawn.append(interval.mean)
        axis.axvline(0, color=BLACK, linewidth=0.8)
        axis.set_yticks(range(len(rows)), list(rows))
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(xlabel)
    return drawn


def table(caption: str, name: str, head: list[str], rows: list[list[str]]) -> Markdown:
    """A numbered table of the book, as MyST: cells are Markdown, `name` is what `numref` refers to."""
    lines = [head, ["---"] * len(head), *rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return Markdown(f":::{{table}} {caption}\n:name: {name}\n\n{body}\n:::")


def chords(curve: Callable[[Array], Array], orders: list[float], slopes: Array) -> list[float]:
    """The convex curve K and its lines through (1, K(1)) of the given slopes, down to the axis. Returns the depths."""
    _, axis = plt.subplots(figsize=(7.0, 4.0))
    t = np.linspace(-0.6, max(orders) + 0.3, 300)
    axis.plot(t, curve(t), color=BLACK, label="$K(t)$")
    at_one, depths = float(curve(np.array(1.0))), []
    for order, slope, color in zip(orders, slopes, (GREEN, SKY, RED, ORANGE, BLUE), strict=True):
        end = max(order, 1.0) if order != 1.0 else 1.6
        axis.plot([0, end], [at_one - slope, at_one + slope * (end - 1)], color=color, linewidth=1.2)
        axis.plot([order], curve(np.array([order])), "o", color=color, markersize=4)
        depths.append(at_one - float(slope))
        axis.plot([0], depths[-1:], "D", color=color, markersize=4, label=f"depth $D_\\alpha$, α = {order:g}")
    axis.axvline(0, color=BLACK, linewidth=0.8)
    axis.axhline(0, color=BLACK, linewidth=0.8)
    axis.set_xlabel("t")
    axis.set_ylim(min(depths) * 1.4, float(curve(np.array(max(orders)))) * 1.05)
    axis.legend()
    return depths


def simplex_flow(paths: dict[float, Array], teacher: Array, corners: list[str], every: int) -> None:
    """One triangle an order: the paths (steps, starts, 3) of distributions, a dot every `every` steps, the teacher."""
    to_plane = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
    _, axes = plt.subplots(1, len(paths), figsize=(8.4, 2.9))
    for axis, (order, path) in zip(axes, paths.items(), strict=True):
        axis.plot(*to_plane[[0, 1, 2, 0]].T, color=BLACK, linewidth=0.8)
        for start, color in zip(np.moveaxis(path, 1, 0), (BLUE, ORANGE, GREEN, RED), strict=True):
            points = start @ to_plane
            axis.plot(*points.T, color=color, linewidth=1.2)
            axis.plot(*points[::every].T, "o", color=color, markersize=3)
        axis.plot(*(teacher @ to_plane), "*", color=BLACK, markersize=9)
        for name, corner, side in zip(corners, to_plane, ("top", "top", "bottom"), strict=True):
            axis.annotate(
                name, corner, (0, -4 if side == "top" else 4), textcoords="offset points", ha="center", va=side
            )
        axis.set_title(f"α = {order:g}", fontsize=10, pad=16)
        axis.set_aspect("equal")
        axis.axis("off")


def covering(x: Array, teacher: Array, students: dict[float, Array]) -> list[Any]:
    """A teacher's distribution over points on a line, filled, and one student's an order. Returns the curves drawn."""
    _, axis = plt.subplots()
    axis.fill_between(x, teacher, color=BLACK, alpha=0.15, linewidth=0, label="teacher")
    for (order, student), color in zip(students.items(), (SKY, GREEN, RED, ORANGE, BLUE), strict=True):
        axis.plot(x, student, color=color, label=f"α = {order:g}")
    axis.set_xlabel("class, as a point on a line")
    axis.set_ylabel("probability")
    axis.legend()
    return [line.get_ydata() for line in axis.lines]


def gradient_lengths(gaps: Array, curves: dict[str, list[float]]) -> None:
    """Log-log lines of gradient lengths against a gap; labels that start with D are solid, the others broken."""
    _, axis = plt.subplots(figsize=(8.4, 3.6))
    for label, row in curves.items():
        axis.loglog(gaps, row, "-" if label.startswith("$D") else "--", label=label)
    axis.set_xlabel("margin $s$ of both")
    axis.set_ylabel("length of the gradient over $c$")
    axis.set_ylim(1e-4, 1e2)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def speed_of_bundles(bundles: dict[str, dict[int, float]], loops: dict[str, float]) -> list[list[float]]:
    """Log-log lines of µs a student and step against students in a bundle, the loops' level and broken. Returns µs."""
    _, axis = plt.subplots(figsize=(7.0, 3.9))
    for (network, row), marker in zip(bundles.items(), "os^", strict=True):
        (line,) = axis.loglog(list(row), list(row.values()), marker=marker, markersize=5, label=network)
        level = axis.axhline(loops[network], color=line.get_color(), linewidth=1.2, linestyle="--")
        level.set(marker=marker, markersize=5, markerfacecolor="white", markevery=[1], clip_on=False)
    axis.plot([], [], color=BLACK, linewidth=1.2, linestyle="--", label="plain loop, same mark")
    sizes = sorted({size for row in bundles.values() for size in row})
    axis.set_xticks(sizes, [f"{size:d}" for size in sizes])
    axis.set_yticks([10, 30, 100, 300, 1000, 3000], ["10", "30", "100", "300", "1,000", "3,000"])
    axis.minorticks_off()
    axis.set_xlabel("students in the bundle")
    axis.set_ylabel("µs a student and step")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return [np.asarray(line.get_ydata()).tolist() for line in axis.lines[:-1:2]]
