"""Figures of trainings, drawn from lines of metrics: losses of SFT, rewards of GRPO.

Every function takes plain data and the PNG to write.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments.figures.style import COLOURS, MARKERS, legend, line_style, percent_axis, save_figure


def sft_losses(runs: Mapping[str, Sequence[dict[str, float]]], path: str | Path) -> None:
    """(d) Loss per token of each model over its supervised steps, and where it was validated in the end."""

    def draw(axes: Axes) -> None:
        for i, (name, rows) in enumerate(runs.items()):
            steps, losses = _series(rows, "loss")
            axes.plot(steps, losses, label=name, lw=1.8, **line_style(i))
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
            axes.plot(steps, _running_mean(rewards, width), label=label, lw=2.2, **line_style(i), **single)
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


def _plain_ticks(axes: Axes) -> None:
    """Numbers such as 0.5 on a log axis, also where it spans less than a decade."""
    for which in ("major", "minor"):
        set_formatter = getattr(axes.yaxis, f"set_{which}_formatter")
        set_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "1235" else "")


def _series(rows: Sequence[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Of the last `width` values, of fewer at the start."""
    return [sum(part := values[max(0, i + 1 - width) : i + 1]) / len(part) for i in range(len(values))]
