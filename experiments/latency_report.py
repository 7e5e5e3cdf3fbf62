"""The report of a latency run: a table of every setting, figures, and the gap between measured and predicted."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from apr_jax.evaluate.latency import (
    Sample,
    Setting,
    Throughput,
    by_setting,
    read_samples,
    read_throughput,
    summarise_latency,
)
from apr_jax.io.files import write_text
from experiments import latency_figures as figures

HEADER = (
    "| model | engine | at once | budget | n | right (95 % interval) | latency ms: mean, median, 90 % |"
    " first token ms | queue, prefill, decode, other | cached | predicted ms | gap ms | samples/s | tokens/s |"
)
PARTS = {"queue": "waiting", "prefill": "slower prefills", "decode": "slower decoding", "overhead": "work between"}
WORST = 5  # samples whose gaps are told one by one


def write_report(out: Path) -> str:
    """Writes report.md, summary.json and figures/ from what ``samples.jsonl`` holds; returns the text. A row says how
    many trees ran of how many problems: those that any setting has samples of. Raises FileNotFoundError where there
    are no samples."""
    groups = _newest(by_setting(read_samples(out / "samples.jsonl")))
    if not groups:
        raise FileNotFoundError(f"no samples in {out}: give an exported model with --apr=FOLDER or --sosp=FOLDER")
    throughput = read_throughput(out / "passes.jsonl")
    problems = 1 + max(sample.index for _, samples in groups for sample in samples)
    rows = [(setting, samples, summarise_latency(samples) | {"problems": problems}) for setting, samples in groups]
    lines = [HEADER, "|" + " --- |" * HEADER.count(" | ") + " --- |"]
    lines += [_row(setting, row, throughput.get(setting)) for setting, _, row in rows]
    lines += _compared(groups, throughput)
    for setting, samples, _ in rows:
        if setting.concurrency == 1:
            lines += ["", *_gaps(setting, samples)]
    text = "\n".join(lines)
    write_text(out / "report.md", text + "\n")
    found = [
        {"setting": vars(setting), **row, "throughput": vars(throughput[setting]) if setting in throughput else None}
        for setting, _, row in rows
    ]
    write_text(out / "summary.json", json.dumps(found, indent=1) + "\n")
    _draw(groups, throughput, out / "figures")
    return text


def _newest(groups: list[figures.Group]) -> list[figures.Group]:
    """Without samples of weights that were replaced since."""
    weights = {(setting.model, setting.engine): setting.weights for setting, _ in groups}
    return [group for group in groups if group[0].weights == weights[group[0].model, group[0].engine]]


def _row(setting: Setting, row: dict, throughput: Throughput | None) -> str:
    def ms(name: str) -> str:
        return f"{1000 * row[name]:.0f}"

    known = row["first_token"] is not None
    shares = ", ".join(
        "not told" if part == "prefill" and not known else f"{100 * row[f'{part}_share']:.0f} %" for part in PARTS
    )
    cached = "not told" if row["cached_share"] is None else f"{100 * row['cached_share']:.0f} %"
    first = ms("first_token") if known else "not told"
    interval = f"{100 * row['accuracy']:.1f} % ({100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f})"
    gap = 1000 * (row["latency"] - row["predicted"])
    rates = ("-", "-") if throughput is None else (f"{throughput.per_second:.2f}", f"{throughput.tokens:.0f}")
    return (
        f"| {figures.TITLES.get(setting.model, setting.model)} | {figures.engine_title(setting)} |"
        f" {setting.concurrency} | {setting.title} | {row['n']} of {row['problems']} | {interval} |"
        f" {ms('latency')}, {ms('latency_median')}, {ms('latency_90')} | {first} | {shares} | {cached} |"
        f" {ms('predicted')} | {gap:+.0f} | {rates[0]} | {rates[1]} |"
    )


def _compared(groups: Sequence[figures.Group], throughput: dict[Setting, Throughput]) -> list[str]:
    """The JAX engine against SGLang wherever both did the same work at the same concurrency: whether their trees are
    the same, and what they got through."""
    lines = []
    for one, mine in groups:
        for other, theirs in groups:
            alike = dataclasses.replace(other, engine="jax", servers=one.servers, placement=one.placement)
            if other.engine != "sglang" or one != alike:
                continue
            trees = {(sample.index, str(sample.problem)): sample.tree for sample in mine}
            both = [s for s in theirs if (s.index, str(s.problem)) in trees]
            equal = sum(sample.tree == trees[sample.index, str(sample.problem)] for sample in both)
            told = [f"{equal} of {len(both)} trees are the same token for token"] if not one.temperature else []
            rates = [throughput.get(setting) for setting in (one, other)]
            if None not in rates and rates[0].samples == rates[1].samples:
                told.append(
                    f"{rates[0].tokens:.0f} tokens/s in process, {rates[1].tokens:.0f} through"
                    f" {figures.engine_title(other)}: {rates[0].tokens / rates[1].tokens:.1f} times"
                )
            if told:
                title = f"{figures.TITLES.get(one.model, one.model)}, {one.concurrency} at once, {one.title}"
                lines += ["", f"{title}: {'; '.join(told)}."]
    return lines


def _gaps(setting: Setting, samples: Sequence[Sample]) -> list[str]:
    """What the latency has more, or less, than the model of it, on average and for the samples where that is most."""
    row = summarise_latency(samples)
    title = f"{figures.TITLES.get(setting.model, setting.model)}, {figures.engine_title(setting)}, {setting.title}"
    parts = ", ".join(f"{PARTS[part]} {1000 * seconds:+.0f} ms" for part, seconds in row["gap"].items())
    lines = [
        f"{title}: measured {1000 * row['latency']:.0f} ms a sample, predicted {1000 * row['predicted']:.0f} ms;"
        f" the gap is {parts}. Largest:", "",
    ]  # fmt: skip
    for sample in sorted(samples, key=lambda s: -abs(s.latency - s.predicted))[:WORST]:
        part, seconds = max(sample.gap.items(), key=lambda item: abs(item[1]))
        lines.append(
            f"- problem {sample.index}: {1000 * sample.latency:.0f} ms, predicted {1000 * sample.predicted:.0f} ms;"
            f" most of it {PARTS[part]} ({1000 * seconds:+.0f} ms), {sample.chain_tokens} tokens in"
            f" {sample.chain_requests} requests were waited for, the longest chain has"
            f" {sample.predicted_chain_tokens}, {sample.children} children"
        )
    return lines


def _draw(groups: Sequence[figures.Group], throughput: dict[Setting, Throughput], folder: Path) -> None:
    """Per engine and placement, since their times are not each other's."""
    ways: dict[str, list[figures.Group]] = {}
    for setting, samples in groups:
        if setting.concurrency == 1:
            ways.setdefault(_slug(figures.engine_title(setting)), []).append((setting, samples))
    for name, those in ways.items():
        figures.accuracy_against_latency(those, folder / f"latency_accuracy_{name}.png")
        figures.accuracy_within_latency(those, folder / f"latency_within_{name}.png")
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for setting, samples in groups:
        if setting in throughput:
            row = summarise_latency(samples)
            title = f"{figures.TITLES.get(setting.model, setting.model)}, {figures.engine_title(setting)}"
            point = (setting.concurrency, throughput[setting].per_second, row["latency"])
            curves.setdefault(f"{title}, {setting.title}", []).append(point)
    curves = {title: sorted(points) for title, points in curves.items() if len(points) > 1}
    if curves:
        figures.load_curves(curves, folder / "latency_load.png")


def _slug(title: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in title.lower()).split())
