"""Sums over a range of numbers, a small task whose work can be divided among threads, but not reduced.

    13 to 62 from 4                                 the problem: add 13, 14, ... 62 to 4, modulo 10
    13+4=7 14+7=1 ...  <return>62:9</return>        a thread adds all numbers, and returns the last one and the sum
    <spawn><thread>13 to 39 from 0</thread> ...     or it divides the range among children,
    39:2+4=6 62:3+6=9  <return>62:9</return>        and adds their results

A correct tree adds every number, whatever the number of threads. More threads make the longest sequential chain of
tokens shorter, and the total number of tokens larger.
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

PHRASES = (" to ", " from ", "+", "=", ":")
CUTS = {1: (), 2: (40,), 4: (25, 40, 55)}  # number of parts -> the first number of each part after the first
_STEP = re.compile(r"(?:\d+:)?(\d+)\+(\d)=(\d)\n")


@dataclasses.dataclass(frozen=True)
class RangeSum:
    """A problem: add the numbers from `first` to `last`, inclusive, to `start`, modulo 10.

    `first` is below every cut in `CUTS` and `last` at or above every cut, so no part is empty. Raises UserError for
    other numbers.
    """

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
        """The correct sum, 0 to 9."""
        return (self.start + sum(range(self.first, self.last + 1))) % 10


def range_sums() -> list[RangeSum]:
    """Return all problems whose ranges begin at 10 to 19 and end at 60 to 69; they have 42 to 60 numbers."""
    ranges = itertools.product(range(10, 20), range(60, 70), range(10))
    return [RangeSum(first, last, start) for first, last, start in ranges]


class Sums(Task):
    """Sums as a task. The correct result is the last number of the range and the sum.

    A demonstration divides the range into 1, 2 or 4 parts. The number of parts is drawn at random, so a model learns
    all three.
    """

    name = "sums"
    variants = ("shared",)

    def problems(self, seed: int, split: str, indices: Sequence[int]) -> list[RangeSum]:
        """Return candidates from one list of all problems, shuffled by `seed`, for either split.

        Training candidates repeat without end, for data sets with `repeats`.
        """
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
        return tag_tokenizer(PHRASES, 99)

    def demonstration(self, problem: RangeSum, variant: str, seed: int, split: str, index: int) -> ThreadTree:
        self.check_variant(variant)
        return solve_sum(problem, random.Random(f"{split}/{seed}/{index}").choice(list(CUTS)))

    def protocol(self, variant: str) -> TagProtocol:
        self.check_variant(variant)
        return TagProtocol(self)

    # ------------------------------------------------------------------ `TagRules`

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
    """Return a tree of text that solves a problem with one child for each of `parts` parts of the range.

    With one part the root adds the numbers itself. Raises ValueError for a number of parts that `CUTS` does not have.
    """
    if parts not in CUTS:
        raise ValueError(f"parts are {', '.join(map(str, CUTS))}, was given {parts}")
    prompt = Block(_prompt(problem), sampled=False)
    if parts == 1:
        return ThreadTree(Thread((prompt, _added(problem.first, problem.last, problem.start))), {"parts": 1})
    edges = (problem.first, *CUTS[parts], problem.last + 1)
    ranges = [(first, end - 1) for first, end in zip(edges, edges[1:])]
    children = [
        Thread((Block(f"{first} to {last} from 0\n", sampled=False), _added(first, last, 0))) for first, last in ranges
    ]
    sums = [(last, sum(range(first, last + 1)) % 10) for first, last in ranges]
    spawn = tag_spawn(children, [f"{last}:{total}" for last, total in sums])
    lines, total = [], problem.start
    for last, more in sums:
        lines.append(f"{last}:{more}+{total}={(more + total) % 10}\n")
        total = (more + total) % 10
    return ThreadTree(Thread((prompt, spawn, _returning(lines, problem.last, total))), {"parts": parts})


def _added(first: int, last: int, total: int) -> Block:
    """Return what a thread writes that adds the numbers from `first` to `last` to `total`."""
    lines = []
    for number in range(first, last + 1):
        lines.append(f"{number}+{total}={(number + total) % 10}\n")
        total = (number + total) % 10
    return _returning(lines, last, total)


def _returning(lines: Sequence[str], last: int, total: int) -> Block:
    return Block(f"{''.join(lines)}<return>{last}:{total}</return>", sampled=True)
