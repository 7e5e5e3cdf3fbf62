"""Statistics of evaluations: confidence intervals, accuracy within a token budget, and a summary of records."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from apr_jax.evaluate.records import Record


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval (low, high) of the rate right / total; z = 1.96 gives a 95 % interval.

    Returns (0, 1) if `total` is 0. Raises ValueError unless 0 <= right <= total.

    >>> [round(end, 3) for end in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    if not 0 <= right <= total:
        raise ValueError(f"right must be from 0 to total, was given {right} of {total}")
    if total == 0:
        return 0.0, 1.0
    rate, spread = right / total, z * z / total
    centre = rate + spread / 2
    half = z * math.sqrt(rate * (1 - rate) / total + spread / (4 * total))
    # If right is 0 or total, one bound is exactly 0 or 1, which the formula would round.
    low = (centre - half) / (1 + spread) if right else 0.0
    return low, (centre + half) / (1 + spread) if right < total else 1.0


def paired_difference(
    before: Sequence[Record], after: Sequence[Record], z: float = 1.96
) -> tuple[float, float, float, int, int]:
    """Return how much more often `after` is right than `before` on the same problems: (difference, low, high, number
    of problems gained, number lost). The first three are rates from -1 to 1.

    (low, high) is the normal interval, z standard errors wide on each side, of the mean of the per-problem differences.
    It is far narrower than the intervals of the two accuracies, since most problems are answered the same both times.
    Raises ValueError if the problems differ or there are none.

    Example: of 100 problems 9 are gained and 4 lost. The difference is 0.05, from -0.02 to 0.12.
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
    """Return (window, accuracy) for each window in tokens. The accuracy is the fraction of all problems that were
    answered right by a tree whose threads all fit the window (the paper's cumulative accuracy, figure 4b).

    Example: of 4 problems two are right, with longest contexts of 100 and 300 tokens. The windows 200 and 400 then give
    [(200, 0.25), (400, 0.5)].
    """
    return _cumulative([record.longest_context for record in records if record.correct], len(records), windows)


def accuracy_by_sequential(records: Sequence[Record], edges: Iterable[int]) -> list[tuple[int, float]]:
    """Return (edge, accuracy) for each edge. The accuracy is the fraction of all problems that were answered right
    within `edge` sequential tokens (the paper's figure 6)."""
    return _cumulative([record.sequential_tokens for record in records if record.correct], len(records), edges)


def _cumulative(costs: Sequence[int], total: int, edges: Iterable[int]) -> list[tuple[int, float]]:
    return [(edge, sum(cost <= edge for cost in costs) / max(total, 1)) for edge in edges]


def even_edges(values: Iterable[int], count: int = 8, step: int = 64) -> list[int]:
    """Return at most `count` evenly spaced edges, each a multiple of `step`. No value is larger than the last edge."""
    top = max([*values, 1])
    width = -(-top // (count * step)) * step
    return [width * i for i in range(1, -(-top // width) + 1)]


def summarise(records: Sequence[Record]) -> dict:
    """Summarise the records of one evaluation as a JSON-able dictionary. `n` is the number of records and `ran` the
    number of those with a tree. Rates are from 0 to 1; token counts and children are means per tree. A tree in which
    the model failed counts as wrong."""
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
