"""The SGLang engine with a fake server: its trees equal those of an engine in memory, and every fault is handled."""

import asyncio
import json
import math
import threading
import time

import pytest

from apr_jax.errors import UserError
from apr_jax.model.llama import LlamaConfig
from apr_jax.rollout.client import Patience, ServerError, context_of_servers
from apr_jax.rollout.engine import JaxEngine
from apr_jax.rollout.measure import Lineage, Measurements, TimedEngine
from apr_jax.rollout.placement import PLACEMENTS, RootsApart
from apr_jax.rollout.sglang import SglangEngine
from apr_jax.rollout.stream import Events, StreamError
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner, run_all
from apr_jax.train.step import data_mesh
from tests.rollout.fake_server import CONTEXT, SPARE, ContextEngine, FakeServer, next_token
from tests.rollout.fake_server import logprob as fake_logprob
from tests.threads.recorder import Recorder, check_recorded
from tests.tiny import TOKENIZER, NonsenseProtocol, make_model, without_logprobs

GREEDY = Sampling(0.0)
BUDGET = Budget(CONTEXT - SPARE, threads=20, depth=2)
SHORT = Patience(request=0.5, retry=0.3)
PROMPT = [TOKENIZER.bos, 20, 21, 22]


def engine_of(*servers, **settings):
    defaults = {"context": CONTEXT - SPARE, "vocab_size": len(TOKENIZER), "patience": SHORT}
    return SglangEngine(
        [server if isinstance(server, str) else server.url for server in servers], **defaults | settings
    )


def trees(engine, count=8, inherit=False, observer=None):
    """The trees of `count` problems, decoded greedily."""
    runner = TreeRunner(engine, NonsenseProtocol(2, inherit), TOKENIZER, BUDGET, GREEDY, observer)

    async def work():
        found = await run_all([lambda i=i: runner.run(i, (4, i)) for i in range(count)])
        if isinstance(engine, SglangEngine):
            await engine.close()
        return found

    return asyncio.run(work())


def decode(engine, ids=PROMPT, stop=frozenset({TOKENIZER.eos}), limit=8, sampling=GREEDY):
    async def work():
        sequence = engine.open(ids, (1,))
        try:
            return await engine.decode(sequence, stop, limit, sampling)
        finally:
            engine.free(sequence)
            await engine.close()

    return asyncio.run(work())


def continuation(ids, count):
    """The `count` ids that the fake server writes after `ids`."""
    ids = list(ids)
    for _ in range(count):
        ids.append(next_token(ids))
    return tuple(ids[-count:])


# ---------------------------------------------------------------------- trees and requests


@pytest.mark.parametrize("inherit", [False, True])
def test_trees_are_those_of_an_engine_in_memory(inherit):
    with FakeServer() as server:
        mine = trees(engine_of(server), inherit=inherit)
    theirs = trees(ContextEngine(), inherit=inherit)
    assert mine == theirs  # log-probabilities too
    assert sum(1 for tree in mine for _ in tree.threads()) > 12


def test_transient_faults_change_no_tree():
    faults = ["close", None, 500, "drop", 503, "end early", 429, "abort", None, "close"] * 3
    measured = Measurements()
    with FakeServer(faults) as server:
        mine = trees(engine_of(server, patience=Patience(5, 5), measurements=measured))
    assert list(map(without_logprobs, mine)) == list(map(without_logprobs, trees(ContextEngine())))
    assert max(one.attempts for one in measured) > 1
    assert len(server.requests) > len(measured)


# ---------------------------------------------------------------------- an observer

BROKEN = ["drop", "end early", None, "drop", 500, None, "end early"] * 4  # of a streamed answer some parts were sent


@pytest.mark.parametrize("faults", [(), BROKEN], ids=["whole", "broken"])
@pytest.mark.parametrize("incremental", ["", "both"])
def test_an_observer_gets_the_ids_of_every_thread_as_they_arrive(faults, incremental):
    recorder = Recorder()
    with FakeServer(faults, parts=(1, 4, 9, 20), incremental=incremental) as server:
        mine = trees(engine_of(server, patience=Patience(5, 5)), observer=recorder)
    assert mine == trees(ContextEngine())
    check_recorded(recorder, {(4, i): tree for i, tree in enumerate(mine)})
    decodes, events = len(server.requests), [kind for kind, _ in recorder.events]
    assert events.count("decoded") > decodes - len(faults)  # several parts for a request
    intervals = {body["sampling_params"]["stream_interval"] for body in server.requests}
    assert max(intervals) < 100  # tokens; without an observer the server sends all but the first at once


def test_an_observer_learns_which_ids_are_decoded_again():
    class Forgetful(FakeServer):  # answers the same prompt by other tokens each time, as at a temperature
        def _events(self, body):
            events = super()._events(body)
            for event in events:
                ids = [1 + (token + len(self.requests)) % 9 for token in event["output_ids"]][: 6 - len(self.requests)]
                entries = [[-0.5, token, None] for token in ids]
                event["output_ids"] = ids
                event["meta_info"] |= {"completion_tokens": len(ids), "output_token_logprobs": entries}
                if event is events[-1]:
                    event["meta_info"]["finish_reason"] = {"type": "stop"}
            return events

    seen, lengths = [], []
    with Forgetful(["drop", "drop", None], parts=(1, 3)) as server:
        engine = engine_of(server, patience=Patience(5, 5))

        async def work():
            sequence = engine.open(PROMPT, (1,))
            try:
                return await engine.decode(sequence, frozenset({20}), 5, GREEDY, watch)
            finally:
                await engine.close()

        def watch(at, ids):
            assert at <= len(seen)
            seen[at:] = ids
            lengths.append(len(seen))

        found = asyncio.run(work())
    assert tuple(seen) == found.ids and lengths != sorted(lengths)


def test_a_request_has_the_ids_the_sampling_and_the_stop_ids():
    with FakeServer() as server:
        decode(engine_of(server), stop=frozenset({7, 5}), limit=3, sampling=Sampling(0.5, top_k=9))
    first, scoring = server.requests
    assert first["input_ids"] == PROMPT and first["stream"] and first["return_logprob"]
    how = first["sampling_params"]
    assert how.items() >= {"temperature": 0.5, "top_k": 9, "top_p": 1.0, "max_new_tokens": 3, "stop_token_ids": [5, 7],
                           "skip_special_tokens": False}.items()  # fmt: skip
    assert "ignore_eos" not in how  # it would make SGLang ignore the stop ids as well
    assert scoring["input_ids"][: len(PROMPT)] == PROMPT


def test_sampling_from_all_tokens_is_sent_as_a_top_k_of_minus_one():
    with FakeServer() as server:
        decode(engine_of(server), sampling=Sampling(1.0))
    assert [r["sampling_params"]["top_k"] for r in server.requests] == [-1]


def test_top_k_with_top_p_is_refused_unless_one_of_them_has_no_effect():
    """SGLang measures both on the whole distribution, `Sampling` measures top_p on the tokens that top_k left."""
    with FakeServer() as server:
        with pytest.raises(UserError, match="top_k 9 .*top_p 0.8"):
            decode(engine_of(server), sampling=Sampling(0.5, top_k=9, top_p=0.8))
        assert not server.requests
        for sampling, sent in (
            (Sampling(1.0, top_p=0.8), (-1, 0.8)),
            (Sampling(1.0, top_k=10**12, top_p=0.8), (-1, 0.8)),  # a top_k of all tokens cuts none
            (Sampling(1.0, top_k=1, top_p=0.8), (1, 1.0)),
            (Sampling(0.0, top_k=9, top_p=0.8), (9, 1.0)),
        ):
            decode(engine_of(server), sampling=sampling)
            how = server.requests[-1]["sampling_params"]
            assert (how["top_k"], how["top_p"]) == sent


# ---------------------------------------------------------------------- streams


def noise(event):
    """An event with all that a stream may contain: comments, other fields, data on two lines, every kind of line end,
    and Unicode separators that end no line."""
    if event == "[DONE]":
        return b"data:[DONE]\r\n\r\n"
    text = json.loads(event)
    text["text"] = "a\u2028b\x85c\x0cd"
    data = json.dumps(text, ensure_ascii=False).replace(', "meta_info"', ',\r\ndata:"meta_info"')
    return f": ping\n\n:\r\nevent: message\r\nid: 7\rretry: 100\r\n\ndata: {data}\r\n\r\n: pong\n".encode()


@pytest.mark.parametrize("write", [None, noise])
@pytest.mark.parametrize("incremental", ["", "ids", "logprobs", "both"])
@pytest.mark.parametrize("parts", [(1,), (), (1, 4, 6)])
def test_the_parts_of_an_answer_are_joined(parts, incremental, write):
    """Ids and log-probabilities: each part has all so far, or the new ones only."""
    with FakeServer(parts=parts, incremental=incremental, write=write) as server:
        for sampling in (GREEDY, Sampling(0.5)):  # the second sends another request, for the log-probabilities
            found = decode(engine_of(server), stop=frozenset(), sampling=sampling)
            ids = PROMPT + list(found.ids)
            assert found.ids == continuation(PROMPT, 8)
            assert found.model_logprobs == pytest.approx([fake_logprob(ids[:i]) for i in range(len(PROMPT), len(ids))])
        found = decode(engine_of(server, logprobs="none"), stop=frozenset())
        assert found.ids == continuation(PROMPT, 8) and all(map(math.isnan, found.logprobs))


def test_log_probabilities_are_not_checked_if_they_were_not_requested():
    for fault in ("no logprobs", "fewer logprobs", "null logprob"):
        server = FakeServer([fault])
        server._events = lambda body, events=server._events: events({**body, "return_logprob": True})
        with server:
            assert decode(engine_of(server, logprobs="none")).ids


def events_of(content, size):
    events = Events()
    fed = [event for at in range(0, len(content), size) for event in events.feed(content[at : at + size])]
    return fed + events.end()


@pytest.mark.parametrize("size", [1, 2, 3, 10**6])
def test_events_are_parsed_from_chunks_of_any_size(size):
    content = (
        b"\xef\xbb\xbfdata: 1\r\n\r\n: ping\r\n\r\nevent: x\rdata:2\r\r" + "data: {é\x85,\ndata:  4}\n\n\n".encode()
        + b"id\nretry: 5\n\ndata\n\ndata: last"
    )  # fmt: skip
    assert events_of(content, size) == ["1", "2", "{é\x85,\n 4}", "", "last"]
    assert events_of(b"", size) == events_of(b": ping\n\n", size) == []
    with pytest.raises(StreamError, match="'<html>'"):
        events_of(b"data: 1\n\n<html>\n", size)


# ---------------------------------------------------------------------- limits and stops


def test_limits_and_errors_are_those_of_the_jax_engine():
    jax_engine = JaxEngine(make_model(), data_mesh(1), slots=2, context=64)
    assert isinstance(jax_engine._config, LlamaConfig)

    def error_of(engine, work):
        with pytest.raises(ValueError) as error:
            asyncio.run(work(engine))
        return str(error.value)

    async def too_long(engine):
        engine.open([1] * 65, (1,))

    async def empty(engine):
        engine.open([], (1,))

    async def fork_too_long(engine):
        engine.fork(engine.open([1] * 3, (1,)), 4, (2,))

    async def full(engine):
        await engine.decode(engine.open([1] * 64, (1,)), frozenset(), 5, GREEDY)

    async def nothing(engine):
        await engine.decode(engine.open([1] * 6, (1,)), frozenset(), 0, GREEDY)

    async def freed(engine):
        sequence = engine.open([1] * 6, (1,))
        engine.free(sequence)
        engine.free(sequence)
        await engine.decode(sequence, frozenset(), 5, GREEDY)

    with FakeServer() as server:
        for work in (too_long, empty, fork_too_long, full, nothing, freed):
            assert error_of(engine_of(server, context=64), work) == error_of(jax_engine, work)
    assert not server.requests


def test_a_sequence_may_fill_the_context_that_servers_report():
    with FakeServer() as server:
        context = asyncio.run(context_of_servers([server.url]))
        assert context == CONTEXT - SPARE
        for length in (1, context - 20, context - 1):
            found = decode(engine_of(server), ids=[9] * length, stop=frozenset(), limit=1000)
            assert len(found.ids) == context - length and not found.stopped


def test_stopped_means_that_the_last_id_is_a_stop_id_even_at_the_limit():
    ids = continuation(PROMPT, 4)
    assert len(set(ids)) == 4
    with FakeServer() as server:
        for limit, stop, length, stopped in ((4, {ids[3]}, 4, True), (3, {ids[3]}, 3, False), (9, {ids[1]}, 2, True)):
            found = decode(engine_of(server), stop=frozenset(stop), limit=limit)
            assert (found.ids, found.stopped) == (ids[:length], stopped)


def test_decoding_continues_after_a_stop_token_of_the_server_that_was_not_requested():
    ids = continuation(PROMPT, 12)
    with FakeServer(own_end=ids[4]) as server:
        found = decode(engine_of(server), stop=frozenset({len(TOKENIZER) - 1}), limit=12)
    assert found.ids == ids and len(found.logprobs) == 12 and len(server.requests) > 1


def test_a_server_with_a_smaller_context_than_the_engine_s_is_an_error():
    with FakeServer() as server, pytest.raises(ServerError, match=" 500 "):
        decode(engine_of(server, context=500), ids=[9] * 150, stop=frozenset(), limit=300)


# ---------------------------------------------------------------------- invalid arguments


def test_an_id_outside_the_vocabulary_is_never_sent():
    with FakeServer() as server:
        for ids, stop in (([1, len(TOKENIZER)], set()), ([1, -1], set()), ([1], {len(TOKENIZER)})):
            with pytest.raises(ValueError, match=f"0 to {len(TOKENIZER) - 1}, .* {[*ids, *stop][-1]}\\b"):
                decode(engine_of(server), ids=ids, stop=frozenset(stop))
    assert not server.requests


def test_invalid_settings_are_refused():
    for urls in ([], ["localhost:80"], ["ftp://a"], ["http://"]):
        with pytest.raises(ValueError, match="server"):
            SglangEngine(urls, context=9, vocab_size=9)
    with pytest.raises(ValueError, match="at_once .* 0"):
        SglangEngine(["http://a"], context=9, vocab_size=9, at_once=0)
    with pytest.raises(ValueError, match="logprobs .*both, drawn, none, .*'all'"):
        SglangEngine(["http://a"], context=9, vocab_size=9, logprobs="all")
    with pytest.raises(ValueError, match="retry .* 0"):
        Patience(retry=0)


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "fault, message",
    [
        ("html", "'<html>"), ("wrong id", f"id {len(TOKENIZER)}\\b.* {len(TOKENIZER) - 1}\\b"),
        ("text id", "output_ids"), ("too many", "1 to 8 "), ("no tokens", " 0 tokens"),
        ("no logprobs", "log-prob"), ("null logprob", "log-prob"),
        ("large logprob", "log-prob"), ("nested", "JSON"),
        ("fewer logprobs", "log-prob"), ("cut prompt", " 1 of 4 "),
        ("other count", "completion_tokens .* 99"), ("other tokens", "first .* tokens"),
        (404, "404: fault 404"), ("error event", "400: no such thing"),
    ],
)  # fmt: skip
def test_an_invalid_answer_is_an_error_of_one_line_without_a_second_attempt(fault, message):
    with FakeServer([fault]) as server:
        with pytest.raises(ServerError, match=message) as error:
            decode(engine_of(server))
        assert str(error.value).startswith(server.url) and "\n" not in str(error.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "fault, message",
    [
        ("close", "connection"), ("drop", "connection"), ("end early", "answer"),
        (500, "500: fault 500"), (429, "429"), ("abort", "500: gone"), ("slow", "0.5 s"),
    ],
)  # fmt: skip
def test_a_fault_that_lasts_is_an_error_in_bounded_time(fault, message):
    with FakeServer([fault] * 50) as server:
        began = time.monotonic()
        with pytest.raises(ServerError, match=f"{message}.* [0-9]+ attempts") as error:
            decode(engine_of(server))
        assert time.monotonic() - began < 2 * SHORT.request + SHORT.retry + 0.5
        assert server.url in str(error.value)
    assert len(server.requests) > 1


def test_a_server_that_starts_late_is_waited_for():
    first = FakeServer().start()
    first.stop()
    with pytest.raises(ServerError, match=first.url):
        decode(engine_of(first.url))
    later = FakeServer()
    timer = threading.Timer(0.4, later.start, [first.port])
    timer.start()
    found = decode(engine_of(first.url, patience=Patience(5, 5)))
    timer.join()
    later.stop()
    assert found.ids == continuation(PROMPT, len(found.ids))


def test_the_context_of_a_server_that_does_not_run_is_an_error():
    with pytest.raises(ServerError, match="http://127.0.0.1:1: "):
        asyncio.run(context_of_servers(["http://127.0.0.1:1"]))


# ---------------------------------------------------------------------- log-probabilities


def test_logprobs_are_those_of_the_sampling_and_model_logprobs_those_of_the_model():
    with FakeServer() as server:
        for temperature in (0.0, 1.0):
            found = decode(engine_of(server), sampling=Sampling(temperature))
            assert found.logprobs == found.model_logprobs
        asked = len(server.requests)
        found = decode(engine_of(server), sampling=Sampling(0.5))
        assert len(server.requests) == asked + 2
        ids = PROMPT + list(found.ids)
        own = [fake_logprob(ids[:i]) for i in range(len(PROMPT), len(ids))]
        assert found.model_logprobs == pytest.approx(own)
        assert found.logprobs == pytest.approx([value / 0.5 for value in own])
        asked = len(server.requests)
        found = decode(engine_of(server, logprobs="drawn"), sampling=Sampling(0.5))
        assert all(map(math.isnan, found.model_logprobs)) and not any(map(math.isnan, found.logprobs))
        found = decode(engine_of(server, logprobs="none"))
        assert all(map(math.isnan, found.logprobs + found.model_logprobs))
        assert len(server.requests) == asked + 2 and not server.requests[-1]["return_logprob"]


# ---------------------------------------------------------------------- threads and servers


def test_the_thread_of_a_sequence_is_found_by_its_name():
    lineage = Lineage()
    root = lineage.open((4, 7))
    child = lineage.open((4, 7, 0, 2))
    assert (root.depth, child.depth) == (0, 1)
    assert lineage.fork(root, (4, 7, 1)) == root
    assert lineage.fork(root, (4, 7, 1, 0)).depth == 1  # a child that inherits
    assert lineage.open((4, 7, 0, 2, 0, 0)).depth == 2
    lineage.close(root)
    lineage.close(root)
    assert lineage.open((4, 7, 0, 3)).depth == 0  # a root: the thread (4, 7) has ended


@pytest.mark.parametrize("inherit", [False, True])
@pytest.mark.parametrize("name", sorted(PLACEMENTS))
def test_a_thread_stays_on_its_server(name, inherit):
    measured = Measurements()
    with FakeServer() as a, FakeServer() as b, FakeServer() as c:
        mine = trees(engine_of(a, b, c, placement=PLACEMENTS[name](), measurements=measured), inherit=inherit)
        counts = [len(server.requests) for server in (a, b, c)]
    assert list(map(without_logprobs, mine)) == list(map(without_logprobs, trees(ContextEngine(), inherit=inherit)))
    homes = {}
    for one in measured:
        assert homes.setdefault(one.thread, one.server) == one.server
    children = [one for one in measured if one.depth]
    assert children and len({one.thread for one in measured}) > len({one.thread for one in children})
    if name == "one":
        assert counts[1:] == [0, 0]
    if name == "roots_apart":
        assert all((one.server == a.url) == (one.depth == 0) for one in measured) and min(counts) > 0
    if name == "round_robin":
        assert min(counts) > 0


def test_roots_apart_with_one_server_puts_all_threads_on_it():
    measured = Measurements()
    with FakeServer() as server:
        trees(engine_of(server, placement=RootsApart(), measurements=measured), count=3)
    assert {one.depth for one in measured} >= {0, 1}


def test_a_server_has_at_most_at_once_open_requests():
    with FakeServer(wait=0.005) as server:
        trees(engine_of(server, at_once=3, patience=Patience(5, 5)))
    assert server.most_under_way == 3


# ---------------------------------------------------------------------- measurements


def test_every_request_is_measured():
    measured = Measurements()
    with FakeServer(wait=0.002) as server:
        mine = trees(engine_of(server, at_once=2, measurements=measured, patience=Patience(5, 5)))
        assert len(measured) == len(server.requests)
    assert sum(one.output_tokens for one in measured) >= sum(t.sampled_tokens for tree in mine for t in tree.threads())
    for one in measured:
        assert one.asked <= one.start < one.first <= one.end and one.server == server.url
        assert (one.server_seconds, one.server_queue) == (0.01, 0.001)
        assert 0 <= one.cached_tokens < one.prompt_tokens
    assert any(one.start - one.asked > 0.001 for one in measured)  # it waited in the engine
    assert max(one.cached_tokens for one in measured if len(one.thread) == 2) > 4  # a root that resumed after a join
    everything = len(measured)
    taken = measured.take((4, 3))
    assert taken and {one.thread[:2] for one in taken} == {(4, 3)} and len(measured) == everything - len(taken)


def test_a_timed_engine_changes_no_token():
    measured = Measurements()
    mine = trees(TimedEngine(ContextEngine(), "memory", measured), inherit=True)
    assert list(map(without_logprobs, mine)) == list(map(without_logprobs, trees(ContextEngine(), inherit=True)))
    assert {one.server for one in measured} == {"memory"} and {one.depth for one in measured} >= {0, 1}
    assert all(one.asked <= one.first <= one.end for one in measured)
    engine = TimedEngine(ContextEngine(), "memory", measured, split=False)
    assert list(map(without_logprobs, trees(engine, inherit=True))) == list(map(without_logprobs, mine))
    assert measured[-1].first is None
    for split in (True, False):
        recorder = Recorder()
        watched = trees(TimedEngine(ContextEngine(), "memory", Measurements(), split), inherit=True, observer=recorder)
        check_recorded(recorder, {(4, i): tree for i, tree in enumerate(watched)})
        assert list(map(without_logprobs, watched)) == list(map(without_logprobs, mine))
