"""Factor search, a small task with nested trees: find the smallest divisor of a number within a range.

A thread tries the candidates of a range of at most three. It divides a longer range into halves, one for each of two
children. The variants differ in the context of children: with "fresh" a child's prompt repeats the number, with
"inherit" a child has its parent's context.
"""

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.checks import at_least, check_fields
from apr_jax.errors import UserError
from apr_jax.tasks.tagged.protocol import TagProtocol, tag_spawn, tag_tokenizer
from apr_jax.tasks.task import Task
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.tree import Block, Thread, ThreadTree

MAX_TRIED = 3  # candidates that one thread tries
PHRASES = (" in ", " to ", "in ", " no\n", " yes\n", "/")
_STEP = re.compile(r"(\d+)/(\d+) (yes|no)\n")


@dataclasses.dataclass(frozen=True)
class Span:
    """A problem: find a divisor of `number` from `first` to `last`, inclusive.

    Raises UserError unless 2 <= first <= last.
    """

    number: int
    first: int
    last: int

    def __post_init__(self):
        check_fields(self)
        if not 2 <= self.first <= self.last:
            raise UserError(f"candidates need 2 <= first <= last, was given {self.first} to {self.last}")

    @property
    def divisor(self) -> int | None:
        """The smallest divisor in the range, or None."""
        return next((d for d in range(self.first, self.last + 1) if self.number % d == 0), None)

    @property
    def halves(self) -> tuple["Span", "Span"]:
        """The problems of the lower and the upper half of the range."""
        middle = (self.first + self.last) // 2
        return Span(self.number, self.first, middle), Span(self.number, middle + 1, self.last)


def spans(largest: int) -> list[Span]:
    """Return all problems for numbers from 2 to `largest`, with ranges that begin at 2 to 4 and end at 7 to 12."""
    ranges = [(first, last) for first in (2, 3, 4) for last in range(7, 13)]
    return [Span(number, first, last) for number in range(2, largest + 1) for first, last in ranges]


@dataclasses.dataclass(frozen=True)
class FactorSettings:
    """The settings of factor search. `largest` is the largest number whose divisor is asked for."""

    largest: int = 60

    BOUNDS = (at_least(2, "largest"),)

    def __post_init__(self):
        check_fields(self)


class Factors(Task):
    """Factor search as a task. The correct result is the smallest divisor, and no result where there is none."""

    name = "factors"
    variants = ("fresh", "inherit")
    Settings = FactorSettings

    def problems(self, seed: int, split: str, indices: Sequence[int]) -> list[Span]:
        """Return candidates from one list of all problems, shuffled by `seed`, for either split.

        A data set takes the held-out problems first, and trains on others.
        """
        every = spans(self.settings.largest)
        random.Random(seed).shuffle(every)
        return [every[index] for index in indices if index < len(every)]

    def read_problem(self, row: Mapping[str, Any]) -> Span:
        try:
            return Span(**row)
        except TypeError:
            raise UserError(f"a problem has number, first and last, was given {str(dict(row))[:80]}") from None

    def describe(self, problem: Span) -> str:
        return f"a divisor of {problem.number} from {problem.first} to {problem.last}"

    def tokenizer(self) -> Tokenizer:
        return tag_tokenizer(PHRASES, self.settings.largest)

    def demonstration(self, problem: Span, variant: str, seed: int, split: str, index: int) -> ThreadTree:
        return solve(problem, self.check_variant(variant) == "inherit")

    def protocol(self, variant: str) -> TagProtocol:
        return TagProtocol(self, inherit=self.check_variant(variant) == "inherit")

    def levels(self, variant: str) -> int:
        return 2  # at most 11 candidates: halves of 6 and 5, then quarters of 3 or 2

    # ------------------------------------------------------------------ `TagRules`

    def root_prompt(self, problem: Span) -> str:
        return f"{problem.number} in {problem.first} to {problem.last}\n"

    def correct(self, problem: Span, result: str | None) -> bool:
        return result == (None if problem.divisor is None else str(problem.divisor))

    def steps(self, text: str) -> tuple[int, int]:
        found = _STEP.findall(text)
        right = sum(int(d) > 0 and (int(n) % int(d) == 0) == (said == "yes") for n, d, said in found)
        return right, len(found)


def solve(problem: Span, inherit: bool = False) -> ThreadTree:
    """Return the tree of text that demonstrates a problem. `inherit`: children have their parent's context."""
    return ThreadTree(_thread(problem, inherit, top=True), {"number": problem.number})


def _thread(span: Span, inherit: bool, top: bool = False) -> Thread:
    named = "" if inherit and not top else f"{span.number} "
    inherits = inherit and not top
    if span.last - span.first < MAX_TRIED:
        return _trying(span, named, inherits)
    children = tuple(_thread(half, inherit) for half in span.halves)
    return _spawning(span, span.halves, children, named, inherits)


def _prompt(span: Span, named: str) -> Block:
    return Block(f"{named}in {span.first} to {span.last}\n", sampled=False)


def _answer(span: Span) -> str:
    return "" if span.divisor is None else f"<return>{span.divisor}</return>"


def _trying(span: Span, named: str, inherits: bool) -> Thread:
    """Return a thread that tries its candidates up to the first divisor."""
    tried = range(span.first, (span.divisor or span.last) + 1)
    lines = "".join(f"{span.number}/{d} {'yes' if d == span.divisor else 'no'}\n" for d in tried)
    return Thread((_prompt(span, named), Block(lines + _answer(span), sampled=True)), inherits=inherits)


def _spawning(span: Span, parts: Sequence[Span], children: tuple[Thread, ...], named: str, inherits: bool) -> Thread:
    """Return a thread that spawns a child for each part of its range, and returns the smallest divisor found."""
    found = (part.divisor for part in parts)
    spawn = tag_spawn(children, [None if divisor is None else str(divisor) for divisor in found])
    return Thread((_prompt(span, named), spawn, Block(_answer(span), sampled=True)), inherits=inherits)
