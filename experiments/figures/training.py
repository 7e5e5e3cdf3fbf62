"""Figures of training: losses of SFT, rewards of GRPO.

Each function takes the lines of metrics by the model's name, and the path of the PNG to write.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments.figures.style import COLOURS, MARKERS, legend, line_style, percent_axis, save_figure


def sft_losses(runs: Mapping[str, Sequence[dict[str, float]]], path: str | Path) -> None:
    """Draw the SFT loss per token of each model by step, and its validation losses."""

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
    """Draw the fraction of correct rollouts by GRPO step (faint), its running mean, and the validation accuracy.

    The running mean is over a tenth of the steps.
    """

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
    """Label a log axis with numbers such as 0.5, also if it spans less than a decade."""
    for which in ("major", "minor"):
        set_formatter = getattr(axes.yaxis, f"set_{which}_formatter")
        set_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "1235" else "")


def _series(rows: Sequence[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Return the steps that have a metric, and its values."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of the last `width` values at each value; of fewer at the start."""
    return [sum(part := values[max(0, i + 1 - width) : i + 1]) / len(part) for i in range(len(values))]
