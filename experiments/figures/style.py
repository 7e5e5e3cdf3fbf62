"""The manner of all figures: colours, lines, axes, legends, and how a figure becomes a file.

A figure has 800 x 500 pixels and takes the place of an earlier one only when it is whole. A name's colour, line and
marker depend on its place in the data alone, so give all figures of a run their names in the same order.
"""

import math
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from apr_jax.io.files import whole
from apr_jax.io.json_lines import read_lines

# Okabe and Ito's colours, told apart with every common kind of colour blindness; lines and markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, GRID = "#333333", "#DDDDDD"


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, without a last one that a kill cut short, and without values that were not finite
    (null, in older files NaN). No file: no lines."""
    rows = (row for _, row in read_lines(path, cut_short=True) if _finite(row.get("step")))
    return [{name: value for name, value in row.items() if _finite(value)} for row in rows]


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def save_figure(path: str | Path, title: str, draw: Callable[[Axes], None]) -> None:
    """Figures are made without pyplot: no display, no state between two of them, any thread."""
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.grid(color=GRID, lw=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    draw(axes)
    axes.set_title(title, loc="left", fontsize=13, color=INK, pad=12)
    axes.xaxis.label.set_size(11)
    axes.yaxis.label.set_size(11)
    with whole(Path(path)) as part:
        figure.savefig(part, format="png", facecolor="white")


def line_style(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "ls": LINES[i % len(LINES)]}


def percent_axis(axes: Axes, top: float) -> None:
    axes.set_ylim(0, min(top, 1.18))
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top)
    axes.set_yticks([tick for tick in ticks if 0 <= tick <= min(top, 1)])
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol="", decimals=0 if top > 0.1 else 1))


def legend(axes: Axes, place: str, **settings) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc=place, frameon=True, framealpha=0.85, edgecolor="none", fontsize=10, **settings)
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=INK, fontsize=14)
        axes.tick_params(which="both", labelbottom=False, labelleft=False, length=0)
