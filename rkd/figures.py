"""The book's pictures: one style, and the figures that more than one page shares. Reads arrays, computes nothing.

Figures are deterministic: SVG ids come from a fixed salt and no date is written, so that a stored picture can be
compared with a fresh one byte by byte. Faces are opaque white, legible on light and dark pages.
"""

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

# Okabe & Ito's palette: told apart with every common colour vision
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#222222"

_STYLE = {
    "axes.grid": True,
    "axes.prop_cycle": mpl.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK]),
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
    mpl.rcParams.update(mpl.rcParamsDefault | {"backend": mpl.get_backend()})
    mpl.rcParams.update(_STYLE)
    set_matplotlib_formats("svg", "png", metadata={"Date": None})
    plt.close("all")
