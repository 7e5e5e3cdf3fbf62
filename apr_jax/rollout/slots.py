"""The slots of an engine: who owns each, what its cache still holds, and the state of every sequence.

A slot's content outlives its owner: until another sequence overwrites it, whoever begins with the same ids takes it
over where it is, or copies it from where it is. So the prompt of a GRPO group is prefilled once on every device that
has a part of the group, and children that inherit find their parent's context.

Rows are copied, never shared: in XLA an attention over pages gathers them at every token, a copied row is copied once.
"""

import enum
from collections.abc import Sequence as Ids
from itertools import islice

HEAD = 16  # tokens that must be the same before sharing is thought of
CANDIDATES = 8  # slots with the same head that are compared, the longest filled first
LONG = 256  # shared tokens for which a sequence goes to the device that has them
UNEVEN = 8  # slots that a device may then have fewer free than another


class State(enum.Enum):
    """Of a sequence. Every change of it is a method of `Slots`:

    ask     OUTSIDE -> WAITING, IDLE -> READY
    place   WAITING -> RUNNING; of the owner that loses the slot IDLE -> OUTSIDE, READY -> WAITING
    run     READY -> RUNNING
    rest    RUNNING -> IDLE, and where a request is dropped WAITING -> OUTSIDE, READY -> IDLE
    free    OUTSIDE, IDLE -> FREED; of the heir that takes the slot over OUTSIDE -> IDLE, WAITING -> READY
    """

    OUTSIDE = "has no slot and does not ask to decode: it is new, or it lost its slot"
    WAITING = "asks to decode and has no slot"
    READY = "asks to decode and has a slot, which it may lose before it runs"
    RUNNING = "decodes in its slot"
    IDLE = "has a slot and does not ask to decode: it may lose the slot"
    FREED = "is done"


_PLACED = (State.READY, State.RUNNING, State.IDLE)  # with a slot
_WITH_SLOT = {State.OUTSIDE: State.IDLE, State.WAITING: State.READY}  # the state after it got a slot
_WITHOUT_SLOT = {State.IDLE: State.OUTSIDE, State.READY: State.WAITING}  # after it lost its slot
_ASKING = {State.OUTSIDE: State.WAITING, State.IDLE: State.READY}  # after it asked to decode
_RESTING = {State.WAITING: State.OUTSIDE, State.READY: State.IDLE, State.RUNNING: State.IDLE}  # when that is over


class Sequence:
    """A handle of the engine: the context so far, and where its keys and values are."""

    def __init__(self, ids: Ids[int], key, depth: int):
        self.ids = list(ids)
        self.key = key  # uint32 [2], of its name: decides its draws
        self.depth = depth
        self.state = State.OUTSIDE
        self.slot: int | None = None  # of a READY, RUNNING or IDLE one
        self.cached = 0  # how many of the first ids the slot's cache holds; the last one is never needed there
        self.parent: Sequence | None = None  # of a fork, until it has a slot
        self.shared = 0  # of a fork: how many first ids are its parent's
        self.heir: Sequence | None = None  # a fork that may take the slot over


class Slots:
    """`count` slots, the same number on each device, in the order of the devices."""

    def __init__(self, count: int, devices: int):
        self.owners: list[Sequence | None] = [None] * count
        self.per_device = count // devices
        # By device the free slots; the slots whose owners do not run, those first that have not for longest.
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

    def ask(self, sequence: Sequence) -> None:
        """The sequence asks to decode. Raises ValueError where it is freed or does so already."""
        if sequence.state not in _ASKING:
            raise ValueError(
                "a freed sequence cannot decode" if sequence.state is State.FREED else "the sequence decodes already"
            )
        sequence.state = _ASKING[sequence.state]

    def run(self, sequence: Sequence) -> None:
        """A READY sequence decodes from now on in the slot that it has."""
        del self._idle[sequence.slot]
        sequence.state = State.RUNNING

    def rest(self, sequence: Sequence) -> None:
        """The sequence decodes no more and asks for nothing: it may lose its slot."""
        sequence.state = _RESTING[sequence.state]
        if sequence.state is State.IDLE:
            self._idle[sequence.slot] = None

    def place(self, sequence: Sequence) -> tuple[int, int] | None:
        """Gives a slot to a WAITING sequence, which decodes from now on: a free one on the device with most of them, or
        on one that holds long parts of it, else the slot of the owner that has not run for longest, which loses it.
        None where there is neither.

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
        loser = self.owners[slot]
        loser.state, loser.slot, loser.cached = _WITHOUT_SLOT[loser.state], None, 0
        self._release(slot)
        return self._own(sequence, self.device(slot), held)

    def move(self, sequence: Sequence, device: int) -> tuple[int, int] | None:
        """Gives a RUNNING sequence a free slot of another device in the place of its own; as `place`."""
        if not self._free[device]:
            return None
        self._release(sequence.slot)
        return self._own(sequence, device, self._match(sequence))

    def free(self, sequence: Sequence) -> None:
        """The sequence is done: its slot goes to the fork that may take it over, or becomes free. Raises ValueError
        where it decodes."""
        if sequence.state in _RESTING:
            raise ValueError("a sequence cannot be freed while it decodes")
        slot, heir = sequence.slot, sequence.heir
        sequence.state, sequence.slot, sequence.heir, sequence.parent = State.FREED, None, None, None
        if slot is None:
            return
        if heir is not None and heir.state in _WITH_SLOT:
            heir.state, heir.slot, heir.parent = _WITH_SLOT[heir.state], slot, None
            self.owners[slot] = heir
            self.note(heir, min(sequence.cached, heir.shared))
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
        self.owners[slot], sequence.state, sequence.slot, sequence.parent = sequence, State.RUNNING, slot, None
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
        if parent is not None and parent.state in _PLACED and self._head(parent.slot) == head:
            candidates.insert(0, parent.slot)
        best: dict[int, tuple[int, int]] = {}
        for slot in candidates:
            held, cached = self._held[slot]
            shared = _common(ids, held, min(cached, len(ids) - 1))
            if shared > best.get(self.device(slot), (-1, 0))[1]:
                best[self.device(slot)] = slot, shared
        return best

    def check(self) -> None:
        """Raises AssertionError where states, owners and lists of slots do not fit together."""
        for slot, owner in enumerate(self.owners):
            assert (owner is None) == (slot in self._free[self.device(slot)]), f"slot {slot} is owned and free, or lost"
            assert (slot in self._idle) == (owner is not None and owner.state in (State.IDLE, State.READY)), slot
            if owner is not None:
                assert owner.slot == slot and owner.state in _PLACED, f"slot {slot} has an owner {owner.state.name}"
                assert owner.cached == self._held[slot][1] <= len(owner.ids), slot
            head = self._head(slot)
            assert head is None or slot in self._heads[head], f"slot {slot} is not found by what it holds"
        heads = [slot for slot in range(len(self.owners)) if self._head(slot) is not None]
        assert sorted(slot for slots in self._heads.values() for slot in slots) == heads


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
