"""The JAX engine: a static pool of slots, decoded together, refilled as sequences end.

`apr_jax.rollout.scheduler` says which sequence has which slot and what comes next; here are the methods of the `Engine`
protocol, the weights, the cache and the calls of the compiled parts. Always true:

* The last id of a sequence is never needed in the cache, since the loop feeds it. Whatever lies further on in the slot
  is garbage that no query sees.
* A fork takes over its parent's slot when the parent is freed: truncation, no copy. Else it shares like anybody else
  (`apr_jax.rollout.slots`): what a slot of its device holds is copied, not computed again.
* Draws depend on (seed, name, position) alone, not on slots, order or batch composition. Logits do in their last bits:
  a product rounds by its shape, and a context may be prefilled or decoded. In float32 a log-probability moves by up to
  1e-5, and a token only where its draw lies that near to a border between two; in bfloat16 that happens.
"""

import asyncio
import hashlib
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
from apr_jax.model.family import Model
from apr_jax.rollout.decode import Distribution, SlotInputs, make_copy, make_decode, make_prefill
from apr_jax.rollout.scheduler import Copy, Group, Prefill, Request, Scheduler
from apr_jax.rollout.shapes import ACCELERATOR_SHAPES, CPU_SHAPES, Shapes, fitting, width_of
from apr_jax.rollout.slots import Sequence
from apr_jax.threads.engine import Decoded, Sampling

LEAVE = 0.25  # a decode call ends when no more of its slots run: the others can be refilled


class _Request(Request):
    """With the tokens drawn so far, and the future of their `Decoded`."""

    def __init__(self, sequence: Sequence, limit: int):
        super().__init__(sequence, limit)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.model_logprobs: list[float] = []
        self.future: asyncio.Future[Decoded] = asyncio.get_running_loop().create_future()

    def take(self, tokens: list[int], logprobs: list[float], model_logprobs: list[float]) -> None:
        """Adds drawn tokens."""
        self.sequence.ids.extend(tokens)
        self.ids.extend(tokens)
        self.logprobs.extend(logprobs)
        self.model_logprobs.extend(model_logprobs)
        self.left -= len(tokens)


class JaxEngine:
    """An `Engine` on the devices of a mesh, each with slots and a copy of the weights. One stop set and one
    `Sampling` at a time. `weights` may be replaced between decodes (`load`). `shapes` are by default
    CPU_SHAPES on a CPU, else ACCELERATOR_SHAPES."""

    def __init__(
        self,
        model: Model,
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
        self._scheduler = Scheduler(slots, devices, widths=self._widths, sizes=self._sizes, steps=steps)
        self.load(weights)
        self._cache = self._blank_cache()
        self._loop: asyncio.Task | None = None
        self._how: tuple[frozenset[int], Sampling] | None = None  # of all requests that wait or run
        self.sampled = self.slot_steps = 0  # tokens drawn and slots stepped: their ratio is the occupancy
        self.prefilled = self.copied = 0  # tokens computed before they are attended to, and tokens copied instead
        self.prefills = self.copies = 0  # calls

    def load(self, weights) -> None:
        """Takes the weights of a model of the same shape (an `nnx.State`)."""
        self._weights = jax.device_put(weights, NamedSharding(self._mesh, P()))
        self._scheduler.slots.forget()

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
        limit = min(limit, self.context - len(sequence.ids))
        if limit < 1:
            raise ValueError(f"no room to decode: {len(sequence.ids)} of {self.context} tokens")
        if self._scheduler.busy and self._how != (stop, sampling):
            raise ValueError(
                f"one stop set and one Sampling at a time: {self._how} decode, was given {stop}, {sampling}"
            )
        request = _Request(sequence, limit)
        self._scheduler.ask(request)
        self._how = stop, sampling
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._serve())
        try:
            return await request.future
        finally:
            self._scheduler.end(request)  # which is over, or cancelled

    def free(self, sequence: Sequence) -> None:
        self._scheduler.slots.free(sequence)

    # ------------------------------------------------------------------ the loop

    async def _serve(self) -> None:
        """Admits, prefills, decodes, until nothing waits and nothing runs."""
        try:
            while self._scheduler.busy:
                interrupt.check()
                for copies, prefills in self._scheduler.admit():
                    self._copy(copies)
                    self._prefill(prefills)
                for group in list(self._scheduler.groups()):
                    self._decode(group)
                for _ in range(4):  # lets the runners of what ended ask for what comes next
                    await asyncio.sleep(0)
        except BaseException as error:
            for request in self._scheduler.end_all():
                if not request.future.done():
                    stopped = RuntimeError(f"the engine stopped: {error!r}")
                    stopped.__cause__ = error
                    request.future.set_exception(stopped)
            # Slots may not hold what they were to be filled with, and a donated cache may be gone.
            self._scheduler.slots.forget()
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._cache)):
                self._cache = self._blank_cache()
            interrupt.check()  # which may have come out of JAX as another error
            raise

    def _copy(self, copies: list[Copy]) -> None:
        """Copies between slots, in their order."""
        for batch in self._by_device(copies, lambda copy: copy.source, self._rows):
            places = np.full((2, self._devices * self._rows), self._per_device, np.int32)
            for at, (source, target, count) in batch:
                places[:, at] = source % self._per_device, target % self._per_device
                self.copied += count
            self._run_copy(fitting(self._copy_widths, max(count for _, (_, _, count) in batch)), *places)

    def _prefill(self, fills: list[Prefill]) -> None:
        """Prefills, in calls of a few rows per device and one padded length."""
        fills = sorted(fills, key=lambda fill: len(fill.sequence.ids) - fill.first)
        most = max(Counter(self._device(sequence.slot) for sequence, _ in fills).values(), default=0)
        longest = max((len(sequence.ids) - 1 - first for sequence, first in fills), default=0)
        rows = fitting(self._rows_of(fitting(self._lengths, longest)), most)
        for batch in self._by_device(fills, lambda fill: fill.sequence.slot, rows):
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
            queues[self._device(slot_of(entry))].append(entry)
        while any(queues):
            yield [
                (device * rows + row, queue.popleft())
                for device, queue in enumerate(queues)
                for row in range(min(rows, len(queue)))
            ]

    def _device(self, slot: int) -> int:
        return self._scheduler.slots.device(slot)

    def _decode(self, group: Group) -> None:
        """One call of the decode loop; hands back what ended."""
        size = group.size
        places = [
            (device * size + row, request)
            for device, there in enumerate(group.requests)
            for row, request in enumerate(there)
        ]
        inputs = self._inputs(size)
        for at, request in places:
            ids = request.sequence.ids
            inputs.rows[at] = request.sequence.slot % self._per_device
            inputs.tokens[at], inputs.positions[at] = ids[-1], len(ids) - 1
            inputs.steps[at] = min(request.left, self.steps)
            inputs.keys[at] = request.sequence.key
        leave = np.asarray([int(LEAVE * len(there)) for there in group.requests], np.int32)
        stop, sampling = self._how
        outputs = self._run_decode(group.width, inputs, leave, stop, sampling)
        tokens, logprobs, model_logprobs, counts = jax.device_get(outputs)
        self.slot_steps += int(counts.reshape(self._devices, size).max(axis=1).sum()) * size
        self.sampled += int(counts.sum())
        for at, request in places:
            drawn = slice(0, counts[at])
            request.take(*(column[at, drawn].tolist() for column in (tokens, logprobs, model_logprobs)))
            self._scheduler.slots.note(request.sequence, len(request.sequence.ids) - 1)
            stopped = request.ids[-1] in stop
            if stopped or not request.left:
                self._scheduler.end(request)
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
        vocab_size = self._config.vocab_size
        stops = np.zeros(vocab_size, bool)
        stops[list(stop)] = True
        how = Distribution(
            np.float32(sampling.temperature),
            np.int32(min(sampling.top_k or vocab_size, vocab_size)),
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
