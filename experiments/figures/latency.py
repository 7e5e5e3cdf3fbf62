"""Figures of latency, drawn from the samples of `tools.latency`. A group is a setting with its samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from apr_jax.evaluate.latency.sample import Group, Setting
from apr_jax.evaluate.latency.summary import summarise_latency
from apr_jax.evaluate.statistics import wilson_interval
from experiments.figures.style import COLOURS, INK, LINES, MARKERS, legend, percent_axis, save_figure


def accuracy_against_latency(groups: Sequence[Group], path: str | Path) -> None:
    """Draw accuracy against mean latency, one point per model and budget (the paper's figure 6, right).

    Accuracies have 95 % Wilson intervals. Hollow points are at the latency that the cost model predicts.
    """

    def draw(axes: Axes) -> None:
        models: dict[str, list[tuple[Setting, dict]]] = {}  # by title
        for setting, samples in groups:
            models.setdefault(setting.title, []).append((setting, summarise_latency(samples)))
        for i, (title, rows) in enumerate(models.items()):
            rows.sort(key=lambda row: row[1]["latency"])
            rates = [row["accuracy"] for _, row in rows]
            errors = [
                [row["accuracy"] - row["accuracy_low"] for _, row in rows],
                [row["accuracy_high"] - row["accuracy"] for _, row in rows],
            ]
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            axes.errorbar([1000 * row["latency"] for _, row in rows], rates, errors, color=colour, marker=marker, ms=8,
                          ls=LINES[0], lw=1.5, capsize=4, label=f"{title}, measured", zorder=3)  # fmt: skip
            axes.plot([1000 * row["predicted"] for _, row in rows], rates, color=colour, marker=marker, ms=9,
                      mfc="white", mew=1.5, ls=LINES[3], lw=1, label=f"{title}, predicted")  # fmt: skip
            for setting, row in rows:
                label = _budget(setting, [other for other, _ in rows])
                axes.annotate(label, (1000 * row["latency"], row["accuracy"]), (6, -12), fontsize=8, color=INK,
                              textcoords="offset points")  # fmt: skip
        axes.margins(x=0.15)
        axes.set_xlim(left=0)
        percent_axis(axes, _top(groups))
        axes.set_xlabel("mean latency of a sample (ms)")
        axes.set_ylabel("problems answered right (%)")
        legend(axes, "upper left")

    save_figure(path, f"Accuracy against latency: {_engines(groups)}", draw)


def accuracy_within_latency(groups: Sequence[Group], path: str | Path) -> None:
    """Draw the fraction of problems that are answered correctly within a latency, measured and (dashed) predicted."""

    def draw(axes: Axes) -> None:
        longest = 0.0
        for i, (setting, samples) in enumerate(groups):
            colour = COLOURS[i % len(COLOURS)]
            budget = _budget(setting, [other for other, _ in groups if other.title == setting.title])
            title = ", ".join(filter(None, (setting.title, budget)))
            right = [sample for sample in samples if sample.correct]
            measured, predicted = ([1000 * getattr(s, name) for s in right] for name in ("latency", "predicted"))
            rates = [n / len(samples) for n in range(len(right) + 1)]
            axes.step([0, *sorted(measured)], rates, where="post", color=colour, lw=2.2, label=title)
            axes.step([0, *sorted(predicted)], rates, where="post", color=colour, lw=1.2, ls=LINES[1])
            longest = max([longest, *measured, *predicted])
        axes.set_xlim(0, 1.05 * longest or 1)
        percent_axis(axes, _top(groups))
        axes.set_xlabel("latency of a sample (ms)")
        axes.set_ylabel("problems answered right (%)")
        legend(axes, "upper left")

    save_figure(path, f"Accuracy within a latency (dashed: predicted): {_engines(groups)}", draw)


def load_curves(curves: Mapping[str, Sequence[tuple[int, float, float]]], path: str | Path) -> None:
    """Draw mean latency against samples per second, one line per setting.

    A point is (trees at once, samples per second, mean latency in seconds).
    """

    def draw(axes: Axes) -> None:
        for i, (title, points) in enumerate(curves.items()):
            axes.plot([rate for _, rate, _ in points], [1000 * latency for _, _, latency in points], lw=2, label=title,
                      marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)],
                      ls=LINES[i % len(LINES)])  # fmt: skip
            for count, rate, latency in points:
                axes.annotate(f"{count}", (rate, 1000 * latency), (6, -12), fontsize=9, color=COLOURS[i % len(COLOURS)],
                              textcoords="offset points")  # fmt: skip
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        # Leaves room for the legend.
        highest = max((latency for points in curves.values() for _, _, latency in points), default=0)
        axes.set_ylim(0, 1000 * highest * (1.15 + 0.08 * len(curves)) or 1)
        axes.set_xlabel("samples per second")
        axes.set_ylabel("mean latency of a sample (ms)")
        legend(axes, "upper left")

    save_figure(path, "Latency under load (numbers: trees at once)", draw)


def _budget(setting: Setting, among: Sequence[Setting]) -> str:
    """Return a label of what distinguishes a setting from other settings of its model: condition, window, children."""
    parts = [setting.condition.strip()] if setting.condition else []
    if len({other.window for other in among}) > 1:
        parts.append(f"window {setting.window}")
    if len({other.min_children for other in among}) > 1:
        parts.append(f"at least {setting.min_children} children")
    return ", ".join(parts)


def _top(groups: Sequence[Group]) -> float:
    highest = [wilson_interval(sum(s.correct for s in samples), len(samples))[1] for _, samples in groups]
    return 1.08 * max([*highest, 0.02])


def _engines(groups: Sequence[Group]) -> str:
    return "; ".join(dict.fromkeys(setting.engine_title for setting, _ in groups))
