"""The report of a latency run: a table of all settings, figures, and the gap between measured and predicted latency."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from apr_jax.evaluate.latency.passes import Throughput, read_throughput
from apr_jax.evaluate.latency.report import latency_text
from apr_jax.evaluate.latency.sample import Group, Setting, by_setting, read_samples
from apr_jax.evaluate.latency.summary import summarise_latency
from apr_jax.io.files import write_text
from experiments.figures import latency as figures


def write_report(out: Path) -> str:
    """Write report.md, summary.json and figures/ from the samples in ``samples.jsonl``, and return the report's text.

    A row says how many of the problems have a sample. The problems are all that any setting has samples of. Raises
    FileNotFoundError if there are no samples.
    """
    groups = _newest(by_setting(read_samples(out / "samples.jsonl")))
    if not groups:
        raise FileNotFoundError(f"no samples in {out}: give an exported model with --model=FOLDER")
    throughput = read_throughput(out / "passes.jsonl")
    problems = 1 + max(sample.index for _, samples in groups for sample in samples)
    summaries = [summarise_latency(samples) for _, samples in groups]
    text = latency_text(groups, summaries, throughput, problems)
    write_text(out / "report.md", text + "\n")
    found = [
        {
            "setting": vars(setting), **row, "problems": problems,
            "throughput": vars(throughput[setting]) if setting in throughput else None,
        }
        for (setting, _), row in zip(groups, summaries)
    ]  # fmt: skip
    write_text(out / "summary.json", json.dumps(found, indent=1) + "\n")
    _draw(groups, throughput, out / "figures")
    return text


def _newest(groups: Sequence[Group]) -> list[Group]:
    """Return the groups without samples of weights that were replaced later."""
    weights = {_model(setting): setting.weights for setting, _ in groups}
    return [group for group in groups if group[0].weights == weights[_model(group[0])]]


def _model(setting: Setting) -> tuple[str, str, str]:
    """Return what identifies a model in a latency run: its task, variant and engine."""
    return setting.task, setting.variant, setting.engine


def _draw(groups: Sequence[Group], throughput: Mapping[Setting, Throughput], folder: Path) -> None:
    """Draw the figures. Each engine and placement has its own, since their times are not comparable."""
    ways: dict[str, list[Group]] = {}
    for setting, samples in groups:
        if setting.concurrency == 1:
            ways.setdefault(_slug(setting.engine_title), []).append((setting, samples))
    for name, found in ways.items():
        figures.accuracy_against_latency(found, folder / f"latency_accuracy_{name}.png")
        figures.accuracy_within_latency(found, folder / f"latency_within_{name}.png")
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for setting, samples in groups:
        if setting in throughput:
            row = summarise_latency(samples)
            point = (setting.concurrency, throughput[setting].per_second, row["latency"])
            curves.setdefault(f"{setting.title}, {setting.engine_title}, {setting.budget_title}", []).append(point)
    curves = {title: sorted(points) for title, points in curves.items() if len(points) > 1}
    if curves:
        figures.load_curves(curves, folder / "latency_load.png")


def _slug(title: str) -> str:
    """Return a title as a part of a file name: lower-case words joined by underscores."""
    return "_".join("".join(c if c.isalnum() else " " for c in title.lower()).split())
