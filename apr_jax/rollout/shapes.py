"""In what shapes an engine calls its compiled parts: every one is a program of its own to compile."""

from collections.abc import Sequence
from typing import NamedTuple

SHORTEST = 64  # tokens: the least width that slots attend over; longer ones are in `width_of`


class Shapes(NamedTuple):
    """In what shapes an engine calls its compiled parts. Between the least and all they are doubles."""

    group: int | None  # slots per device of the smallest decode call; None: all, there is one size
    width: int  # tokens: the least that a call attends over
    fine: bool  # decode calls have the widths of `width_of` instead of doubles
    rows: tuple[int, ...]  # prompts per device and prefill call
    length: int  # tokens of the shortest prefill


# A CPU's call takes as long as its arithmetic, so calls fit what they are for. An accelerator's takes as long as its
# launches, whatever their size, and every shape is longer to compile: few shapes, and as much in a call as there is.
CPU_SHAPES = Shapes(group=4, width=SHORTEST, fine=True, rows=(1, 8), length=32)
ACCELERATOR_SHAPES = Shapes(group=None, width=1024, fine=False, rows=(32,), length=128)


def width_of(tokens: int) -> int:
    """The width that a context of so many tokens is attended over, at its finest: eight multiples of SHORTEST, then
    four to a doubling, so that at most a fifth of a long one is padding."""
    step = SHORTEST
    while tokens > 8 * step:
        step *= 2
    return -(-tokens // step) * step


def doubles(least: int, most: int) -> list[int]:
    """`least` and its doubles below `most`, then `most`."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]


def fitting(sizes: Sequence[int], needed: int) -> int:
    """The first of ascending sizes that is large enough."""
    return next(size for size in sizes if size >= needed)
