"""In what shapes an engine calls its compiled parts: each is a program of its own to compile."""

from collections.abc import Sequence
from typing import NamedTuple

SHORTEST = 64  # tokens: the least width that slots attend over; longer ones are in `width_of`
PREFILL_TOKENS = 8192  # of a device's call, padding included, where fewer rows can be chosen: scores grow with them


class Shapes(NamedTuple):
    """The shapes as rules; the methods give them for a window and a number of slots per device, in ascending order.
    Where nothing else is said they are doubles of the least, and the whole."""

    group: int | None  # slots of the smallest decode call; None: all slots, in every call
    width: int  # tokens: the least that copies, prefills and, unless `fine`, decode calls attend over
    fine: bool  # decode calls have all widths of `width_of`
    rows: tuple[int, ...]  # prompts of a prefill call
    length: int  # tokens of the shortest prefill

    def sizes(self, slots: int) -> list[int]:
        """Slots of a decode call."""
        return _doubles(self.group or slots, slots)

    def widths(self, context: int) -> list[int]:
        """Of decode calls."""
        return sorted({width_of(n) for n in range(1, context + 1)}) if self.fine else self.copy_widths(context)

    def copy_widths(self, context: int) -> list[int]:
        """Of copies and prefills, which are short."""
        return _doubles(self.width, width_of(context))

    def lengths(self, context: int) -> list[int]:
        """Tokens of a prefill."""
        return _doubles(self.length, width_of(context))

    def rows_of(self, length: int) -> list[int]:
        """Prompts of a prefill of so many tokens."""
        return [rows for rows in self.rows if rows * length <= PREFILL_TOKENS] or [self.rows[0]]


# A CPU's call takes as long as its arithmetic, so calls fit what they are for. On an accelerator every shape takes
# longer to compile, and waste costs less: 95 shapes of a CPU took 173 s, 6 of an H200 10 s.
CPU_SHAPES = Shapes(group=4, width=SHORTEST, fine=True, rows=(1, 8), length=32)
ACCELERATOR_SHAPES = Shapes(group=None, width=1024, fine=False, rows=(8, 32), length=128)


def width_of(tokens: int) -> int:
    """The width that a context of so many tokens is attended over, at its finest: eight multiples of SHORTEST, then
    four to a doubling, so that at most a fifth of a long one is padding."""
    step = SHORTEST
    while tokens > 8 * step:
        step *= 2
    return -(-tokens // step) * step


def fitting(sizes: Sequence[int], needed: int) -> int:
    """The first of ascending sizes that is large enough, the last where none is."""
    return next((size for size in sizes if size >= needed), sizes[-1])


def _doubles(least: int, most: int) -> list[int]:
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]
