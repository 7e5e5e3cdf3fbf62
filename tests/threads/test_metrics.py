"""Costs of a tree against a slow reference that counts tokens one by one, and the tree's JSON form."""

import dataclasses
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_jax.threads import Block, Spawn, Thread, ThreadTree, TreeOutcome, metrics, tree_json

IDS = st.lists(st.integers(0, 5), max_size=4).map(tuple)
SAMPLED = IDS.flatmap(
    lambda ids: st.lists(st.floats(-20, 0, allow_nan=False), min_size=len(ids), max_size=len(ids)).flatmap(
        lambda logprobs: st.sampled_from([None, tuple(logprobs[::-1])]).map(
            lambda other: Block(ids, True, tuple(logprobs), other)
        )
    )
)
FORCED = IDS.map(lambda ids: Block(ids, False))
FAILURES = st.sampled_from([None, "length", "malformed:empty"])


def threads(levels):
    """A strategy for threads of ids with up to `levels` levels of children."""
    item = SAMPLED
    if levels:
        children = st.lists(threads(levels - 1), min_size=1, max_size=3)
        child = st.tuples(children, st.booleans()).map(
            lambda drawn: tuple(dataclasses.replace(child, inherits=drawn[1]) for child in drawn[0])
        )
        call = st.lists(st.one_of(SAMPLED, FORCED), min_size=1, max_size=2).map(tuple)
        item = st.one_of(SAMPLED, FORCED, st.builds(Spawn, call, child, FORCED))
    rest = st.lists(item, max_size=4)
    return st.builds(lambda prompt, rest, failure: Thread((prompt, *rest), failure), FORCED, rest, FAILURES)


COUNTS = st.dictionaries(st.sampled_from(["length", "empty", "bad_line"]), st.integers(1, 9))
OUTCOMES = st.none() | st.builds(
    TreeOutcome, st.booleans(), st.booleans(), COUNTS, COUNTS, st.integers(0, 3), st.integers(0, 3)
)
TREES = st.builds(lambda root, outcome: ThreadTree(root, {"problem": [1, 2]}, outcome), threads(2), OUTCOMES)

EXAMPLE = ThreadTree(
    Thread(
        (
            Block("ppppp", False),
            Block("wwww", True),
            Spawn(
                (Block("ccc", True),),
                (
                    Thread((Block("pppppp", False), Block("wwwwwww", True))),
                    Thread((Block("pppppp", False), Block("ww", True))),
                ),
                Block("jj", False),
            ),
            Block("w", True),
        )
    )
)


def events(thread, number=itertools.count()):
    """The reference: one tuple for each token of a thread and its descendants. It is (number of the token, numbers of
    the tokens that must be written before it, numbers of the tokens in its context and itself, whether it was
    sampled)."""
    out = []

    def run(thread, before, inherited=()):
        context, last = list(inherited), before
        for item in thread.blocks:
            blocks = [*item.call] if isinstance(item, Spawn) else [item]
            start = len(context)
            for block in blocks:
                for _ in range(len(block)):
                    me = next(number)
                    context.append(me)
                    out.append((me, last, list(context), block.sampled))
                    last = [me]
            if isinstance(item, Spawn):
                # The join can begin only when every child has ended.
                shared = context[:start]
                ends = [run(child, last, shared if child.inherits else ()) for child in item.children]
                last = last + [end for one in ends for end in one]
                del context[start:]
                for _ in range(len(item.join)):
                    me = next(number)
                    context.append(me)
                    out.append((me, last, list(context), item.join.sampled))
                    last = [me]
        return last

    run(thread, [])
    return out


def longest_chain(tokens):
    """Return the length of the longest chain in the tuples of `events`."""
    depth = {}
    for me, before, _, _ in tokens:
        depth[me] = 1 + max((depth[other] for other in before), default=0)
    return max(depth.values(), default=0)


@given(TREES)
def test_agrees_with_counting_tokens_one_by_one(tree):
    tokens = events(tree.root)
    assert metrics.total_tokens(tree) == len(tokens)
    assert metrics.sampled_tokens(tree) == sum(sampled for *_, sampled in tokens)
    assert metrics.longest_context(tree) == max((len(held) for _, _, held, _ in tokens), default=0)
    assert metrics.sequential_tokens(tree) == longest_chain(tokens)


@given(TREES)
def test_bounds_between_the_metrics(tree):
    total, chain = metrics.total_tokens(tree), metrics.sequential_tokens(tree)
    assert metrics.longest_context(tree) <= chain <= total
    assert metrics.sampled_tokens(tree) <= total
    assert metrics.depth(tree) <= metrics.children(tree)
    assert (chain == total) or metrics.children(tree) > 1, "only siblings make a tree shorter than its tokens"


def test_worked_example_of_the_docstrings():
    assert metrics.total_tokens(EXAMPLE) == 36
    assert metrics.sampled_tokens(EXAMPLE) == 17
    assert metrics.sequential_tokens(EXAMPLE) == 28
    assert metrics.longest_context(EXAMPLE) == 13
    assert metrics.children(EXAMPLE) == 2
    assert metrics.depth(EXAMPLE) == 1
    assert metrics.duplicate_children(EXAMPLE) == 1


def test_one_thread_costs_the_same_however_it_is_counted():
    tree = ThreadTree(Thread((Block((1, 2), False), Block((3, 4, 5), True))))
    assert metrics.total_tokens(tree) == metrics.sequential_tokens(tree) == metrics.longest_context(tree) == 5
    assert metrics.children(tree) == metrics.depth(tree) == metrics.duplicate_children(tree) == 0


@given(TREES)
def test_json_restores_an_equal_tree(tree):
    assert tree_json.tree_from_json(json.loads(json.dumps(tree_json.tree_to_json(tree)))) == tree


def test_json_keeps_text_and_rounds_only_when_asked():
    assert tree_json.tree_from_json(json.loads(json.dumps(tree_json.tree_to_json(EXAMPLE)))) == EXAMPLE
    tree = ThreadTree(Thread((Block((1,), False), Block((2,), True, (-0.123456,)))))
    assert tree_json.tree_from_json(tree_json.tree_to_json(tree, digits=2)).root.blocks[1].logprobs == (-0.12,)
    assert tree_json.tree_from_json(tree_json.tree_to_json(tree)) == tree


def test_only_the_json_of_a_rollout_has_an_outcome():
    outcome = TreeOutcome(correct=False, answered=True, failures={"length": 2}, suppressed_joins=1)
    assert "outcome" not in tree_json.tree_to_json(EXAMPLE)
    assert tree_json.tree_to_json(dataclasses.replace(EXAMPLE, outcome=outcome))["outcome"] == {
        "correct": False, "answered": True, "failures": {"length": 2}, "malformed": {}, "suppressed_joins": 1,
        "forced_spawns": 0,
    }  # fmt: skip


@pytest.mark.parametrize("reward", [None, -0.25, 0.0])
def test_a_reward_of_the_task_comes_back_from_json(reward):
    tree = dataclasses.replace(EXAMPLE, outcome=TreeOutcome(True, True, reward=reward))
    row = json.loads(json.dumps(tree_json.tree_to_json(tree)))
    assert row["outcome"].get("reward") == reward and tree_json.tree_from_json(row) == tree


OUTCOME = dataclasses.asdict(TreeOutcome(True, True, {"length": 1}))
ROOT = {"blocks": [{"sampled": False, "content": [5]}]}
BROKEN = [None, [], {}, {"info": {}}, {"info": {}, "root": {"blocks": [1]}}, {"root": {"blocks": []}}]
BROKEN += [
    {"info": {}, "root": ROOT, "outcome": outcome}
    for outcome in (
        None, {}, OUTCOME | {"correct": 1}, OUTCOME | {"failures": ["length"]}, OUTCOME | {"malformed": {"empty": "1"}},
        OUTCOME | {"forced_spawns": True},
    )
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_json_is_a_value_error(broken):
    with pytest.raises(ValueError, match="thread tree"):
        tree_json.tree_from_json(broken)
