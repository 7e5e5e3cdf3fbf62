"""The reward of a sampled tree: 1 for a correct answer, or the value of the task's own reward, minus penalties.

All penalties are 0 by default, which is the paper's reward. A penalty on tokens or on children favours narrow trees. A
penalty on sequential tokens favours trees that search in parallel.

With penalties, rewards differ even in a group whose trees are all correct. Divided by the group's standard deviation
that small difference would become as large as the one between correct and wrong, so set `normalise` to False then.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from apr_jax.checks import check_fields
from apr_jax.errors import UserError
from apr_jax.threads import ThreadTree
from apr_jax.threads.metrics import (
    children,
    depth,
    duplicate_children,
    longest_context,
    sampled_tokens,
    sequential_tokens,
    total_tokens,
)

Groups = Sequence[Sequence[ThreadTree]]  # for each prompt its sampled trees, which have an outcome


@dataclasses.dataclass(frozen=True)
class Penalties:
    """Penalties, each subtracted from a tree's reward for every item of its name. A token penalty of 0.0001, for
    example, takes 0.1 off the reward of a tree of 1,000 sampled tokens."""

    token: float = 0.0  # per token that the model sampled, in all threads
    sequential_token: float = 0.0  # per token of the longest chain of dependent threads
    child: float = 0.0  # per thread but the root
    malformed: float = 0.0  # per spawn that could not be run
    wrong_answer: float = 0.0  # of a root that ended by itself; without it a wrong answer is worth as much as none

    def __post_init__(self):
        check_fields(self)
        for name, value in vars(self).items():
            if value < 0:
                raise UserError(f"a penalty is a number from 0 on, was given {value} for {name}")


def reward_terms(tree: ThreadTree, penalties: Penalties) -> dict[str, float]:
    """The terms of a tree's reward by name. The first is "task", the value of the task's own reward, or without one
    "correct", 1 or 0. The others are minus the cost for each penalty that is not 0. Their sum is the reward."""
    counts = {
        "token": sampled_tokens,
        "sequential_token": sequential_tokens,
        "child": children,
        "malformed": lambda tree: sum(tree.outcome.malformed.values()),
        "wrong_answer": _answered_wrongly,
    }
    charged = {name: penalty for name, penalty in vars(penalties).items() if penalty}
    own = tree.outcome.reward
    first = {"correct": float(tree.outcome.correct)} if own is None else {"task": own}
    return first | {name: -p * counts[name](tree) for name, p in charged.items()}


def _answered_wrongly(tree: ThreadTree) -> bool:
    """Whether the root ended by itself with a wrong answer."""
    return tree.outcome.answered and not tree.outcome.correct and tree.root.failure is None


def rewards(group: Sequence[ThreadTree], penalties: Penalties) -> list[float]:
    """The reward of each tree of a group."""
    return [sum(reward_terms(tree, penalties).values()) for tree in group]


def differ(values: Sequence[float]) -> bool:
    """Whether the rewards of a group differ by more than rounding. The same terms added up in another order can differ
    in their last bits."""
    return max(values) - min(values) > 1e-9 * max(1.0, *map(abs, values))


def rollout_metrics(groups: Groups, penalties: Penalties) -> dict[str, float]:
    """Metrics of the trees of a step: means over trees, of the reward and its terms, sizes, shapes and failures.

    A policy that no longer spawns shows in `rollout/spawned` and `rollout/children`, one that writes noise in the
    failures. `rollout/groups_with_signal` is a mean over groups, `rollout/tokens_per_thread` one over threads.
    """
    trees = [tree for group in groups for tree in group]
    n = len(trees)
    failures, malformed, terms = Counter(), Counter(), Counter()
    for tree in trees:
        failures.update(tree.outcome.failures)
        malformed.update(tree.outcome.malformed)
        terms.update(reward_terms(tree, penalties))
    group_rewards = [rewards(group, penalties) for group in groups]
    threads = sum(1 + children(tree) for tree in trees)

    def mean(count) -> float:
        return sum(map(count, trees)) / n

    return {
        "rollout/reward": sum(map(sum, group_rewards)) / n,
        "rollout/correct": mean(lambda tree: tree.outcome.correct),
        "rollout/answered": mean(lambda tree: tree.outcome.answered),
        "rollout/wrong": mean(_answered_wrongly),
        "rollout/groups_with_signal": sum(map(differ, group_rewards)) / len(groups),
        "rollout/spawned": mean(lambda tree: bool(tree.root.spawns)),
        "rollout/children": mean(children),
        "rollout/duplicate_children": mean(duplicate_children),
        "rollout/depth": mean(depth),
        "rollout/total_tokens": mean(total_tokens),
        "rollout/sequential_tokens": mean(sequential_tokens),
        "rollout/tokens_per_thread": sum(map(total_tokens, trees)) / threads,
        "rollout/longest_context": mean(longest_context),
        "rollout/suppressed_joins": mean(lambda tree: tree.outcome.suppressed_joins),
        **{f"rollout/reward_{name}": total / n for name, total in terms.items() if len(terms) > 1},
        **{f"rollout/malformed_{kind}": count / n for kind, count in sorted(malformed.items())},
        **{f"rollout/failed_{kind}": count / n for kind, count in sorted(failures.items())},
    }
