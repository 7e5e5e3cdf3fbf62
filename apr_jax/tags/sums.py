"""Sums of a row of digits, a small task of tags whose work nobody can skip, though it can be shared out.

    a3b7c1 ... z5                                   the problem: a letter and a digit each
    a:a3+0=3 b:b7+3=0 ...  <return>Z4</return>      a thread adds up, modulo 10, and returns the last letter and the sum
    <spawn><thread>a to m</thread> ...              or shares the letters out to children, which see its context,
    m=M2+0=2 z=Z2+2=4  <return>Z4</return>          and adds up what they return

Every digit counts, so a tree has done all of the work or is wrong; how many threads do it is a choice.
"""

import dataclasses
import re
import string
from collections.abc import Sequence

from apr_jax.tags.protocol import tag_spawn
from apr_jax.threads.tree import Block, Thread, ThreadTree

# Small models look a word up when the word before it says which: "c:" what the problem has for c, "c=" what a child has
# returned. A letter and its digit are one word, small for the problem's, capital for sums.
SUM_WORDS = (
    " to ", *(f"{letter}{sign}" for letter in string.ascii_lowercase for sign in ":="),
    *(f"{letter}{digit}" for letter in string.ascii_letters for digit in range(10)),
)  # fmt: skip
_STEP = re.compile(r"[A-Za-z](\d)\+(\d)=(\d)\n")
_ASKED = re.compile(r"[a-z] to ([a-z])\n")


@dataclasses.dataclass(frozen=True)
class DigitSum:
    """A problem: 1 to 26 digits."""

    digits: tuple[int, ...]

    def __post_init__(self):
        if not 1 <= len(self.digits) <= 26 or not all(0 <= digit <= 9 for digit in self.digits):
            raise ValueError(f"a sum has 1 to 26 digits of 0 to 9, was given {self.digits}")

    @property
    def labelled(self) -> list[tuple[str, int]]:
        return list(zip(string.ascii_lowercase, self.digits))


class SumTask:
    """A `Task`: right is the last letter and the sum of all digits modulo 10. Children inherit their context."""

    def root_prompt(self, problem: DigitSum) -> str:
        return "".join(f"{letter}{digit}" for letter, digit in problem.labelled) + "\n"

    def correct(self, problem: DigitSum, result: str | None) -> bool:
        return result == _total(problem.labelled)

    def child_correct(self, text: str, result: str | None) -> bool:
        """A child's text holds its range and not the digits: what can be told is whether it went to the range's end."""
        asked = _ASKED.match(text)
        return asked is not None and result is not None and result.startswith(asked[1].upper())

    def steps(self, text: str) -> tuple[int, int]:
        found = [tuple(map(int, step)) for step in _STEP.findall(text)]
        return sum((digit + before) % 10 == after for digit, before, after in found), len(found)


def solve_sum(problem: DigitSum, parts: int) -> ThreadTree:
    """The tree of text of a solver that gives `parts` even parts of the letters to children, or with 1 adds up itself.
    Raises ValueError where there are fewer letters than parts."""
    labelled = problem.labelled
    if not 1 <= parts <= len(labelled):
        raise ValueError(f"{len(labelled)} digits have 1 to {len(labelled)} parts, was given {parts}")
    prompt = Block(SumTask().root_prompt(problem), sampled=False)
    if parts == 1:
        return ThreadTree(Thread((prompt, _adding(labelled))), {"parts": 1})
    edges = [len(labelled) * part // parts for part in range(parts + 1)]
    shares = [labelled[first:end] for first, end in zip(edges, edges[1:])]
    children = [
        Thread((Block(f"{share[0][0]} to {share[-1][0]}\n", sampled=False), _adding(share)), inherits=True)
        for share in shares
    ]
    results = list(map(_total, shares))
    spawn = tag_spawn(children, results)
    return ThreadTree(Thread((prompt, spawn, _adding([(total[0], int(total[1])) for total in results]))), {"parts": parts})


def _total(labelled: Sequence[tuple[str, int]]) -> str:
    return f"{labelled[-1][0].upper()}{sum(digit for _, digit in labelled) % 10}"


def _adding(labelled: Sequence[tuple[str, int]]) -> Block:
    """What a thread writes to add up digits or, of capital letters, sums; and its return."""
    lines, total = [], 0
    for letter, digit in labelled:
        sign = "=" if letter.isupper() else ":"
        lines.append(f"{letter.lower()}{sign}{letter}{digit}+{total}={(total + digit) % 10}\n")
        total = (total + digit) % 10
    return Block("".join(lines) + f"<return>{_total(labelled)}</return>", sampled=True)
