"""Tests of statistics of evaluations: intervals, paired differences, accuracy within a budget, summaries."""

import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_jax.evaluate.records import Record
from apr_jax.evaluate.statistics import (
    accuracy_by_sequential,
    accuracy_by_window,
    even_edges,
    paired_difference,
    summarise,
    wilson_interval,
)


@given(st.integers(0, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_contains_its_rate_and_is_symmetric(case):
    right, total = case
    low, high = wilson_interval(right, total)
    assert 0 <= low <= high <= 1
    if total:
        assert low <= right / total <= high
        mirrored = wilson_interval(total - right, total)
        assert mirrored == pytest.approx((1 - high, 1 - low))


def test_a_paired_difference_counts_gained_and_lost_problems():
    before = [record(i, i < 54, 10, 10, problem={"i": i}) for i in range(100)]
    after = [record(i, 4 <= i < 63, 10, 10, problem={"i": i}) for i in range(100)]
    mean, low, high, gained, lost = paired_difference(before, after)
    assert (gained, lost) == (9, 4) and mean == pytest.approx(0.05)
    rng, differences = random.Random(0), [int(b.correct) - int(a.correct) for a, b in zip(before, after)]
    drawn = sorted(sum(rng.choices(differences, k=100)) / 100 for _ in range(4000))  # bootstrap, as an oracle
    assert (low, high) == pytest.approx((drawn[100], drawn[3900]), abs=0.015)
    assert paired_difference(before, before)[:3] == (0, 0, 0)
    with pytest.raises(ValueError):
        paired_difference(before, after[::-1])


def test_wilson_interval_has_known_values_and_refuses_impossible_counts():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(834, 1000) == pytest.approx((0.8097, 0.8558), abs=1e-4)
    assert wilson_interval(0, 0) == (0, 1)
    for right, total in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"{right} of {total}"):
            wilson_interval(right, total)


def record(index, correct, longest, sequential, **changes):
    base = Record(
        index, {}, name="toy", correct=correct, answered=correct, longest_context=longest,
        sequential_tokens=sequential, tree={},
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def test_the_summary_of_four_records():
    records = [
        record(0, True, 100, 150, children=2, steps=4, steps_right=4),
        record(1, True, 300, 350, children=4, steps=4, steps_right=2),
        record(
            2, False, 90, 90, failures={"length": 2, "malformed:empty": 1}, malformed={"empty": 1}, suppressed_joins=3
        ),
        record(3, False, 80, 80, failures={"tokens": 1}),
    ]
    assert accuracy_by_window(records, [99, 100, 299, 300]) == [(99, 0.0), (100, 0.25), (299, 0.25), (300, 0.5)]
    assert accuracy_by_sequential(records, [100, 400]) == [(100, 0.0), (400, 0.5)]
    summary = summarise(records)
    assert (summary["n"], summary["ran"], summary["right"], summary["accuracy"]) == (4, 4, 2, 0.5)
    assert summary["children"] == 1.5 and summary["step_accuracy"] == 0.75
    assert summary["failures"] == {"length": 2, "malformed:empty": 1, "tokens": 1}
    assert summary["malformed"] == {"empty": 1} and summary["suppressed_joins"] == 3
    assert summary["accuracy_by_window"][-1][1] == summary["accuracy"]
    assert json.loads(json.dumps(summary))["accuracy_low"] == wilson_interval(2, 4)[0]


@given(st.lists(st.integers(0, 5000), max_size=5))
def test_no_value_is_larger_than_the_last_edge(values):
    edges = even_edges(values)
    assert len(edges) <= 8 and edges == sorted(set(edges)) and edges[-1] >= max([*values, 0])
