"""Evaluations in numbers: intervals, accuracy within a window or a number of tokens, one summary of all records."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from apr_jax.evaluate.records import Record


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a rate, (low, high) from 0 to 1; z = 1.96 covers 95 %.

    (0, 1) where nothing was counted. Raises ValueError unless 0 <= right <= total.

    >>> [round(end, 3) for end in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    if not 0 <= right <= total:
        raise ValueError(f"right is from 0 to total, was given {right} of {total}")
    if total == 0:
        return 0.0, 1.0
    rate, spread = right / total, z * z / total
    centre = rate + spread / 2
    half = z * math.sqrt(rate * (1 - rate) / total + spread / (4 * total))
    # At its ends the formula is exact only up to rounding.
    low = (centre - half) / (1 + spread) if right else 0.0
    return low, (centre + half) / (1 + spread) if right < total else 1.0


def paired_difference(
    before: Sequence[Record], after: Sequence[Record], z: float = 1.96
) -> tuple[float, float, float, int, int]:
    """How much more often `after` is right than `before` on the same problems: (difference, low, high, problems gained,
    problems lost), rates from -1 to 1. The interval is that of a mean of paired differences, which is far narrower than
    those of the two accuracies: most problems are answered the same. Raises ValueError where the problems differ.

    Example: of 100 problems 9 are gained and 4 lost: 0.05, from -0.02 to 0.12.
    """
    if not before or [record.problem for record in before] != [record.problem for record in after]:
        raise ValueError("a paired difference needs the same problems in the same order")
    n = len(before)
    gained = sum(b.correct and not a.correct for a, b in zip(before, after))
    lost = sum(a.correct and not b.correct for a, b in zip(before, after))
    mean = (gained - lost) / n
    half = z * math.sqrt(max((gained + lost) / n - mean * mean, 0.0) / n)
    return mean, mean - half, mean + half, gained, lost


def accuracy_by_window(records: Sequence[Record], windows: Iterable[int]) -> list[tuple[int, float]]:
    """The paper's cumulative accuracy (figure 4b): for each window in tokens the share of all problems
    answered right with every thread inside the window.

    Example: right answers with longest contexts 100 and 300 of 4 problems give [(200, 0.25), (400, 0.5)]
    for windows 200 and 400.
    """
    return _cumulative([record.longest_context for record in records if record.correct], len(records), windows)


def accuracy_by_sequential(records: Sequence[Record], edges: Iterable[int]) -> list[tuple[int, float]]:
    """For each edge the share of all problems answered right in at most so many sequential tokens
    (the paper's figure 6)."""
    return _cumulative([record.sequential_tokens for record in records if record.correct], len(records), edges)


def _cumulative(costs: Sequence[int], total: int, edges: Iterable[int]) -> list[tuple[int, float]]:
    return [(edge, sum(cost <= edge for cost in costs) / max(total, 1)) for edge in edges]


def even_edges(values: Iterable[int], count: int = 8, step: int = 64) -> list[int]:
    """At most `count` even edges, multiples of `step`, the last of which holds every value."""
    top = max([*values, 1])
    width = -(-top // (count * step)) * step
    return [width * i for i in range(1, -(-top // width) + 1)]


def summarise(records: Sequence[Record]) -> dict:
    """One evaluation in numbers, JSON-able; `ran` of `n` problems have a tree, and means are per tree. Every failure of
    the model counts as wrong."""
    n, right = len(records), sum(record.correct for record in records)
    ran = [record for record in records if record.tree is not None]
    low, high = wilson_interval(right, n)

    def mean(field: str) -> float:
        return sum(getattr(record, field) for record in ran) / max(len(ran), 1)

    def by_kind(field: str) -> dict[str, int]:
        return dict(sorted(sum((Counter(getattr(record, field)) for record in records), Counter()).items()))

    steps = sum(record.steps for record in ran)
    return {
        "name": records[0].name if records else "",
        "condition": records[0].condition if records else "",
        "n": n,
        "ran": len(ran),
        "right": right,
        "accuracy": right / max(n, 1),
        "accuracy_low": low,
        "accuracy_high": high,
        "answered": sum(record.answered for record in records) / max(n, 1),
        "total_tokens": mean("total_tokens"),
        "sampled_tokens": mean("sampled_tokens"),
        "sequential_tokens": mean("sequential_tokens"),
        "longest_context": mean("longest_context"),
        "children": mean("children"),
        "duplicate_children": mean("duplicate_children"),
        "steps": steps,
        "step_accuracy": sum(record.steps_right for record in ran) / steps if steps else None,
        "malformed": by_kind("malformed"),
        "failures": by_kind("failures"),
        "suppressed_joins": sum(record.suppressed_joins for record in records),
        "accuracy_by_window": accuracy_by_window(records, even_edges(record.longest_context for record in records)),
        "accuracy_by_sequential": accuracy_by_sequential(records, even_edges(r.sequential_tokens for r in records)),
    }
