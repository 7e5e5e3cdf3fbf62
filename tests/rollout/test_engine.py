"""The JAX engine: its tokens and log-probabilities are those of plain forward passes, for any number of slots, order of
requests and batch composition."""

import asyncio
import random

import jax
import numpy as np
import pytest
from flax import nnx

from apr_jax.data.packing import first_fit, flatten_thread, flatten_tree, pack_rows
from apr_jax.data.store import SAMPLED_ROLES
from apr_jax.evaluate.records import read_records
from apr_jax.evaluate.run import evaluate
from apr_jax.rollout.engine import JaxEngine
from apr_jax.rollout.shapes import ACCELERATOR_SHAPES
from apr_jax.tasks.countdown import CountdownProtocol, Problem, ProblemRange
from apr_jax.threads import Block, Spawn
from apr_jax.threads.engine import Sampling
from apr_jax.threads.metrics import children, depth
from apr_jax.threads.run import Budget, TreeRunner, run_all
from apr_jax.train.loss import row_logits, token_logprobs
from apr_jax.train.step import data_mesh
from tests.evaluate.nonsense import Nonsense
from tests.threads.recorder import Recorder, check_recorded
from tests.tiny import (
    SIZES,
    TOKENIZER,
    NonsenseProtocol,
    log_softmax,
    make_model,
    plain_logits,
    spawning_model,
    without_logprobs,
)

CONTEXT = 96
NO_STOP = frozenset()


@pytest.fixture(scope="module")
def mesh():
    return data_mesh(min(2, jax.device_count()))  # 1 on a machine with one GPU


@pytest.fixture(scope="module")
def spawning():
    return spawning_model(1)


@pytest.fixture(scope="module")
def plain():
    return make_model(1)


def idle(engine):
    """Whether the engine has no request and no slot has an owner."""
    engine._scheduler.check()
    return not engine._scheduler.busy and not any(engine._scheduler.slots.owners)


def run_trees(engine, protocol, budget, names, order=None, temperature=1.0, observer=None):
    """The trees of problems 0, 1, ... with these names. They are returned in this order and requested in `order`."""
    runner = TreeRunner(engine, protocol, TOKENIZER, budget, Sampling(temperature), observer)
    order = list(range(len(names))) if order is None else order
    jobs = [lambda i=i: runner.run(i, names[i]) for i in order]
    found = dict(zip(order, asyncio.run(run_all(jobs))))
    assert idle(engine)
    return [found[i] for i in range(len(names))]


# ---------------------------------------------------------------------- greedy, token for token


async def walk(engine, ids, name, levels, sampling, found):
    """Run one thread without a runner. Twice it writes, waits for three children, and resumes in a fork that is shorter
    by two ids. Appends (context, decoded) of every decode to `found`. Returns an id that depends on all of them."""
    sequence = engine.open(ids, name)
    for turn in range(2):
        before = tuple(sequence.ids)
        decoded = await engine.decode(sequence, NO_STOP, 5 + turn, sampling)
        assert tuple(sequence.ids) == before + decoded.ids and len(decoded.ids) == 5 + turn and not decoded.stopped
        found.append((before, decoded))
        if levels:
            prompts = [(4 + index, 5 + levels, *decoded.ids[:2]) for index in range(3)]
            results = await asyncio.gather(
                *(walk(engine, ids, (*name, turn, i), levels - 1, sampling, found) for i, ids in enumerate(prompts))
            )
            parent = sequence
            sequence = engine.fork(parent, len(parent.ids) - 2, (*name, -turn - 1))
            engine.free(parent)
            engine.extend(sequence, results)
    last = sequence.ids[-1]
    engine.free(sequence)
    return last


@pytest.mark.parametrize("slots", [2, 8, 48])  # with 48 no sequence loses its slot, and forks take over their parents'
def test_greedy_tokens_are_the_argmax_of_plain_forwards_despite_forks_joins_and_evictions(plain, mesh, slots):
    engine = JaxEngine(plain, mesh, slots=slots, context=CONTEXT, steps=4)
    found = []

    async def all_trees():
        await asyncio.gather(*(walk(engine, (1, 7, 20 + i), (i,), 2, Sampling(0.0), found) for i in range(3)))

    asyncio.run(all_trees())
    assert idle(engine) and len(found) == 3 * 2 * (1 + 6 + 36)
    random.Random(0).shuffle(found)
    for before, decoded in found[:60]:
        logits = plain_logits(plain, [*before, *decoded.ids])[len(before) - 1 : -1]
        assert decoded.ids == tuple(logits.argmax(axis=-1))
        right = log_softmax(logits)[np.arange(len(decoded.ids)), list(decoded.ids)]
        np.testing.assert_allclose(decoded.logprobs, right, atol=1e-4)


def test_a_fork_does_not_change_its_parent(plain, mesh):
    """Forks and parent continue side by side, and each decodes the same tokens as a new sequence with the same ids."""
    engine = JaxEngine(plain, mesh, slots=2, context=CONTEXT)
    prompt = tuple(range(4, 24))

    async def alone(ids):
        sequence = engine.open(ids, (0,))
        decoded = await engine.decode(sequence, NO_STOP, 6, Sampling(0.0))
        engine.free(sequence)
        return decoded.ids

    async def forked():
        parent = engine.open(prompt, (0,))
        first = await engine.decode(parent, NO_STOP, 6, Sampling(0.0))
        forks = [engine.fork(parent, length, (1, length)) for length in (20, 9, 1)]
        for fork in forks:
            engine.extend(fork, (30, 31))
        ids = [tuple(fork.ids) for fork in forks]
        assert ids == [(*(*prompt, *first.ids)[:length], 30, 31) for length in (20, 9, 1)]
        parent_ids = tuple(parent.ids)
        both = await asyncio.gather(*(engine.decode(s, NO_STOP, 6, Sampling(0.0)) for s in (*forks, parent)))
        for sequence in (parent, *forks):
            engine.free(sequence)
        return [*ids, parent_ids], [decoded.ids for decoded in both]

    contexts, continued = asyncio.run(forked())
    assert continued == [asyncio.run(alone(ids)) for ids in contexts]
    assert idle(engine)


# ---------------------------------------------------------------------- sampled trees


@pytest.fixture(scope="module")
def trees(spawning, mesh):
    """Nested trees of nonsense, sampled with 16 slots: every other number of slots must give the same tokens."""
    engine = JaxEngine(spawning, mesh, slots=16, context=CONTEXT, seed=3, steps=8)
    found = run_trees(engine, NonsenseProtocol(), BUDGET, NAMES)
    assert sum(map(children, found)) > 50 and max(map(depth, found)) == 3, "too few threads for the tests to mean much"
    assert sum(tree.outcome.suppressed_joins for tree in found) > 5
    return found


BUDGET = Budget(CONTEXT, threads=40, depth=3)
NAMES = [(7, i) for i in range(12)]


def test_the_training_forward_computes_the_log_probabilities_of_the_engine(trees, spawning):
    segments = [flatten_thread(thread) for tree in trees for thread in tree.threads()]
    rows = first_fit([len(segment) for segment in segments], 256)
    packed = pack_rows([[segments[i] for i in row] for row in rows], 256)
    logprobs = jax.jit(lambda rows: token_logprobs(row_logits(spawning, rows), rows.tokens))(packed)
    sampled = np.isin(packed.role, SAMPLED_ROLES)
    assert sampled.sum() > 500
    assert np.abs(np.asarray(logprobs) - packed.logprobs)[sampled].max() < 1e-4
    assert (packed.logprobs[sampled] < 0).all()


def test_children_that_inherit_continue_their_parent_s_context(spawning, mesh):
    """The packed training forward computes the engine's log-probabilities, and the number of slots changes no token."""
    protocol = NonsenseProtocol(2, inherit=True)
    found = run_trees(JaxEngine(spawning, mesh, slots=16, context=CONTEXT, seed=3, steps=8), protocol, BUDGET, NAMES)
    inheriting = [thread for tree in found for thread in tree.threads() if thread.inherits]
    assert len(inheriting) > 20 and max(map(depth, found)) >= 2
    segments = [segment for tree in found for segment in flatten_tree(tree)]
    assert len(segments) == len(found)
    length = max(map(len, segments))
    packed = pack_rows([[segment] for segment in segments], -(-length // 64) * 64)
    logprobs = jax.jit(lambda rows: token_logprobs(row_logits(spawning, rows), rows.tokens))(packed)
    sampled = np.isin(packed.role, SAMPLED_ROLES)
    assert sampled.sum() > 300
    assert np.abs(np.asarray(logprobs) - packed.logprobs)[sampled].max() < 1e-4
    recorder = Recorder()
    engine = JaxEngine(spawning, mesh, slots=2, context=CONTEXT, seed=3, steps=8)
    few = run_trees(engine, protocol, BUDGET, NAMES, observer=recorder)
    assert list(map(without_logprobs, few)) == list(map(without_logprobs, found))
    check_recorded(recorder, dict(zip(NAMES, few)))


def test_an_observer_gets_the_ids_of_every_thread_and_changes_no_bit(trees, spawning, mesh):
    recorder = Recorder()
    engine = JaxEngine(spawning, mesh, slots=16, context=CONTEXT, seed=3, steps=8)
    watched = run_trees(engine, NonsenseProtocol(), BUDGET, NAMES, observer=recorder)
    assert watched == trees  # log-probabilities too
    check_recorded(recorder, dict(zip(NAMES, watched)))
    assert recorder.again == 0


def test_the_model_s_own_log_probabilities_are_returned_if_they_differ(spawning, mesh):
    def trees(sampling):
        engine = JaxEngine(spawning, mesh, slots=16, context=CONTEXT, seed=3, steps=8)
        runner = TreeRunner(engine, NonsenseProtocol(), TOKENIZER, BUDGET, sampling)
        return asyncio.run(run_all([lambda name=name: runner.run(0, name) for name in NAMES[:4]]))

    for sampling in (Sampling(0.7), Sampling(1.0, top_k=20), Sampling(1.3, top_p=0.8)):
        blocks = [b for tree in trees(sampling) for t in tree.threads() for b in t.context if b.sampled and len(b) > 2]
        assert blocks and all(b.model_logprobs is not None and b.model_logprobs != b.logprobs for b in blocks)
        assert all(np.isfinite(b.logprobs).all() for b in blocks)
        tree = trees(sampling)[0]
        ids = [token for block in tree.root.context for token in block.content]
        if not tree.root.spawns:
            logits = log_softmax(plain_logits(spawning, ids))
            first = len(tree.root.blocks[0])
            right = [logits[first + i - 1, token] for i, token in enumerate(tree.root.blocks[1].content)]
            np.testing.assert_allclose(tree.root.blocks[1].model_logprobs, right, atol=1e-4)
    plain = [b for tree in trees(Sampling(1.0)) for t in tree.threads() for b in t.context if b.sampled]
    assert all(b.model_logprobs is None for b in plain)


@pytest.mark.parametrize(
    "devices, slots, shapes",
    [
        (1, 1, None),
        (2, 2, None),
        (1, 7, None),
        (2, 64, None),
        (1, 8, ACCELERATOR_SHAPES),
        (2, 32, ACCELERATOR_SHAPES._replace(width=32, length=16)),
    ],
)
def test_tokens_do_not_depend_on_slots_devices_shapes_or_order(trees, spawning, devices, slots, shapes):
    order = random.Random(slots).sample(range(len(NAMES)), len(NAMES))
    mesh = data_mesh(min(devices, jax.device_count()))
    engine = JaxEngine(spawning, mesh, slots=slots, context=CONTEXT, seed=3, steps=8, shapes=shapes)
    for tree, other in zip(run_trees(engine, NonsenseProtocol(), BUDGET, NAMES, order), trees):
        assert without_logprobs(tree) == without_logprobs(other) and tree.outcome == other.outcome


def test_tokens_do_not_depend_on_batch_composition_or_the_length_of_decode_calls(trees, spawning, mesh):
    """Trees run alone, in an engine whose decode calls have another number of steps."""
    engine = JaxEngine(spawning, mesh, slots=2, context=CONTEXT, seed=3, steps=16)
    for i in (0, 5):
        runner = TreeRunner(engine, NonsenseProtocol(), TOKENIZER, BUDGET, Sampling(1.0))
        assert without_logprobs(asyncio.run(runner.run(i, NAMES[i]))) == without_logprobs(trees[i])


def test_names_and_seeds_decide_the_draws(trees, spawning, mesh):
    engine = JaxEngine(spawning, mesh, slots=16, context=CONTEXT, seed=4, steps=8)
    reseeded = run_trees(engine, NonsenseProtocol(), BUDGET, NAMES)
    equal = sum(without_logprobs(a) == without_logprobs(b) for a, b in zip(reseeded, trees))
    assert equal <= 2, "only short trees may be equal, by chance"
    runner = TreeRunner(engine, NonsenseProtocol(), TOKENIZER, BUDGET, Sampling(1.0))
    same_prompt = asyncio.run(run_all([lambda name=name: runner.run(1, name) for name in NAMES]))
    assert len({without_logprobs(tree) for tree in same_prompt}) >= len(NAMES) - 2


def test_a_fork_draws_other_tokens_than_its_parent_at_the_same_positions(plain, mesh):
    """Without that, a thread would repeat the random numbers of its call after the join."""
    engine = JaxEngine(plain, mesh, slots=2, context=CONTEXT)

    async def both():
        parent = engine.open((1, 5, 6), (0,))
        first = await engine.decode(parent, NO_STOP, 20, Sampling(1.0))
        fork = engine.fork(parent, 3, (0, 1))
        second = await engine.decode(fork, NO_STOP, 20, Sampling(1.0))
        engine.free(parent)
        engine.free(fork)
        return first.ids, second.ids

    first, second = asyncio.run(both())
    assert first != second and idle(engine)


@pytest.mark.parametrize("wide, threads", [(4, 160), pytest.param(15, 4000, marks=pytest.mark.slow)])
def test_two_slots_complete_wide_nested_trees_of_waiting_parents(mesh, wide, threads):
    """Far more parents wait than there are slots. Every tree ends, with the same tokens as with many slots."""
    model, budget = spawning_model(1, opens=6.5, closes=5.0, ends=0.0), Budget(CONTEXT, threads, depth=3)
    few, many = (
        run_trees(
            JaxEngine(model, mesh, slots=slots, context=CONTEXT, steps=8), NonsenseProtocol(wide), budget, [(0,), (1,)]
        )
        for slots in (2, 16)
    )
    assert max(map(depth, few)) == 3 and sum(map(children, few)) > 60
    assert list(map(without_logprobs, few)) == list(map(without_logprobs, many))


def test_only_prompts_joins_and_replaced_openings_are_forced(trees):
    """Prompts, joins and a spawn opening that replaces a join opening are forced and have no log-probabilities. All
    other blocks are sampled."""
    open_, close = (TOKENIZER.token(text) for text in (NonsenseProtocol.spawn_open, NonsenseProtocol.spawn_close))
    suppressed = 0
    for tree in trees:
        for thread in tree.threads():
            assert not thread.blocks[0].sampled and thread.blocks[0].content[0] == TOKENIZER.bos
            for item in thread.blocks[1:]:
                for block in (*item.call, item.join) if isinstance(item, Spawn) else (item,):
                    assert (block.logprobs is not None) == block.sampled
                    joined = isinstance(item, Spawn) and block is item.join
                    if not block.sampled and not joined:
                        assert block == Block((open_,), sampled=False)
                        suppressed += 1
                if isinstance(item, Spawn):
                    call = [token for block in item.call for token in block.content]
                    assert (call[0], call[-1]) == (open_, close)
    assert suppressed == sum(tree.outcome.suppressed_joins for tree in trees)


# ---------------------------------------------------------------------- malformed output and failures


@pytest.mark.parametrize("malformed", ["stop", "fail"])
@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_trees_of_an_untrained_model_end_without_an_exception(mesh, count, malformed):
    rng = random.Random(0)
    source = ProblemRange(max_number=30)
    problems = [source.draw(rng) for _ in range(min(count, 300))] * -(-count // 300)
    count = len(problems)
    engine = JaxEngine(spawning_model(2, opens=2.0, closes=3.0, ends=2.0), mesh, slots=32, context=CONTEXT)
    budget = Budget(CONTEXT, 8, 1, malformed=malformed)
    runner = TreeRunner(engine, CountdownProtocol(), TOKENIZER, budget, Sampling(1.2))
    ended = []
    jobs = [lambda i=i, problem=problem: runner.run(problem, (i,)) for i, problem in enumerate(problems)]
    found = asyncio.run(run_all(jobs, lambda index, tree: ended.append(index)))
    assert sorted(ended) == list(range(count)) and len(found) == count and idle(engine)
    for problem, tree in zip(problems, found):
        assert TOKENIZER.decode(tree.root.blocks[0].content) == CountdownProtocol().root_prompt(problem)
    kinds = {kind for tree in found for kind in tree.outcome.failures}
    assert "length" in kinds and any(tree.outcome.malformed for tree in found)
    assert any(tree.outcome.suppressed_joins for tree in found) and any(not tree.outcome.failures for tree in found)


class Breaking(NonsenseProtocol):
    """A protocol that raises an error when a child thread of a `broken` problem spawns, while other threads decode."""

    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    def root_prompt(self, problem):
        return ("b" if problem.target in self.broken else "a") + f"{problem.target}\n"

    def parse_spawn(self, text):
        request = super().parse_spawn(text)
        if request is not None and text.startswith("b"):
            request = type(request)(tuple("c" + child for child in request.children), request.position)
        if request is not None and text.startswith("c"):
            raise ZeroDivisionError("on purpose")
        return request


def test_a_tree_that_raises_ends_the_evaluation_and_leaves_the_engine_usable(spawning, mesh, tmp_path):
    """The evaluation is resumed with the same engine. Its records are those of an evaluation without interruption."""
    problems = [Problem((1, 2), 100 + i) for i in range(12)]
    engine = JaxEngine(spawning, mesh, slots=4, context=CONTEXT, seed=3, steps=8)

    def records(which, path):
        runner = TreeRunner(engine, Breaking(which), TOKENIZER, BUDGET, Sampling(1.0))
        return evaluate(runner, problems, path, task=Nonsense(), variant="threads", name="x", at_once=3)

    with pytest.raises(ZeroDivisionError):
        records({problem.target for problem in problems[3::3]}, tmp_path / "broken.jsonl")
    assert idle(engine)
    kept = read_records(tmp_path / "broken.jsonl.partial")
    assert 0 < len(kept) < len(problems)

    def tokens(found):
        return [without_logprobs(record.thread_tree) for record in found]

    again, whole = (records((), tmp_path / f"{name}.jsonl") for name in ("broken", "whole"))
    assert idle(engine) and [record.index for record in again] == list(range(12))
    assert tokens(again) == tokens(whole)
    assert tokens(kept) == tokens(whole[record.index] for record in kept)


def test_an_engine_is_usable_after_a_run_that_raised(spawning, trees, mesh):
    engine = JaxEngine(spawning, mesh, slots=4, context=CONTEXT, seed=3, steps=8)

    class Broken(NonsenseProtocol):
        def join(self, spawn, results):
            raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError):
        run_trees(engine, Broken(), BUDGET, NAMES)
    assert idle(engine)
    again = run_trees(engine, NonsenseProtocol(), BUDGET, NAMES[:3])
    assert list(map(without_logprobs, again)) == list(map(without_logprobs, trees[:3]))


def test_a_failure_inside_the_engine_is_raised_by_every_decode(plain, mesh):
    engine = JaxEngine(plain, mesh, slots=2, context=CONTEXT)

    async def ask():
        sequences = [engine.open((1, 5), (i,)) for i in range(5)]
        outside = frozenset({10**6})  # a stop id that is not in the vocabulary
        work = (engine.decode(sequence, outside, 3, Sampling()) for sequence in sequences)
        return await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 60)

    errors = asyncio.run(ask())
    assert len(errors) == 5 and all(isinstance(error, RuntimeError) and "IndexError" in str(error) for error in errors)


def test_loaded_weights_are_used(plain, mesh):
    engine, other = JaxEngine(plain, mesh, slots=2, context=CONTEXT), make_model(9)

    async def greedy():
        sequence = engine.open((1, 9, 30), (0,))
        decoded = await engine.decode(sequence, NO_STOP, 8, Sampling(0.0))
        engine.free(sequence)
        return decoded.ids

    before = asyncio.run(greedy())
    engine.load(nnx.state(other))
    after = asyncio.run(greedy())
    assert before != after
    assert after == tuple(plain_logits(other, (1, 9, 30, *after)).argmax(axis=-1)[2:-1])


# ---------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"slots": 3}, "slots.* 3"),
        ({"slots": 0}, "slots.* 0"),
        ({"context": SIZES["context"] + 1}, f"{SIZES['context']} .*{SIZES['context'] + 1}"),
    ],
)
def test_invalid_engine_settings_are_refused_with_their_value(plain, mesh, settings, message):
    with pytest.raises(ValueError, match=message):
        JaxEngine(plain, mesh, **{"slots": 2, "context": CONTEXT} | settings)


def test_invalid_sequences_and_requests_are_refused(plain, mesh):
    engine = JaxEngine(plain, mesh, slots=2, context=8)
    for ids in ((), (1,) * 9):
        with pytest.raises(ValueError, match=f"1 to 8 .*{len(ids)}"):
            engine.open(ids, (0,))
    sequence = engine.open((1, 2, 3), (0,))
    for length in (0, 4):
        with pytest.raises(ValueError, match=f"1 to 3 .*{length}"):
            engine.fork(sequence, length, (1,))

    def decode(sequence, limit=3):
        return asyncio.run(engine.decode(sequence, NO_STOP, limit, Sampling()))

    with pytest.raises(ValueError, match="8 of 8"):
        decode(engine.open((1,) * 8, (0,)))
    with pytest.raises(ValueError, match="3 of 8"):
        decode(sequence, limit=0)
    engine.free(sequence)
    with pytest.raises(ValueError, match="freed"):
        decode(sequence)
    for name, given in (("temperature", -1), ("top_k", -2), ("top_p", 0), ("top_p", 2)):
        with pytest.raises(ValueError, match=f"{name}.* {given}"):
            Sampling(**{name: given})
    with pytest.raises(ValueError, match="9 .*8"):
        TreeRunner(engine, NonsenseProtocol(), TOKENIZER, Budget(9), Sampling())


def test_a_context_is_filled_to_its_last_token(plain, mesh):
    for context in (8, 128, 250):
        engine = JaxEngine(plain, mesh, slots=2, context=context)

        async def fill():
            sequence = engine.open((1, 9, 30), (0,))
            decoded = await engine.decode(sequence, NO_STOP, 10**6, Sampling(0.0))
            engine.free(sequence)
            return decoded

        decoded = asyncio.run(fill())
        assert len(decoded.ids) == context - 3 and not decoded.stopped
        assert decoded.ids == tuple(plain_logits(plain, (1, 9, 30, *decoded.ids)).argmax(axis=-1)[2:-1])
