"""The figures of a run, drawn from what its stages left: records of evaluations and lines of metrics.

Every function takes plain data and the PNG to write, draws one figure of 800 x 500 pixels, and leaves
whatever was there if it fails. A name's colour, line and marker depend on its place in the data alone, so
give all figures of a run their names in the same order.
"""

import json
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from apr_jax.evaluate.records import Record
from apr_jax.evaluate.statistics import even_edges, wilson_interval

# Okabe and Ito's colours, told apart with every common kind of colour blindness; lines and markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, GRID = "#333333", "#DDDDDD"


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, without a last one that a kill cut short, and without values that were not finite
    (null, in older files NaN). No file: no lines."""
    path = Path(path)
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    rows = [row for row in rows if isinstance(row, dict) and _finite(row.get("step"))]
    return [{name: value for name, value in row.items() if _finite(value)} for row in rows]


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def accuracy_bars(models: Mapping[str, Sequence[Record]], path: str | Path) -> None:
    """(a) Accuracy of each model with its 95 % Wilson interval."""

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
    """(b) Cumulative accuracy against the context window (the paper's figure 4b): an answer counts within a
    window where every thread of its tree fits."""
    title = "Accuracy within a context window (every thread fits)"
    _cumulative(models, path, lambda record: record.longest_context, "context window (tokens)", title)


def accuracy_against_sequential(models: Mapping[str, Sequence[Record]], path: str | Path) -> None:
    """(c) Accuracy against sequential tokens (the paper's figure 6): answers found within so many tokens of
    the longest causal chain."""
    title = "Accuracy within a number of sequential tokens"
    _cumulative(models, path, lambda r: r.sequential_tokens, "sequential tokens: longest causal chain of a tree", title)


def accuracy_against_total(models: Mapping[str, Sequence[Record]], path: str | Path) -> None:
    """Accuracy against all tokens of a tree (in the manner of the paper's figure 4a): what parallel search
    costs in compute."""
    title = "Accuracy within a number of total tokens"
    _cumulative(models, path, lambda record: record.total_tokens, "total tokens of all threads of a tree", title)


def sft_losses(runs: Mapping[str, Sequence[dict[str, float]]], path: str | Path) -> None:
    """(d) Loss per token of each model over its supervised steps, and where it was validated in the end."""

    def draw(axes: Axes) -> None:
        for i, (name, rows) in enumerate(runs.items()):
            steps, losses = _series(rows, "loss")
            axes.plot(steps, losses, label=name, lw=1.8, **_style(i))
            steps, losses = _series(rows, "validation_loss")
            axes.plot(
                steps, losses, MARKERS[i % len(MARKERS)], ms=9, mfc="white", mew=2, color=COLOURS[i % len(COLOURS)],
                label=f"{name}, held out" if steps else None, zorder=4,
            )  # fmt: skip
        axes.set_yscale("log")
        _plain_ticks(axes)
        axes.set_xlabel("supervised step")
        axes.set_ylabel("loss (nats per token, log scale)")
        legend(axes, "upper right")

    save_figure(path, "Supervised training: loss per token", draw)


def grpo_rewards(runs: Mapping[str, Sequence[dict[str, float]]], path: str | Path) -> None:
    """(d) How many of each GRPO step's rollouts are right, faint, its mean over about a tenth of the run, and
    validation where there is some."""

    def draw(axes: Axes) -> None:
        highest = 0.0
        for i, (name, rows) in enumerate(runs.items()):
            steps, rewards = _series(rows, "rollout/correct")
            highest = max([highest, *rewards])
            axes.plot(steps, rewards, lw=1, alpha=0.35, color=COLOURS[i % len(COLOURS)])
            width = max(1, len(steps) // 10)
            label = name if width == 1 else f"{name}, mean of {width} steps"
            single = {"marker": MARKERS[i % len(MARKERS)]} if len(steps) < 30 else {}
            axes.plot(steps, _running_mean(rewards, width), label=label, lw=2.2, **_style(i), **single)
            if validated := _series(rows, "validation/accuracy")[0]:
                values = _series(rows, "validation/accuracy")[1]
                highest = max([highest, *values])
                axes.plot(validated, values, lw=1, ls=":", marker="D", color=COLOURS[i % len(COLOURS)],
                          label=f"{name}, validation")  # fmt: skip
        percent_axis(axes, max(1.15 * highest, 0.05))
        axes.set_xlabel("GRPO step")
        axes.set_ylabel("rollouts answered right (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(axes, "lower right")

    save_figure(path, "Reinforcement learning: sampled trees that are right (faint: each step)", draw)


# ---------------------------------------------------------------------- parts


def _cumulative(models: Mapping[str, Sequence[Record]], path, cost: Callable[[Record], int], label: str, title: str):
    """Lines with their 95 % intervals as bands; the last points say the accuracy without a limit."""

    def draw(axes: Axes) -> None:
        edges = [0, *even_edges((cost(record) for records in models.values() for record in records), count=64, step=1)]
        for i, (name, records) in enumerate(models.items()):
            costs = [cost(record) for record in records if record.correct]
            right = [sum(each <= edge for each in costs) for edge in edges]
            bands = [wilson_interval(count, len(records)) for count in right]
            rates = [count / max(len(records), 1) for count in right]
            style = _style(i)
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


def save_figure(path: str | Path, title: str, draw: Callable[[Axes], None]) -> None:
    """Figures are made without pyplot: no display, no state between two of them, any thread."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
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
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", facecolor="white")
    os.replace(part, path)


def _style(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "ls": LINES[i % len(LINES)]}


def percent_axis(axes: Axes, top: float) -> None:
    axes.set_ylim(0, min(top, 1.18))
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top)
    axes.set_yticks([tick for tick in ticks if 0 <= tick <= min(top, 1)])
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol="", decimals=0 if top > 0.1 else 1))


def _plain_ticks(axes: Axes) -> None:
    """Numbers such as 0.5 on a log axis, also where it spans less than a decade."""
    for which in ("major", "minor"):
        set_formatter = getattr(axes.yaxis, f"set_{which}_formatter")
        set_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "1235" else "")


def legend(axes: Axes, place: str, **settings) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc=place, frameon=True, framealpha=0.85, edgecolor="none", fontsize=10, **settings)
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=INK, fontsize=14)
        axes.tick_params(which="both", labelbottom=False, labelleft=False, length=0)


def _series(rows: Sequence[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Of the last `width` values, of fewer at the start."""
    return [sum(part := values[max(0, i + 1 - width) : i + 1]) / len(part) for i in range(len(values))]
