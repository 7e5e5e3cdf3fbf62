"""The scheduler of the JAX engine: which sequence gets a slot when, in what order caches are filled, and which slots
decode in one call. Plain Python on ids and numbers: it calls no model.

Always true:

* A sequence decodes only in a slot; a slot belongs to at most one sequence.
* A sequence that waits (a parent for its children) may lose its slot to one that decodes, never the other way round. It
  is prefilled again when it goes on. So every slot ends in the hands of a sequence that decodes, decoding ends, and
  nothing deadlocks with any number of slots.
* Longer names first: children and parents that go on come before new roots, so that trees end rather than pile up as
  parents whose slots are taken from them.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from typing import NamedTuple

from apr_jax.rollout.shapes import fitting
from apr_jax.rollout.slots import Sequence, Slots, State

FILLED = 0.75  # of a call's places that slots of its width take at least, but of the smallest call
UNEVEN = 8  # slots that one device may run more than another when nothing waits


class Request:
    """One decode that a sequence asks for: `left` tokens at most. It is `over` when it has ended or is dropped."""

    def __init__(self, sequence: Sequence, left: int):
        self.sequence, self.left = sequence, left
        self.over = False


class Copy(NamedTuple):
    """The first `tokens` positions of a slot's cache go to another slot of its device."""

    source: int
    target: int
    tokens: int


class Prefill(NamedTuple):
    """The ids of a sequence from number `first` on, all but the last, are computed into its slot's cache."""

    sequence: Sequence
    first: int


class Round(NamedTuple):
    """Copies, in their order, and prefills after them."""

    copies: list[Copy]
    prefills: list[Prefill]


class Group(NamedTuple):
    """One decode call."""

    width: int  # tokens that its slots attend over
    size: int  # places for slots on each device
    requests: list[list[Request]]  # of each device, `size` at most


class Scheduler:
    """Of `slots` slots, the same number on each device. `widths` and `sizes` are the shapes of decode calls
    (`apr_jax.rollout.shapes`), ascending; a call draws up to `steps` tokens a slot."""

    def __init__(self, slots: int, devices: int, *, widths: Ids[int], sizes: Ids[int], steps: int):
        self.slots = Slots(slots, devices)
        self._devices, self._widths, self._sizes, self._steps = devices, widths, sizes, steps
        self._waiting: list[tuple[int, int, Request]] = []  # a heap: the longest name first, then the oldest request
        self._arrivals = 0
        self._running: dict[int, Request] = {}  # by slot

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._running) or any(not request.over for *_, request in self._waiting)

    # ------------------------------------------------------------------ requests come and go

    def ask(self, request: Request) -> None:
        """Puts a request in the queue. Raises ValueError where its sequence is freed or decodes already."""
        self.slots.ask(request.sequence)
        self._arrivals += 1
        heapq.heappush(self._waiting, (-request.sequence.depth, self._arrivals, request))

    def end(self, request: Request) -> None:
        """The request waits and runs no more; its sequence keeps its slot while nobody needs it. Nothing happens where
        the request is over."""
        if request.over:
            return
        request.over = True
        if request.sequence.state is State.RUNNING:
            del self._running[request.sequence.slot]
        self.slots.rest(request.sequence)

    def end_all(self) -> list[Request]:
        """Ends all requests, and returns them."""
        ended = [request for *_, request in self._waiting if not request.over] + list(self._running.values())
        for request in ended:
            self.end(request)
        self._waiting.clear()
        return ended

    # ------------------------------------------------------------------ slots are given

    def admit(self) -> list[Round]:
        """Gives slots to waiting requests, which then run. Returns how the caches of their slots are to be filled, in
        the order of the rounds."""
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
        """Lets a request run in its sequence's slot, after the plan has brought in what is missing there: the first
        `shared` ids come from slot `source`."""
        sequence = request.sequence
        self._running[sequence.slot] = request
        plan.add(sequence, source, shared)
        self.slots.note(sequence, len(sequence.ids) - 1)

    def _even_out(self, plan: "Plan") -> None:
        """When nothing waits: the shortest sequences of the device that runs most go to the one that runs least, as far
        as it has free slots, and are prefilled there."""
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

    # ------------------------------------------------------------------ slots decode

    def groups(self) -> Iterator[Group]:
        """All running requests, in groups of about the same length, so that a short sequence does not pay for attending
        over the width of a long one. Where a group leaves places, the next shorter ones take them."""
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
        """Raises AssertionError where requests, states and slots do not fit together."""
        self.slots.check()
        for slot, request in self._running.items():
            assert not request.over and request.sequence.slot == slot and request.sequence.state is State.RUNNING
        running = [owner for owner in self.slots.owners if owner is not None and owner.state is State.RUNNING]
        assert len(running) == len(self._running), "a sequence runs without a request"
        asking = [request.sequence for *_, request in self._waiting if not request.over]
        assert all(sequence.state in (State.WAITING, State.READY) for sequence in asking)
        assert len(set(map(id, asking))) == len(asking), "a sequence asks twice"


class Plan:
    """In what order caches are filled: rounds, each of copies between slots and then prefills. A slot is copied from
    when what it should hold is there, and not written to before those who copy from it have done so."""

    def __init__(self):
        self.rounds: list[Round] = []
        self._filled: dict[int, int] = {}  # by slot: the round after which it holds what it should
        self._read: dict[int, int] = {}  # by slot: the last round that copies from it

    def add(self, sequence: Sequence, source: int, shared: int) -> None:
        """`shared` first ids come from `source`; where that is the sequence's own slot they are there. `cached` of the
        sequence says how many need not be computed."""
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
