"""Tests of problems: all checks of solvability agree, and problems are drawn with the right distribution."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.tasks.countdown import Problem, ProblemRange
from apr_jax.tasks.countdown import problem as module
from apr_jax.tasks.countdown.problem import fits_int64, reach_targets, reachable, solvable, successors


@settings(max_examples=150)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(1, 120))
def test_solvable_agrees_with_an_exhaustive_search(numbers, target):
    expected = target in reachable(tuple(numbers))
    assert solvable(Problem(numbers, target)) is expected
    assert reach_targets(np.array([numbers]), np.array([target])).tolist() == [expected]


@pytest.mark.parametrize("count, largest", [(2, 9), (3, 12), (4, 99), (4, 6), (5, 8)])
def test_checking_many_problems_together_agrees_with_checking_each(count, largest):
    rng = random.Random(count * largest)
    numbers = [tuple(rng.randint(1, largest) for _ in range(count)) for _ in range(40)]
    targets = [rng.randint(2, 100) for _ in numbers]
    together = reach_targets(np.array(numbers), np.array(targets)).tolist()
    assert together == [target in reachable(each) for each, target in zip(numbers, targets)]
    assert together == [solvable(Problem(*pair)) for pair in zip(numbers, targets)]
    assert False in together or count == 5


def test_problems_that_could_overflow_are_not_checked_together(monkeypatch):
    assert fits_int64(5, 6208) and not fits_int64(5, 6209) and fits_int64(4, 55_000) and not fits_int64(4, 56_000)
    monkeypatch.setattr(ProblemRange, "draw", lambda source, rng: "alone")
    for large in ({"max_number": 6209}, {"max_target": 6209}):
        assert ProblemRange(count=5, **large).draw_each([random.Random(0)]) == ["alone"]
    assert ProblemRange(count=5).draw_each([random.Random(0)]) != ["alone"]


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_draw_each_agrees_with_draw(count):
    source = ProblemRange(count=count)
    together = source.draw_each([random.Random(i) for i in range(12)])
    assert together == [source.draw(random.Random(i)) for i in range(12)]
    assert all(len(p.numbers) == count and 10 <= p.target <= 100 and max(p.numbers) <= 99 for p in together)


def test_problems_have_the_distribution_of_drawing_until_solvable():
    """Targets are uniform, however rarely numbers reach them; numbers are uniform among those that reach the target."""
    source = ProblemRange(count=2, max_number=6, min_target=5, max_target=7)
    drawn = Counter(source.draw_each([random.Random(f"x/{i}") for i in range(6000)]))
    for target in (5, 6, 7):
        pairs = {(a, b) for a in range(1, 7) for b in range(1, 7) if target in reachable((a, b))}
        counts = {problem.numbers: n for problem, n in drawn.items() if problem.target == target}
        assert counts.keys() == pairs
        assert abs(sum(counts.values()) - 2000) < 4 * (6000 * 2 / 9) ** 0.5
        expected = sum(counts.values()) / len(pairs)
        chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
        assert chi_square < len(pairs) - 1 + 4 * (2 * (len(pairs) - 1)) ** 0.5


def test_an_unreachable_target_is_named(monkeypatch):
    monkeypatch.setattr(module, "MAX_DRAWS", 40)
    source = ProblemRange(count=2, max_number=10, min_target=97, max_target=97)
    for draw in (lambda: source.draw(random.Random(0)), lambda: source.draw_each([random.Random(0)])):
        with pytest.raises(ValueError, match="40 draws of 2 numbers up to 10 .*97"):
            draw()


def test_operations_are_those_of_the_paper():
    results = {operation: state for state, operation in successors((6, 4, 12))}
    assert results["6+4=10"] == (12, 10) and results["6-4=2"] == (12, 2) and results["12/6=2"] == (4, 2)
    assert "4-6=-2" not in results and "6/4=1" not in results and "6/12=0" not in results
    assert not solvable(Problem((1, 1), 100)) and solvable(Problem((7,), 7)) and not solvable(Problem((7,), 8))
