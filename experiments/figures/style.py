"""The common style of all figures: colours, lines, axes, legends, and writing of files.

A figure has 800 x 500 pixels. It replaces an earlier file only when it is complete. A name's colour, line and marker
depend only on its position in the data, so all figures of a run should get the names in the same order.
"""

import math
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from apr_jax.io.files import whole
from apr_jax.io.json_lines import read_lines

# Okabe and Ito's colours, which can be distinguished with every common kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, GRID = "#333333", "#DDDDDD"


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl; none if there is no file.

    A last line that a kill truncated is left out, and so are values that were not finite (null, in older files NaN).
    """
    rows = (row for _, row in read_lines(path, cut_short=True) if _finite(row.get("step")))
    return [{name: value for name, value in row.items() if _finite(value)} for row in rows]


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def save_figure(path: str | Path, title: str, draw: Callable[[Axes], None]) -> None:
    """Write a PNG with one pair of axes, which `draw` fills.

    It does not use pyplot, so it needs no display, keeps no state, and works in any thread.
    """
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
    """Return the colour and line style of name number `i`."""
    return {"color": COLOURS[i % len(COLOURS)], "ls": LINES[i % len(LINES)]}


def percent_axis(axes: Axes, top: float) -> None:
    """Format the y axis of fractions as percent, from 0 to about `top`."""
    axes.set_ylim(0, min(top, 1.18))
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top)
    axes.set_yticks([tick for tick in ticks if 0 <= tick <= min(top, 1)])
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol="", decimals=0 if top > 0.1 else 1))


def legend(axes: Axes, place: str, **settings) -> None:
    """Add a legend, or the text "no data" if nothing was drawn."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc=place, frameon=True, framealpha=0.85, edgecolor="none", fontsize=10, **settings)
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=INK, fontsize=14)
        axes.tick_params(which="both", labelbottom=False, labelleft=False, length=0)
