"""Whether a path solves a problem, read line by line: no text is run as code, none raises anything."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.problem import Problem

_EXPLORING = "Exploring Operation:"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Truthy where the solution is right; where it is not, `reason` says why in one line."""

    right: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.right


def check_solution(problem: Problem, text: str | None) -> Verdict:
    """Checks the path that a thread returned, or a thread's whole text: there, the path that it returns, which a trace
    of Stream of Search does not write.

    Every operation must take two numbers that are left (each as often as it is there), be right, and leave
    exactly the numbers that its line says; at the first "Goal Reached" only the target may be left. Other
    lines do not count.

    >>> check_solution(Problem((6, 4), 24), "Exploring Operation: 6*4=24, Resulting Numbers: [24]\\n"
    ...                                     "24,24 equal: Goal Reached").right
    True
    """
    verdict = check_path(problem.numbers, problem.target, text)
    if verdict or text is None or (path := trace.read_search(text)) is None:
        return verdict
    return check_path(problem.numbers, problem.target, path)


def check_path(numbers: Sequence[int], target: int, text: str | None) -> Verdict:
    """As `check_solution` from any numbers on, those of a child thread's state, 0 among them."""
    if not isinstance(text, str):
        return Verdict(False, "no path was returned")
    path = trace.read_path(text)
    left = Counter(numbers)
    for number, line in enumerate((text if path is None else path).split("\n"), 1):
        if _EXPLORING in line:
            parsed = trace.read_exploring(line)
            if parsed is None:
                return _wrong(number, line, "is no operation line")
            operation, resulting = parsed
            used = Counter((operation.left, operation.right))
            if not used <= left:
                return _wrong(number, line, "uses a number that is not left")
            if not _is_right(operation):
                return _wrong(number, line, "is wrong arithmetic")
            left = left - used + Counter((operation.value,))
            if left != Counter(resulting):
                return _wrong(number, line, "does not give these numbers")
        if trace.GOAL_REACHED in line:
            if left == Counter((target,)):
                return Verdict(True)
            return _wrong(number, line, "claims the goal, but the target is not all that is left")
    return Verdict(False, f'never says "{trace.GOAL_REACHED}"')


def operations(text: str) -> tuple[int, int]:
    """How many of a text's "Exploring Operation" lines are right in themselves, and how many there are.
    A line that begins like one and cannot be read counts as wrong."""
    lines = [line for line in text.split("\n") if line.strip().startswith(_EXPLORING)]
    parsed = [trace.read_exploring(line) for line in lines]
    return sum(entry is not None and _is_right(entry[0]) for entry in parsed), len(lines)


def _is_right(operation: trace.Operation) -> bool:
    """Exact, with integers; what is read is never negative, so a difference below zero is wrong."""
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
    # repr keeps the reason on one line and printable; the line may be of any length.
    return Verdict(False, f"line {number} {why}: {line.strip()[:100]!r}")
