"""Tests of the chain of requests that decided a tree's latency, and of the parts of the latency."""

import asyncio

import pytest

from apr_jax.evaluate.latency.chain import critical_path, latency_parts
from apr_jax.evaluate.latency.costs import Costs, predict
from apr_jax.rollout.measure import Measurement, Measurements, TimedEngine
from apr_jax.threads import metrics
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner
from tests.rollout.fake_server import ContextEngine
from tests.tiny import TOKENIZER, NonsenseProtocol

COSTS = Costs(token=1.0, prefill=100.0, prefill_token=0.01)


def request(thread, asked, end, first=None, output=3, queue=None):
    return Measurement(thread, (len(thread) - 2) // 2, "s", 9, output, asked, asked, first, end, server_queue=queue)


def test_the_critical_path_goes_through_the_child_that_ends_last():
    root, a, b = (0, 0), (0, 0, 0, 0), (0, 0, 0, 1)
    calls = [
        request(root, 0, 2), request(a, 2.1, 4), request(b, 2.1, 3), request(b, 3.1, 6), request(a, 4.1, 5),
        request(root, 6.2, 7),
    ]  # fmt: skip
    assert [(one.thread, one.end) for one in critical_path(calls[::-1])] == [(root, 2), (b, 3), (b, 6), (root, 7)]
    assert critical_path([]) == []


def test_a_latency_is_split_along_its_chain():
    calls = [request((0, 0), 0, 2, first=0.5, queue=0.25), request((0, 0), 3, 4)]
    parts = {"queue": 0.25, "prefill": 0.25, "decode": 2.5, "overhead": 2.0}
    assert latency_parts(calls, 5.0) == pytest.approx(parts)


def test_with_one_child_per_spawn_the_critical_path_has_all_requests():
    measurements = Measurements()
    engine = TimedEngine(ContextEngine(), "memory", measurements)
    runner = TreeRunner(engine, NonsenseProtocol(1), TOKENIZER, Budget(190, threads=20, depth=2), Sampling(0.0))
    spawned = 0
    for index in range(12):
        tree = asyncio.run(runner.run(index, (0, index)))
        calls = measurements.take((0, index))
        assert critical_path(calls) == calls
        assert sum(one.output_tokens for one in calls) >= predict(tree.root, COSTS).tokens
        spawned += metrics.children(tree)
    assert spawned
