"""The array shapes in which the JAX engine calls its compiled functions. Each shape is a program to compile."""

from collections.abc import Sequence
from typing import NamedTuple

SHORTEST = 64  # tokens: the smallest width of an attention over the cache; `width_of` gives the larger ones
# Most tokens of a device's prefill call, padding included: the memory of attention scores grows with them. A call with
# the smallest number of rows may exceed it.
PREFILL_TOKENS = 8192


class Shapes(NamedTuple):
    """Rules that give the allowed shapes for a context length and a number of slots per device.

    Each method returns one dimension's allowed values in ascending order. Unless said otherwise they are a smallest
    value, its doubles, and the full size. A width is the number of cache positions that a call attends over or copies.
    """

    group: int | None  # slots of the smallest decode call; None: every call has all slots
    width: int  # smallest width of copies and prefills, and of decode calls unless `fine`
    fine: bool  # whether decode calls may have every width of `width_of`
    rows: tuple[int, ...]  # prompts of a prefill call, per device
    length: int  # tokens of the shortest prefill

    def sizes(self, slots: int) -> list[int]:
        """Slots of a decode call, per device."""
        return _doubles(self.group or slots, slots)

    def widths(self, context: int) -> list[int]:
        """Widths of decode calls, in tokens."""
        return sorted({width_of(n) for n in range(1, context + 1)}) if self.fine else self.copy_widths(context)

    def copy_widths(self, context: int) -> list[int]:
        """Widths of copies and prefills, in tokens. There are few: these calls are short."""
        return _doubles(self.width, width_of(context))

    def lengths(self, context: int) -> list[int]:
        """Padded lengths of a prefill's prompts, in tokens."""
        return _doubles(self.length, width_of(context))

    def rows_of(self, length: int) -> list[int]:
        """Prompts of a prefill call of padded length `length`, per device."""
        return [rows for rows in self.rows if rows * length <= PREFILL_TOKENS] or [self.rows[0]]


# On a CPU the time of a call is the time of its arithmetic, so many shapes keep padding small. On an accelerator each
# shape takes longer to compile and padding costs less. 95 shapes took 173 s on a CPU, 6 shapes 10 s on an H200.
CPU_SHAPES = Shapes(group=4, width=SHORTEST, fine=True, rows=(1, 8), length=32)
ACCELERATOR_SHAPES = Shapes(group=None, width=1024, fine=False, rows=(8, 32), length=128)

# For one tree at a time on a CPU, where compiling takes longer than decoding. A tree in a window of 768 needs three
# shapes, compiled in 3 s on a Xeon. With widths of 256, 512 and 768 compiling took 8 s, and a tree of 990 sequential
# tokens 1.5 s instead of 2.5 s.
FEW_SHAPES = Shapes(group=None, width=1024, fine=False, rows=(8,), length=256)


def width_of(tokens: int) -> int:
    """Return the smallest allowed width for a context of `tokens` tokens.

    Allowed are the first eight multiples of SHORTEST, then four widths per doubling. So at most a fifth of a long
    context is padding.
    """
    step = SHORTEST
    while tokens > 8 * step:
        step *= 2
    return -(-tokens // step) * step


def fitting(sizes: Sequence[int], needed: int) -> int:
    """Return the first of the ascending `sizes` that is at least `needed`, or the last if all are smaller."""
    return next((size for size in sizes if size >= needed), sizes[-1])


def _doubles(least: int, most: int) -> list[int]:
    """`least` and its doubles below `most`, then `most`."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]
