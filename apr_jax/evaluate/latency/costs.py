"""A model of a tree's latency, and the measuring of what it is made of: the time of a token and of a prefill."""

import dataclasses
import json
import random
import statistics
import time
from pathlib import Path

import numpy as np

from apr_jax.io.files import write_text
from apr_jax.io.paths import read_json
from apr_jax.rollout.measure import Measurements
from apr_jax.threads.engine import Engine, Sampling
from apr_jax.threads.tree import Block, Spawn, Thread

NAME_TAG = -3  # first in the names of what is decoded here
REPEATS = 3
TOKENS = 64  # of one decode


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds on an idle engine: of a decoded token, of a prefill whatever its length, of each token of a prefill. A
    prefill's include the first token that comes out of it."""

    token: float
    prefill: float
    prefill_token: float


@dataclasses.dataclass(frozen=True)
class Predicted:
    """Of the longest chain of a tree."""

    prefill: float
    decode: float
    tokens: int

    def __add__(self, other: "Predicted") -> "Predicted":
        return Predicted(self.prefill + other.prefill, self.decode + other.decode, self.tokens + other.tokens)

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode


NOTHING = Predicted(0.0, 0.0, 0)


def predict(thread: Thread, costs: Costs) -> Predicted:
    """The time of a thread and what it waits for, where each thread has an engine to itself, contexts stay cached and
    nothing else takes time.

    Example: a prompt of 5, 4 written, a call of 3, children of 6 + 7 and 6 + 2, a join of 2, 1 written: three prefills,
    of 5, 6 and 2 tokens, and 4 + 3 + 7 + 1 tokens, the first after each prefill in its time: 12 by themselves.
    """
    chain, forced = NOTHING, 0

    def add(block: Block) -> Predicted:
        nonlocal forced
        if not block.sampled or not len(block):
            forced += len(block)
            return NOTHING
        prefill, alone = 0.0, len(block)
        if forced:
            prefill = costs.prefill + costs.prefill_token * forced
            forced, alone = 0, alone - 1
        return Predicted(prefill, costs.token * alone, len(block))

    for item in thread.blocks:
        if isinstance(item, Spawn):
            for block in item.call:
                chain += add(block)
            below = (predict(child, costs) for child in item.children)
            chain += max(below, key=lambda one: one.seconds, default=NOTHING)
            chain += add(item.join)
        else:
            chain += add(item)
    return chain


async def calibrate(engine: Engine, measurements: Measurements, vocab_size: int) -> Costs:
    """Measures an engine that nothing else uses, with prompts of random ids below `vocab_size`, that no
    cache knows."""
    rng, greedy = random.Random(time.time_ns()), Sampling(0.0)
    room = engine.context - min(TOKENS, engine.context // 4)
    lengths = sorted({min(16, room), max(room // 3, 1), room})
    firsts: dict[int, list[float]] = {length: [] for length in lengths}
    decoded: list[tuple[float, int]] = []
    for repeat in range(REPEATS + 1):  # what the first compiles or allocates is left out
        for number, length in enumerate(lengths):
            name = (NAME_TAG, repeat * len(lengths) + number)
            sequence = engine.open([rng.randrange(vocab_size) for _ in range(length)], name)
            await engine.decode(sequence, frozenset(), min(TOKENS, engine.context - length), greedy)
            engine.free(sequence)
            calls = measurements.take(name)
            if repeat:
                firsts[length].append(calls[0].first - calls[0].start - (calls[0].server_queue or 0.0))
                # Several where the server stopped at an end token of its own.
                decoded += [(one.end - one.first, one.output_tokens - 1) for one in calls if one.output_tokens > 1]
    points = [(length, statistics.median(times)) for length, times in firsts.items()]
    slope = max(float(np.polyfit(*zip(*points), 1)[0]), 0.0) if len(points) > 1 else 0.0
    base = max(statistics.mean(seconds - slope * length for length, seconds in points), 0.0)
    tokens = sum(count for _, count in decoded)
    return Costs(sum(seconds for seconds, _ in decoded) / max(tokens, 1), base, slope)


async def known_costs(path: Path, key: str, engine: Engine, measurements: Measurements, vocab_size: int) -> Costs:
    """The costs that a JSON file holds under a key, measured first where it has none: passes and restarts are predicted
    by the same. Raises UserError where the file is broken."""
    known = read_json(path, "delete it, it is measured again") if path.exists() else {}
    if key not in known:
        known[key] = dataclasses.asdict(await calibrate(engine, measurements, vocab_size))
        write_text(path, json.dumps(known, indent=1) + "\n")
    return Costs(**known[key])
