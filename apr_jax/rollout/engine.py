"""The JAX engine: a static pool of slots, decoded together, refilled as sequences end.

Always true:

* A sequence decodes only in a slot; a slot belongs to at most one sequence.
* The last id of a sequence is never needed in the cache, since the loop feeds it. Whatever lies further on in the slot
  is garbage that no query sees.
* A sequence that waits (a parent for its children) may lose its slot to one that decodes, never the other
  way round. It is prefilled again when it goes on. So every slot ends in the hands of a sequence that
  decodes, decoding ends, and nothing deadlocks with any number of slots.
* A fork takes over its parent's slot when the parent is freed: truncation, no copy. Else it shares like anybody else
  (`apr_jax.rollout.slots`): what a slot of its device holds is copied, not computed again.
* Draws depend on (seed, name, position) alone, not on slots, order or batch composition. Logits do in their last bits:
  a product rounds by its shape, and a context may be prefilled or decoded. In float32 a log-probability moves by up to
  1e-5, and a token only where its draw lies that near to a border between two; in bfloat16 that happens.
"""

import asyncio
import hashlib
import heapq
from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as Ids

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from apr_jax import interrupt
from apr_jax.errors import UserError
from apr_jax.model.cache import make_cache
from apr_jax.model.llama import Llama
from apr_jax.rollout.decode import Distribution, SlotInputs, make_copy, make_decode, make_prefill
from apr_jax.rollout.shapes import ACCELERATOR_SHAPES, CPU_SHAPES, Shapes, fitting, width_of
from apr_jax.rollout.slots import Sequence, Slots
from apr_jax.threads.engine import Decoded, Sampling

FILLED = 0.75  # of a call's places that slots of its width take at least, but of the smallest
LEAVE = 0.25  # a decode call ends when no more of its slots run: the others can be refilled
UNEVEN = 8  # slots that one device may run more than another when nothing waits


class _Request:
    def __init__(self, sequence: Sequence, stop: frozenset[int], limit: int, sampling: Sampling):
        self.sequence, self.stop, self.limit, self.sampling = sequence, stop, limit, sampling
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.model_logprobs: list[float] = []
        self.future = asyncio.get_running_loop().create_future()

    @property
    def left(self) -> int:
        return self.limit - len(self.ids)


class JaxEngine:
    """An `Engine` on the devices of a mesh, each with slots and a copy of the weights. One stop set and one
    `Sampling` at a time. `weights` may be replaced between decodes (`load`). `shapes` are by default
    CPU_SHAPES on a CPU, else ACCELERATOR_SHAPES."""

    def __init__(
        self,
        model: Llama,
        mesh: Mesh,
        *,
        slots: int,
        context: int,
        seed: int = 0,
        steps: int = 64,
        shapes: Shapes | None = None,
    ):
        devices = mesh.devices.size
        if slots < 1 or slots % devices:
            raise UserError(f"slots must be a multiple of the {devices} devices, was given {slots}")
        if context > model.config.context:
            raise UserError(f"the model holds {model.config.context} tokens, an engine of {context} was asked for")
        self.context, self.seed, self.steps = context, seed, steps
        self._mesh = mesh = Mesh(mesh.devices.reshape(-1), ("data",))
        self._devices, self._per_device, self._config = devices, slots // devices, model.config
        if shapes is None:
            shapes = CPU_SHAPES if mesh.devices.flat[0].platform == "cpu" else ACCELERATOR_SHAPES
        self._sizes, self._widths = shapes.sizes(self._per_device), shapes.widths(context)
        self._lengths, self._copy_widths = shapes.lengths(context), shapes.copy_widths(context)
        self._rows, self._rows_of = max(shapes.rows), shapes.rows_of
        self._by_slot = NamedSharding(mesh, P("data"))
        self._graphdef, weights = nnx.split(model)
        self._slots = Slots(slots, devices)
        self.load(weights)
        self._cache = self._blank_cache()
        # Longer names first: children and parents that go on come before new roots, so that trees end
        # rather than pile up as parents whose slots are taken from them.
        self._waiting: list[tuple[int, int, _Request]] = []
        self._arrivals = 0
        self._running: dict[int, _Request] = {}  # by slot
        self._loop: asyncio.Task | None = None
        self._how: tuple[frozenset[int], Sampling] | None = None  # of all that waits and runs
        self.sampled = self.slot_steps = 0  # tokens drawn and slots stepped: their ratio is the occupancy
        self.prefilled = self.copied = 0  # tokens computed before they are attended to, and tokens copied instead
        self.prefills = self.copies = 0  # calls

    def load(self, weights) -> None:
        """Takes the weights of a model of the same shape (an `nnx.State`)."""
        self._weights = jax.device_put(weights, NamedSharding(self._mesh, P()))
        self._slots.forget()

    def _blank_cache(self):
        slots = self._devices * self._per_device
        return jax.device_put(make_cache(self._config, slots, width_of(self.context)), self._by_slot)

    def compile(self, sampling: Sampling) -> int:
        """Compiles ahead all that rollouts under `sampling` can need; returns how many shapes that were. Without it
        each is compiled when it first comes up. Either way JAX's persistent compilation cache keeps them."""
        shapes = 0
        nowhere = np.full(self._devices * self._rows, self._per_device, np.int32)
        for width in self._copy_widths:
            self._run_copy(width, nowhere, nowhere)
            prefills = [(rows, T) for T in self._lengths if T <= width for rows in self._rows_of(T)]
            for rows, T in prefills:
                B = self._devices * rows
                self._run_prefill(width, nowhere[:B], np.zeros((B, T), np.int32), *np.zeros((2, B), np.int32))
            shapes += 1 + len(prefills)
        for width in self._widths:
            for size in self._sizes:
                self._run_decode(width, self._inputs(size), np.zeros(self._devices, np.int32), frozenset(), sampling)
                shapes += 1
        return shapes

    # ------------------------------------------------------------------ the Engine protocol

    def open(self, ids: Ids[int], name: Ids[int]) -> Sequence:
        if not 1 <= len(ids) <= self.context:
            raise ValueError(f"a sequence holds 1 to {self.context} tokens, was given {len(ids)}")
        digest = hashlib.blake2b(",".join(map(str, (self.seed, *name))).encode(), digest_size=8).digest()
        return Sequence(ids, np.frombuffer(digest, np.uint32), len(name))

    def fork(self, sequence: Sequence, length: int, name: Ids[int]) -> Sequence:
        if not 1 <= length <= len(sequence.ids):
            raise ValueError(f"a fork keeps 1 to {len(sequence.ids)} tokens, was given {length}")
        sequence.heir = heir = self.open(sequence.ids[:length], name)
        heir.parent, heir.shared = sequence, length
        return heir

    def extend(self, sequence: Sequence, ids: Ids[int]) -> None:
        sequence.ids.extend(ids)

    async def decode(self, sequence: Sequence, stop: frozenset[int], limit: int, sampling: Sampling) -> Decoded:
        if sequence.freed:
            raise ValueError("a freed sequence cannot decode")
        limit = min(limit, self.context - len(sequence.ids))
        if limit < 1:
            raise ValueError(f"no room to decode: {len(sequence.ids)} of {self.context} tokens")
        if (self._waiting or self._running) and self._how != (stop, sampling):
            raise ValueError(
                f"one stop set and one Sampling at a time: {self._how} decode, was given {stop}, {sampling}"
            )
        self._how = stop, sampling
        request = _Request(sequence, stop, limit, sampling)
        self._arrivals += 1
        heapq.heappush(self._waiting, (-sequence.depth, self._arrivals, request))
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._serve())
        return await request.future

    def free(self, sequence: Sequence) -> None:
        sequence.freed = True
        self._slots.give(sequence)

    # ------------------------------------------------------------------ the loop

    async def _serve(self) -> None:
        """Admits, prefills, decodes, until nothing waits and nothing runs."""
        try:
            while self._waiting or self._running:
                interrupt.check()
                self._admit()
                for width, size, slots in list(self._groups()):
                    self._decode(width, size, slots)
                for _ in range(4):  # lets the runners of what ended ask for what comes next
                    await asyncio.sleep(0)
        except BaseException as error:
            for request in (*(entry[2] for entry in self._waiting), *self._running.values()):
                if not request.future.done():
                    stopped = RuntimeError(f"the engine stopped: {error!r}")
                    stopped.__cause__ = error
                    request.future.set_exception(stopped)
            self._waiting.clear()
            self._running.clear()
            # Slots may not hold what they were to be filled with, and a donated cache may be gone.
            self._slots.forget()
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._cache)):
                self._cache = self._blank_cache()
            interrupt.check()  # which may have come out of JAX as another error
            raise

    def _admit(self) -> None:
        """Gives slots to waiting sequences and fills their caches. A request that was cancelled goes."""
        for slot in [slot for slot, request in self._running.items() if request.future.done()]:
            del self._running[slot]
            if self._slots.owners[slot] is not None:
                self._slots.wait(slot)
        plan = _Plan()
        if not self._waiting:
            self._even_out(plan)
        while self._waiting:
            request = self._waiting[0][2]
            sequence = request.sequence
            if not request.future.done():
                if sequence.slot is not None:
                    self._fill(plan, request, sequence.slot, 0)
                elif (placed := self._slots.place(sequence)) is not None:
                    self._fill(plan, request, *placed)
                else:
                    break
            heapq.heappop(self._waiting)
        for copies, prefills in plan.rounds:
            self._copy(copies)
            self._prefill(prefills)

    def _fill(self, plan: "_Plan", request: _Request, source: int, shared: int) -> None:
        """Lets a sequence run in its slot, after the plan has brought in what is missing there."""
        sequence = request.sequence
        self._running[sequence.slot] = request
        self._slots.run(sequence.slot)
        plan.add(sequence, source, shared)
        self._slots.note(sequence, len(sequence.ids) - 1)

    def _even_out(self, plan: "_Plan") -> None:
        """When nothing waits: the shortest sequences of the device that runs most go to the one that runs least, as far
        as it has free slots, and are prefilled there."""
        own: list[list[int]] = [[] for _ in range(self._devices)]
        for slot in self._running:
            own[self._slots.device(slot)].append(slot)
        for _ in range(sum(map(len, own))):
            most, least = max(own, key=len), min(own, key=len)
            if len(most) - len(least) <= UNEVEN:
                return
            slot = min(most, key=lambda slot: len(self._running[slot].sequence.ids))
            request = self._running[slot]
            if (placed := self._slots.move(request.sequence, own.index(least))) is None:
                return
            del self._running[slot]
            most.remove(slot)
            least.append(request.sequence.slot)
            self._fill(plan, request, *placed)

    def _copy(self, copies: list[tuple[int, int, int]]) -> None:
        """(source, target, tokens): what a slot holds goes to another of its device, in order."""
        for batch in self._by_device(copies, lambda entry: entry[0], self._rows):
            places = np.full((2, self._devices * self._rows), self._per_device, np.int32)
            for at, (source, target, count) in batch:
                places[:, at] = source % self._per_device, target % self._per_device
                self.copied += count
            self._run_copy(fitting(self._copy_widths, max(count for _, (_, _, count) in batch)), *places)

    def _prefill(self, fills: list[tuple[Sequence, int]]) -> None:
        """(sequence, first): caches its ids from `first` on, all but the last, in calls of a few rows per device and
        one padded length."""
        fills = sorted(fills, key=lambda fill: len(fill[0].ids) - fill[1])
        most = max(Counter(self._slots.device(sequence.slot) for sequence, _ in fills).values(), default=0)
        longest = max((len(sequence.ids) - 1 - first for sequence, first in fills), default=0)
        rows = fitting(self._rows_of(fitting(self._lengths, longest)), most)
        for batch in self._by_device(fills, lambda fill: fill[0].slot, rows):
            longest = max(len(s.ids) - 1 - first for _, (s, first) in batch)
            T = fitting(self._lengths, longest)
            width = fitting(self._copy_widths, max(T, *(len(s.ids) for _, (s, _) in batch)))
            places = np.full(self._devices * rows, self._per_device, np.int32)
            tokens = np.zeros((len(places), T), np.int32)
            firsts, counts = np.zeros((2, len(places)), np.int32)
            for at, (sequence, first) in batch:
                new = sequence.ids[first:-1]
                places[at], firsts[at], counts[at] = sequence.slot % self._per_device, first, len(new)
                tokens[at, : len(new)] = new
                self.prefilled += len(new)
            self._run_prefill(width, places, tokens, firsts, counts)

    def _by_device(self, entries: list, slot_of, rows: int) -> Iterator[list[tuple[int, object]]]:
        """Calls of up to `rows` entries a device, each with its place in the call; a device's keep their order."""
        queues = [deque() for _ in range(self._devices)]
        for entry in entries:
            queues[self._slots.device(slot_of(entry))].append(entry)
        while any(queues):
            yield [
                (device * rows + row, queue.popleft())
                for device, queue in enumerate(queues)
                for row in range(min(rows, len(queue)))
            ]

    def _groups(self) -> Iterator[tuple[int, int, list[list[int]]]]:
        """(width, slots a device of the call, slots of each device): all running slots, in groups of about the same
        length, so that a short sequence does not pay for attending over the width of a long one. Where a group leaves
        places, the next shorter ones take them."""
        ends = {
            slot: fitting(self._widths, len(request.sequence.ids) + min(self.steps, request.left))
            for slot, request in self._running.items()
        }
        queues: list[deque[int]] = [deque() for _ in range(self._devices)]
        for slot in sorted(ends, key=ends.__getitem__, reverse=True):
            queues[self._slots.device(slot)].append(slot)
        while any(queues):
            width = max(ends[queue[0]] for queue in queues if queue)
            most = max(sum(ends[slot] == width for slot in queue) for queue in queues)
            size = max(size for size in self._sizes if size == self._sizes[0] or FILLED * size <= most)
            yield width, size, [[queue.popleft() for _ in range(min(size, len(queue)))] for queue in queues]

    def _decode(self, width: int, size: int, slots: list[list[int]]) -> None:
        """One call of the decode loop for some slots of each device; hands back what ended."""
        places = {slot: device * size + at for device, there in enumerate(slots) for at, slot in enumerate(there)}
        inputs = self._inputs(size)
        for slot, at in places.items():
            request = self._running[slot]
            ids = request.sequence.ids
            inputs.rows[at] = slot % self._per_device
            inputs.tokens[at], inputs.positions[at] = ids[-1], len(ids) - 1
            inputs.steps[at] = min(request.left, self.steps)
            inputs.keys[at] = request.sequence.key
        leave = np.asarray([int(LEAVE * len(there)) for there in slots], np.int32)
        outputs = self._run_decode(width, inputs, leave, *self._how)
        tokens, logprobs, model_logprobs, counts = jax.device_get(outputs)
        self.slot_steps += int(counts.reshape(self._devices, size).max(axis=1).sum()) * size
        self.sampled += int(counts.sum())
        for slot, at in places.items():
            request, drawn = self._running[slot], slice(0, counts[at])
            request.sequence.ids.extend(tokens[at, drawn].tolist())
            self._slots.note(request.sequence, len(request.sequence.ids) - 1)
            request.ids.extend(tokens[at, drawn].tolist())
            request.logprobs.extend(logprobs[at, drawn].tolist())
            request.model_logprobs.extend(model_logprobs[at, drawn].tolist())
            stopped = request.ids[-1] in request.stop
            if stopped or not request.left:
                del self._running[slot]
                self._slots.wait(slot)
                if not request.future.done():
                    request.future.set_result(
                        Decoded(tuple(request.ids), tuple(request.logprobs), stopped, tuple(request.model_logprobs))
                    )

    # ------------------------------------------------------------------ the compiled parts

    def _inputs(self, size: int) -> SlotInputs:
        """Of no slots, to be filled in."""
        S = self._devices * size
        return SlotInputs(
            np.full(S, self._per_device, np.int32), *np.zeros((3, S), np.int32), np.zeros((S, 2), np.uint32)
        )

    def _run_decode(self, width: int, inputs: SlotInputs, leave, stop: frozenset[int], sampling: Sampling):
        words = self._config.vocab_size
        stops = np.zeros(words, bool)
        stops[list(stop)] = True
        how = Distribution(
            np.float32(sampling.temperature),
            np.int32(min(sampling.top_k or words, words)),
            np.float32(sampling.top_p),
        )
        decode = make_decode(self._graphdef, self._mesh, width, self.steps, sampling.truncated)
        inputs, leave = jax.device_put((inputs, leave), self._by_slot)
        self._cache, outputs = decode(self._weights, self._cache, inputs, leave, stops, how)
        return outputs

    def _run_prefill(self, width: int, *arrays) -> None:
        self.prefills += 1
        arrays = jax.device_put(arrays, self._by_slot)
        self._cache = make_prefill(self._graphdef, self._mesh, width)(self._weights, self._cache, *arrays)

    def _run_copy(self, width: int, sources, targets) -> None:
        self.copies += 1
        self._cache = make_copy(self._mesh, width)(self._cache, *jax.device_put((sources, targets), self._by_slot))


class _Plan:
    """In what order caches are filled: rounds, each of copies between slots and then prefills. A slot is copied from
    when what it should hold is there, and not written to before those who copy from it have done so."""

    def __init__(self):
        self.rounds: list[tuple[list[tuple[int, int, int]], list[tuple[Sequence, int]]]] = []
        self._filled: dict[int, int] = {}  # by slot: the round after which it holds what it should
        self._read: dict[int, int] = {}  # by slot: the last round that copies from it

    def add(self, sequence: Sequence, source: int, shared: int) -> None:
        """`shared` first ids come from `source`; where that is the sequence's own slot they are there. `cached` of the
        sequence says how many need not be computed."""
        slot, first = sequence.slot, sequence.cached
        copies = shared > 0 and source != slot
        number = max(self._read.get(slot, 0), self._filled.get(source, -1) + 1 if copies else 0)
        while len(self.rounds) <= number:
            self.rounds.append(([], []))
        if copies:
            self.rounds[number][0].append((source, slot, shared))
            self._read[source] = max(self._read.get(source, 0), number)
            self._filled[slot] = number
        if first < len(sequence.ids) - 1:
            self.rounds[number][1].append((sequence, first))
            self._filled[slot] = number
