"""The scheduler of the JAX engine. It decides when a sequence gets a slot, in what order caches are filled, and which
slots decode in one call. It is plain Python on ids and numbers and calls no model.

Always true:

* A sequence decodes only in a slot, and a slot belongs to at most one sequence.
* A sequence that does not decode (a parent that waits for its children) may lose its slot to one that asks to decode.
  Its cache is filled again when it resumes. A decoding sequence never loses its slot to another one. So a sequence
  that waits for a slot gets one at last, and there is no deadlock with any number of slots.
* Requests with longer names are served first. Children and resuming parents have longer names than new roots, so trees
  finish before new ones start, and few parents wait without a slot.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from typing import NamedTuple

from apr_jax.rollout.shapes import fitting
from apr_jax.rollout.slots import Sequence, Slots, State

FILLED = 0.75  # least fraction of a call's places that slots of its width fill, except in the smallest call
UNEVEN = 8  # when no request waits, a device may run this many sequences more than another before some are moved


class Request:
    """A sequence's request to decode at most `left` more tokens. `over` is true once it has ended or is cancelled."""

    def __init__(self, sequence: Sequence, left: int):
        self.sequence, self.left = sequence, left
        self.over = False


class Copy(NamedTuple):
    """Copy the first `tokens` positions of slot `source` to slot `target` of the same device."""

    source: int
    target: int
    tokens: int


class Prefill(NamedTuple):
    """Compute keys and values of a sequence's ids from index `first` on, without the last id, into its slot."""

    sequence: Sequence
    first: int


class Round(NamedTuple):
    """Copies, to be done in their order, and prefills, to be done after the copies."""

    copies: list[Copy]
    prefills: list[Prefill]


class Group(NamedTuple):
    """The requests of one decode call."""

    width: int  # cache positions that the call attends over
    size: int  # places for slots on each device
    requests: list[list[Request]]  # one list per device, each of at most `size` requests


class Scheduler:
    """Assigns `slots` slots, the same number on each device, to requests, and groups the running requests into calls.

    `widths` and `sizes` are the allowed shapes of decode calls (`apr_jax.rollout.shapes`), in ascending order. A call
    samples up to `steps` tokens for each slot.
    """

    def __init__(self, slots: int, devices: int, *, widths: Ids[int], sizes: Ids[int], steps: int):
        self.slots = Slots(slots, devices)
        self._devices, self._widths, self._sizes, self._steps = devices, widths, sizes, steps
        self._waiting: list[tuple[int, int, Request]] = []  # a heap: longest name first, then oldest
        self._arrivals = 0
        self._running: dict[int, Request] = {}  # the running request of each slot

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._running) or any(not request.over for *_, request in self._waiting)

    # ------------------------------------------------------------------ requests

    def ask(self, request: Request) -> None:
        """Queue a request. Raises ValueError if its sequence is freed or has a request already."""
        self.slots.ask(request.sequence)
        self._arrivals += 1
        heapq.heappush(self._waiting, (-request.sequence.depth, self._arrivals, request))

    def end(self, request: Request) -> None:
        """End or cancel a request. Its sequence keeps its slot until another sequence needs it. Does nothing if the
        request is over already."""
        if request.over:
            return
        request.over = True
        if request.sequence.state is State.RUNNING:
            del self._running[request.sequence.slot]
        self.slots.rest(request.sequence)

    def end_all(self) -> list[Request]:
        """End all requests and return them."""
        ended = [request for *_, request in self._waiting if not request.over] + list(self._running.values())
        for request in ended:
            self.end(request)
        self._waiting.clear()
        return ended

    # ------------------------------------------------------------------ slots

    def admit(self) -> list[Round]:
        """Give slots to waiting requests, which run from then on. Returns the rounds that fill the slots' caches, to be
        done in their order. When no request waits, running sequences are moved to less busy devices instead."""
        plan = Plan()
        if not self._waiting:
            self._even_out(plan)
        while self._waiting:
            request = self._waiting[0][2]
            if not request.over:
                sequence = request.sequence
                if sequence.state is State.READY:
                    self.slots.run(sequence)
                    self._start(plan, request, sequence.slot, 0)
                elif (placed := self.slots.place(sequence)) is not None:
                    self._start(plan, request, *placed)
                else:
                    break
            heapq.heappop(self._waiting)
        return plan.rounds

    def _start(self, plan: "Plan", request: Request, source: int, shared: int) -> None:
        """Start a request in its sequence's slot, and plan to fill the slot's cache. The first `shared` ids are copied
        from slot `source`, unless `source` is the slot itself."""
        sequence = request.sequence
        self._running[sequence.slot] = request
        plan.add(sequence, source, shared)
        self.slots.note(sequence, len(sequence.ids) - 1)

    def _even_out(self, plan: "Plan") -> None:
        """Move the shortest sequences of the busiest device to free slots of the least busy one, until the busiest runs
        at most UNEVEN sequences more. The cache of a moved sequence is filled anew on the other device."""
        own: list[list[int]] = [[] for _ in range(self._devices)]
        for slot in self._running:
            own[self.slots.device(slot)].append(slot)
        for _ in range(sum(map(len, own))):
            most, least = max(own, key=len), min(own, key=len)
            if len(most) - len(least) <= UNEVEN:
                return
            slot = min(most, key=lambda slot: len(self._running[slot].sequence.ids))
            request = self._running[slot]
            if (placed := self.slots.move(request.sequence, own.index(least))) is None:
                return
            del self._running[slot]
            most.remove(slot)
            least.append(request.sequence.slot)
            self._start(plan, request, *placed)

    # ------------------------------------------------------------------ decode calls

    def groups(self) -> Iterator[Group]:
        """Yield all running requests in groups of similar length, the longest first, so that a short sequence does not
        attend over the width of a long one. Places that a group leaves empty go to the next shorter sequences."""
        ends = {
            slot: fitting(self._widths, len(request.sequence.ids) + min(self._steps, request.left))
            for slot, request in self._running.items()
        }
        queues: list[deque[int]] = [deque() for _ in range(self._devices)]
        for slot in sorted(ends, key=ends.__getitem__, reverse=True):
            queues[self.slots.device(slot)].append(slot)
        while any(queues):
            width = max(ends[queue[0]] for queue in queues if queue)
            most = max(sum(ends[slot] == width for slot in queue) for queue in queues)
            size = max(size for size in self._sizes if size == self._sizes[0] or FILLED * size <= most)
            taken = [[queue.popleft() for _ in range(min(size, len(queue)))] for queue in queues]
            yield Group(width, size, [[self._running[slot] for slot in there] for there in taken])

    # ------------------------------------------------------------------ checks

    def check(self) -> None:
        """Raise AssertionError if requests, states and slots contradict each other."""
        self.slots.check()
        for slot, request in self._running.items():
            assert not request.over and request.sequence.slot == slot and request.sequence.state is State.RUNNING
        running = [owner for owner in self.slots.owners if owner is not None and owner.state is State.RUNNING]
        assert len(running) == len(self._running), "a sequence runs without a request"
        asking = [request.sequence for *_, request in self._waiting if not request.over]
        assert all(sequence.state in (State.WAITING, State.READY) for sequence in asking)
        assert len(set(map(id, asking))) == len(asking), "a sequence asks twice"


class Plan:
    """The order in which caches are filled: rounds of copies between slots, then prefills.

    A slot is copied from only after the round that fills it, and written to only after all copies from its old content.
    """

    def __init__(self):
        self.rounds: list[Round] = []
        self._filled: dict[int, int] = {}  # for each slot: the round that fills it
        self._read: dict[int, int] = {}  # for each slot: the last round that copies from it

    def add(self, sequence: Sequence, source: int, shared: int) -> None:
        """Plan to fill the slot of a sequence. Its first `shared` ids are copied from slot `source`, unless `source` is
        its own slot. The ids from `sequence.cached` on are prefilled."""
        slot, first = sequence.slot, sequence.cached
        copies = shared > 0 and source != slot
        number = max(self._read.get(slot, 0), self._filled.get(source, -1) + 1 if copies else 0)
        while len(self.rounds) <= number:
            self.rounds.append(Round([], []))
        if copies:
            self.rounds[number].copies.append(Copy(source, slot, shared))
            self._read[source] = max(self._read.get(source, 0), number)
            self._filled[slot] = number
        if first < len(sequence.ids) - 1:
            self.rounds[number].prefills.append(Prefill(sequence, first))
            self._filled[slot] = number
