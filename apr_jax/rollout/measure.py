"""What decoding cost on the clock: one `Measurement` per request, whichever engine did it.

Times are seconds of `time.perf_counter`: a change of the date leaves them alone, and only differences mean something.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence as Ids

from apr_jax.threads.engine import Decoded, Engine, Sampling, Sequence


@dataclasses.dataclass(frozen=True)
class Origin:
    """Which thread a sequence belongs to: the thread's own name, and how many threads are above it."""

    name: tuple[int, ...]
    depth: int


class Lineage:
    """Tells roots, children and threads that go on apart by the names that a runner gives (`Engine.open`).

    Example: (4, 7) is a root; (4, 7, 0, 2), opened while (4, 7) lives, is its child; (4, 7, 1), a fork of either of
    (4, 7)'s sequences, is (4, 7) going on.
    """

    def __init__(self):
        self._live: Counter[Origin] = Counter()
        self._depths: dict[tuple[int, ...], int] = {}  # by the names of threads that live

    def open(self, name: Ids[int]) -> Origin:
        name = tuple(name)
        above = self._depths.get(name[:-2])
        return self._add(Origin(name, 0 if above is None else above + 1))

    def fork(self, origin: Origin, name: Ids[int]) -> Origin:
        name = tuple(name)
        same = len(name) == len(origin.name) + 1
        return self._add(origin if same else Origin(name, origin.depth + 1))

    def close(self, origin: Origin) -> None:
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
    """One request of one thread. `asked`, `start`, `first` and `end` are points in time: of the decode, of the
    request's first try on its server, of the answer's first token, of its end."""

    thread: tuple[int, ...]
    depth: int  # threads above it
    server: str
    prompt_tokens: int
    output_tokens: int
    asked: float
    start: float
    first: float | None  # None where it is not known
    end: float
    cached_tokens: int | None = None  # of the prompt, not computed again; None where it is not told
    tries: int = 1
    server_seconds: float | None = None  # from end to end, as the server tells it
    server_queue: float | None = None  # seconds that it waited there, as the server tells it


class Measurements(list[Measurement]):
    """Those of many trees, in the order in which they ended."""

    def take(self, tree: Ids[int]) -> list[Measurement]:
        """Takes out those of one tree, whose root has this name."""
        tree = tuple(tree)
        taken = [one for one in self if one.thread[: len(tree)] == tree]
        self[:] = [one for one in self if one.thread[: len(tree)] != tree]
        return taken


class _Sequence:
    def __init__(self, inner: Sequence, origin: Origin):
        self.inner, self.origin = inner, origin

    @property
    def ids(self) -> list[int]:
        return self.inner.ids


class TimedEngine:
    """Any engine, with a measurement of every decode. With `split` a decode is asked for as one token and then the
    rest, which draws the same tokens (draws depend on name and position) and shows when the first one was there; it
    costs an engine that decodes many at once some of its throughput."""

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

    async def decode(self, sequence: _Sequence, stop: frozenset[int], limit: int, sampling: Sampling) -> Decoded:
        prompt, asked = len(sequence.ids), time.perf_counter()
        limit = min(limit, self.context - prompt)
        decoded = await self.engine.decode(sequence.inner, stop, min(limit, 1) if self.split else limit, sampling)
        first = time.perf_counter() if self.split else None
        if self.split and not decoded.stopped and limit > 1:
            rest = await self.engine.decode(sequence.inner, stop, limit - 1, sampling)
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
