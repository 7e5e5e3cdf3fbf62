"""Countdown problems: reach the target with every number used exactly once (paper, section 4.1).

Intermediate results are non-negative integers: subtraction is larger minus smaller, division only
where it is exact.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem. Raises ValueError where the numbers or the target are not positive integers."""

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self):
        object.__setattr__(self, "numbers", tuple(self.numbers))
        if not self.numbers:
            raise ValueError("a Countdown problem needs at least one number, was given none")
        for value in (*self.numbers, self.target):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Countdown numbers and targets are integers of at least 1, was given {value!r}")

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """Two problems are the same where multiset and target are (paper, section 4.1)."""
        return tuple(sorted(self.numbers)), self.target


def combine(a: int, b: int) -> list[tuple[int, str]]:
    """All results of two numbers with the operation that gives each, as ``(7, "3+4=7")``."""
    high, low = (b, a) if a <= b else (a, b)
    results = [(a + b, f"{a}+{b}={a + b}"), (a * b, f"{a}*{b}={a * b}"), (high - low, f"{high}-{low}={high - low}")]
    if low and high % low == 0:
        results.append((high // low, f"{high}/{low}={high // low}"))
    return results


def successors(numbers: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Every state one operation away: the other numbers in their order, then the result."""
    for i, j in itertools.combinations(range(len(numbers)), 2):
        rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
        for value, operation in combine(numbers[i], numbers[j]):
            yield (*rest, value), operation


def reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    """Every value that uses all of `numbers` exactly once. Exhaustive; memoised by multiset."""
    return _reachable(tuple(sorted(numbers)))


_REACHABLE: dict[tuple[int, ...], frozenset[int]] = {}


def _reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    if len(numbers) == 1:
        return frozenset(numbers)
    found = _REACHABLE.get(numbers)
    if found is None:
        found = frozenset().union(*(_reachable(tuple(sorted(state))) for state, _ in successors(numbers)))
        if len(_REACHABLE) > 1_000_000:  # bounds memory at the paper's ranges; a miss only costs time
            _REACHABLE.clear()
        _REACHABLE[numbers] = found
    return found


def solvable(problem: Problem) -> bool:
    return problem.target in reachable(problem.numbers)


MOST_DRAWS = 20_000  # tries for one problem before its target counts as out of reach


@dataclasses.dataclass(frozen=True)
class ProblemRange:
    """Where problems are drawn from. The paper: 4 numbers of 1 to 99, targets 10 to 100."""

    count: int = 4
    max_number: int = 99
    min_target: int = 10
    max_target: int = 100

    def __post_init__(self):
        if not 2 <= self.count <= 6:
            raise ValueError(f"numbers per problem are 2 to 6, was given {self.count}")
        if self.max_number < 1:
            raise ValueError(f"the largest number is at least 1, was given {self.max_number}")
        if not 2 <= self.min_target <= self.max_target:
            raise ValueError(f"targets need 2 <= lowest <= highest, was given {self.min_target} to {self.max_target}")

    def draw(self, rng: random.Random) -> Problem:
        """A target at random, then numbers at random until they reach it. Raises ValueError where none do."""
        target = rng.randint(self.min_target, self.max_target)
        for _ in range(MOST_DRAWS):
            problem = Problem(tuple(rng.randint(1, self.max_number) for _ in range(self.count)), target)
            if solvable(problem):
                return problem
        raise ValueError(
            f"none of {MOST_DRAWS} draws of {self.count} numbers up to {self.max_number} reached the target {target}: "
            "lower max_target or raise max_number"
        )


def split_problems(source: ProblemRange, seed: int, train: int, held_out: int) -> tuple[list[Problem], list[Problem]]:
    """`held_out` distinct problems, then `train` problems none of which is held out.

    Training problems may repeat: a small range has fewer distinct problems than a run wants.
    """
    rng = random.Random(seed)
    held: dict[tuple, Problem] = {}
    for tries in itertools.count():
        if len(held) == held_out:
            break
        if tries > 100 * held_out + 1000:
            raise ValueError(
                f"{held_out} distinct held-out problems were asked for, this range gives about {len(held)}"
            )
        problem = source.draw(rng)
        held.setdefault(problem.key, problem)
    training = []
    for tries in itertools.count():
        if len(training) == train:
            break
        if tries > 100 * train + 1000:
            raise ValueError(f"the range leaves too few training problems beside {held_out} held-out ones")
        problem = source.draw(rng)
        if problem.key not in held:
            training.append(problem)
    return training, list(held.values())
