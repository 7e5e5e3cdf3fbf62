"""Countdown problems: combine all numbers to the target, each used exactly once (paper, section 4.1).

Intermediate results are non-negative integers: the smaller number is subtracted from the larger one, and division must
be exact.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np

from apr_jax.checks import FieldError, at_least, check_fields
from apr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Problem:
    """A Countdown problem. Raises UserError where the numbers or the target are not positive integers."""

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self):
        object.__setattr__(self, "numbers", tuple(self.numbers))
        if not self.numbers:
            raise UserError("a Countdown problem needs at least one number, was given none")
        for value in (*self.numbers, self.target):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"Countdown numbers and targets are integers of at least 1, was given {value!r}")

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """The sorted numbers and the target: problems with equal keys are the same (paper, section 4.1)."""
        return tuple(sorted(self.numbers)), self.target


def combine(a: int, b: int) -> list[tuple[int, str]]:
    """Return each result of combining two numbers with its operation, as ``(7, "3+4=7")``."""
    high, low = (b, a) if a <= b else (a, b)
    results = [(a + b, f"{a}+{b}={a + b}"), (a * b, f"{a}*{b}={a * b}"), (high - low, f"{high}-{low}={high - low}")]
    if low and high % low == 0:
        results.append((high // low, f"{high}/{low}={high // low}"))
    return results


def successors(numbers: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield (state, operation) for every state that is one operation away.

    A state is a tuple of numbers: the unused ones in their order, then the result of the operation.
    """
    for i, j in itertools.combinations(range(len(numbers)), 2):
        rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
        for value, operation in combine(numbers[i], numbers[j]):
            yield (*rest, value), operation


def reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    """Return every value that can be made with all of `numbers`, each used exactly once.

    An exhaustive search, against which `solvable` and `reach_targets` are tested.
    """
    if len(numbers) == 1:
        return frozenset(numbers)
    states = {tuple(sorted(state)) for state, _ in successors(numbers)}
    return frozenset().union(*map(reachable, states))


def solvable(problem: Problem) -> bool:
    """Return whether a problem has a solution."""
    return _reaches(problem.numbers, problem.target)


def _reaches(numbers: tuple[int, ...], target: int) -> bool:
    """Return whether the target can be made of the numbers.

    For each division of the numbers into two parts, it computes all values of the smaller part, and for each value
    checks whether the larger part can be combined to a matching one.
    """
    if len(numbers) == 1:
        return numbers[0] == target
    if len(numbers) == 2:  # a special case for speed: it is called thousands of times per problem
        a, b = numbers
        divides = a * b > 0 and (a == b * target or b == a * target)
        return a + b == target or a * b == target or abs(a - b) == target or divides
    n = len(numbers)
    for size in range(1, n // 2 + 1):
        for part in itertools.combinations(range(n), size):
            if 2 * size == n and part[0]:
                break  # every division into halves was checked already, with the halves exchanged
            rest = tuple(numbers[i] for i in range(n) if i not in part)
            for value in reachable(tuple(numbers[i] for i in part)):
                if value == target == 0 or any(_reaches(rest, other) for other in _partners(value, target)):
                    return True
    return False


def _partners(value: int, target: int) -> set[int]:
    """Return the values that one operation combines with `value` to `target`."""
    partners = {value + target, abs(value - target)}
    if value:
        partners.add(value * target)
        if target % value == 0:
            partners.add(target // value)
        if target and value % target == 0:
            partners.add(value // target)
    return partners


def reach_targets(numbers_PxN: np.ndarray, targets_P: np.ndarray) -> np.ndarray:
    """Return which of P problems are solvable, bool [P], all computed together.

    Requires 2 to 5 numbers per problem, and numbers and targets for which `fits_int64` is true.
    """
    N = numbers_PxN.shape[1]
    # bit set of numbers -> values [P, k] of their combinations
    parts = {1 << i: numbers_PxN[:, i : i + 1].astype(np.int64) for i in range(N)}
    target = targets_P.astype(np.int64)[:, None, None]
    solved = np.zeros(len(numbers_PxN), bool)
    for chosen in sorted(range(3, 1 << N), key=int.bit_count):
        halves = [(part, chosen ^ part) for part in range(1, chosen) if part & chosen == part and part < chosen ^ part]
        if chosen == (1 << N) - 1:
            for one, two in halves:  # a / b = t is tested as a = b t, without division
                a, b = parts[one][:, :, None], parts[two][:, None, :]
                right = (a + b == target) | (a * b == target) | (abs(a - b) == target)
                right |= (a == b * target) & (b > 0) | (b == a * target) & (a > 0)
                solved |= (right & (a >= 0) & (b >= 0)).any(axis=(1, 2))
        elif halves:
            parts[chosen] = np.concatenate([_combine_all(parts[one], parts[two]) for one, two in halves], axis=1)
    return solved


def fits_int64(count: int, largest: int) -> bool:
    """Return whether `reach_targets` cannot overflow for `count` numbers; no number or target is above `largest`."""
    return largest**count < 2**63


def _combine_all(a_PxI: np.ndarray, b_PxJ: np.ndarray) -> np.ndarray:
    """Return all results [P, 4 I J] of combining a value of `a` with a value of `b`; -1 stands for no value."""
    a, b = np.broadcast_arrays(a_PxI[:, :, None], b_PxJ[:, None, :])
    high, low = np.maximum(a, b), np.minimum(a, b)
    quotient, left = np.divmod(high, np.maximum(low, 1))
    results = np.stack([a + b, a * b, high - low, np.where((low > 0) & (left == 0), quotient, -1)])
    return np.where(low < 0, -1, results).transpose(1, 0, 2, 3).reshape(len(a_PxI), -1)


DRAWS_AHEAD = 8  # draws per problem that `draw_each` tests together: in the paper's ranges one draw in 7.5 is solvable
TEST_BATCH = 512  # draws per call of `reach_targets`: their values fit the processor's cache
MAX_SOLVABLE_NUMBERS = 6  # `solvable` is not called for problems of more numbers: with seven it takes 6 s
MAX_DRAWS = 20_000  # draws for one problem before its target counts as unreachable


@dataclasses.dataclass(frozen=True)
class ProblemRange:
    """The ranges that problems are drawn from. The paper has 4 numbers from 1 to 99 and targets from 10 to 100."""

    count: int = 4
    max_number: int = 99
    min_target: int = 10
    max_target: int = 100

    BOUNDS = (at_least(1, "max_number"),)

    def __post_init__(self):
        check_fields(self)
        if not 2 <= self.count <= 6:
            raise UserError(f"numbers per problem are 2 to 6, was given {self.count}")
        if not 2 <= self.min_target <= self.max_target:
            raise UserError(f"targets need 2 <= lowest <= highest, was given {self.min_target} to {self.max_target}")
        if self.max_target > (largest := max(2, self.max_number) ** self.count):
            raise FieldError(
                "max_target",
                f"is at most {largest}, no more can be made of {self.count} numbers up to {self.max_number}, was given "
                f"{self.max_target}",
            )

    def draw(self, rng: random.Random) -> Problem:
        """Draw a target, then draw numbers until they can reach it. Raises UserError after MAX_DRAWS draws in vain."""
        target = rng.randint(self.min_target, self.max_target)
        for _ in range(MAX_DRAWS):
            problem = Problem(self._numbers(rng), target)
            if solvable(problem):
                return problem
        raise self._out_of_reach(target)

    def draw_each(self, rngs: Sequence[random.Random]) -> list[Problem]:
        """Return `draw(rng)` for each of `rngs`, computed together: ten times as fast for up to 5 numbers."""
        # Six numbers have millions of values, and most draws are solvable: they are tested one by one.
        if self.count > 5 or not fits_int64(self.count, max(self.max_number, self.max_target)):
            return [self.draw(rng) for rng in rngs]
        targets = np.array([rng.randint(self.min_target, self.max_target) for rng in rngs])
        found: list[Problem | None] = [None] * len(rngs)
        pending = np.arange(len(rngs))
        for _ in range(-(-MAX_DRAWS // DRAWS_AHEAD)):
            drawn = np.array([[self._numbers(rngs[i]) for _ in range(DRAWS_AHEAD)] for i in pending.tolist()])
            flat, wanted = drawn.reshape(-1, self.count), np.repeat(targets[pending], DRAWS_AHEAD)
            blocks = range(0, len(flat), TEST_BATCH)
            right = np.concatenate(
                [reach_targets(flat[i : i + TEST_BATCH], wanted[i : i + TEST_BATCH]) for i in blocks]
            ).reshape(len(pending), DRAWS_AHEAD)
            for row in np.flatnonzero(right.any(axis=1)).tolist():
                i = int(pending[row])
                found[i] = Problem(tuple(drawn[row, right[row].argmax()].tolist()), int(targets[i]))
            pending = pending[~right.any(axis=1)]
            if not len(pending):
                return found
        raise self._out_of_reach(int(targets[pending[0]]))

    def _numbers(self, rng: random.Random) -> tuple[int, ...]:
        return tuple(rng.randint(1, self.max_number) for _ in range(self.count))

    def _out_of_reach(self, target: int) -> UserError:
        return UserError(
            f"none of {MAX_DRAWS} draws of {self.count} numbers up to {self.max_number} reached the target {target}: "
            "lower max_target or raise max_number"
        )
