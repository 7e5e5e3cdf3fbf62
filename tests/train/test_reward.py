"""Rewards of trees, and the metrics of the trees of a step."""

import dataclasses

import pytest

from apr_jax.threads import ThreadTree
from apr_jax.train.reward import Penalties, reward_terms, rewards, rollout_metrics
from tests.train.objectives import hand_made_tree


def tree(correct, failures=(), malformed=(), suppressed_joins=0):
    return hand_made_tree(
        correct=correct, failures=dict(failures), malformed=dict(malformed), suppressed_joins=suppressed_joins
    )


def test_without_penalties_the_reward_is_1_for_a_correct_answer_else_0():
    assert reward_terms(tree(True), Penalties()) == {"correct": 1.0}
    assert rewards([tree(True), tree(False)], Penalties()) == [1.0, 0.0]


def test_each_penalty_is_subtracted_once_per_item():
    """The tree has 9 sampled tokens, 16 sequential tokens (10 of the root, 6 of the longer child) and 2 children."""
    penalties = Penalties(token=0.01, sequential_token=0.001, child=0.1, malformed=0.2)
    terms = reward_terms(tree(True, malformed={"bad_line": 1, "empty": 2}), penalties)
    assert terms == pytest.approx(
        {"correct": 1, "token": -0.09, "sequential_token": -0.016, "child": -0.2, "malformed": -0.6}
    )
    assert rewards([tree(True)], Penalties(child=0.25)) == [0.5]


def test_a_wrong_answer_can_cost_more_than_no_answer():
    silent = hand_made_tree(correct=False, answered=False)
    cut_off = ThreadTree(dataclasses.replace(tree(False).root, failure="length"), outcome=tree(False).outcome)
    group = [tree(True), tree(False), silent, cut_off]
    assert rewards(group, Penalties(wrong_answer=0.25)) == [1.0, -0.25, 0.0, 0.0]
    assert rewards(group, Penalties()) == [1, 0, 0, 0]
    assert rollout_metrics([group], Penalties())["rollout/wrong"] == 1 / 4


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_negative_or_infinite_penalty_is_refused(value):
    with pytest.raises(ValueError, match="child"):
        Penalties(child=value)


def test_rollout_metrics_are_means_over_trees():
    serial = ThreadTree(hand_made_tree().root.children[0], outcome=tree(False).outcome)
    groups = [[tree(True), tree(False, {"length": 3})], [tree(False, suppressed_joins=2), serial]]
    metrics = rollout_metrics(groups, Penalties())
    assert metrics["rollout/reward"] == metrics["rollout/correct"] == 0.25 and metrics["rollout/answered"] == 1
    assert metrics["rollout/groups_with_signal"] == 0.5 and metrics["rollout/children"] == 1.5
    assert metrics["rollout/spawned"] == 0.75 and metrics["rollout/depth"] == 0.75
    assert metrics["rollout/duplicate_children"] == 0.75  # both children of a spawn have one prompt
    assert metrics["rollout/failed_length"] == 0.75 and metrics["rollout/suppressed_joins"] == 0.5
    assert metrics["rollout/total_tokens"] == (3 * (10 + 6 + 2) + 6) / 4
    assert metrics["rollout/sequential_tokens"] == (3 * (5 + 2 + 6 + 3) + 6) / 4
    assert metrics["rollout/tokens_per_thread"] == 60 / 10
    assert not any(name.startswith("rollout/reward_") for name in metrics)


def test_penalties_make_a_signal_and_are_logged_one_by_one():
    groups = [[tree(True), tree(True, malformed={"empty": 1})]]
    metrics = rollout_metrics(groups, Penalties(malformed=0.5, child=0.1))
    assert metrics["rollout/reward"] == pytest.approx(1 - 0.2 - 0.25) and metrics["rollout/correct"] == 1
    assert metrics["rollout/reward_malformed"] == -0.25 and metrics["rollout/reward_child"] == pytest.approx(-0.2)
    assert metrics["rollout/groups_with_signal"] == 1 and metrics["rollout/malformed_empty"] == 0.5
