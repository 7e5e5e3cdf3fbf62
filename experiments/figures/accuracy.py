"""Figures of evaluations: accuracy by model, and accuracy within a budget.

Each function takes records by the model's name, and the path of the PNG to write.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from apr_jax.evaluate.records import Record
from apr_jax.evaluate.statistics import even_edges, wilson_interval
from experiments.figures.style import COLOURS, INK, MARKERS, legend, line_style, percent_axis, save_figure


def accuracy_bars(models: Mapping[str, Sequence[Record]], path: str | Path) -> None:
    """Draw the accuracy of each model with its 95 % Wilson interval."""

    def draw(axes: Axes) -> None:
        for i, (name, records) in enumerate(models.items()):
            right, total = sum(record.correct for record in records), len(records)
            rate = right / max(total, 1)
            low, high = wilson_interval(right, total)
            axes.bar(i, rate, width=0.62, color=COLOURS[i % len(COLOURS)], zorder=2)
            axes.errorbar(i, rate, [[rate - low], [high - rate]], color=INK, capsize=6, lw=1.5, zorder=3)
            label = f"{100 * rate:.1f} %\n{right} of {total}"
            axes.annotate(label, (i, high), (0, 5), textcoords="offset points", ha="center", va="bottom", fontsize=10)
        axes.set_xticks(range(len(models)), [textwrap.fill(name, 14) for name in models])
        axes.set_xlim(-0.6, max(len(models), 2) - 0.4)
        top = max((wilson_interval(sum(r.correct for r in rs), len(rs))[1] for rs in models.values()), default=1)
        percent_axis(axes, 1.22 * top)
        axes.set_ylabel("problems answered right (%)")
        axes.grid(axis="x", visible=False)

    save_figure(path, "Accuracy by model (bars: 95 % Wilson intervals)", draw)


def accuracy_against_window(models: Mapping[str, Sequence[Record]], path: str | Path) -> None:
    """Draw accuracy against the context window (the paper's figure 4b).

    A correct answer counts from the window on that every thread of its tree fits.
    """
    title = "Accuracy within a context window (every thread fits)"
    _cumulative(models, path, lambda record: record.longest_context, "context window (tokens)", title)


def accuracy_against_sequential(models: Mapping[str, Sequence[Record]], path: str | Path) -> None:
    """Draw accuracy against sequential tokens, the tokens of a tree's longest causal chain (the paper's figure 6).

    A correct answer counts from its tree's number of sequential tokens on.
    """
    title = "Accuracy within a number of sequential tokens"
    _cumulative(models, path, lambda r: r.sequential_tokens, "sequential tokens: longest causal chain of a tree", title)


def accuracy_against_total(models: Mapping[str, Sequence[Record]], path: str | Path) -> None:
    """Draw accuracy against all tokens of a tree, the compute cost of parallel search (as the paper's figure 4a)."""
    title = "Accuracy within a number of total tokens"
    _cumulative(models, path, lambda record: record.total_tokens, "total tokens of all threads of a tree", title)


def _cumulative(models: Mapping[str, Sequence[Record]], path, cost: Callable[[Record], int], label: str, title: str):
    """Draw, for each model, the fraction of problems that are answered correctly at a cost of at most x.

    Bands are 95 % Wilson intervals. The last point is the accuracy without a limit.
    """

    def draw(axes: Axes) -> None:
        edges = [0, *even_edges((cost(record) for records in models.values() for record in records), count=64, step=1)]
        for i, (name, records) in enumerate(models.items()):
            costs = [cost(record) for record in records if record.correct]
            right = [sum(each <= edge for each in costs) for edge in edges]
            bands = [wilson_interval(count, len(records)) for count in right]
            rates = [count / max(len(records), 1) for count in right]
            style = line_style(i)
            axes.plot(edges, rates, lw=2.2, label=f"{name} ({100 * rates[-1]:.1f} %)", **style,
                      marker=MARKERS[i % len(MARKERS)], markevery=(i % 8, 8), ms=6)  # fmt: skip
            axes.fill_between(edges, *zip(*bands), color=style["color"], alpha=0.12, lw=0)
        axes.set_xlim(0, edges[-1])
        percent_axis(axes, 1.08 * max(axes.get_ylim()[1], 0.02))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(label)
        axes.set_ylabel("problems answered right (%)")
        legend(axes, "upper left", title="model (without limit)")

    save_figure(path, f"{title}, 95 % bands", draw)
