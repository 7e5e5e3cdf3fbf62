"""GRPO's objective against its equations in NumPy: advantages, token weights, ratios, clips and divergence."""

import dataclasses
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.data.packing import flatten_tree, pack_rows
from apr_jax.threads import Block, Spawn, Thread, ThreadTree, map_blocks
from apr_jax.train.aggregation import AGGREGATIONS, TreeWeights, aggregation
from apr_jax.train.objective import advantages, grpo_loss, policy_logprobs, step_segments
from apr_jax.train.reward import differ
from tests.tiny import causal_logits, log_softmax, make_model, plain_logits, random_thread
from tests.train.objectives import hand_made_tree, make_config


def tree_segments(tree, advantage, config, window=64):
    """The segments of one tree. They are made even for an advantage of 0, by a kl above 0."""
    return step_segments([(tree, advantage)], dataclasses.replace(config, kl=config.kl or 1.0), window)[0]


def plain_logprobs(model, segment, temperature):
    """(log-probabilities [n], entropies [n]) of the model's predictions of the n tokens of a segment, with each path
    forwarded alone. Both are 0 for a token without a predecessor."""
    logprobs, entropy = np.zeros(len(segment)), np.zeros(len(segment))
    for last in set(range(len(segment))) - set(segment.predecessors.tolist()):
        path = [last]
        while segment.predecessors[path[0]] >= 0:
            path.insert(0, int(segment.predecessors[path[0]]))
        table = log_softmax(plain_logits(model, segment.tokens[path]).astype(np.float64)[:-1] / temperature)
        logprobs[path[1:]] = table[np.arange(len(path) - 1), segment.tokens[path[1:]]]
        entropy[path[1:]] = -(np.exp(table) * table).sum(axis=-1)
    return logprobs, entropy


def test_advantages_are_rewards_minus_the_mean_of_the_group():
    np.testing.assert_allclose(advantages([1, 0, 0, 0], normalise=False), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(advantages([1, 0, 0, 0], normalise=True), np.array([3, -1, -1, -1]) / 3**0.5)
    np.testing.assert_allclose(advantages([0, 1], normalise=True), [-1, 1])
    for normalise in (True, False):
        for equal in ([0, 0, 0], [1.0, 1.0], [0.1] * 7):
            assert not advantages(equal, normalise).any()
        assert abs(advantages(np.random.default_rng(0).random(9), normalise).sum()) < 1e-9


def test_rewards_that_differ_by_rounding_alone_are_equal():
    """61 tokens and 1 child cost as much as 21 tokens and 5 children, but the sums differ in the last bit."""
    values = [1 - 0.001 * 61 - 0.01 * 1, 1 - 0.001 * 21 - 0.01 * 5]
    assert values[0] != values[1] and not differ(values)
    assert not advantages(values, True).any() and not advantages(values, False).any()
    near = [0.5, 0.5 + 1e-6]
    assert differ(near)
    np.testing.assert_allclose(advantages(near, True), [-1, 1], rtol=1e-6)


def token_terms(config, segment, advantage, p, b, o, q, t):
    """(loss, its derivative by p[t], ratio, importance weight, k3 estimate) of token t of a segment, by the equations
    in `apr_jax.train.objective`. The arrays p, b, o and q [n] have the names used there."""
    old, weight = b[t], 1.0
    if config.tis_clip:
        old, weight = o[t], min(np.exp(o[t] - b[t]), config.tis_clip)
    if config.kl_estimator == "k1":
        advantage = advantage - config.kl * (b[t] - q[t])
    ratio = np.exp(p[t] - old)
    clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
    inside = ratio * advantage <= clipped * advantage  # the clip does not bind
    loss = -segment.loss_weight[t] * weight * min(ratio * advantage, clipped * advantage)
    slope = -segment.loss_weight[t] * weight * ratio * advantage * inside
    k3 = np.exp(q[t] - p[t]) - (q[t] - p[t]) - 1
    if config.kl_estimator == "k3":
        loss += segment.kl_weight[t] * config.kl * k3
        slope += segment.kl_weight[t] * config.kl * (1 - np.exp(q[t] - p[t]))
    return loss, slope, ratio, weight, k3


def leaf_paths(segment):
    """The paths of a segment as lists of indices, one for each token that no other token follows."""
    found = []
    for last in sorted(set(range(len(segment))) - set(segment.predecessors.tolist())):
        path = [last]
        while segment.predecessors[path[0]] >= 0:
            path.insert(0, int(segment.predecessors[path[0]]))
        found.append(path)
    return found


def gradient_by_paths(model, segments, slopes, temperature):
    """The gradient of the sum of slope times log-probability. By the chain rule it is the gradient of the loss whose
    derivatives by log-probabilities are `slopes`. Each path is forwarded alone, and each token counts on one path."""
    paths = [(segment, slope, path) for segment, slope in zip(segments, slopes) for path in leaf_paths(segment)]
    padded = np.zeros((2, len(paths), max(len(path) for *_, path in paths)), np.float32)
    seen = set()
    for i, (segment, slope, path) in enumerate(paths):
        padded[0, i, : len(path)] = segment.tokens[path]
        padded[1, i, : len(path)] = [0 if (id(segment), t) in seen else slope[t] for t in path]
        seen |= {(id(segment), t) for t in path}
    tokens_BxT, weight_BxT = jnp.asarray(padded[0], jnp.int32), jnp.asarray(padded[1])
    graphdef, parameters = nnx.split(model)

    def total(parameters):
        logits_BxTxV = causal_logits(nnx.merge(graphdef, parameters), tokens_BxT)[:, :-1]
        logprobs_BxTxV = jax.nn.log_softmax(logits_BxTxV / temperature)
        logprobs_BxT = jnp.take_along_axis(logprobs_BxTxV, tokens_BxT[:, 1:, None], axis=-1)[:, :, 0]
        return jnp.sum(weight_BxT[:, 1:] * logprobs_BxT)

    return jax.jit(jax.grad(total))(parameters)


OBJECTIVES = {
    "plain": {},
    "k3": {"kl": 0.3},
    "k1": {"kl": 0.3, "kl_estimator": "k1"},
    "importance": {"tis_clip": 1.1, "kl": 0.2},
    "paper": {"kl": 0.3, "aggregate": "paper"},
    "sequence": {"kl": 0.3, "aggregate": "sequence"},
}


@pytest.mark.parametrize("changes", OBJECTIVES.values(), ids=OBJECTIVES)
def test_loss_and_gradient_are_those_of_the_equations_in_numpy(changes):
    """The sums are compared with NumPy's, the gradient with that of the paths forwarded one by one. The small packed
    trees have ratios on both sides of both clips, for both signs of the advantage."""
    rng, noise = random.Random(1), np.random.default_rng(1)
    model = make_model(2)
    config = make_config(**{"clip_low": 0.2, "clip_high": 0.3, "temperature": 0.7} | changes)
    counted = ("trained", "clipped_low", "clipped_high")
    names = ("loss", "weight", "logprob_mismatch", "importance", "kl", "entropy", *counted)
    right, most = dict.fromkeys(names, 0.0), 0.0
    segments, slopes, columns = [], [], {"old_logprobs": [], "reference_logprobs": []}
    for advantage in (1.5, -0.5):
        for segment in tree_segments(ThreadTree(random_thread(rng, depth=1)), advantage, config, window=64):
            p, entropy = plain_logprobs(model, segment, 0.7)
            b, o, q = (p + noise.normal(0, 0.3, len(p)) for _ in range(3))
            segments.append(dataclasses.replace(segment, logprobs=np.where(segment.sampled, b, 99).astype(np.float32)))
            columns["old_logprobs"].append(o)
            columns["reference_logprobs"].append(q)
            slope = np.zeros(len(segment))
            for t in range(len(segment)):
                if segment.sampled[t] and segment.predecessors[t] >= 0:
                    loss, slope[t], ratio, weight, k3 = token_terms(config, segment, advantage, p, b, o, q, t)
                    own = advantage - config.kl * (b[t] - q[t]) * (config.kl_estimator == "k1")
                    right["loss"] += loss
                    right["weight"] += segment.loss_weight[t]
                    right["trained"] += 1
                    right["logprob_mismatch"] += abs(p[t] - b[t])
                    most = max(most, abs(p[t] - b[t]))
                    right["clipped_low"] += ratio < 0.8 and own < 0
                    right["clipped_high"] += ratio > 1.3 and own > 0
                    right["importance"] += weight
                    right["kl"] += k3 if config.kl else 0
                    right["entropy"] += entropy[t]
            slopes.append(slope)
    padded = {name: np.concatenate([*values, np.zeros(7)])[None].astype(np.float32) for name, values in columns.items()}
    rows = dataclasses.replace(pack_rows([segments], sum(map(len, segments)) + 7), **padded)
    rows.check()
    graphdef, parameters = nnx.split(model)

    def total(parameters):
        return grpo_loss(nnx.merge(graphdef, parameters), rows, config)

    (loss, sums), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(parameters)
    assert right["clipped_low"] > 2 and right["clipped_high"] > 2
    for name, value in dict(sums, loss=loss).items():
        expected = most if name == "max_logprob_mismatch" else right[name]
        assert float(value) == pytest.approx(expected, rel=1e-3, abs=1e-4), name
    by_paths = gradient_by_paths(model, segments, slopes, 0.7)
    for ours, alone in zip(jax.tree.leaves(gradient), jax.tree.leaves(by_paths), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-3, atol=1e-4 * float(jnp.abs(alone).max()))


@pytest.mark.parametrize("advantage, low, high", [(1.0, 0, 1), (-1.0, 1, 0)])
def test_a_clip_counts_where_it_binds(advantage, low, high):
    """One token's ratio is below the lower bound, the other's above the upper one. The clip removes the gradient of one
    of them, depending on the sign of the advantage."""
    model, config = make_model(2), make_config()
    (segment,) = tree_segments(
        ThreadTree(Thread((Block((5,), False), Block((7, 8), True)))), advantage, config, window=64
    )
    rows = pack_rows([[segment]], 3)
    drawn = np.asarray(policy_logprobs(model, rows, 1.0)) - np.float32([[0, -1, 1]])  # ratios of 1/e and e
    rows = dataclasses.replace(rows, logprobs=drawn)
    _, sums = grpo_loss(model, rows, config)
    assert (float(sums["clipped_low"]), float(sums["clipped_high"])) == (low, high)


def test_the_first_ratio_is_1_with_a_tis_clip():
    """With a tis_clip, ratios are against the trainer's old log-probabilities. The engine's are used for a weight."""
    model, config = make_model(2), make_config(tis_clip=2.0)
    segments = tree_segments(hand_made_tree(), 1.0, config, window=64)
    rows = pack_rows([segments], sum(map(len, segments)))
    rows = dataclasses.replace(rows, old_logprobs=np.asarray(policy_logprobs(model, rows, 1.0)))
    for shift, weight in ((-1.0, 2.0), (0.5, np.exp(-0.5))):  # the engine's are below, then above the trainer's
        rows = dataclasses.replace(rows, logprobs=rows.old_logprobs + np.float32(shift))
        loss, sums = grpo_loss(model, rows, config)
        assert sums["clipped_low"] == sums["clipped_high"] == 0
        assert float(sums["importance"] / sums["trained"]) == pytest.approx(weight, rel=1e-4)
        assert float(loss) == pytest.approx(-weight * float(sums["weight"]), rel=1e-4)


def test_the_mean_gradient_of_k1_is_that_of_the_divergence():
    """The divergence is the one between model and reference, for the next token after one prompt. The mean is over all
    next tokens, each weighted by its probability. In the loss, not in the advantage, k1 would have a mean of 0."""
    model, config = make_model(2), make_config(kl=1.0, kl_estimator="k1")
    V = model.config.vocab_size
    graphdef, parameters = nnx.split(model)
    reference = jnp.asarray(log_softmax(np.random.default_rng(0).normal(size=V)), jnp.float32)
    log_p = jnp.asarray(log_softmax(plain_logits(model, [5]))[0])
    threads = [Thread((Block((5,), False), Block((token,), True))) for token in range(V)]
    rows = pack_rows([tree_segments(ThreadTree(thread), 0.0, config, window=64) for thread in threads], 64)
    rows.logprobs[:, 1], rows.loss_weight[:, 1] = log_p, jnp.exp(log_p)
    rows = dataclasses.replace(rows, reference_logprobs=np.zeros_like(rows.logprobs))
    rows.reference_logprobs[:, 1] = reference

    def divergence(parameters):
        logits = causal_logits(nnx.merge(graphdef, parameters), jnp.full((1, 1), 5, jnp.int32))[0, 0]
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(log_p) * (log_p - reference))

    ours = jax.jit(jax.grad(lambda parameters: grpo_loss(nnx.merge(graphdef, parameters), rows, config)[0]))(parameters)
    exact = jax.jit(jax.grad(divergence))(parameters)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(exact))
    for one, right in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(one, right, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "aggregate, root, child, kl_root",
    [
        ("tree", 1 / 9, 1 / 9, 1 / 9),
        ("sequence", 1 / 10, 1 / 8, 1 / 10),
        ("paper", 1 / 10, 1 / 8, 1 / 5),
        ("token", 1.0, 1.0, 1.0),
        ("constant", 1 / 64, 1 / 64, 1 / 64),
    ],
)
def test_each_aggregation_gives_its_token_weights(aggregate, root, child, kl_root):
    segments = tree_segments(hand_made_tree(), -0.5, make_config(aggregate=aggregate), window=64)
    assert [int(segment.sampled.sum()) for segment in segments] == [5, 4, 0]
    np.testing.assert_allclose(segments[0].loss_weight, root, rtol=1e-6)
    np.testing.assert_allclose(segments[1].loss_weight, child, rtol=1e-6)
    np.testing.assert_allclose(segments[0].kl_weight, kl_root, rtol=1e-6)
    assert all((segment.advantage == -0.5).all() for segment in segments)
    assert [segment.tokens.tolist() for segment in segments] == [
        segment.tokens.tolist() for segment in flatten_tree(hand_made_tree())
    ]


def paper_sequences(tree):
    """The sampled ids of each request that the authors' code makes for a tree, as lists. A spawn ends a request, and
    the next one begins after the join. A parent's requests come before its children's. Empty ones are left out."""
    found = []

    def walk(thread):
        written = []
        for item in thread.blocks:
            parts = item.call if isinstance(item, Spawn) else (item,)
            written += [token for block in parts if block.sampled for token in block.content]
            if isinstance(item, Spawn):
                found.append(written)
                written = []
        found.append(written)
        for child in thread.children:
            walk(child)

    walk(tree.root)
    return [sequence for sequence in found if sequence]


def numbered(thread, numbers):
    """The same thread with a new number for each of its ids."""
    return map_blocks(
        thread, lambda block: dataclasses.replace(block, content=tuple(next(numbers) for _ in block.content))
    )


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_weights_of_the_paper_are_those_of_its_requests(kl):
    """50 random trees, some nested, some with children that inherit, a third of them with advantage 0. A token weighs 1
    over the tokens of its sequence, over the sequences of its tree (not for the kl), over the sequences of the step.
    Without a kl, trees with advantage 0 are left out first."""
    rng, numbers = random.Random(7), itertools.count(1)
    config = make_config(aggregate="paper", kl=kl)
    trees = [
        (ThreadTree(numbered(random_thread(rng, inherit=0.3), numbers)), rng.choice([0.0, 1.5, -0.5]))
        for _ in range(50)
    ]
    kept = [(paper_sequences(tree), advantage) for tree, advantage in trees if advantage or kl]
    total = sum(len(sequences) for sequences, _ in kept)
    right = {
        token: (advantage / len(sequence) / len(sequences) / total, 1 / len(sequence) / total)
        for sequences, advantage in kept
        for sequence in sequences
        for token in sequence
    }
    (segments, divisor), found = step_segments(trees, config, window=64), {}
    for segment in segments:
        weights = segment.loss_weight * segment.advantage / divisor, segment.kl_weight / divisor
        for t in np.flatnonzero(segment.sampled):
            found[int(segment.tokens[t])] = float(weights[0][t]), float(weights[1][t])
    assert total > 100 and right.keys() == found.keys()
    for token, weights in right.items():
        assert found[token] == pytest.approx(weights, rel=1e-5)


def test_the_weights_of_the_paper_for_a_tree_counted_by_hand():
    """The first tree: a root samples 6 tokens, a call of 2, and 2 after the join; its child samples 4. The second tree:
    one thread of 6 tokens."""

    def written(n):
        return Block((7,) * n, True)

    prompt, join = Block((5,), False), Block((14,), False)
    root = Thread((prompt, written(6), Spawn((written(2),), (Thread((prompt, written(4))),), join), written(2)))
    trees = [(ThreadTree(root), 1.0), (ThreadTree(Thread((prompt, written(6)))), -1.0)]
    config = make_config(aggregate="paper")
    segments, divisor = step_segments(trees, config, window=64)
    of_root, of_child, of_other = (segment.loss_weight[segment.sampled] / divisor for segment in segments)
    np.testing.assert_allclose(of_root, [1 / 96] * 8 + [1 / 24] * 2, rtol=1e-6)
    np.testing.assert_allclose(of_child, 1 / 48, rtol=1e-6)
    np.testing.assert_allclose(of_other, 1 / 24, rtol=1e-6)


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize(
    "aggregate, divisor, paper",
    [("tree", 3, 0), ("sequence", 3, 0), ("token", 27, 0), ("constant", 3, 0), ("paper", 4, 2)],
)
def test_the_divisor_of_a_step_counts_trees_tokens_or_requests(aggregate, divisor, paper, kl):
    """Three trees of 9 tokens and 2 requests. One has advantage 0: without a kl "paper" does not count its requests."""
    trees = [(hand_made_tree(), advantage) for advantage in (1.0, 0.0, -1.0)]
    segments, found = step_segments(trees, make_config(aggregate=aggregate, kl=kl), window=64)
    assert found == divisor + (paper if kl else 0)
    assert [float(segment.advantage[0]) for segment in segments[::3]] == ([1, 0, -1] if kl else [1, -1])


def test_a_new_aggregation_is_one_function(monkeypatch):
    monkeypatch.setitem(AGGREGATIONS, "request", None)  # so that it is removed after the test

    @aggregation("request")
    def by_request(tree, window, trained):
        return TreeWeights(lambda thread, request: request + 2.0, lambda thread, request: 0.5, divisor=window)

    config = make_config(aggregate="request")
    segments, divisor = step_segments([(hand_made_tree(), 1.0)] * 2, config, window=64)
    assert divisor == 128 and len(segments) == 6
    assert (segments[0].loss_weight[segments[0].sampled] == 2).all() and (segments[0].kl_weight == 0.5).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"aggregate": "mean"}, "aggregate .*tree, sequence, paper, token, constant.* 'mean'"),
        ({"kl_estimator": "k2"}, "kl_estimator .*k1, k3.* 'k2'"),
        ({"group": 1}, "group .* 1$"),
        ({"temperature": 0.0}, "temperature .* 0.0"),
        ({"validate_every": 2, "validation": 0}, "validation .* 0"),
    ],
)
def test_invalid_configs_are_refused_with_the_setting_and_its_value(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)
