"""What a tree is worth, and what is told of a step's trees."""

import dataclasses

import pytest

from apr_jax.threads import ThreadTree
from apr_jax.train.reward import Penalties, reward_terms, rewards, rollout_metrics
from tests.train.objectives import hand_made_tree


def tree(correct, failures=(), malformed=(), suppressed_joins=0):
    return hand_made_tree(
        correct=correct, failures=dict(failures), malformed=dict(malformed), suppressed_joins=suppressed_joins
    )


def test_without_prices_a_tree_is_worth_whether_it_is_right():
    assert reward_terms(tree(True), Penalties()) == {"correct": 1.0}
    assert rewards([tree(True), tree(False)], Penalties()) == [1.0, 0.0]


def test_every_price_is_taken_off_by_what_the_tree_cost():
    """The tree samples 9 tokens, its longest chain has 16 (the root's 10, the longer child's 6), and 2 children."""
    penalties = Penalties(token=0.01, sequential_token=0.001, child=0.1, malformed=0.2)
    terms = reward_terms(tree(True, malformed={"bad_line": 1, "empty": 2}), penalties)
    assert terms == pytest.approx(
        {"correct": 1, "token": -0.09, "sequential_token": -0.016, "child": -0.2, "malformed": -0.6}
    )
    assert rewards([tree(True)], Penalties(child=0.25)) == [0.5]


def test_an_answer_that_is_wrong_can_cost_more_than_none():
    silent = hand_made_tree(correct=False, answered=False)
    cut_off = ThreadTree(dataclasses.replace(tree(False).root, failure="length"), outcome=tree(False).outcome)
    group = [tree(True), tree(False), silent, cut_off]
    assert rewards(group, Penalties(wrong_answer=0.25)) == [1.0, -0.25, 0.0, 0.0]
    assert rewards(group, Penalties()) == [1, 0, 0, 0]
    assert rollout_metrics([group], Penalties())["rollout/wrong"] == 1 / 4


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_price_is_a_number_from_0_on(value):
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


def test_prices_make_a_signal_and_are_told_apart():
    groups = [[tree(True), tree(True, malformed={"empty": 1})]]
    metrics = rollout_metrics(groups, Penalties(malformed=0.5, child=0.1))
    assert metrics["rollout/reward"] == pytest.approx(1 - 0.2 - 0.25) and metrics["rollout/correct"] == 1
    assert metrics["rollout/reward_malformed"] == -0.25 and metrics["rollout/reward_child"] == pytest.approx(-0.2)
    assert metrics["rollout/groups_with_signal"] == 1 and metrics["rollout/malformed_empty"] == 0.5
