"""Predicts a tree's latency from the seconds that an engine takes for a token and for a prefill, and measures both."""

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

NAME_TAG = -3  # begins the names of the sequences that `calibrate` decodes
REPEATS = 3  # measured rounds of a calibration
TOKENS = 64  # decoded by each sequence of a calibration


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds that an idle engine takes. A prefill of n tokens takes `prefill` + n * `prefill_token`, which includes
    sampling the first new token. Each further token takes `token`."""

    token: float
    prefill: float
    prefill_token: float


@dataclasses.dataclass(frozen=True)
class Predicted:
    """Predicted seconds of the prefills and of the decoding along a tree's longest chain, and its sampled tokens."""

    prefill: float
    decode: float
    tokens: int

    def __add__(self, other: "Predicted") -> "Predicted":
        return Predicted(self.prefill + other.prefill, self.decode + other.decode, self.tokens + other.tokens)

    @property
    def seconds(self) -> float:
        """The predicted latency."""
        return self.prefill + self.decode


NOTHING = Predicted(0.0, 0.0, 0)


def predict(thread: Thread, costs: Costs) -> Predicted:
    """Predict the seconds of a thread and of the children that it waits for. The prediction assumes that each thread
    has an engine to itself, that contexts stay cached, and that nothing else takes time.

    Example: a prompt of 5 tokens, 4 written, a call of 3, children of 6 + 7 and 6 + 2 (prompt + written), a join of 2,
    and 1 written. The longest chain has three prefills, of 5, 6 and 2 tokens, and 4 + 3 + 7 + 1 = 15 sampled tokens.
    The first token after each prefill is part of the prefill; 12 tokens remain.
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
    """Measure the costs of an engine that nothing else uses meanwhile. The prompts are random ids below `vocab_size`,
    so that no cache contains them."""
    rng, greedy = random.Random(time.time_ns()), Sampling(0.0)
    room = engine.context - min(TOKENS, engine.context // 4)
    lengths = sorted({min(16, room), max(room // 3, 1), room})
    firsts: dict[int, list[float]] = {length: [] for length in lengths}
    decoded: list[tuple[float, int]] = []
    for repeat in range(REPEATS + 1):  # the first round is not measured: it compiles and allocates
        for number, length in enumerate(lengths):
            name = (NAME_TAG, repeat * len(lengths) + number)
            sequence = engine.open([rng.randrange(vocab_size) for _ in range(length)], name)
            await engine.decode(sequence, frozenset(), min(TOKENS, engine.context - length), greedy)
            engine.free(sequence)
            calls = measurements.take(name)
            if repeat:
                firsts[length].append(calls[0].first - calls[0].start - (calls[0].server_queue or 0.0))
                # There are several requests if the server stopped at an end token of its own.
                decoded += [(one.end - one.first, one.output_tokens - 1) for one in calls if one.output_tokens > 1]
    points = [(length, statistics.median(times)) for length, times in firsts.items()]
    slope = max(float(np.polyfit(*zip(*points), 1)[0]), 0.0) if len(points) > 1 else 0.0
    base = max(statistics.mean(seconds - slope * length for length, seconds in points), 0.0)
    tokens = sum(count for _, count in decoded)
    return Costs(sum(seconds for seconds, _ in decoded) / max(tokens, 1), base, slope)


async def stored_costs(path: Path, key: str, engine: Engine, measurements: Measurements, vocab_size: int) -> Costs:
    """Return the costs that a JSON file holds under `key`; if there are none, measure and store them first. So every
    pass, and a restarted one, predicts with the same costs. Raises UserError if the file is broken."""
    stored = read_json(path, "delete it, the costs are measured again") if path.exists() else {}
    if key not in stored:
        stored[key] = dataclasses.asdict(await calibrate(engine, measurements, vocab_size))
        write_text(path, json.dumps(stored, indent=1) + "\n")
    return Costs(**stored[key])
