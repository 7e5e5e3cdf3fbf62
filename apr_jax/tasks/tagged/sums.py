"""Sums over a range of numbers, a small task of tags whose work nobody can skip, though it can be shared out.

    13 to 62 from 4                                 the problem: add 13, 14, ... 62 to 4, all modulo 10
    13+4=7 14+7=1 ...  <return>62:9</return>        a thread adds them up, and returns the last one and the sum
    <spawn><thread>13 to 39 from 0</thread> ...     or shares the range out to children,
    39:2+4=6 62:3+6=9  <return>62:9</return>        and adds up what they return

Every number counts, so a tree has done all of the work or is wrong; how many threads do it is a choice. The more there
are, the shorter is the longest chain of tokens, and the more tokens are written in all.
"""

import dataclasses
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.checks import check_fields
from apr_jax.errors import UserError
from apr_jax.tasks.tagged.protocol import TagProtocol, tag_spawn, tag_tokenizer
from apr_jax.tasks.task import Task
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.tree import Block, Thread, ThreadTree

SUM_WORDS = (" to ", " from ", "+", "=", ":")
CUTS = {1: (), 2: (40,), 4: (25, 40, 55)}  # by parts: where those after the first begin
_STEP = re.compile(r"(?:\d+:)?(\d+)\+(\d)=(\d)\n")


@dataclasses.dataclass(frozen=True)
class RangeSum:
    """A problem. `first` is below every cut, `last` not below any, so that each part has something to add."""

    first: int
    last: int
    start: int

    def __post_init__(self):
        check_fields(self)
        if not (10 <= self.first < 25 and 55 <= self.last < 100 and 0 <= self.start < 10):
            raise UserError(
                f"a sum begins with 10 to 24, ends with 55 to 99 and has a start of 0 to 9, was given {vars(self)}"
            )

    @property
    def total(self) -> int:
        return (self.start + sum(range(self.first, self.last + 1))) % 10


def range_sums() -> list[RangeSum]:
    """All problems that begin with 10 to 19 and end with 60 to 69: of 42 to 60 numbers."""
    ranges = itertools.product(range(10, 20), range(60, 70), range(10))
    return [RangeSum(first, last, start) for first, last, start in ranges]


class Sums(Task):
    """Right is the range's last number and the sum. A demonstration has 1, 2 or 4 parts, drawn by its index: a model of
    them knows all three ways."""

    name = "sums"
    variants = ("shared",)

    def problems(self, seed: int, split: str, indices: Sequence[int]) -> list[RangeSum]:
        """All problems in one order, whatever the split; in training they come again and again, for `data.repeats`."""
        every = range_sums()
        random.Random(seed).shuffle(every)
        if split == "train":
            return [every[index % len(every)] for index in indices]
        return [every[index] for index in indices if index < len(every)]

    def read_problem(self, row: Mapping[str, Any]) -> RangeSum:
        try:
            return RangeSum(**row)
        except TypeError:
            raise UserError(f"a problem has first, last and start, was given {str(dict(row))[:80]}") from None

    def describe(self, problem: RangeSum) -> str:
        return f"the sum of {problem.first} to {problem.last}, added to {problem.start}, modulo 10"

    def tokenizer(self) -> Tokenizer:
        return tag_tokenizer(SUM_WORDS, 99)

    def demonstration(self, problem: RangeSum, variant: str, seed: int, split: str, index: int) -> ThreadTree:
        self.check_variant(variant)
        return solve_sum(problem, random.Random(f"{split}/{seed}/{index}").choice(list(CUTS)))

    def protocol(self, variant: str) -> TagProtocol:
        self.check_variant(variant)
        return TagProtocol(self)

    # ------------------------------------------------------------------ the rules of `TagProtocol`

    def root_prompt(self, problem: RangeSum) -> str:
        return _prompt(problem)

    def correct(self, problem: RangeSum, result: str | None) -> bool:
        return result == f"{problem.last}:{problem.total}"

    def steps(self, text: str) -> tuple[int, int]:
        found = [tuple(map(int, step)) for step in _STEP.findall(text)]
        return sum((number + before) % 10 == after for number, before, after in found), len(found)


def _prompt(problem: RangeSum) -> str:
    return f"{problem.first} to {problem.last} from {problem.start}\n"


def solve_sum(problem: RangeSum, parts: int) -> ThreadTree:
    """The tree of text of a solver that gives `parts` parts of the range to children, or with 1 adds up itself. Raises
    ValueError for a number of parts without cuts."""
    if parts not in CUTS:
        raise ValueError(f"parts are {', '.join(map(str, CUTS))}, was given {parts}")
    prompt = Block(_prompt(problem), sampled=False)
    if parts == 1:
        return ThreadTree(Thread((prompt, _added(problem.first, problem.last, problem.start))), {"parts": 1})
    edges = (problem.first, *CUTS[parts], problem.last + 1)
    shares = [(first, end - 1) for first, end in zip(edges, edges[1:])]
    children = [
        Thread((Block(f"{first} to {last} from 0\n", sampled=False), _added(first, last, 0))) for first, last in shares
    ]
    sums = [(last, sum(range(first, last + 1)) % 10) for first, last in shares]
    spawn = tag_spawn(children, [f"{last}:{total}" for last, total in sums])
    lines, total = [], problem.start
    for last, more in sums:
        lines.append(f"{last}:{more}+{total}={(more + total) % 10}\n")
        total = (more + total) % 10
    return ThreadTree(Thread((prompt, spawn, _returning(lines, problem.last, total))), {"parts": parts})


def _added(first: int, last: int, total: int) -> Block:
    """What a thread writes that adds a range up itself."""
    lines = []
    for number in range(first, last + 1):
        lines.append(f"{number}+{total}={(number + total) % 10}\n")
        total = (number + total) % 10
    return _returning(lines, last, total)


def _returning(lines: Sequence[str], last: int, total: int) -> Block:
    return Block(f"{''.join(lines)}<return>{last}:{total}</return>", sampled=True)
