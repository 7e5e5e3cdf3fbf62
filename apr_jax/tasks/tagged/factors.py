"""Factor search, a small task of tags: does a number have a divisor in a range, and which is the smallest?

A thread halves its range for two children until three candidates are left, and tries those. So trees are nested, and
whether children inherit the number or are told it again is the protocol's choice.
"""

import dataclasses
import re
from collections.abc import Sequence

from apr_jax.tasks.tagged.protocol import tag_spawn
from apr_jax.threads.tree import Block, Thread, ThreadTree

MOST_TRIED = 3  # candidates of one thread
WORDS = (" in ", " to ", "in ", " no\n", " yes\n", "/")
_STEP = re.compile(r"(\d+)/(\d+) (yes|no)\n")


@dataclasses.dataclass(frozen=True)
class Span:
    """A problem: a divisor of `number` from `first` to `last`, both among the candidates."""

    number: int
    first: int
    last: int

    def __post_init__(self):
        if not 2 <= self.first <= self.last:
            raise ValueError(f"candidates need 2 <= first <= last, was given {self.first} to {self.last}")

    @property
    def divisor(self) -> int | None:
        return next((d for d in range(self.first, self.last + 1) if self.number % d == 0), None)

    @property
    def halves(self) -> tuple["Span", "Span"]:
        middle = (self.first + self.last) // 2
        return Span(self.number, self.first, middle), Span(self.number, middle + 1, self.last)


def spans(largest: int) -> list[Span]:
    """All problems of numbers up to `largest`: first candidates 2 to 4, last ones 7 to 12."""
    ranges = [(first, last) for first in (2, 3, 4) for last in range(7, 13)]
    return [Span(number, first, last) for number in range(2, largest + 1) for first, last in ranges]


class FactorTask:
    """A `Task`: right is the smallest divisor, and nothing where there is none."""

    def root_prompt(self, problem: Span) -> str:
        return f"{problem.number} in {problem.first} to {problem.last}\n"

    def correct(self, problem: Span, result: str | None) -> bool:
        return result == (None if problem.divisor is None else str(problem.divisor))

    def steps(self, text: str) -> tuple[int, int]:
        found = _STEP.findall(text)
        right = sum(int(d) > 0 and (int(n) % int(d) == 0) == (said == "yes") for n, d, said in found)
        return right, len(found)


def solve(problem: Span, inherit: bool = False) -> ThreadTree:
    """The tree of text that a model is to learn."""
    return ThreadTree(_thread(problem, inherit, top=True), {"number": problem.number})


def _thread(span: Span, inherit: bool, top: bool = False) -> Thread:
    named = "" if inherit and not top else f"{span.number} "
    inherits = inherit and not top
    if span.last - span.first < MOST_TRIED:
        return _trying(span, named, inherits)
    children = tuple(_thread(half, inherit) for half in span.halves)
    return _spawning(span, span.halves, children, named, inherits)


def _prompt(span: Span, named: str) -> Block:
    return Block(f"{named}in {span.first} to {span.last}\n", sampled=False)


def _answer(span: Span) -> str:
    return "" if span.divisor is None else f"<return>{span.divisor}</return>"


def _trying(span: Span, named: str, inherits: bool) -> Thread:
    """A thread that tries its candidates up to the first divisor."""
    tried = range(span.first, (span.divisor or span.last) + 1)
    lines = "".join(f"{span.number}/{d} {'yes' if d == span.divisor else 'no'}\n" for d in tried)
    return Thread((_prompt(span, named), Block(lines + _answer(span), sampled=True)), inherits=inherits)


def _spawning(span: Span, parts: Sequence[Span], children: tuple[Thread, ...], named: str, inherits: bool) -> Thread:
    """A thread that gives the parts of its range to children, and returns what they found."""
    found = (part.divisor for part in parts)
    spawn = tag_spawn(children, [None if divisor is None else str(divisor) for divisor in found])
    return Thread((_prompt(span, named), spawn, Block(_answer(span), sampled=True)), inherits=inherits)
