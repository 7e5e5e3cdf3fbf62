"""The slots of an engine: who owns each, and what its cache still holds.

A slot's content outlives its owner: until another sequence overwrites it, whoever begins with the same ids takes it
over where it is, or copies it from where it is. So the prompt of a GRPO group is prefilled once on every device that
has a part of the group, and children that inherit find their parent's context.

Rows are copied, never shared: in XLA an attention over pages gathers them at every token, a copied row is copied once.
"""

from collections.abc import Sequence as Ids
from itertools import islice

HEAD = 16  # tokens that must be the same before sharing is thought of
CANDIDATES = 8  # slots with the same head that are compared, the longest filled first
LONG = 256  # shared tokens for which a sequence goes to the device that has them
UNEVEN = 8  # slots that a device may then have fewer free than another


class Sequence:
    """A handle of the engine: the context so far, and where its keys and values are."""

    def __init__(self, ids: Ids[int], key, depth: int):
        self.ids = list(ids)
        self.key = key  # uint32 [2], of its name: decides its draws
        self.depth = depth
        self.slot: int | None = None
        self.cached = 0  # how many of the first ids the slot's cache holds; the last one is never needed there
        self.parent: Sequence | None = None  # of a fork, until it has a slot
        self.shared = 0  # of a fork: how many first ids are its parent's
        self.heir: Sequence | None = None  # a fork that may take the slot over
        self.freed = False


class Slots:
    """`count` slots, the same number on each device, in the order of the devices."""

    def __init__(self, count: int, devices: int):
        self.owners: list[Sequence | None] = [None] * count
        self.per_device = count // devices
        # By device the free slots, and the slots whose owners wait, those first that have done so longest.
        self._free: list[dict[int, None]] = [
            dict.fromkeys(range(first, first + self.per_device)) for first in range(0, count, self.per_device)
        ]
        self._idle: dict[int, None] = {}
        self._held: list[tuple[list[int], int]] = [([], 0)] * count  # ids, and how many of them are cached
        self._heads: dict[tuple[int, ...], dict[int, None]] = {}  # slots by what they begin with, oldest first

    def device(self, slot: int) -> int:
        return slot // self.per_device

    def forget(self) -> None:
        """What the slots hold is of no use: the weights have changed, or it was never written."""
        for owner in self.owners:
            if owner is not None:
                owner.cached = 0
        self._held = [([], 0)] * len(self.owners)
        self._heads.clear()

    def note(self, sequence: Sequence, cached: int) -> None:
        """The sequence's slot now holds so many of its first ids."""
        slot, sequence.cached = sequence.slot, cached
        before, now = self._head(slot), tuple(sequence.ids[:HEAD]) if cached >= HEAD else None
        self._held[slot] = (sequence.ids, cached)
        if before != now:
            if before is not None:
                del self._heads[before][slot]
                if not self._heads[before]:
                    del self._heads[before]
            if now is not None:
                self._heads.setdefault(now, {})[slot] = None

    def wait(self, slot: int) -> None:
        """The slot's owner does not decode: it may lose the slot."""
        self._idle[slot] = None

    def run(self, slot: int) -> None:
        """The slot's owner decodes."""
        self._idle.pop(slot, None)

    def place(self, sequence: Sequence) -> tuple[int, int] | None:
        """Gives a slot to a sequence without one: a free one on the device with most of them, or on one that holds long
        parts of it, else the slot of the owner that has waited longest, which loses it. None where there is neither.

        Returns a slot of the same device and how many of the sequence's first ids can be copied from it; the sequence's
        own slot where they are there already, and 0 where nothing is to be had.
        """
        held = self._match(sequence)
        if most := max(map(len, self._free)):

            def preference(device: int) -> tuple[int, int, int]:
                free, shared = len(self._free[device]), held.get(device, (-1, 0))[1]
                return shared if shared >= LONG and free >= most - UNEVEN else 0, free, -device

            device = max((device for device, free in enumerate(self._free) if free), key=preference)
            return self._own(sequence, device, held)
        if not self._idle:
            return None
        slot = next(iter(self._idle))
        self._idle.pop(slot)
        self.owners[slot].slot, self.owners[slot].cached = None, 0
        self._free[self.device(slot)][slot] = None
        return self._own(sequence, self.device(slot), held)

    def move(self, sequence: Sequence, device: int) -> tuple[int, int] | None:
        """Gives a sequence a free slot of another device in the place of its own; as `place`."""
        if not self._free[device]:
            return None
        self._release(sequence.slot)
        return self._own(sequence, device, self._match(sequence))

    def give(self, sequence: Sequence) -> None:
        """The sequence is done with its slot: it goes to the fork that waits for it, or becomes free."""
        slot, heir = sequence.slot, sequence.heir
        sequence.heir = sequence.parent = None
        if slot is None:
            return
        sequence.slot = None
        if heir is not None and not heir.freed and heir.slot is None:
            heir.slot, heir.parent, self.owners[slot] = slot, None, heir
            self.note(heir, min(sequence.cached, heir.shared))
            self.wait(slot)
        else:
            self._release(slot)

    def _release(self, slot: int) -> None:
        self.owners[slot] = None
        self._idle.pop(slot, None)
        self._free[self.device(slot)][slot] = None

    def _own(self, sequence: Sequence, device: int, held: dict[int, tuple[int, int]]) -> tuple[int, int]:
        """Gives a free slot of a device, best the one that holds what the sequence begins with."""
        source, shared = held.get(device, (-1, 0))
        free = self._free[device]
        slot = source if source in free else next(iter(free))
        del free[slot]
        self.owners[slot], sequence.slot, sequence.parent = sequence, slot, None
        self.note(sequence, shared)
        return source, shared

    def _head(self, slot: int) -> tuple[int, ...] | None:
        ids, cached = self._held[slot]
        return tuple(ids[:HEAD]) if cached >= HEAD else None

    def _match(self, sequence: Sequence) -> dict[int, tuple[int, int]]:
        """By device the slot that holds most of a sequence's first ids, all but the last at most, and how many."""
        ids = sequence.ids
        if len(ids) <= HEAD:
            return {}
        head = tuple(ids[:HEAD])
        candidates = list(islice(self._heads.get(head, ()), CANDIDATES))
        parent = sequence.parent
        if parent is not None and parent.slot is not None and self._head(parent.slot) == head:
            candidates.insert(0, parent.slot)
        best: dict[int, tuple[int, int]] = {}
        for slot in candidates:
            held, cached = self._held[slot]
            shared = _common(ids, held, min(cached, len(ids) - 1))
            if shared > best.get(self.device(slot), (-1, 0))[1]:
                best[self.device(slot)] = slot, shared
        return best


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
