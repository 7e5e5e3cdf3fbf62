"""Verifies whether a solution path solves a Countdown problem.

Texts are parsed line by line. No text is executed as code, and no text raises an error.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.problem import Problem

_EXPLORING = "Exploring Operation:"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a check. It is true for a correct solution; else `reason` states the error in one line."""

    right: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.right


def check_solution(problem: Problem, text: str | None) -> Verdict:
    """Check a solution path, or the path that a thread's whole text returns.

    A trace of Stream of Search contains no path; its path is derived from its last state (`trace.read_search`).

    Each operation must use two of the remaining numbers, have a correct result, and leave exactly the numbers that its
    line states. At the first "Goal Reached" the target must be the only remaining number. Other lines are ignored.

    >>> check_solution(Problem((6, 4), 24), "Exploring Operation: 6*4=24, Resulting Numbers: [24]\\n"
    ...                                     "24,24 equal: Goal Reached").right
    True
    """
    verdict = check_path(problem.numbers, problem.target, text)
    if verdict or text is None or (path := trace.read_search(text)) is None:
        return verdict
    return check_path(problem.numbers, problem.target, path)


def check_path(numbers: Sequence[int], target: int, text: str | None) -> Verdict:
    """Check a path as `check_solution` does, but from any numbers, such as those of a child thread's state.

    Such numbers may include 0. A trace of Stream of Search is not supported.
    """
    if not isinstance(text, str):
        return Verdict(False, "no path was returned")
    path = trace.read_path(text)
    left = Counter(numbers)
    for number, line in enumerate((text if path is None else path).split("\n"), 1):
        if _EXPLORING in line:
            parsed = trace.read_exploring(line)
            if parsed is None:
                return _wrong(number, line, "is not an operation line")
            operation, resulting = parsed
            used = Counter((operation.left, operation.right))
            if not used <= left:
                return _wrong(number, line, "uses a number that is not left")
            if not _is_right(operation):
                return _wrong(number, line, "has a wrong result")
            left = left - used + Counter((operation.value,))
            if left != Counter(resulting):
                return _wrong(number, line, "does not leave the numbers that it states")
        if trace.GOAL_REACHED in line:
            if left == Counter((target,)):
                return Verdict(True)
            return _wrong(number, line, f"states {trace.GOAL_REACHED!r}, but the target is not the only number left")
    return Verdict(False, f'never says "{trace.GOAL_REACHED}"')


def operations(text: str) -> tuple[int, int]:
    """Return (number of correct operations, number of operations) of a text.

    An operation is a line that begins with "Exploring Operation:". It is correct if its result is correct arithmetic; a
    line that cannot be parsed is not.
    """
    lines = [line for line in text.split("\n") if line.strip().startswith(_EXPLORING)]
    parsed = [trace.read_exploring(line) for line in lines]
    return sum(entry is not None and _is_right(entry[0]) for entry in parsed), len(lines)


def _is_right(operation: trace.Operation) -> bool:
    """Return whether an operation's result is correct. A negative difference never is, as values are not negative."""
    left, symbol, right, value = operation
    match symbol:
        case "+":
            return left + right == value
        case "-":
            return left - right == value
        case "*":
            return left * right == value
        case _:
            return right != 0 and left == right * value


def _wrong(number: int, line: str, why: str) -> Verdict:
    # The line comes from a model, so it may have any length and any characters: repr makes it printable.
    return Verdict(False, f"line {number} {why}: {line.strip()[:100]!r}")
