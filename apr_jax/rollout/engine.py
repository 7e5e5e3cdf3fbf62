"""The JAX engine: continuous batching over a fixed number of slots.

A slot is one row of the key/value cache and serves one sequence at a time. `apr_jax.rollout.scheduler` decides which
sequence gets which slot and what to compute next. This module implements the `Engine` protocol, owns the weights and
the cache, and calls the compiled functions of `apr_jax.rollout.decode`. Always true:

* The key and value of a sequence's last id are not needed in the cache: the decode loop takes that id as its input.
  Positions after it may contain old values, which no query attends to.
* When a sequence is freed, its latest fork takes over the slot, truncated, without a copy, unless the fork has a slot
  already. Any other sequence copies the prefix that it shares with a slot of its device (`apr_jax.rollout.slots`)
  instead of computing it again.
* The random number behind a token depends on (seed, name, position) alone, not on slots, order or batch composition.
  Logits depend on the batch composition in their last bits: a matrix product rounds by its shape, and a context may be
  prefilled or decoded. In float32 a log-probability moves by up to 1e-5, and a token changes only if its random number
  is that close to the border between two tokens. In bfloat16 this happens.
"""

import asyncio
import hashlib
from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as Ids

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax import interrupt
from apr_jax.errors import UserError
from apr_jax.model.cache import make_cache
from apr_jax.model.family import Model
from apr_jax.rollout.decode import Distribution, SlotInputs, make_copy, make_decode, make_prefill
from apr_jax.rollout.scheduler import Copy, Group, Prefill, Request, Scheduler
from apr_jax.rollout.shapes import ACCELERATOR_SHAPES, CPU_SHAPES, Shapes, fitting, width_of
from apr_jax.rollout.slots import Sequence
from apr_jax.threads.engine import Decoded, Sampling, Watch

REFILL_AT = 0.25  # a decode call ends when this fraction of its slots still runs, so that the others are refilled


class _Request(Request):
    """A scheduler's request with the tokens sampled so far and a future for the result."""

    def __init__(self, sequence: Sequence, limit: int, watch: Watch | None):
        super().__init__(sequence, limit)
        self.watch = watch
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.model_logprobs: list[float] = []
        self.future: asyncio.Future[Decoded] = asyncio.get_running_loop().create_future()

    def take(self, tokens: list[int], logprobs: list[float], model_logprobs: list[float]) -> None:
        """Append sampled tokens to the sequence and to the result."""
        if self.watch is not None:
            self.watch(len(self.ids), tuple(tokens))
        self.sequence.ids.extend(tokens)
        self.ids.extend(tokens)
        self.logprobs.extend(logprobs)
        self.model_logprobs.extend(model_logprobs)
        self.left -= len(tokens)


class JaxEngine:
    """An `Engine` on the devices of a mesh. Each device has `slots` / devices slots and a copy of the weights.

    All requests at one time must have the same stop set and the same `Sampling`. The weights may be replaced between
    decodes (`load`). `context` is the most tokens of a sequence, `steps` the most tokens of a slot in one decode call.
    `shapes` defaults to CPU_SHAPES on a CPU and to ACCELERATOR_SHAPES elsewhere. Raises UserError if `slots` is not a
    multiple of the devices or `context` exceeds the model's.
    """

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
        self._by_slot = NamedSharding(mesh, PartitionSpec("data"))
        self._graphdef, weights = nnx.split(model)
        self._scheduler = Scheduler(slots, devices, widths=self._widths, sizes=self._sizes, steps=steps)
        self.load(weights)
        self._cache = self._blank_cache()
        self._loop: asyncio.Task | None = None
        self._how: tuple[frozenset[int], Sampling] | None = None  # stop set and sampling of all current requests
        self.sampled = self.slot_steps = 0  # tokens sampled, and steps times slots of the calls: the ratio is occupancy
        self.prefilled = self.copied = 0  # prompt tokens that were computed, and those copied from another slot
        self.prefills = self.copies = 0  # calls of the compiled functions

    def load(self, weights) -> None:
        """Replace the weights by those of a model of the same shape (an `nnx.State`), and forget cached prefixes."""
        self._weights = jax.device_put(weights, NamedSharding(self._mesh, PartitionSpec()))
        self._scheduler.slots.forget()

    def _blank_cache(self):
        slots = self._devices * self._per_device
        return jax.device_put(make_cache(self._config, slots, width_of(self.context)), self._by_slot)

    def compile(self, sampling: Sampling) -> int:
        """Compile ahead every shape that rollouts under `sampling` can need, and return how many there are.

        Without this call a shape is compiled when it is first needed. JAX's persistent compilation cache keeps the
        programs in both cases.
        """
        shapes = 0
        no_slot_B = np.full(self._devices * self._rows, self._per_device, np.int32)
        for width in self._copy_widths:
            self._run_copy(width, no_slot_B, no_slot_B)
            prefills = [(rows, T) for T in self._lengths if T <= width for rows in self._rows_of(T)]
            for rows, T in prefills:
                B = self._devices * rows
                self._run_prefill(width, no_slot_B[:B], np.zeros((B, T), np.int32), *np.zeros((2, B), np.int32))
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

    async def decode(
        self, sequence: Sequence, stop: frozenset[int], limit: int, sampling: Sampling, watch: Watch | None = None
    ) -> Decoded:
        limit = min(limit, self.context - len(sequence.ids))
        if limit < 1:
            raise ValueError(f"no room to decode: {len(sequence.ids)} of {self.context} tokens")
        if self._scheduler.busy and self._how != (stop, sampling):
            raise ValueError(
                f"one stop set and one Sampling at a time: {self._how} decode, was given {stop}, {sampling}"
            )
        request = _Request(sequence, limit, watch)
        self._scheduler.ask(request)
        self._how = stop, sampling
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._serve())
        try:
            return await request.future
        finally:
            self._scheduler.end(request)  # does nothing unless this task was cancelled

    def free(self, sequence: Sequence) -> None:
        self._scheduler.slots.free(sequence)

    # ------------------------------------------------------------------ the loop

    async def _serve(self) -> None:
        """Give slots, fill caches and decode, until no request is left. An error is passed on to every request."""
        try:
            while self._scheduler.busy:
                interrupt.check()
                for copies, prefills in self._scheduler.admit():
                    self._copy(copies)
                    self._prefill(prefills)
                for group in list(self._scheduler.groups()):
                    self._decode(group)
                for _ in range(4):  # lets the owners of ended sequences make their next requests
                    await asyncio.sleep(0)
        except BaseException as error:
            for request in self._scheduler.end_all():
                if not request.future.done():
                    stopped = RuntimeError(f"the engine stopped: {error!r}")
                    stopped.__cause__ = error
                    request.future.set_exception(stopped)
            # Some slots may not have been filled as planned, and a donated cache may be deleted.
            self._scheduler.slots.forget()
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._cache)):
                self._cache = self._blank_cache()
            interrupt.check()  # JAX may have raised an interrupt as an error of another type
            raise

    def _copy(self, copies: list[Copy]) -> None:
        """Copy prefixes between slots, in the given order."""
        for batch in self._by_device(copies, lambda copy: copy.source, self._rows):
            slots_2xB = np.full((2, self._devices * self._rows), self._per_device, np.int32)
            for at, (source, target, count) in batch:
                slots_2xB[:, at] = source % self._per_device, target % self._per_device
                self.copied += count
            self._run_copy(fitting(self._copy_widths, max(count for _, (_, _, count) in batch)), *slots_2xB)

    def _prefill(self, fills: list[Prefill]) -> None:
        """Prefill sequences, shortest first, in calls of a few rows per device that are padded to one length."""
        fills = sorted(fills, key=lambda fill: len(fill.sequence.ids) - fill.first)
        most = max(Counter(self._device(sequence.slot) for sequence, _ in fills).values(), default=0)
        longest = max((len(sequence.ids) - 1 - first for sequence, first in fills), default=0)
        rows = fitting(self._rows_of(fitting(self._lengths, longest)), most)
        for batch in self._by_device(fills, lambda fill: fill.sequence.slot, rows):
            longest = max(len(s.ids) - 1 - first for _, (s, first) in batch)
            T = fitting(self._lengths, longest)
            width = fitting(self._copy_widths, max(T, *(len(s.ids) for _, (s, _) in batch)))
            rows_B = np.full(self._devices * rows, self._per_device, np.int32)
            tokens_BxT = np.zeros((len(rows_B), T), np.int32)
            first_B, counts_B = np.zeros((2, len(rows_B)), np.int32)
            for at, (sequence, first) in batch:
                new = sequence.ids[first:-1]
                rows_B[at], first_B[at], counts_B[at] = sequence.slot % self._per_device, first, len(new)
                tokens_BxT[at, : len(new)] = new
                self.prefilled += len(new)
            self._run_prefill(width, rows_B, tokens_BxT, first_B, counts_B)

    def _by_device(self, entries: list, slot_of, rows: int) -> Iterator[list[tuple[int, object]]]:
        """Split entries into calls of up to `rows` entries per device, and yield each call as (index in the call's
        arrays, entry) pairs. Entries of one device keep their order."""
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
        """Call the decode loop once for a group, and finish the requests that ended."""
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
        refill_at = np.asarray([int(REFILL_AT * len(there)) for there in group.requests], np.int32)
        stop, sampling = self._how
        outputs = self._run_decode(group.width, inputs, refill_at, stop, sampling)
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
        """Inputs of a decode call with `size` places per device, all of them "no slot"."""
        P = self._devices * size
        return SlotInputs(
            np.full(P, self._per_device, np.int32), *np.zeros((3, P), np.int32), np.zeros((P, 2), np.uint32)
        )

    def _run_decode(self, width: int, inputs: SlotInputs, refill_at, stop: frozenset[int], sampling: Sampling):
        vocab_size = self._config.vocab_size
        stop_V = np.zeros(vocab_size, bool)
        stop_V[list(stop)] = True
        how = Distribution(
            np.float32(sampling.temperature),
            np.int32(min(sampling.top_k or vocab_size, vocab_size)),
            np.float32(sampling.top_p),
        )
        decode = make_decode(self._graphdef, self._mesh, width, self.steps, sampling.truncated)
        inputs, refill_at = jax.device_put((inputs, refill_at), self._by_slot)
        self._cache, outputs = decode(self._weights, self._cache, inputs, refill_at, stop_V, how)
        return outputs

    def _run_prefill(self, width: int, rows_B, tokens_BxT, first_B, counts_B) -> None:
        self.prefills += 1
        arrays = jax.device_put((rows_B, tokens_BxT, first_B, counts_B), self._by_slot)
        self._cache = make_prefill(self._graphdef, self._mesh, width)(self._weights, self._cache, *arrays)

    def _run_copy(self, width: int, sources_B, targets_B) -> None:
        self.copies += 1
        self._cache = make_copy(self._mesh, width)(self._cache, *jax.device_put((sources_B, targets_B), self._by_slot))
