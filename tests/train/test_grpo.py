"""GRPO: the loss is the equation of its module, the update is the gradient of the paths alone, and it learns."""

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.threads import Block, Spawn, Thread, ThreadTree
from apr_jax.threads.run import Budget
from apr_jax.train.grpo import AGGREGATES, GrpoConfig, GrpoTrainer, advantages, grpo_loss, rollout_metrics, tree_pieces
from apr_jax.train.optimizer import OptimizerConfig
from apr_jax.train.pack import lay_out, lay_out_tree, pack_rows
from apr_jax.train.step import data_mesh
from tests.tiny import (
    TOKENIZER,
    NonsenseProtocol,
    causal_logits,
    log_softmax,
    make_model,
    paths,
    plain_logits,
    random_thread,
    spawning_model,
)

OPTIMIZER = OptimizerConfig(peak_rate=1e-2, schedule="constant", weight_decay=0.0)
BUDGET = Budget(64, threads=12, depth=2)


def make_config(**changes):
    values = {"steps": 2, "prompts": 3, "group": 4, "optimizer": OPTIMIZER, "batch_rows": 4, "row_length": 128}
    return GrpoConfig(**values | {"inner_steps": 1} | changes)


def make_trainer(model, protocol=None, budget=BUDGET, slots=16, **changes):
    config = make_config(**changes)
    trainer = GrpoTrainer(model, protocol or NonsenseProtocol(2), TOKENIZER, budget, config, data_mesh(2), slots)
    return trainer, trainer.trainer.init(model)


def plain_logprobs(model, piece, temperature):
    """Log-probability and entropy behind every token of a piece, each path forwarded alone."""
    logprobs, entropy = np.zeros(len(piece)), np.zeros(len(piece))
    for last in set(range(len(piece))) - set(piece.predecessors.tolist()):
        path = [last]
        while piece.predecessors[path[0]] >= 0:
            path.insert(0, int(piece.predecessors[path[0]]))
        table = log_softmax(plain_logits(model, piece.tokens[path]).astype(np.float64)[:-1] / temperature)
        logprobs[path[1:]] = table[np.arange(len(path) - 1), piece.tokens[path[1:]]]
        entropy[path[1:]] = -(np.exp(table) * table).sum(axis=-1)
    return logprobs, entropy


def test_advantages_are_rewards_against_their_group():
    np.testing.assert_allclose(advantages([1, 0, 0, 0], normalise=False), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(advantages([1, 0, 0, 0], normalise=True), np.array([3, -1, -1, -1]) / 3**0.5)
    np.testing.assert_allclose(advantages([0, 1], normalise=True), [-1, 1])
    for normalise in (True, False):
        for equal in ([0, 0, 0], [1.0, 1.0], [0.1] * 7):
            assert not advantages(equal, normalise).any()
        assert abs(advantages(np.random.default_rng(0).random(9), normalise).sum()) < 1e-9


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_loss_is_the_equation_in_numpy(kl):
    """On small trees with ratios on both sides of both clips, under both signs of the advantage."""
    rng, noise = random.Random(1), np.random.default_rng(1)
    model = make_model(2)
    config = make_config(kl=kl, clip_low=0.2, clip_high=0.3, temperature=0.7)
    pieces, references, right = (
        [],
        [],
        dict.fromkeys(("loss", "weight", "trained", "difference", "clipped", "kl", "entropy"), 0.0),
    )
    for advantage in (1.5, -0.5):
        tree = ThreadTree(random_thread(rng, depth=1))
        for piece in tree_pieces(tree, advantage, "tree"):
            p, entropy = plain_logprobs(model, piece, 0.7)
            old, q = p + noise.normal(0, 0.3, len(p)), p + noise.normal(0, 0.3, len(p))
            pieces.append(dataclasses.replace(piece, logprobs=np.where(piece.sampled, old, 99).astype(np.float32)))
            references.append(q)
            for t in range(len(piece)):
                if piece.sampled[t] and piece.predecessors[t] >= 0:
                    ratio = np.exp(p[t] - old[t])
                    clipped = min(max(ratio, 0.8), 1.3)
                    k3 = np.exp(q[t] - p[t]) - (q[t] - p[t]) - 1
                    loss = -min(ratio * advantage, clipped * advantage) + kl * k3
                    right["loss"] += piece.share[t] * loss
                    right["weight"] += piece.share[t]
                    right["trained"] += 1
                    right["difference"] += abs(p[t] - old[t])
                    right["clipped"] += clipped != ratio
                    right["kl"] += k3 if kl else 0
                    right["entropy"] += entropy[t]
    rows = pack_rows([pieces], sum(map(len, pieces)) + 7)
    rows["reference"] = np.zeros_like(rows["logprobs"])
    rows["reference"][0, :-7] = np.concatenate(references)
    loss, sums = jax.jit(lambda rows: grpo_loss(model, rows, config))(rows)
    assert right["clipped"] > 5 and right["weight"] == pytest.approx(2, rel=1e-5)
    for name, value in dict(sums, loss=loss).items():
        assert float(value) == pytest.approx(right[name], rel=1e-3, abs=1e-4), name


def hand_made_tree():
    """Root 3 + 2 sampled (its call counts), first child 4, second child none."""
    prompt, four = Block((5, 6), False), Block((7, 8, 9, 10), True)
    spawn = Spawn((Block((12, 13), True),), (Thread((prompt, four)), Thread((prompt,))), Block((14, 15, 16), False))
    return ThreadTree(Thread((prompt, Block((7, 8, 9), True), spawn)))


@pytest.mark.parametrize(
    "aggregate, root, child", [("tree", 1 / 9, 1 / 9), ("sequence", 1 / 15, 1 / 12), ("token", 1.0, 1.0)]
)
def test_every_way_to_aggregate_gives_its_share(aggregate, root, child):
    pieces = tree_pieces(hand_made_tree(), -0.5, aggregate)
    assert [int(piece.sampled.sum()) for piece in pieces] == [5, 4, 0]
    np.testing.assert_allclose(pieces[0].share, root, rtol=1e-6)
    np.testing.assert_allclose(pieces[1].share, child, rtol=1e-6)
    assert all((piece.advantage == -0.5).all() for piece in pieces)
    assert [piece.tokens.tolist() for piece in pieces] == [
        piece.tokens.tolist() for piece in lay_out_tree(hand_made_tree())
    ]


def rewarded(groups, rewards):
    """The groups with other rewards."""
    return [
        [dataclasses.replace(tree, info={**tree.info, "correct": bool(reward)}) for tree, reward in zip(group, given)]
        for group, given in zip(groups, rewards)
    ]


@pytest.fixture(scope="module")
def sampled():
    """A trainer, its state's model, and groups of trees that it sampled: the second of three has no signal."""
    model = spawning_model(1)
    trainer, state = make_trainer(model)
    groups = rewarded(trainer.sample(state, 1, range(3)), [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    assert all(len(group) == 4 for group in groups)
    assert sum(len(tree.root.spawns) for group in groups for tree in group) > 3
    return model, groups


@functools.partial(jax.jit, static_argnums=0)
def policy_gradient(graphdef, parameters, tokens, weight):
    def loss(parameters):
        logprobs = jax.nn.log_softmax(causal_logits(nnx.merge(graphdef, parameters), tokens)[:, :-1])
        return -jnp.sum(weight[:, 1:] * jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[:, :, 0])

    return jax.grad(loss)(parameters)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_the_first_update_is_the_policy_gradient_of_the_paths_alone(sampled, aggregate):
    """Before any update the ratio is 1, so the gradient is that of -A logprob, weighed by hand from the trees."""
    model, groups = sampled
    trainer, state = make_trainer(model, aggregate=aggregate)
    rows, weights = [], []
    for group, gains in zip(groups, ([1, -1, -1, 1], None, np.array([-1, 3, -1, -1]) / 3**0.5)):
        for tree, gain in zip(group, [] if gains is None else gains):
            threads = [paths(thread) for thread in tree.threads()]
            written = [sum(entry[1] and entry[3] for path in thread for entry in path) for thread in threads]
            for thread, n in zip(threads, written):
                share = {"tree": 1 / sum(written), "sequence": 1 / len(threads) / max(n, 1), "token": 1.0}[aggregate]
                for path in thread:
                    rows.append([entry[0] for entry in path])
                    weights.append([gain * share * (entry[1] and entry[3]) for entry in path])
    trained = sum(np.count_nonzero(row) for row in weights)
    divisor = trained if aggregate == "token" else 12
    padded = np.zeros((2, len(rows), max(map(len, rows))))
    for i, (row, weight) in enumerate(zip(rows, weights)):
        padded[0, i, : len(row)], padded[1, i, : len(row)] = row, weight
    tokens, weight = jnp.asarray(padded[0], jnp.int32), jnp.asarray(padded[1] / divisor, jnp.float32)
    graphdef, parameters = nnx.split(model)

    gradient = policy_gradient(graphdef, parameters, tokens, weight)
    right = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient)))
    _, metrics = trainer.update(state, groups)
    assert metrics["train/tokens"] == trained
    assert metrics["train/gradient_norm"] == pytest.approx(right, rel=1e-3)
    assert metrics["train/engine_difference"] < 1e-4 and metrics["train/clipped"] == 0 and metrics["train/kl"] == 0
    assert metrics["train/threads_too_long"] == 0


def test_later_inner_steps_leave_the_old_policy_and_the_reference_behind(sampled):
    model, groups = sampled
    trainer, state = make_trainer(model, inner_steps=3, kl=0.1)
    state, metrics = trainer.update(state, groups)
    assert int(state.step) == 3
    assert metrics["train/engine_difference"] < 1e-4
    assert metrics["train/clipped"] > 0 and metrics["train/kl"] > 0


@pytest.mark.parametrize("reward", [0, 1])
def test_equal_rewards_are_no_update(sampled, reward):
    model, groups = sampled
    trainer, state = make_trainer(model)
    before = jax.tree.map(np.asarray, (state.weights, state.optimizer, state.step))
    state, metrics = trainer.update(state, rewarded(groups, [[reward] * 4] * 3))
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves((state.weights, state.optimizer, state.step)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert metrics == {"train/threads": 0, "train/threads_too_long": 0}


def test_threads_that_fit_no_row_are_counted_and_the_others_train(sampled):
    model, groups = sampled
    lengths = [len(lay_out(thread)) for i in (0, 2) for tree in groups[i] for thread in tree.threads()]
    limit = sorted(lengths)[-3]
    trainer, state = make_trainer(model, row_length=limit)
    _, metrics = trainer.update(state, groups)
    assert metrics["train/threads_too_long"] == sum(length > limit for length in lengths) > 0
    assert metrics["train/threads"] == sum(length <= limit for length in lengths)


def test_a_step_samples_the_same_again_and_the_next_step_another(sampled):
    model, _ = sampled
    trainer, state = make_trainer(model)
    first, again, other = (trainer.sample(state, step, range(3)) for step in (1, 1, 2))
    assert first == again != other


class FirstCharacter(NonsenseProtocol):
    """Right is a thread that begins with a digit on the first problem, with a letter on the second, and ends."""

    def correct(self, problem, text):
        written = text.removeprefix(self.root_prompt(problem))
        return written[:1].isdigit() if problem == 0 else written[:1].isalpha()


def test_it_learns_what_is_rewarded():
    """From chance to above 0.9: a wrong sign, shifted logits or groups mixed up do not get there."""
    model = spawning_model(3, opens=0.0, closes=0.0, ends=4.0)
    trainer, state = make_trainer(
        model, FirstCharacter(), Budget(16, 1, 0), slots=32, steps=40, prompts=2, group=16, row_length=64, inner_steps=2
    )
    rewards = []
    for step in range(1, 41):
        groups = trainer.sample(state, step, [0, 1])
        rewards.append(rollout_metrics(groups)["rollout/reward"])
        if np.mean(rewards[-3:]) > 0.95:
            break
        state, _ = trainer.update(state, groups)
    assert rewards[0] < 0.5 and min(rewards[-2:]) > 0.9, rewards


def test_rollout_metrics_are_means_over_trees():
    def tree(correct, failures, guarded=0):
        info = {"correct": correct, "claimed": True, "failures": failures, "malformed": {}, "guarded": guarded}
        return ThreadTree(hand_made_tree().root, info)

    metrics = rollout_metrics(
        [[tree(True, {}), tree(False, {"length": 3})], [tree(False, {}, 2), tree(False, {"length": 1})]]
    )
    assert metrics["rollout/reward"] == 0.25 and metrics["rollout/claimed"] == 1
    assert metrics["rollout/groups_with_signal"] == 0.5 and metrics["rollout/children"] == 2
    assert metrics["rollout/failed_length"] == 0.5 and metrics["rollout/guarded"] == 0.5
    assert metrics["rollout/total_tokens"] == 10 + 6 + 2 and metrics["rollout/sequential_tokens"] == 5 + 2 + 6 + 3


@pytest.mark.parametrize(
    "changes, message",
    [({"aggregate": "mean"}, "'mean'"), ({"group": 1}, "was given 1"), ({"temperature": 0.0}, "was given 0.0")],
)
def test_configs_that_cannot_be_are_refused_with_what_was_given(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_rows_that_do_not_split_over_the_devices_are_refused():
    with pytest.raises(ValueError, match="batch_rows .3. must be a multiple of the 2 devices"):
        make_trainer(make_model(0), batch_rows=3)
