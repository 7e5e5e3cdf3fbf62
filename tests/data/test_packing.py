"""Tests of packing: rows keep every token, batches depend on seed and step alone, and a packed tree gives the gradient
of its unpacked paths."""

import dataclasses
import random
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from apr_jax.data.packing import PackedBatches, first_fit, flatten_thread, flatten_tree, pack_rows
from apr_jax.threads import Block, Spawn, Thread, ThreadTree
from apr_jax.threads.metrics import depth, total_tokens
from apr_jax.train.loss import supervised_loss, trained_tokens
from tests.tiny import causal_logits, make_model, paths, random_thread

P, W, C, J, X = (Block((10 * i + 5, 10 * i + 6), i in (1, 2, 4)) for i in range(5))


def nested_tree():
    """A tree with three levels of children, a spawn right after a join, a spawn at the end of a thread, and a call with
    a forced token."""

    def ids(*content, sampled=True):
        return Block(content, sampled)

    third = Thread((ids(5, 9, sampled=False), ids(44, 45, 2)))
    second = Thread(
        (ids(5, 8, sampled=False), ids(31), Spawn((ids(32, 33),), (third, third), ids(34, sampled=False)), ids(35, 2))
    )  # fmt: skip
    first = Thread((ids(5, 7, sampled=False), Spawn((ids(21, 22),), (second,), ids(23, 24, sampled=False)), ids(2)))
    forced_call = (ids(11), ids(12, sampled=False), ids(13, 14))
    root = Thread(
        (
            ids(5, 6, 7, sampled=False), ids(10),
            Spawn(forced_call, (first, third), ids(15, 16, 17, sampled=False)),
            Spawn((ids(18, 19),), (second,), ids(20, sampled=False)), ids(50, 51, 52),
            Spawn((ids(53),), (), ids(54, sampled=False)),
        )
    )  # fmt: skip
    return ThreadTree(root)


def unpacked(tree, mode):
    """Return tokens [paths, T], each path of each thread in a row of its own, and their loss weights [paths, T]."""
    rows = [path for thread in tree.threads() if not thread.inherits for path in paths(thread)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    weight = np.zeros(tokens.shape, np.float32)
    for row, path in enumerate(rows):
        for at, (token, sampled, _, counted) in enumerate(path):
            tokens[row, at] = token
            weight[row, at] = counted and at > 0 and (sampled or mode == "all")
    return tokens, weight


MODEL = make_model(6)
GRAPHDEF, WEIGHTS = nnx.split(MODEL)


@jax.jit
def unpacked_gradient(tokens, weight):
    def loss(weights):
        logits = jax.nn.log_softmax(causal_logits(nnx.merge(GRAPHDEF, weights), tokens)[:, :-1])
        return -jnp.sum(weight[:, 1:] * jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[:, :, 0])

    return jax.value_and_grad(loss)(WEIGHTS)


def packed_gradient(rows, mode):
    def loss(weights, rows):
        return supervised_loss(nnx.merge(GRAPHDEF, weights), rows, mode)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(WEIGHTS, rows)


@pytest.mark.parametrize("mode", ["sampled", "all"])
@pytest.mark.parametrize("which", ["nested", "random", "inheriting"])
def test_packed_loss_and_gradient_are_those_of_the_unpacked_paths(mode, which):
    rng = random.Random(7)
    inherit = 0.7 if which == "inheriting" else 0.0
    tree = nested_tree() if which == "nested" else ThreadTree(random_thread(rng, depth=3, inherit=inherit))
    assert depth(tree) == 3 and any(thread.inherits for thread in tree.threads()) == (which == "inheriting")
    tokens, weight = unpacked(tree, mode)
    right, right_gradient = unpacked_gradient(tokens, weight)
    segments = flatten_tree(tree)
    rng.shuffle(segments)
    length = max(map(len, segments)) + 9
    rows = pack_rows([[segments[i] for i in row] for row in first_fit(list(map(len, segments)), length)], length)
    (loss, sums), gradient = packed_gradient(rows, mode)
    assert float(sums["weight"]) == weight.sum() > 0
    assert float(sums["tokens"]) == total_tokens(tree)
    np.testing.assert_allclose(loss, right, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(right_gradient), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(b), 1e-3)


def test_the_example_in_the_docstring_of_the_module():
    segment = flatten_thread(Thread((P, W, Spawn((C,), (), J), X)))
    assert segment.tokens.tolist() == [5, 6, 15, 16, 25, 26, 35, 36, 45, 46]
    assert segment.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert segment.predecessors.tolist() == [-1, 0, 1, 2, 3, 4, 3, 6, 7, 8]
    assert segment.enter.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert segment.exit.tolist() == [5, 5, 5, 5, 3, 3, 5, 5, 5, 5]
    assert segment.sampled.tolist() == [False, False, True, True, True, True, False, False, True, True]
    assert (segment.nodes, len(segment)) == (5, 10)


def test_children_that_inherit_continue_the_prefix_before_the_call():
    child = Thread((P, X), inherits=True)
    segment = flatten_thread(Thread((P, W, Spawn((C,), (child, child), J), X)))
    assert segment.tokens.tolist() == [5, 6, 15, 16, 25, 26, 5, 6, 45, 46, 5, 6, 45, 46, 35, 36, 45, 46]
    assert segment.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7]
    assert segment.predecessors.tolist() == [-1, 0, 1, 2, 3, 4, 3, 6, 7, 8, 3, 10, 11, 12, 3, 14, 15, 16]


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5]))
def test_a_segment_has_every_token_once_with_its_position_on_its_path(seed, inherit):
    thread = random_thread(random.Random(seed), logprobs=True, inherit=inherit)
    segment = flatten_thread(thread, lambda *_: 0.5, advantage=-2.0)
    found = []
    for path in paths(thread):
        found += [(*entry[:3], at, path[at - 1][0] if at else None) for at, entry in enumerate(path) if entry[3]]
    before = [int(segment.tokens[j]) if j >= 0 else None for j in segment.predecessors]
    logprobs = segment.logprobs.astype(float).round(5).tolist()
    laid = zip(segment.tokens.tolist(), segment.sampled.tolist(), logprobs, segment.positions.tolist(), before)
    assert Counter(laid) == Counter(
        (token, sampled, round(float(np.float32(p)), 5), at, b) for token, sampled, p, at, b in found
    )
    assert (segment.predecessors < np.arange(len(segment))).all(), "a predecessor stands before its token in the row"
    assert set(segment.loss_weight) == {np.float32(0.5)} and set(segment.advantage) == {np.float32(-2.0)}


@given(st.integers(0, 10**6))
def test_packing_keeps_segments_complete_and_separate(seed):
    rng = random.Random(seed)
    segments = [flatten_thread(thread, lambda *_, i=i: i + 1.0) for i, thread in enumerate(random_thread(rng).walk())]
    length = max(map(len, segments)) + rng.randrange(20)
    chosen = first_fit([len(segment) for segment in segments], length)
    packed = pack_rows([[segments[i] for i in row] for row in chosen], length, len(chosen) + 1)
    packed.check()
    assert packed.tokens.shape == (len(chosen) + 1, length)
    for b, row in enumerate([*chosen, []]):
        at = nodes = 0
        for i in row:
            span = slice(at, at + len(segments[i]))
            for name in ("tokens", "positions", "role", "logprobs", "loss_weight", "kl_weight", "advantage"):
                assert (getattr(packed, name)[b, span] == getattr(segments[i], name)).all()
            assert (packed.enter[b, span] == segments[i].enter + nodes).all()
            own = packed.predecessors[b, span]
            assert (own == np.where(segments[i].predecessors < 0, -1, segments[i].predecessors + at)).all()
            at, nodes = at + len(segments[i]), nodes + segments[i].nodes
        padding = slice(at, length)
        assert (packed.exit[b, padding] <= packed.enter[b, padding]).all()
        assert (packed.predecessors[b, padding] == -1).all() and not packed.loss_weight[b, padding].any()
        for mode in ("sampled", "all"):
            assert not np.asarray(trained_tokens(packed, mode))[b, padding].any()


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.6]))
def test_every_batch_of_random_trees_keeps_the_invariants(seed, inherit):
    rng = random.Random(seed)
    trees = [ThreadTree(random_thread(rng, depth=3, longest=3, inherit=inherit)) for _ in range(2)]
    segments = [segment for tree in trees for segment in flatten_tree(tree)]
    length = max(map(len, segments)) + 5
    chosen = first_fit([len(segment) for segment in segments], length)
    pack_rows([[segments[i] for i in row] for row in chosen], length, len(chosen) + 1).check()


BREAKS = {
    "padding sees a token": ("enter", 11, 0),
    "padding has a role": ("role", 10, 0),
    "padding has a weight": ("kl_weight", 11, 1),
    "not nested": ("exit", 2, 3),
    "not the last token seen": ("predecessors", 6, 5),
    "not the number of tokens": ("positions", 6, 6),
}


@pytest.mark.parametrize("rule", BREAKS)
def test_a_batch_that_breaks_an_invariant_is_refused(rule):
    """The example of the module's docstring and two tokens of padding, with one number changed."""
    batch = pack_rows([[flatten_thread(Thread((P, W, Spawn((C,), (), J), X)))]], 12)
    batch.check()
    name, at, value = BREAKS[rule]
    getattr(batch, name)[0, at] = value
    with pytest.raises(ValueError, match=f"row 0 .*{rule}"):
        batch.check()


def test_a_batch_with_wrong_shapes_or_dtypes_is_refused():
    batch = pack_rows([[]], 4)
    for name, values in (
        ("exit", np.zeros((1, 5), np.int32)),
        ("role", np.zeros((1, 4), np.int64)),
        ("old_logprobs", np.zeros((1, 4), np.float64)),
    ):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(batch, **{name: values}).check()
    dataclasses.replace(batch, reference_logprobs=np.zeros((1, 4), np.float32)).check()


def test_a_batch_is_a_pytree_of_its_arrays():
    batch = pack_rows([[flatten_thread(Thread((P, W)))]], 6)
    halves = jax.jit(lambda batch: jax.tree.map(lambda x_BxT: x_BxT[:, :3], batch))(batch)
    assert len(jax.tree.leaves(batch)) == 10 and halves.reference_logprobs is None
    assert halves.tokens.tolist() == [[5, 6, 15]] and halves.real.tolist() == [[True] * 3]
    both = dataclasses.replace(batch, reference_logprobs=batch.logprobs, old_logprobs=batch.logprobs)
    assert len(jax.tree.leaves(both)) == 12


def test_an_unknown_loss_mode_is_named():
    with pytest.raises(ValueError, match="'prompts'"):
        trained_tokens(pack_rows([[]], 4), "prompts")


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(50, 120), st.integers(1, 40))
def test_first_fit_never_overfills_and_keeps_all(lengths, row_length, open_rows):
    rows = first_fit(lengths, row_length, open_rows)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < len(row) and sum(lengths[i] for i in row) <= row_length for row in rows)
    if len(rows) <= open_rows:  # no row was closed: two rows that are at most half full would be one row
        assert sum(2 * sum(lengths[i] for i in row) <= row_length for row in rows) <= 1


def test_first_fit_refuses_an_item_longer_than_a_row():
    with pytest.raises(ValueError, match="item 1 .* 12 .* 11"):
        first_fit([11, 12], 11)


def numbered(lengths):
    """Return segments that can be distinguished: all tokens of segment i are i."""
    return [flatten_thread(Thread((Block((i,) * n, True),))) for i, n in enumerate(lengths)]


def segments_of(batch):
    return [int(token) for token in batch.tokens[(batch.positions == 0) & (batch.exit > batch.enter)]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 5), st.data())
def test_a_batch_depends_on_seed_and_step_alone(lengths, batch_rows, data):
    segments, steps = numbered(lengths), data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
    one = PackedBatches(segments, 20, batch_rows, seed=3)
    right = [one[step] for step in range(31)]
    assert all(batch.tokens.shape == (batch_rows, 20) for batch in right)
    other = PackedBatches(segments, 20, batch_rows, seed=3)
    for step in steps:  # in any order, as after a kill
        batch = other[step]
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, batch, right[step])))


@pytest.mark.parametrize("count, batch_rows", [(24, 4), (26, 4), (8, 4), (6, 4), (2, 4), (2, 1)])
def test_an_epoch_has_every_segment(count, batch_rows):
    """Two segments fill a row. If rows do not fill the last batch, some rows occur twice. Fewer rows than a batch has
    are repeated equally often."""
    rows = count // 2
    steps = rows * (1 + batch_rows) // batch_rows if rows <= batch_rows else -(-rows // batch_rows)
    batches = PackedBatches(numbered([10] * count), 20, batch_rows, seed=1)
    orders = set()
    for epoch in range(3):
        seen = [segment for step in range(steps) for segment in segments_of(batches[epoch * steps + step])]
        orders.add(tuple(seen))
        counts = Counter(seen)
        assert len(seen) == 2 * steps * batch_rows and set(counts) == set(range(count))
        if rows <= batch_rows:
            assert len(set(counts.values())) == 1
        else:
            assert sum(n == 2 for n in counts.values()) == 2 * (-rows % batch_rows) and max(counts.values()) <= 2
    assert count == 2 or len(orders) == 3, "every epoch has an order of its own"


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 500), st.integers(0, 20)
)
def test_steps_for_is_the_fewest_batches_with_enough_tokens_up_to_a_limit(lengths, batch_rows, tokens, most):
    batches = PackedBatches(numbered(lengths), 20, batch_rows, seed=3)
    steps = batches.steps_for(tokens, most)
    had = np.cumsum([0] + [batches[step].real.sum() for step in range(steps)])
    assert steps == most or (steps < most and had[-1] >= tokens)
    assert steps == 0 or had[-2] < tokens


def test_seeds_give_different_orders():
    segments = numbered([10] * 24)
    first = [segments_of(PackedBatches(segments, 20, 4, seed)[0]) for seed in (0, 1)]
    assert first[0] != first[1]


def test_segments_too_long_for_a_row_are_counted():
    batches = PackedBatches(numbered([5, 21, 20, 30]), 20, 1, seed=0)
    assert batches.too_long == 2
    assert {segment for step in range(8) for segment in segments_of(batches[step])} == {0, 2}
    with pytest.raises(ValueError, match="row of 4 tokens"):
        PackedBatches(numbered([5, 21]), 4, 1, seed=0)
