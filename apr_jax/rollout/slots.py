"""The slots of an engine: who owns each, and what its cache still holds.

A slot's content outlives its owner: until another sequence overwrites it, whoever begins with the same ids takes it
over where it is, or copies it from where it is. So the prompt of a GRPO group is prefilled once on every device, and
children that inherit their parent's context share it, without anybody saying so.

Rows are copied, never shared: an attention over pages would gather them at every token, which on the CPU costs as much
as attending, while copying a row once costs less than one step of decoding does.
"""

from collections.abc import Sequence as Ids

HEAD = 16  # tokens that must be the same before sharing is thought of
CANDIDATES = 8  # slots with the same head that are compared


class Sequence:
    """A handle of the engine: the context so far, and where its keys and values are."""

    def __init__(self, ids: Ids[int], key, depth: int):
        self.ids = list(ids)
        self.key = key  # uint32 [2], of its name: decides its draws
        self.depth = depth
        self.slot: int | None = None
        self.cached = 0  # how many of the first ids the slot's cache holds; the last one is never needed there
        self.heir: Sequence | None = None  # a fork that may take the slot over
        self.shared = 0  # of a fork: how many first ids are its parent's
        self.freed = False


class Slots:
    """`count` slots, the same number on each device, in the order of the devices."""

    def __init__(self, count: int, devices: int):
        self.owners: list[Sequence | None] = [None] * count
        self.per_device = count // devices
        self._held: list[tuple[list[int], int]] = [([], 0)] * count  # ids, and how many of them are cached
        self._heads: dict[tuple[int, ...], dict[int, None]] = {}  # slots by what they begin with, oldest first
        self._used = [0] * count  # when a slot was last written to, to give away the longest idle
        self._clock = 0

    def device(self, slot: int) -> int:
        return slot // self.per_device

    def forget(self) -> None:
        """What the slots hold is of no use any more: the weights have changed."""
        self._held = [([], 0)] * len(self.owners)
        self._heads.clear()

    def note(self, sequence: Sequence, cached: int) -> None:
        """The sequence's slot now holds so many of its first ids."""
        slot, sequence.cached = sequence.slot, cached
        before, now = self._head(slot), tuple(sequence.ids[:HEAD]) if cached >= HEAD else None
        self._held[slot] = (sequence.ids, cached)
        self._clock += 1
        self._used[slot] = self._clock
        if before != now:
            if before is not None:
                del self._heads[before][slot]
                if not self._heads[before]:
                    del self._heads[before]
            if now is not None:
                self._heads.setdefault(now, {})[slot] = None

    def place(self, sequence: Sequence, busy) -> tuple[int, int] | None:
        """Gives a slot to a sequence without one: a free one on the device with most of them, else that of the longest
        idle owner that is not among the `busy` slots, which loses it. None where there is neither.

        Returns a slot of the same device and how many of the sequence's first ids can be copied from it; the sequence's
        own slot where they are there already, and 0 where nothing is to be had.
        """
        free: dict[int, list[int]] = {}
        for slot, owner in enumerate(self.owners):
            if owner is None:
                free.setdefault(self.device(slot), []).append(slot)
        if free:
            return self._own(sequence, free[max(free, key=lambda device: (len(free[device]), -device))])
        idle = [slot for slot in range(len(self.owners)) if slot not in busy]
        if not idle:
            return None
        slot = min(idle, key=self._used.__getitem__)
        self.owners[slot].slot, self.owners[slot].cached = None, 0
        return self._own(sequence, [slot])

    def move(self, sequence: Sequence, device: int) -> tuple[int, int] | None:
        """Gives a sequence a free slot of another device in the place of its own; as `place`."""
        first = device * self.per_device
        free = [slot for slot in range(first, first + self.per_device) if self.owners[slot] is None]
        if not free:
            return None
        self.owners[sequence.slot] = None
        return self._own(sequence, free)

    def _own(self, sequence: Sequence, free: list[int]) -> tuple[int, int]:
        """Gives one of some free slots of a device, best the one that holds what the sequence begins with."""
        source, shared = self._match(sequence.ids, self.device(free[0]))
        slot = source if source in free else min(free, key=self._used.__getitem__)
        self.owners[slot], sequence.slot = sequence, slot
        self.note(sequence, shared)
        return source, shared

    def give(self, sequence: Sequence) -> None:
        """The sequence is done with its slot: it goes to the fork that waits for it, or becomes free."""
        slot, heir = sequence.slot, sequence.heir
        sequence.heir = None
        if slot is None:
            return
        sequence.slot = self.owners[slot] = None
        if heir is not None and not heir.freed and heir.slot is None:
            heir.slot, self.owners[slot] = slot, heir
            self.note(heir, min(sequence.cached, heir.shared))

    def _head(self, slot: int) -> tuple[int, ...] | None:
        ids, cached = self._held[slot]
        return tuple(ids[:HEAD]) if cached >= HEAD else None

    def _match(self, ids: list[int], device: int) -> tuple[int, int]:
        """The slot of a device that holds most of the first ids, all but the last at most, and how many."""
        best, most = -1, 0
        same_head = self._heads.get(tuple(ids[:HEAD]), {}) if len(ids) > HEAD else {}
        for slot in [slot for slot in reversed(same_head) if self.device(slot) == device][:CANDIDATES]:
            held, cached = self._held[slot]
            if (shared := _common(ids, held, min(cached, len(ids) - 1))) > most:
                best, most = slot, shared
        return best, most


def _common(a: list[int], b: list[int], most: int) -> int:
    """How many first ids are the same, up to `most`, at least HEAD of which are."""
    low, high = HEAD, most
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
