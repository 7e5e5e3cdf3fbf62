"""Writes the text of a latency report: a table with a row per setting, a comparison of the engines, and the gaps
between measured and predicted latencies."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.evaluate.latency.passes import Throughput
from apr_jax.evaluate.latency.sample import Group, Sample, Setting
from apr_jax.evaluate.latency.summary import summarise_latency

HEADER = (
    "| model | engine | at once | budget | n | right (95 % interval) | latency ms: mean, median, 90 % |"
    " first token ms | queue, prefill, decode, other | cached | predicted ms | gap ms | samples/s | tokens/s |"
)
PARTS = {"queue": "waiting", "prefill": "slower prefills", "decode": "slower decoding", "overhead": "work between"}
WORST = 5  # samples with the largest gaps, which are listed one by one


def latency_text(
    groups: Sequence[Group], summaries: Sequence[Mapping[str, Any]], throughput: Mapping[Setting, Throughput],
    problems: int,
) -> str:  # fmt: skip
    """Return the whole report. `summaries` has the `summarise_latency` of each group. `problems` is the number of all
    problems; a setting may have fewer samples."""
    lines = [HEADER, "|" + " --- |" * HEADER.count(" | ") + " --- |"]
    lines += [_row(setting, row, throughput.get(setting), problems) for (setting, _), row in zip(groups, summaries)]
    lines += _compared(groups, throughput)
    for setting, samples in groups:
        if setting.concurrency == 1:
            lines += ["", *_gaps(setting, samples)]
    return "\n".join(lines)


def _row(setting: Setting, row: Mapping[str, Any], throughput: Throughput | None, problems: int) -> str:
    def ms(name: str) -> str:
        return f"{1000 * row[name]:.0f}"

    known = row["first_token"] is not None
    shares = ", ".join(
        "unknown" if part == "prefill" and not known else f"{100 * row[f'{part}_share']:.0f} %" for part in PARTS
    )
    cached = "unknown" if row["cached_share"] is None else f"{100 * row['cached_share']:.0f} %"
    first = ms("first_token") if known else "unknown"
    interval = f"{100 * row['accuracy']:.1f} % ({100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f})"
    gap = 1000 * (row["latency"] - row["predicted"])
    rates = ("-", "-") if throughput is None else (f"{throughput.per_second:.2f}", f"{throughput.tokens:.0f}")
    return (
        f"| {setting.title} | {setting.engine_title} |"
        f" {setting.concurrency} | {setting.budget_title} | {row['n']} of {problems} | {interval} |"
        f" {ms('latency')}, {ms('latency_median')}, {ms('latency_90')} | {first} | {shares} | {cached} |"
        f" {ms('predicted')} | {gap:+.0f} | {rates[0]} | {rates[1]} |"
    )


def _compared(groups: Sequence[Group], throughput: Mapping[Setting, Throughput]) -> list[str]:
    """Compare the JAX engine with SGLang wherever both were measured under the same setting: whether their greedy trees
    are equal, and how many tokens a second each decoded."""
    lines = []
    for one, mine in groups:
        for other, theirs in groups:
            alike = dataclasses.replace(other, engine="jax", servers=one.servers, placement=one.placement)
            if other.engine != "sglang" or one != alike:
                continue
            trees = {(sample.index, str(sample.problem)): sample.digest for sample in mine}
            both = [s for s in theirs if (s.index, str(s.problem)) in trees]
            equal = sum(sample.digest == trees[sample.index, str(sample.problem)] for sample in both)
            found = [f"{equal} of {len(both)} trees are the same token for token"] if not one.temperature else []
            rates = [throughput.get(setting) for setting in (one, other)]
            if None not in rates and rates[0].samples == rates[1].samples:
                found.append(
                    f"{rates[0].tokens:.0f} tokens/s in process, {rates[1].tokens:.0f} through"
                    f" {other.engine_title}: {rates[0].tokens / rates[1].tokens:.1f} times"
                )
            if found:
                title = f"{one.title}, {one.concurrency} at once, {one.budget_title}"
                lines += ["", f"{title}: {'; '.join(found)}."]
    return lines


def _gaps(setting: Setting, samples: Sequence[Sample]) -> list[str]:
    """List the gaps between measured and predicted latency: on average, and for the samples with the largest gaps."""
    row = summarise_latency(samples)
    title = f"{setting.title}, {setting.engine_title}, {setting.budget_title}"
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
            f" {sample.chain_requests} requests on the measured chain, {sample.predicted_chain_tokens} tokens on the"
            f" predicted one, {sample.children} children"
        )
    return lines
