"""Reuse of prefixes between slots: a common prompt is computed once per device, and no sequence's tokens change."""

import asyncio
import random

import pytest

from apr_jax.rollout import slots
from apr_jax.rollout.decode import make_copy, make_decode, make_prefill
from apr_jax.rollout.engine import JaxEngine
from apr_jax.rollout.shapes import ACCELERATOR_SHAPES, CPU_SHAPES, width_of
from apr_jax.rollout.slots import Sequence, Slots, State
from apr_jax.threads.engine import Sampling
from apr_jax.train.step import data_mesh
from tests.tiny import make_model

NO_STOP = frozenset()
CONTEXT = 96


@pytest.fixture(scope="module")
def mesh():
    return data_mesh(2)


@pytest.fixture(scope="module")
def model():
    return make_model(1)


def decode_all(engine, sequences, tokens=6):
    async def run():
        return await asyncio.gather(*(engine.decode(s, NO_STOP, tokens, Sampling(0.0)) for s in sequences))

    return [decoded.ids for decoded in asyncio.run(run())]


def test_a_group_s_prompt_is_prefilled_once_on_every_device(model, mesh):
    engine = JaxEngine(model, mesh, slots=16, context=CONTEXT)
    prompt = tuple(range(4, 44))
    group = [engine.open(prompt, (i,)) for i in range(10)]
    together = decode_all(engine, group)
    assert len(set(together)) == 1
    assert (engine.prefilled, engine.copied) == (2 * 39, 8 * 39)
    assert engine.prefills == 1 and engine.copies == 1, "one call of copies fills all slots"
    for sequence in group:
        engine.free(sequence)
    again = [engine.open((*prompt, 50 + i), (20 + i,)) for i in range(4)]  # slots still hold the prompt
    decode_all(engine, again)
    assert engine.prefilled - 2 * 39 <= 4, "only the prompt's last token was not in a cache"


def test_children_that_inherit_reuse_their_parent_s_context(model, mesh):
    engine = JaxEngine(model, mesh, slots=16, context=CONTEXT)
    prompt = tuple(range(4, 54))
    parent = engine.open(prompt, (0,))
    decode_all(engine, [parent])
    children = [engine.fork(parent, 52, (0, i)) for i in range(5)]
    for index, child in enumerate(children):
        engine.extend(child, (60 + index, 5))
    before = engine.prefilled
    inherited = decode_all(engine, children)
    # The parent's context is on one device. The other device computes it once.
    assert engine.prefilled - before == 53 + 4 * 1 and engine.copied == 4 * 52
    alone = JaxEngine(model, mesh, slots=2, context=CONTEXT)
    for index, ids in enumerate(inherited):
        fresh = alone.open((*prompt, *parent.ids[50:52], 60 + index, 5), (9, index))
        assert decode_all(alone, [fresh]) == [ids]
        alone.free(fresh)


@pytest.mark.parametrize("seed", range(4))
def test_reusing_prefixes_changes_no_token(model, mesh, monkeypatch, seed):
    """Prompts with many common prefixes, in an engine with few slots and in an engine that never reuses a prefix."""
    rng = random.Random(seed)
    stems = [[rng.randrange(4, 60) for _ in range(40)] for _ in range(3)]
    prompts = []
    for _ in range(40):
        stem = rng.choice(stems)[: rng.randint(10, 40)]
        prompts.append(stem + [rng.randrange(4, 60) for _ in range(rng.randint(1, 20))])

    async def one(engine, name):
        sequence = engine.open(prompts[name], (name,))
        first = await engine.decode(sequence, NO_STOP, rng.randint(1, 9) if name % 2 else 5, Sampling(0.0))
        fork = engine.fork(sequence, len(prompts[name]) + 1, (name, 1))
        engine.extend(fork, (7, name % 50 + 4))
        if name % 3:
            engine.free(sequence)
        second = await engine.decode(fork, NO_STOP, 4, Sampling(0.0))
        engine.free(fork)
        if name % 3 == 0:
            engine.free(sequence)
        return first.ids[:1], second.ids

    async def all_of_them(engine):
        return await asyncio.gather(*(one(engine, name) for name in range(40)))

    engine = JaxEngine(model, mesh, slots=6, context=CONTEXT, steps=4)
    found = asyncio.run(all_of_them(engine))
    assert engine.copied > 100
    monkeypatch.setattr(slots, "HEAD", 10**6)
    lonely = JaxEngine(model, mesh, slots=80, context=CONTEXT, steps=4)
    assert asyncio.run(all_of_them(lonely)) == found and lonely.copied == 0


def test_new_weights_invalidate_the_cached_prefixes(model, mesh):
    engine = JaxEngine(model, mesh, slots=2, context=CONTEXT)
    prompt = tuple(range(4, 44))
    for _ in range(2):
        sequence = engine.open(prompt, (0,))
        decode_all(engine, [sequence])
        engine.free(sequence)
    assert engine.prefilled == 39
    engine.load(engine._weights)
    decode_all(engine, [engine.open(prompt, (0,))])
    assert engine.prefilled == 2 * 39


def test_a_device_without_work_takes_over_sequences_of_the_other(model, mesh):
    """All long sequences run on one device. The shortest of them move, and no sequence's tokens change."""

    def play(uneven):
        engine = JaxEngine(model, mesh, slots=48, context=CONTEXT, steps=4)
        tokens = [40 if uneven and i % 2 == 0 else 4 for i in range(44)]
        sequences = [engine.open((4 + i, 5, 6), (i,)) for i in range(44)]
        devices = set()

        async def one(sequence, count):
            decoded = await engine.decode(sequence, NO_STOP, count, Sampling(0.0))
            if count == 40:
                devices.add(engine._scheduler.slots.device(sequence.slot))
            return decoded.ids

        async def run():
            return await asyncio.gather(*map(one, sequences, tokens))

        return asyncio.run(run()), devices, engine

    found, devices, engine = play(uneven=True)
    assert devices == {0, 1}
    plain, _, _ = play(uneven=False)
    assert all(ids[:4] == other for ids, other in zip(found, plain))


def asking(ids, depth=1):
    """A new sequence that waits for a slot."""
    sequence = Sequence(ids, None, depth)
    sequence.state = State.WAITING
    return sequence


def test_children_with_a_long_prefix_go_to_the_device_that_holds_it():
    table = Slots(32, devices=2)
    parent = asking(range(300))
    table.place(parent)
    table.note(parent, 299)
    for _ in range(6):
        child = asking([*range(290), 7, 8], 2)
        child.parent = parent
        assert table.place(child) == (parent.slot, 290)
    short = asking([*range(40), 7, 8], 2)
    assert table.place(short) == (-1, 0) and table.device(short.slot) != table.device(parent.slot)


def test_a_child_finds_its_parent_among_many_slots_with_the_same_first_ids():
    table = Slots(40, devices=1)
    roots = [asking([*range(20), *([i] * 30)]) for i in range(20)]
    for root in roots:
        table.place(root)
        table.note(root, 49)
    for root in (roots[0], roots[13], roots[19]):
        child = asking([*root.ids[:45], 3], 2)
        child.parent = root
        assert table.place(child) == (root.slot, 45)


def test_after_a_failed_prefill_its_slot_counts_as_empty(model, mesh):
    engine = JaxEngine(model, mesh, slots=4, context=CONTEXT)
    prompt = tuple(range(4, 44))
    [right] = decode_all(engine, [engine.open(prompt, (0,))])
    broken = JaxEngine(model, mesh, slots=4, context=CONTEXT)
    kept, broken._run_prefill = broken._run_prefill, None
    sequence = broken.open(prompt, (0,))
    with pytest.raises(RuntimeError, match="TypeError"):
        decode_all(broken, [sequence])
    broken._run_prefill = kept
    assert decode_all(broken, [sequence]) == [right]


def test_two_samplings_at_the_same_time_are_refused(model, mesh):
    engine = JaxEngine(model, mesh, slots=4, context=CONTEXT)

    async def both():
        first, second = (engine.open((4, 5, 6), (i,)) for i in range(2))
        return await asyncio.gather(
            engine.decode(first, NO_STOP, 4, Sampling(0.0)), engine.decode(second, NO_STOP, 4, Sampling(1.0)),
            return_exceptions=True,
        )  # fmt: skip

    decoded, error = asyncio.run(both())
    assert len(decoded.ids) == 4 and isinstance(error, ValueError) and "Sampling" in str(error)


@pytest.mark.parametrize(
    "shapes, widths, feed_forward",
    [
        (CPU_SHAPES, (64, 128), 32),
        (ACCELERATOR_SHAPES, (128,), 40),
        (ACCELERATOR_SHAPES._replace(width=64), (64, 128), 48),
    ],
)
def test_rollouts_need_no_shape_that_was_not_compiled_ahead(mesh, shapes, widths, feed_forward):
    """The model has sizes of its own, so that no other test has compiled its functions."""
    model = make_model(1, width=16, feed_forward=feed_forward)
    engine = JaxEngine(model, mesh, slots=8, context=CONTEXT, steps=3, shapes=shapes)
    model, on = engine._graphdef, engine._mesh
    made = [make_decode(model, on, width, 3, False) for width in widths]
    made += [make_prefill(model, on, width) for width in widths]
    copies = [make_copy(on, width) for width in widths]  # copies are independent of the model
    assert engine._widths == list(widths)
    shapes = engine.compile(Sampling(1.0))
    assert sum(function._cache_size() for function in made) == shapes - len(copies)
    made += copies
    before = [function._cache_size() for function in made]
    prompts = [[4 + i % 3] * (i + 1) for i in range(40)]
    sequences = [engine.open(prompt, (i,)) for i, prompt in enumerate(prompts)]

    async def run():
        return await asyncio.gather(*(engine.decode(s, NO_STOP, 50, Sampling(1.0)) for s in sequences))

    asyncio.run(run())
    assert [function._cache_size() for function in made] == before


def test_an_engine_on_a_cpu_has_the_cpu_s_shapes_and_long_prefills_have_few_rows(model, mesh):
    engine = JaxEngine(model, mesh, slots=8, context=CONTEXT)
    assert (engine._widths, engine._sizes) == ([64, 128], [4]) and engine._rows == 8
    for shapes in (CPU_SHAPES, ACCELERATOR_SHAPES):
        for length in shapes.lengths(4096):
            least, *more = shapes.rows_of(length)
            assert least == shapes.rows[0] and all(rows * length <= 8192 for rows in more)


def test_at_most_a_fifth_of_a_long_width_is_padding():
    widths = sorted({width_of(tokens) for tokens in range(1, 9000)})
    assert widths[:3] == [64, 128, 192] and len(widths) < 48
    for tokens in range(1, 9000):
        assert tokens <= width_of(tokens) <= max(tokens + 63, tokens * 5 / 4)
