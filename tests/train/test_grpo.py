"""A step of GRPO and the loop around it: gradients equal those of plain sequences, and rewards are learned."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.data.packing import flatten_thread
from apr_jax.errors import UserError
from apr_jax.tasks.countdown import Problem
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget
from apr_jax.train.aggregation import AGGREGATIONS
from apr_jax.train.grpo import VALIDATION_TAG, GrpoJob, GrpoTrainer, RolloutSpec, hold_back, run_grpo
from apr_jax.train.reward import Penalties, rollout_metrics
from apr_jax.train.step import data_mesh
from tests.tiny import TOKENIZER, NonsenseProtocol, causal_logits, make_model, paths, spawning_model
from tests.train.objectives import make_config

BUDGET = Budget(64, threads=12, depth=2)


def make_trainer(model, protocol=None, budget=BUDGET, slots=16, **changes):
    rollouts = RolloutSpec(protocol or NonsenseProtocol(2), TOKENIZER, budget, slots)
    trainer = GrpoTrainer(model, make_config(**changes), rollouts, data_mesh(2))
    return trainer, trainer.trainer.init(model)


def rewarded(groups, rewards):
    """The same groups with the given rewards, 0 or 1."""
    return [
        [
            dataclasses.replace(tree, outcome=dataclasses.replace(tree.outcome, correct=bool(reward)))
            for tree, reward in zip(group, group_rewards)
        ]
        for group, group_rewards in zip(groups, rewards)
    ]


@pytest.fixture(scope="module")
def sampled():
    """(model, groups): a model, and three groups of trees that it sampled; rewards differ in the first and the last."""
    model = spawning_model(1)
    trainer, state = make_trainer(model)
    groups = rewarded(trainer.sample(state, 1, range(3))[0], [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    assert all(len(group) == 4 for group in groups)
    assert sum(len(tree.root.spawns) for group in groups for tree in group) > 3
    return model, groups


@functools.partial(jax.jit, static_argnums=0)
def policy_gradient(graphdef, parameters, tokens_BxT, weight_BxT):
    """The gradient of minus the weighted sum of log-probabilities of plain token sequences."""

    def loss(parameters):
        logprobs_BxTxV = jax.nn.log_softmax(causal_logits(nnx.merge(graphdef, parameters), tokens_BxT)[:, :-1])
        logprobs_BxT = jnp.take_along_axis(logprobs_BxTxV, tokens_BxT[:, 1:, None], axis=-1)[:, :, 0]
        return -jnp.sum(weight_BxT[:, 1:] * logprobs_BxT)

    return jax.grad(loss)(parameters)


@pytest.mark.parametrize("aggregate", AGGREGATIONS)
def test_the_first_update_is_the_policy_gradient_of_plain_sequences(sampled, aggregate):
    """Before any update the ratio is 1, so the gradient is that of minus advantage times log-probability, here with
    weights counted from the trees, and every path forwarded alone."""
    model, groups = sampled
    trainer, state = make_trainer(model, aggregate=aggregate)
    rows, weights, requests = [], [], 0
    for group, advantages in zip(groups, ([1, -1, -1, 1], None, np.array([-1, 3, -1, -1]) / 3**0.5)):
        for tree, advantage in zip(group, [] if advantages is None else advantages):
            threads = [paths(thread) for thread in tree.threads()]
            # A path is one request to a server. `written` counts its sampled tokens, which are on no other path.
            written = [[sum(entry[1] and entry[3] for entry in path) for path in thread] for thread in threads]
            tree_requests = np.count_nonzero([n for thread in written for n in thread])
            requests += tree_requests
            for thread, counts in zip(threads, written):
                for path, n in zip(thread, counts):
                    token_weight = {
                        "tree": 1 / sum(map(sum, written)), "token": 1.0, "constant": 1 / 64,
                        "paper": 1 / max(n, 1) / tree_requests,
                        "sequence": 1 / max(sum(counts), 1) / np.count_nonzero(list(map(sum, written))),
                    }[aggregate]  # fmt: skip
                    rows.append([entry[0] for entry in path])
                    weights.append([advantage * token_weight * (entry[1] and entry[3]) for entry in path])
    trained = sum(np.count_nonzero(row) for row in weights)
    tokens = sum(thread.sampled_tokens for group in groups for tree in group for thread in tree.threads())
    divisor = {"token": tokens, "paper": requests}.get(aggregate, 12)
    padded = np.zeros((2, len(rows), max(map(len, rows))))
    for i, (row, weight) in enumerate(zip(rows, weights)):
        padded[0, i, : len(row)], padded[1, i, : len(row)] = row, weight
    tokens_BxT, weight_BxT = jnp.asarray(padded[0], jnp.int32), jnp.asarray(padded[1] / divisor, jnp.float32)
    graphdef, parameters = nnx.split(model)

    gradient = policy_gradient(graphdef, parameters, tokens_BxT, weight_BxT)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient)))
    _, metrics = trainer.update(state, groups)
    assert metrics["train/sampled_tokens"] == trained < metrics["train/tokens"]
    assert metrics["train/gradient_norm"] == pytest.approx(norm, rel=1e-3)
    assert metrics["train/logprob_mismatch"] < metrics["train/max_logprob_mismatch"] < 1e-4  # the ratio is 1
    assert metrics["train/clipped_low"] == metrics["train/clipped_high"] == metrics["train/kl"] == 0
    assert metrics["train/threads_too_long"] == 0


def test_later_inner_steps_move_away_from_the_old_policy_and_the_reference(sampled):
    model, groups = sampled
    trainer, state = make_trainer(model, inner_steps=3, kl=0.1)
    state, metrics = trainer.update(state, groups)
    assert int(state.step) == 3
    assert metrics["train/max_logprob_mismatch"] < 1e-4
    assert metrics["train/clipped_low"] + metrics["train/clipped_high"] > 0 and metrics["train/kl"] > 0


@pytest.mark.parametrize("reward", [0, 1])
def test_equal_rewards_change_no_weights(sampled, reward):
    model, groups = sampled
    trainer, state = make_trainer(model)
    before = jax.tree.map(np.asarray, (state.weights, state.optimizer, state.step))
    state, metrics = trainer.update(state, rewarded(groups, [[reward] * 4] * 3))
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves((state.weights, state.optimizer, state.step)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert {name: value for name, value in metrics.items() if "seconds" not in name} == {
        "train/threads": 0, "train/threads_too_long": 0, "train/rows": 0, "train/tokens": 0,
    }  # fmt: skip


def test_threads_longer_than_a_row_are_counted_and_the_others_trained_on(sampled):
    model, groups = sampled
    lengths = [len(flatten_thread(thread)) for i in (0, 2) for tree in groups[i] for thread in tree.threads()]
    limit = sorted(lengths)[-3]
    trainer, state = make_trainer(model, row_length=limit)
    _, metrics = trainer.update(state, groups)
    assert metrics["train/threads_too_long"] == sum(length > limit for length in lengths) > 0
    assert metrics["train/threads"] == sum(length <= limit for length in lengths)


def test_a_repeated_step_samples_the_same_trees_and_the_next_step_others(sampled):
    model, _ = sampled
    trainer, state = make_trainer(model)
    first, again, other = (trainer.sample(state, step, range(3))[0] for step in (1, 1, 2))
    assert first == again != other


class FirstCharacter(NonsenseProtocol):
    """A thread is correct if it ends and begins with a digit on the first problem, with a letter on the second."""

    def correct(self, problem, text):
        written = text.removeprefix(self.root_prompt(problem))
        return written[:1].isdigit() if problem == 0 else written[:1].isalpha()


def test_the_reward_is_learned():
    """It rises from chance to above 0.9, which a wrong sign, shifted logits or mixed-up groups would prevent."""
    model = spawning_model(3, opens=0.0, closes=0.0, ends=4.0)
    trainer, state = make_trainer(
        model, FirstCharacter(), Budget(16, 1, 0), slots=32, steps=40, prompts=2, group=16, row_length=64, inner_steps=2
    )
    rewards = []
    for step in range(1, 41):
        groups, _ = trainer.sample(state, step, [0, 1])
        rewards.append(rollout_metrics(groups, Penalties())["rollout/reward"])
        if np.mean(rewards[-3:]) > 0.95:
            break
        state, _ = trainer.update(state, groups)
    assert rewards[0] < 0.5 and min(rewards[-2:]) > 0.9, rewards


def test_conditions_are_drawn_with_the_frequencies_of_demonstrations():
    """A group's condition depends on seed, step and prompt alone. Validation uses the most frequent condition."""
    conditions = {"": 1, "Sub Call Budget: 2 ": 6, "Sub Call Budget: 5 ": 3}
    model = spawning_model(1)

    def trainer_of(conditions, seed=0):
        rollouts = RolloutSpec(NonsenseProtocol(2), TOKENIZER, BUDGET, 16, conditions)
        trainer = GrpoTrainer(model, make_config(seed=seed), rollouts, data_mesh(2))
        return trainer, trainer.trainer.init(model)

    def condition_of(tree):
        return TOKENIZER.decode(tree.root.blocks[0].content).removesuffix(f"{number}\n")

    trainer, state = trainer_of(conditions)
    groups, _ = trainer.sample(state, 1, range(3))
    for number, group in enumerate(groups):
        assert {condition_of(tree) for tree in group} == {trainer.condition(1, number)}
    drawn = [trainer.condition(step, prompt) for step in range(1, 201) for prompt in range(10)]
    for condition, count in conditions.items():
        assert drawn.count(condition) == pytest.approx(200 * count, abs=90)  # three standard deviations are 66
    other, _ = trainer_of(conditions)
    assert drawn == [other.condition(step, prompt) for step in range(1, 201) for prompt in range(10)]
    reseeded, _ = trainer_of(conditions, seed=1)
    assert drawn != [reseeded.condition(step, prompt) for step in range(1, 201) for prompt in range(10)]
    engine_open, prompts = trainer.engine.open, {}

    def recorded_open(ids, name):
        prompts[tuple(name)] = TOKENIZER.decode(ids)
        return engine_open(ids, name)

    trainer.engine.open = recorded_open
    trainer.validate(state, [21, 22], Sampling(0.0))
    roots = [prompts[VALIDATION_TAG, index] for index in range(2)]
    assert roots == ["Sub Call Budget: 2 21\n", "Sub Call Budget: 2 22\n"]
    plain, _ = trainer_of({})
    assert plain.condition(1, 0) == ""


class SomeAreHopeless(NonsenseProtocol):
    """Problems below 10 are never solved."""

    def correct(self, problem, text):
        return problem >= 10 and super().correct(problem, text)


def test_fresh_prompts_replace_groups_without_a_signal():
    trainer, state = make_trainer(spawning_model(1), SomeAreHopeless(2), dynamic_sampling_rounds=6)
    plain, _ = make_trainer(spawning_model(1), SomeAreHopeless(2))
    # Three prompts, then the spares. Two spares are needed in the first round, fewer in later ones.
    problems = [11, 1, 2, 3, *range(12, 20)]
    groups, replaced = trainer.sample(state, 1, problems)
    first, none = plain.sample(state, 1, problems)
    assert none == [] and len(first) == 3
    assert groups[0] == first[0], "a group with a signal is kept"
    assert replaced[:2] == first[1:] and len(replaced) >= 3, "problem 3 is the first spare and has no signal either"
    assert all(len({tree.outcome.correct for tree in group}) == 2 for group in groups)
    assert trainer.sample(state, 1, problems) == (groups, replaced)
    assert len(trainer.sample(state, 1, [11, 1, 2, 3])[0]) == 3, "there are fewer spares than groups to replace"


@pytest.mark.parametrize("twins, validation", [(5, 3), (0, 3), (0, 9)])
def test_validation_that_leaves_no_problem_is_refused(tmp_path, twins, validation):
    """GRPO does not start if all problems are held out, or if each of the others equals a held-out one up to the order
    of its numbers."""
    config = make_config(steps=1, prompts=2, validate_every=1, validation=validation)
    problems = [*[Problem((7, 2), 5)] * twins, *(Problem((2, 7), target) for target in (3, 4, 5))]
    rollouts = RolloutSpec(NonsenseProtocol(2), TOKENIZER, BUDGET, slots=16)
    with pytest.raises(UserError, match="grpo.validation"):
        run_grpo(GrpoJob(spawning_model(1), config, rollouts, problems, data_mesh(2), tmp_path, key=lambda p: p.key))
    assert not list(tmp_path.iterdir())


def test_problems_held_out_for_validation_are_never_sampled(tmp_path):
    prompted = []

    class Recorder(NonsenseProtocol):
        def root_prompt(self, problem):
            prompted.append(problem.target)
            return super().root_prompt(problem.target)

    config = make_config(steps=4, prompts=2, validate_every=2, validation=3)
    # The last three are held out. The first is not sampled either: it is one of them with its numbers in another order.
    problems = [Problem((7, 2), 5), *(Problem((2, 7), target) for target in (1, 8, 2, 3, 4, 5))]
    rollouts = RolloutSpec(Recorder(2), TOKENIZER, BUDGET, slots=16)
    run_grpo(GrpoJob(spawning_model(1), config, rollouts, problems, data_mesh(2), tmp_path, key=lambda p: p.key))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation/accuracy" in line] == [0, 2, 4]
    validations, sampled = 3 * 3, 4 * 2 * 4
    assert sum(problem in (3, 4, 5) for problem in prompted) == validations
    assert sum(problem in (1, 2, 8) for problem in prompted) == sampled
    parts = ("sample", "pack", "score", "update", "rest")
    for line in lines[1:]:
        # A step without a signal has no update, and not every step is validated.
        seconds = sum(line.get(f"seconds/{part}", 0) for part in (*parts, "validate"))
        assert seconds == pytest.approx(line["seconds/step"], rel=1e-6)


class AlwaysRight(NonsenseProtocol):
    def correct(self, problem, text):
        return True


def test_a_penalty_on_children_makes_trees_narrow():
    """Every tree is correct, so that rewards differ by the penalty alone."""
    trainer, state = make_trainer(
        spawning_model(3), AlwaysRight(2), Budget(64, 12, 1), slots=32, steps=25, prompts=2, group=16,
        penalties=Penalties(child=0.1), normalise=False,
    )  # fmt: skip
    children = []
    for step in range(1, 26):
        groups, _ = trainer.sample(state, step, [0, 1])
        children.append(rollout_metrics(groups, trainer.config.penalties)["rollout/children"])
        if children[-1] < 0.3 * children[0]:
            break
        state, _ = trainer.update(state, groups)
    assert children[0] > 1 and children[-1] < 0.3 * children[0], children


def test_problems_are_compared_by_their_key_or_else_by_equality():
    config = make_config(validate_every=1, validation=2)
    assert hold_back([3, 1, 2, 1, 4], config) == ([3, 2], [1, 4])
    assert hold_back([3, 1, 5, 6, 4], config, key=lambda problem: problem % 2) == ([3, 1, 5], [6, 4])
    assert hold_back([3, 1], make_config()) == ([3, 1], [])


def test_batch_rows_that_devices_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="batch_rows .3.*2 devices"):
        make_trainer(make_model(0), batch_rows=3)
