"""Tests of predicted latencies of trees, and of measured costs of an engine."""

import asyncio
import types

import pytest

from apr_jax.evaluate.latency.costs import Costs, calibrate, predict, stored_costs
from apr_jax.rollout import measure as measure_module
from apr_jax.rollout.measure import Measurements, TimedEngine
from apr_jax.threads import Block, Spawn, Thread
from tests.rollout.fake_server import ContextEngine
from tests.tiny import TOKENIZER

COSTS = Costs(token=1.0, prefill=100.0, prefill_token=0.01)


def written(length, sampled=True):
    return Block(tuple(range(length)), sampled)


def example():
    children = (Thread((written(6, False), written(7))), Thread((written(6, False), written(2))))
    spawn = Spawn((written(3),), children, written(2, False))
    return Thread((written(5, False), written(4), spawn, written(1)))


def test_a_prediction_follows_the_longest_chain():
    found = predict(example(), COSTS)
    assert (found.prefill, found.decode, found.tokens) == (pytest.approx(300 + 0.13), 12.0, 15)
    one = Thread((written(5, False), written(0), written(3)))
    assert predict(one, COSTS).seconds == pytest.approx(100.05 + 2)


def test_calibration_finds_the_costs_of_a_simulated_engine(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure_module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(ContextEngine):
        async def decode(self, sequence, stop, limit, sampling, watch=None):
            if len(sequence.ids) != self.written:
                now[0] += 0.3 + 0.5 * len(sequence.ids)
            decoded = await super().decode(sequence, stop, limit, sampling, watch)
            now[0] += 2.0 * len(decoded.ids)
            self.written = len(sequence.ids)
            return decoded

        written = 0

    measurements = Measurements()
    costs = asyncio.run(calibrate(TimedEngine(Slow(), "slow", measurements), measurements, len(TOKENIZER)))
    assert vars(costs) == pytest.approx({"token": 2.0, "prefill": 2.3, "prefill_token": 0.5})
    assert not measurements


def test_costs_are_measured_once_per_key(tmp_path):
    measurements, path = Measurements(), tmp_path / "deep" / "costs.json"
    engine = TimedEngine(ContextEngine(), "memory", measurements)
    first = asyncio.run(stored_costs(path, "a", engine, measurements, len(TOKENIZER)))
    assert asyncio.run(stored_costs(path, "a", None, measurements, 0)) == first
    asyncio.run(stored_costs(path, "b", engine, measurements, len(TOKENIZER)))
    assert asyncio.run(stored_costs(path, "a", None, measurements, 0)) == first
