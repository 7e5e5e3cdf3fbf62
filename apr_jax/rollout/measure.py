"""Timings of decoding: one `Measurement` per request, for any engine.

Times are in seconds of `time.perf_counter`. Only their differences have a meaning, and setting the system clock does
not change them.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence as Ids

from apr_jax.threads.engine import Decoded, Engine, Sampling, Sequence, Watch


@dataclasses.dataclass(frozen=True)
class Origin:
    """The thread that a sequence belongs to: the thread's name, and the number of its ancestors (0 for a root)."""

    name: tuple[int, ...]
    depth: int


class Lineage:
    """Finds the thread of each sequence from the names that a runner gives (see `Engine.open`).

    A child's name is its parent's name and two numbers. When a thread resumes after a join, its new sequence is a fork
    whose name is the thread's name and one number. Example: (4, 7) is a root. (4, 7, 0, 2), opened while (4, 7) lives,
    is its child. (4, 7, 1), a fork of a sequence of (4, 7), belongs to the thread (4, 7).
    """

    def __init__(self):
        self._live: Counter[Origin] = Counter()
        self._depths: dict[tuple[int, ...], int] = {}  # of live threads, by name

    def open(self, name: Ids[int]) -> Origin:
        """Return the origin of a new sequence: a child of the live thread that its name extends, else a root."""
        name = tuple(name)
        above = self._depths.get(name[:-2])
        return self._add(Origin(name, 0 if above is None else above + 1))

    def fork(self, origin: Origin, name: Ids[int]) -> Origin:
        """Return the origin of a fork of a sequence: the same thread, or a child that inherits its context."""
        name = tuple(name)
        same = len(name) == len(origin.name) + 1
        return self._add(origin if same else Origin(name, origin.depth + 1))

    def close(self, origin: Origin) -> None:
        """Count a sequence as freed. A thread lives until all its sequences are freed."""
        self._live[origin] -= 1
        if self._live[origin] <= 0:
            del self._live[origin]
            self._depths.pop(origin.name, None)

    def _add(self, origin: Origin) -> Origin:
        self._live[origin] += 1
        self._depths[origin.name] = origin.depth
        return origin


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The timing of one request of one thread. Times are in seconds of `time.perf_counter`."""

    thread: tuple[int, ...]  # the thread's name
    depth: int  # the thread's number of ancestors
    server: str
    prompt_tokens: int
    output_tokens: int
    asked: float  # when the engine was asked to decode
    start: float  # when the first attempt was sent to the server
    first: float | None  # when the first token arrived; None if unknown
    end: float  # when the last token arrived
    cached_tokens: int | None = None  # prompt tokens that the server had in its cache; None if not reported
    attempts: int = 1
    server_seconds: float | None = None  # duration of the request, reported by the server
    server_queue: float | None = None  # seconds in the server's queue, reported by the server


class Measurements(list[Measurement]):
    """The measurements of many trees, in the order in which the requests ended."""

    def take(self, tree: Ids[int]) -> list[Measurement]:
        """Remove and return the measurements of the tree whose root has the name `tree`."""
        tree = tuple(tree)
        taken = [one for one in self if one.thread[: len(tree)] == tree]
        self[:] = [one for one in self if one.thread[: len(tree)] != tree]
        return taken


class _Sequence:
    """A sequence of the wrapped engine and the thread that it belongs to."""

    def __init__(self, inner: Sequence, origin: Origin):
        self.inner, self.origin = inner, origin

    @property
    def ids(self) -> list[int]:
        return self.inner.ids


class TimedEngine:
    """An `Engine` that wraps another one and appends a `Measurement` of every decode to `measurements`.

    `name` is the measurements' `server`. With `split` each decode is done in two parts, the first token and the rest,
    so that the time of the first token is known. The tokens are the same, since an engine draws each by the sequence's
    name and the position. The split costs an engine that batches requests some throughput.
    """

    def __init__(self, engine: Engine, name: str, measurements: Measurements, split: bool = True):
        self.engine, self.name, self.measurements, self.split = engine, name, measurements, split
        self.context = engine.context
        self._lineage = Lineage()

    def open(self, ids: Ids[int], name: Ids[int]) -> _Sequence:
        inner = self.engine.open(ids, name)
        return _Sequence(inner, self._lineage.open(name))

    def fork(self, sequence: _Sequence, length: int, name: Ids[int]) -> _Sequence:
        inner = self.engine.fork(sequence.inner, length, name)
        return _Sequence(inner, self._lineage.fork(sequence.origin, name))

    def extend(self, sequence: _Sequence, ids: Ids[int]) -> None:
        self.engine.extend(sequence.inner, ids)

    async def decode(
        self, sequence: _Sequence, stop: frozenset[int], limit: int, sampling: Sampling, watch: Watch | None = None
    ) -> Decoded:
        prompt, asked = len(sequence.ids), time.perf_counter()
        limit = min(limit, self.context - prompt)
        part = min(limit, 1) if self.split else limit
        decoded = await self.engine.decode(sequence.inner, stop, part, sampling, watch)
        first = time.perf_counter() if self.split else None
        if self.split and not decoded.stopped and limit > 1:
            later = None if watch is None else lambda at, ids: watch(1 + at, ids)
            rest = await self.engine.decode(sequence.inner, stop, limit - 1, sampling, later)
            decoded = Decoded(
                decoded.ids + rest.ids, decoded.logprobs + rest.logprobs, rest.stopped,
                decoded.model_logprobs + rest.model_logprobs,
            )  # fmt: skip
        self.measurements.append(
            Measurement(
                sequence.origin.name, sequence.origin.depth, self.name, prompt, len(decoded.ids), asked, asked, first,
                time.perf_counter(),
            )
        )  # fmt: skip
        return decoded

    def free(self, sequence: _Sequence) -> None:
        self.engine.free(sequence.inner)
        self._lineage.close(sequence.origin)
