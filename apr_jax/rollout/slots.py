"""The slots of the JAX engine: the owner of each, the ids that its cache still holds, and the state of every sequence.

A slot is one row of the key/value cache. Its content stays after its owner is gone, until another sequence overwrites
it. A new sequence that begins with the same ids gets that slot, or copies the common prefix from it to a slot of the
same device. So the prompt of a GRPO group is prefilled once on each device that runs a part of the group, and a child
thread that inherits its parent's context does not compute it again.

Prefixes are copied, not shared by page tables: with pages XLA would gather the whole context at every token, while a
copy is made once.
"""

import enum
from collections.abc import Sequence as Ids
from itertools import islice

HEAD = 16  # shortest common prefix, in tokens, that is reused; slots are looked up by their first HEAD ids
CANDIDATES = 8  # most slots with the same first ids whose common prefix is measured, oldest first
LONG = 256  # a common prefix of this many tokens or more draws a sequence to the device that holds it
UNEVEN = 8  # unless that device has more than this many fewer free slots than another


class State(enum.Enum):
    """The state of a sequence. Only these methods of `Slots` change it:

    ask     OUTSIDE -> WAITING, IDLE -> READY
    place   WAITING -> RUNNING; the sequence that loses its slot: IDLE -> OUTSIDE, READY -> WAITING
    run     READY -> RUNNING
    rest    RUNNING -> IDLE; if the request is cancelled: WAITING -> OUTSIDE, READY -> IDLE
    free    OUTSIDE, IDLE -> FREED; the fork that takes over the slot: OUTSIDE -> IDLE, WAITING -> READY
    """

    OUTSIDE = "has no slot and does not ask to decode: it is new, or it lost its slot"
    WAITING = "asks to decode and has no slot"
    READY = "asks to decode and has a slot, which it may lose before it runs"
    RUNNING = "decodes in its slot"
    IDLE = "has a slot and does not ask to decode: it may lose the slot"
    FREED = "is done"


_PLACED = (State.READY, State.RUNNING, State.IDLE)  # the states of a sequence with a slot
_WITH_SLOT = {State.OUTSIDE: State.IDLE, State.WAITING: State.READY}  # after gaining a slot
_WITHOUT_SLOT = {State.IDLE: State.OUTSIDE, State.READY: State.WAITING}  # after losing its slot
_ASKING = {State.OUTSIDE: State.WAITING, State.IDLE: State.READY}  # after asking to decode
_RESTING = {State.WAITING: State.OUTSIDE, State.READY: State.IDLE, State.RUNNING: State.IDLE}  # when that ends


class Sequence:
    """The engine's handle of one sequence: its ids, its state, and the slot that holds its keys and values."""

    def __init__(self, ids: Ids[int], key, depth: int):
        self.ids = list(ids)
        self.key = key  # uint32 [2], random key data made from the seed and the sequence's name
        self.depth = depth  # length of its name, by which requests are ordered
        self.state = State.OUTSIDE
        self.slot: int | None = None  # set in the states READY, RUNNING and IDLE
        self.cached = 0  # how many of the first ids are in the slot's cache; the last id is never needed there
        self.parent: Sequence | None = None  # the sequence that this one is a fork of, until this one gets a slot
        self.shared = 0  # if this is a fork: how many of its first ids are the parent's
        self.heir: Sequence | None = None  # the latest fork, which takes over the slot when this sequence is freed


class Slots:
    """The owners and contents of `count` slots. Each device has `count` / `devices` slots, with successive numbers."""

    def __init__(self, count: int, devices: int):
        self.owners: list[Sequence | None] = [None] * count
        self.per_device = count // devices
        # Dictionaries serve as ordered sets.
        self._free: list[dict[int, None]] = [  # the free slots of each device
            dict.fromkeys(range(first, first + self.per_device)) for first in range(0, count, self.per_device)
        ]
        self._idle: dict[int, None] = {}  # slots whose owner does not run, the longest idle first
        self._held: list[tuple[list[int], int]] = [([], 0)] * count  # for each slot: ids, and how many are cached
        self._heads: dict[tuple[int, ...], dict[int, None]] = {}  # slots by their first HEAD ids, oldest first

    def device(self, slot: int) -> int:
        return slot // self.per_device

    def forget(self) -> None:
        """Treat all slots' caches as empty. Needed after new weights, and after a failure while caches are filled."""
        for owner in self.owners:
            if owner is not None:
                owner.cached = 0
        self._held = [([], 0)] * len(self.owners)
        self._heads.clear()

    def note(self, sequence: Sequence, cached: int) -> None:
        """Record that the cache of the sequence's slot now holds the first `cached` of its ids."""
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
        """Mark that the sequence asks to decode. Raises ValueError if it is freed or asks or decodes already."""
        if sequence.state not in _ASKING:
            raise ValueError(
                "a freed sequence cannot decode" if sequence.state is State.FREED else "the sequence decodes already"
            )
        sequence.state = _ASKING[sequence.state]

    def run(self, sequence: Sequence) -> None:
        """Mark that a READY sequence decodes from now on in its own slot."""
        del self._idle[sequence.slot]
        sequence.state = State.RUNNING

    def rest(self, sequence: Sequence) -> None:
        """Mark that the sequence's request has ended or is cancelled. The sequence may lose its slot from now on."""
        sequence.state = _RESTING[sequence.state]
        if sequence.state is State.IDLE:
            self._idle[sequence.slot] = None

    def place(self, sequence: Sequence) -> tuple[int, int] | None:
        """Give a slot to a WAITING sequence, which decodes from now on.

        A free slot is taken on the device with the most free slots, or on a device that holds a long prefix of the
        sequence. Without a free slot, the owner that has been idle for longest loses its slot. Returns None if all
        slots run.

        Otherwise returns (source, shared): the first `shared` ids of the sequence are in the cache of slot `source` of
        the same device. If `source` is the sequence's own slot, nothing need be copied. (-1, 0): no prefix was found.
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
        """Give a RUNNING sequence a free slot of another device and release its own. Returns what `place` returns, and
        None if the device has no free slot."""
        if not self._free[device]:
            return None
        self._release(sequence.slot)
        return self._own(sequence, device, self._match(sequence))

    def free(self, sequence: Sequence) -> None:
        """End the sequence. Its slot goes to its latest fork if that has none, and becomes free otherwise. Raises
        ValueError if the sequence asks or decodes."""
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
        """Give the sequence a free slot of a device, preferably the slot that holds its prefix. Returns what `place`
        returns."""
        source, shared = held.get(device, (-1, 0))
        free = self._free[device]
        slot = source if source in free else next(iter(free))
        del free[slot]
        self.owners[slot], sequence.state, sequence.slot, sequence.parent = sequence, State.RUNNING, slot, None
        self.note(sequence, shared)
        return source, shared

    def _head(self, slot: int) -> tuple[int, ...] | None:
        """The first HEAD ids in a slot's cache; None if it holds fewer."""
        ids, cached = self._held[slot]
        return tuple(ids[:HEAD]) if cached >= HEAD else None

    def _match(self, sequence: Sequence) -> dict[int, tuple[int, int]]:
        """Find for each device the slot with the longest common prefix: {device: (slot, tokens)}. A prefix has at least
        HEAD tokens, and never the sequence's last id, which the decode loop takes as input."""
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
        """Raise AssertionError if states, owners and the sets of slots contradict each other."""
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
    """Return the length of the common prefix, `most` at the highest. The first HEAD ids must be equal."""
    low, high = HEAD, most
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
