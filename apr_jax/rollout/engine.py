"""The JAX engine: a static pool of slots, decoded together, refilled as sequences end.

Always true:

* A sequence decodes only in a slot; a slot belongs to at most one sequence.
* ``cached`` of a sequence is how many of its first ids the slot's cache holds; the last id is never needed
  there, since the loop feeds it. Whatever lies further on in the slot is garbage that no query sees.
* A sequence that waits (a parent for its children) may lose its slot to one that decodes, never the other
  way round. It is prefilled again when it goes on. So every slot ends in the hands of a sequence that
  decodes, decoding ends, and nothing deadlocks with any number of slots.
* A fork takes over its parent's slot when the parent is freed: truncation, no copy.
* Draws depend on (seed, name, position) alone, not on slots, order or company.
"""

import asyncio
import hashlib
import heapq
from collections import deque
from collections.abc import Sequence as Ids

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from apr_jax.model.cache import make_cache
from apr_jax.model.llama import Llama
from apr_jax.rollout.decode import SlotInputs, make_decode, make_prefill
from apr_jax.threads.engine import Decoded, Sampling

WIDTH_STEP = 256  # tokens: slots decode in groups that attend over a multiple of it; each is a shape to compile
SMALLEST_GROUP = 8  # slots per device of the smallest decode; larger ones are its doubles
PREFILL_ROWS = 8  # prompts per device and prefill call
PREFILL_STEP = 128  # lengths of prefills above 32 are its multiples


class _Sequence:
    def __init__(self, ids: Ids[int], name: Ids[int], seed: int):
        self.ids = list(ids)
        digest = hashlib.blake2b(",".join(map(str, (seed, *name))).encode(), digest_size=8).digest()
        self.key = np.frombuffer(digest, np.uint32)
        self.depth = len(name)
        self.slot: int | None = None
        self.cached = 0
        self.heir: _Sequence | None = None  # a fork that may take the slot over
        self.freed = False


class _Request:
    def __init__(self, sequence: _Sequence, stop: frozenset[int], limit: int, sampling: Sampling):
        self.sequence, self.stop, self.limit, self.sampling = sequence, stop, limit, sampling
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.future = asyncio.get_running_loop().create_future()


class JaxEngine:
    """An `Engine` on the devices of a mesh, each with slots and a copy of the weights. One stop set and one
    `Sampling` at a time.

    `weights` may be replaced between rollouts (`load`); sequences must be freed before.
    """

    def __init__(self, model: Llama, mesh: Mesh, *, slots: int, context: int, seed: int = 0, steps: int = 64):
        devices = mesh.devices.size
        if slots < 1 or slots % devices:
            raise ValueError(f"slots must be a multiple of the {devices} devices, was given {slots}")
        if context > model.config.context:
            raise ValueError(f"the model holds {model.config.context} tokens, an engine of {context} was asked for")
        self.context, self.seed, self.steps = context, seed, steps
        self._mesh = mesh = Mesh(mesh.devices.reshape(-1), ("data",))
        self._slots, self._config = slots, model.config
        self._by_slot = NamedSharding(mesh, P("data"))
        self._graphdef, weights = nnx.split(model)
        self.load(weights)
        self._width = -(-context // WIDTH_STEP) * WIDTH_STEP
        self._cache = jax.device_put(make_cache(self._config, slots, self._width), self._by_slot)
        self._owners: list[_Sequence | None] = [None] * slots
        self._used = [0] * slots  # when a slot was last decoded in, to evict the longest idle
        self._clock = 0
        # Longer names first: children and parents that go on come before new roots, so that trees end
        # rather than pile up as parents whose slots are taken from them.
        self._waiting: list[tuple[int, int, _Request]] = []
        self._arrivals = 0
        self._running: dict[int, _Request] = {}  # by slot
        self._loop: asyncio.Task | None = None
        self.sampled = self.slot_steps = 0  # tokens drawn and slots stepped: their ratio is the occupancy

    def load(self, weights) -> None:
        """Takes the weights of a model of the same shape (an `nnx.State`)."""
        self._weights = jax.device_put(weights, NamedSharding(self._mesh, P()))

    # ------------------------------------------------------------------ the Engine protocol

    def open(self, ids: Ids[int], name: Ids[int]) -> _Sequence:
        if not 1 <= len(ids) <= self.context:
            raise ValueError(f"a sequence holds 1 to {self.context} tokens, was given {len(ids)}")
        return _Sequence(ids, name, self.seed)

    def fork(self, sequence: _Sequence, length: int, name: Ids[int]) -> _Sequence:
        if not 1 <= length <= len(sequence.ids):
            raise ValueError(f"a fork keeps 1 to {len(sequence.ids)} tokens, was given {length}")
        sequence.heir = _Sequence(sequence.ids[:length], name, self.seed)
        return sequence.heir

    def extend(self, sequence: _Sequence, ids: Ids[int]) -> None:
        sequence.ids.extend(ids)

    async def decode(self, sequence: _Sequence, stop: frozenset[int], limit: int, sampling: Sampling) -> Decoded:
        if sequence.freed:
            raise ValueError("a freed sequence cannot decode")
        limit = min(limit, self.context - len(sequence.ids))
        if limit < 1:
            raise ValueError(f"no room to decode: {len(sequence.ids)} of {self.context} tokens")
        request = _Request(sequence, stop, limit, sampling)
        self._arrivals += 1
        heapq.heappush(self._waiting, (-sequence.depth, self._arrivals, request))
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._serve())
        return await request.future

    def free(self, sequence: _Sequence) -> None:
        sequence.freed = True
        slot, heir = sequence.slot, sequence.heir
        sequence.heir = None
        if slot is None:
            return
        sequence.slot = self._owners[slot] = None
        if heir is not None and not heir.freed and heir.slot is None:
            heir.slot, heir.cached = slot, min(sequence.cached, len(heir.ids))
            self._owners[slot] = heir

    # ------------------------------------------------------------------ the loop

    async def _serve(self) -> None:
        """Admits, prefills, decodes, until nothing waits and nothing runs."""
        try:
            while self._waiting or self._running:
                self._admit()
                if self._running:
                    self._step()
                for _ in range(4):  # lets the runners of what ended ask for what comes next
                    await asyncio.sleep(0)
        except BaseException as error:
            for request in (*(entry[2] for entry in self._waiting), *self._running.values()):
                if not request.future.done():
                    request.future.set_exception(RuntimeError(f"the engine stopped: {error!r}"))
            self._waiting.clear()
            self._running.clear()
            raise

    def _admit(self) -> None:
        """Gives slots to waiting sequences and fills their caches. A request that was cancelled goes."""
        for slot in [slot for slot, request in self._running.items() if request.future.done()]:
            del self._running[slot]
        admitted = []
        while self._waiting:
            request = self._waiting[0][2]
            sequence = request.sequence
            if not request.future.done():
                if sequence.slot is None and not self._take_slot(sequence):
                    break
                self._running[sequence.slot] = request
                admitted.append(sequence)
            heapq.heappop(self._waiting)
        if admitted:
            self._prefill(admitted)

    def _take_slot(self, sequence: _Sequence) -> bool:
        """A free slot on the device with most of them, else that of the longest waiting owner."""
        per_device = self._slots // self._mesh.devices.size
        free = [slot for slot, owner in enumerate(self._owners) if owner is None]
        if free:
            room = np.bincount([slot // per_device for slot in free], minlength=self._mesh.devices.size)
            slot = max(free, key=lambda slot: (room[slot // per_device], -slot))
        else:
            idle = [slot for slot in range(self._slots) if slot not in self._running]
            if not idle:
                return False
            slot = min(idle, key=lambda slot: self._used[slot])
            self._owners[slot].slot, self._owners[slot].cached = None, 0
        self._owners[slot], sequence.slot, sequence.cached = sequence, slot, 0
        return True

    def _prefill(self, sequences: list[_Sequence]) -> None:
        """Caches all ids but the last of each, in calls of a few rows per device and one padded length."""
        devices = self._mesh.devices.size
        per_device = self._slots // devices
        todo = sorted((s for s in sequences if s.cached < len(s.ids) - 1), key=lambda s: len(s.ids) - s.cached)
        queues = [deque(s for s in todo if s.slot // per_device == device) for device in range(devices)]
        prefill = make_prefill(self._graphdef, self._mesh)
        while any(queues):
            batch = [
                (device * PREFILL_ROWS + row, queues[device].popleft())
                for device in range(devices)
                for row in range(min(PREFILL_ROWS, len(queues[device])))
            ]
            longest = max(len(s.ids) - 1 - s.cached for _, s in batch)
            T = 32 if longest <= 32 else -(-longest // PREFILL_STEP) * PREFILL_STEP
            rows = np.full(devices * PREFILL_ROWS, per_device, np.int32)
            tokens = np.zeros((len(rows), T), np.int32)
            positions = np.full((len(rows), T), np.iinfo(np.int32).max, np.int32)
            for row, sequence in batch:
                new = sequence.ids[sequence.cached : -1]
                rows[row] = sequence.slot % per_device
                tokens[row, : len(new)] = new
                positions[row, : len(new)] = np.arange(sequence.cached, len(sequence.ids) - 1)
                sequence.cached = len(sequence.ids) - 1
            arrays = jax.device_put((rows, tokens, positions), self._by_slot)
            self._cache = prefill(self._weights, self._cache, *arrays)

    def _step(self) -> None:
        """Runs every running slot once through the decode loop, in groups of about the same length, so that
        a short sequence does not pay for attending over the width of a long one."""
        groups: dict[int, list[int]] = {}
        for slot, request in self._running.items():
            last = len(request.sequence.ids) + min(self.steps, request.limit - len(request.ids))
            groups.setdefault(-(-last // WIDTH_STEP) * WIDTH_STEP, []).append(slot)
        self._clock += 1
        for width, slots in groups.items():
            self._decode_group(width, slots)

    def _decode_group(self, width: int, slots: list[int]) -> None:
        """One call of the decode loop for some slots; hands back what ended."""
        devices = self._mesh.devices.size
        per_device = self._slots // devices
        own = [[slot for slot in slots if slot // per_device == device] for device in range(devices)]
        size = min(SMALLEST_GROUP, per_device)
        while size < max(map(len, own)):
            size = min(2 * size, per_device)
        S = devices * size
        places = {slot: device * size + at for device, there in enumerate(own) for at, slot in enumerate(there)}
        inputs = SlotInputs(np.full(S, per_device, np.int32), *np.zeros((3, S), np.int32), np.zeros((S, 2), np.uint32))
        for slot, at in places.items():
            request = self._running[slot]
            ids = request.sequence.ids
            inputs.rows[at] = slot % per_device
            inputs.tokens[at], inputs.positions[at] = ids[-1], len(ids) - 1
            inputs.steps[at] = min(request.limit - len(request.ids), self.steps)
            inputs.keys[at] = request.sequence.key
        stop = np.zeros(self._config.vocab_size, bool)
        stop[list(request.stop)] = True
        decode = make_decode(self._graphdef, self._mesh, width, self.steps)
        temperature = jnp.float32(request.sampling.temperature)
        self._cache, outputs = decode(
            self._weights, self._cache, jax.device_put(inputs, self._by_slot), stop, temperature
        )
        tokens, logprobs, counts = jax.device_get(outputs)
        self.slot_steps += int(counts.reshape(devices, size).max(axis=1).sum()) * size
        self.sampled += int(counts.sum())
        for slot, at in places.items():
            request = self._running[slot]
            drawn = tokens[at, : counts[at]].tolist()
            sequence = request.sequence
            sequence.ids.extend(drawn)
            sequence.cached = len(sequence.ids) - 1
            request.ids.extend(drawn)
            request.logprobs.extend(logprobs[at, : counts[at]].tolist())
            self._used[slot] = self._clock
            stopped = request.ids[-1] in request.stop
            if stopped or len(request.ids) == request.limit:
                del self._running[slot]
                if not request.future.done():
                    request.future.set_result(Decoded(tuple(request.ids), tuple(request.logprobs), stopped))
