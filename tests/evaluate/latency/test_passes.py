"""Tests of latency passes: parts add up, and no sample is lost or stored twice, however servers fail."""

import asyncio
import dataclasses
import json
import sys
import threading
import time

import pytest

from apr_jax.evaluate.latency.costs import Costs
from apr_jax.evaluate.latency.passes import measure, read_throughput
from apr_jax.evaluate.latency.sample import Setting, read_samples
from apr_jax.evaluate.latency.summary import summarise_latency
from apr_jax.rollout.client import Patience, ServerError
from apr_jax.rollout.measure import Measurements, TimedEngine
from apr_jax.rollout.servers import Servers, StartedServers
from apr_jax.rollout.sglang import SglangEngine
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner
from tests.evaluate.nonsense import SPEC, Nonsense, Question
from tests.rollout.fake_server import CONTEXT, SPARE, ContextEngine, FakeServer
from tests.tiny import TOKENIZER, NonsenseProtocol

COSTS = Costs(token=1.0, prefill=100.0, prefill_token=0.01)
SETTING = Setting(SPEC, "threads", "In threads", "w", "sglang", 1, "one", 1, 190, 2, 0, 0.0)
SERVE = [sys.executable, "-m", "tests.rollout.fake_server", "serve"]
PROBLEMS = [Question(number) for number in range(8)]


def not_called(*_):
    raise AssertionError("recovery or a log line without a failure")


def measured(engine, path, measurements, problems=PROBLEMS, setting=SETTING, recover=None, log=not_called):
    runner = TreeRunner(engine, NonsenseProtocol(2), TOKENIZER, Budget(190, threads=20, depth=2), Sampling(0.0))

    async def work():
        async def default():
            not_called()

        try:
            return await measure(
                runner, Nonsense(), problems, path, setting, measurements, COSTS, recover or default, log
            )
        finally:
            if isinstance(engine, SglangEngine):
                await engine.close()

    return asyncio.run(work())


def engine_of(*urls, measurements, patience=Patience(1.0, 0.2)):
    return SglangEngine(
        urls, context=CONTEXT - SPARE, vocab_size=len(TOKENIZER), measurements=measurements, patience=patience
    )


def timeless(sample):
    """The fields of a sample that do not depend on the clock."""
    row = dict(vars(sample))
    for name in ("began", "latency", "first_token", "queue", "prefill", "decode", "overhead", "cached_tokens", "tries",
                 "chain_tokens", "chain_requests"):  # fmt: skip
        del row[name]
    return row


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    measurements = Measurements()
    engine = TimedEngine(ContextEngine(), "memory", measurements)
    return list(map(timeless, measured(engine, tmp_path_factory.mktemp("m") / "s.jsonl", measurements)))


def check_whole(path, samples, expected):
    assert [sample.index for sample in samples] == list(range(len(PROBLEMS)))
    assert list(map(timeless, samples)) == expected
    lines = path.read_text().splitlines()
    assert sorted(json.loads(line)["index"] for line in lines) == list(range(len(PROBLEMS)))


def test_the_parts_of_a_latency_add_up(tmp_path):
    measurements = Measurements()
    with FakeServer(wait=0.003) as server:
        samples = measured(engine_of(server.url, measurements=measurements), tmp_path / "s.jsonl", measurements)
    for sample in samples:
        assert (sample.task, sample.variant, sample.condition) == (SPEC, "threads", "")
        parts = sample.queue + sample.prefill + sample.decode + sample.overhead
        assert parts == pytest.approx(sample.latency) and sum(sample.gap.values()) == pytest.approx(
            sample.latency - sample.predicted
        )
        assert 0 < sample.first_token < sample.latency and sample.overhead > 0
        assert sample.prefill > 0.002 * sample.chain_requests
        assert sample.chain_requests <= sample.requests and 0 <= sample.cached_tokens < sample.prompt_tokens
    summary = summarise_latency(samples)
    shares = sum(summary[f"{part}_share"] for part in ("queue", "prefill", "decode", "overhead"))
    assert shares == pytest.approx(1) and summary["n"] == len(PROBLEMS) and 0 < summary["cached_share"] < 1
    json.dumps(summary)


# ---------------------------------------------------------------------- resuming


def test_a_killed_pass_resumes_with_the_missing_samples(tmp_path, expected):
    path, measurements = tmp_path / "s.jsonl", Measurements()
    with FakeServer() as server:
        engine = engine_of(server.url, measurements=measurements)
        measured(engine, path, measurements, PROBLEMS[:5])
        text = path.read_text()
        path.write_text(text[: len(text) - 40])  # killed while it wrote the fifth
        asked = len(server.requests)
        check_whole(path, measured(engine, path, measurements), expected)
        again = len(server.requests)
        assert again > asked
        check_whole(path, measured(engine, path, measurements), expected)
        assert len(server.requests) == again  # nothing was missing
        other = dataclasses.replace(SETTING, concurrency=3)
        measured(engine, path, measurements, setting=other)
    assert len(read_samples(path)) == 2 * len(PROBLEMS)
    passes = read_throughput(tmp_path / "passes.jsonl")
    assert other in passes and passes[other].tokens > 0 and passes[other].samples == len(PROBLEMS)


def test_a_sample_is_not_reused_for_another_problem(tmp_path):
    path, measurements = tmp_path / "s.jsonl", Measurements()
    engine = TimedEngine(ContextEngine(), "memory", measurements)
    measured(engine, path, measurements, [Question(3)])
    found = measured(engine, path, measurements, [Question(4)])
    assert [sample.problem for sample in found] == [{"number": 4}]


def test_an_engine_failure_ends_the_pass_and_is_never_a_sample(tmp_path, expected):
    class Broken(ContextEngine):
        async def decode(self, sequence, stop, limit, sampling, watch=None):
            if sequence.name[1] == 2:
                raise KeyError("no such thing")
            return await super().decode(sequence, stop, limit, sampling, watch)

    path, measurements = tmp_path / "s.jsonl", Measurements()
    broken = Broken()
    with pytest.raises(KeyError):
        measured(TimedEngine(broken, "memory", measurements), path, measurements)
    assert [sample.index for sample in read_samples(path)] == [0, 1] and not broken.live
    check_whole(path, measured(TimedEngine(ContextEngine(), "memory", measurements), path, measurements), expected)


def test_a_stored_sample_with_unknown_fields_is_measured_again(tmp_path, expected):
    path, measurements = tmp_path / "s.jsonl", Measurements()
    engine = TimedEngine(ContextEngine(), "memory", measurements)
    measured(engine, path, measurements)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5] |= {"ran": True}
    rows[6] |= {"setting": {"model": "apr"}}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [sample.index for sample in read_samples(path)] == [0, 1, 2, 3, 4, 7]
    check_whole(path, measured(engine, path, measurements), expected)


# ---------------------------------------------------------------------- servers that fail


@pytest.mark.parametrize(
    "faults", [["drop"], [None, 500, None, "close"], ["end early"] * 3, ["html", None, "wrong id"]]
)
def test_samples_that_a_fault_touched_are_measured_again(tmp_path, expected, faults):
    path, measurements, lines, recovered = tmp_path / "s.jsonl", Measurements(), [], []

    async def recover():
        recovered.append(1)

    with FakeServer(faults) as server:
        engine = engine_of(server.url, measurements=measurements, patience=Patience(5, 5))
        samples = measured(engine, path, measurements, recover=recover, log=lines.append)
        check_whole(path, samples, expected)
        assert lines and recovered and all(server.url in line for line in lines)
    assert max(sample.tries for sample in samples) > 1
    assert not (tmp_path / "passes.jsonl").exists()  # the throughput of a disturbed pass is not stored


def test_a_server_that_keeps_failing_ends_the_pass_which_can_be_resumed(tmp_path, expected):
    path, measurements = tmp_path / "s.jsonl", Measurements()

    async def recover():
        pass

    with FakeServer([None] * 4 + ["html"] * 100) as server:
        engine = engine_of(server.url, measurements=measurements)
        with pytest.raises(ServerError, match=f"4 times: {server.url}: "):
            measured(engine, path, measurements, recover=recover, log=lambda line: None)
        server.faults.clear()
        check_whole(path, measured(engine, path, measurements, recover=recover, log=print), expected)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_started_server_that_dies_is_started_again(tmp_path, expected, concurrency):
    path, measurements, lines = tmp_path / "s.jsonl", Measurements(), []
    setting = dataclasses.replace(SETTING, concurrency=concurrency)
    environment = {"FAKE_LASTS": "12"}
    folder = tmp_path / "model"
    folder.mkdir()
    with StartedServers([*SERVE, str(folder)], 1, tmp_path, [environment], patience=60, log=lines.append) as servers:
        asyncio.run(servers.ready())
        engine = engine_of(*servers.urls, measurements=measurements)
        samples = measured(engine, path, measurements, setting=setting, recover=servers.ready, log=lines.append)
        process = servers._processes[0]
    rows = [{**row, "setting": dataclasses.asdict(setting)} for row in expected]
    check_whole(path, samples, rows)
    assert any("exit code 3" in line for line in lines)
    assert max(sample.tries for sample in samples) > 1
    assert process.poll() is not None  # the context stopped it


def test_a_pass_waits_for_a_server_that_others_run(tmp_path, expected):
    path, measurements, lines = tmp_path / "s.jsonl", Measurements(), []
    server = FakeServer().start()
    servers = Servers([server.url], patience=30, log=lines.append)
    asyncio.run(servers.ready())
    stopped = threading.Event()
    later = FakeServer()

    def away():
        while len(server.requests) < 9:
            time.sleep(0.005)
        server.stop()
        stopped.set()
        time.sleep(1.5)
        later.start(server.port)

    thread = threading.Thread(target=away)
    thread.start()
    server.wait = 0.01
    engine = engine_of(server.url, measurements=measurements)
    samples = measured(engine, path, measurements, recover=servers.ready, log=lines.append)
    thread.join()
    later.stop()
    check_whole(path, samples, expected)
    assert sum(server.url in line for line in lines) >= 2  # waiting for it, and ready again
