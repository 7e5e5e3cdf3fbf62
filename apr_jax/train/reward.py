"""What a sampled tree is worth: whether its answer is right, less what it cost.

Every penalty is 0 by default, which is the paper's reward. A penalty on tokens or on children favours narrow trees. A
penalty on sequential tokens favours trees that search in parallel. With penalties every group has a signal, also where
all of its trees are right. Dividing advantages by the deviation would then make that small difference as large as the
one between right and wrong, so turn `normalise` off.
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

Groups = Sequence[Sequence[ThreadTree]]  # of each prompt its sampled trees, which have an outcome


@dataclasses.dataclass(frozen=True)
class Penalties:
    """What is taken off a reward of 1 for each of these; 0.0001 a token takes 0.1 off a tree of 1,000."""

    token: float = 0.0  # that the model sampled, in all threads
    sequential_token: float = 0.0  # of the longest chain of threads
    child: float = 0.0
    malformed: float = 0.0  # spawn that could not be run
    wrong_answer: float = 0.0  # answer of a root that ended well: without it worth as much as no answer

    def __post_init__(self):
        check_fields(self)
        for name, value in vars(self).items():
            if value < 0:
                raise UserError(f"a penalty is a number from 0 on, was given {value} for {name}")


def reward_terms(tree: ThreadTree, penalties: Penalties) -> dict[str, float]:
    """The parts of a tree's reward by name; those without a penalty are left out. Their sum is the reward."""
    costs = {
        "token": sampled_tokens,
        "sequential_token": sequential_tokens,
        "child": children,
        "malformed": lambda tree: sum(tree.outcome.malformed.values()),
        "wrong_answer": _wrong,
    }
    priced = {name: penalty for name, penalty in vars(penalties).items() if penalty}
    return {"correct": float(tree.outcome.correct)} | {name: -p * costs[name](tree) for name, p in priced.items()}


def _wrong(tree: ThreadTree) -> bool:
    return tree.outcome.answered and not tree.outcome.correct and tree.root.failure is None


def rewards(group: Sequence[ThreadTree], penalties: Penalties) -> list[float]:
    """Of each tree of a group."""
    return [sum(reward_terms(tree, penalties).values()) for tree in group]


def differ(values: Sequence[float]) -> bool:
    """Whether the rewards of a group differ by more than rounding: sums in another order may end in other bits."""
    return max(values) - min(values) > 1e-9 * max(1.0, *map(abs, values))


def rollout_metrics(groups: Groups, penalties: Penalties) -> dict[str, float]:
    """What a step's trees were like, as means over trees: reward and its terms, size, shape, and what went wrong. A
    collapse to serial shows in `spawned` and `children`, one to noise in the failures."""
    trees = [tree for group in groups for tree in group]
    n = len(trees)
    failures, malformed, terms = Counter(), Counter(), Counter()
    for tree in trees:
        failures.update(tree.outcome.failures)
        malformed.update(tree.outcome.malformed)
        terms.update(reward_terms(tree, penalties))
    given = [rewards(group, penalties) for group in groups]
    threads = sum(1 + children(tree) for tree in trees)

    def mean(count) -> float:
        return sum(map(count, trees)) / n

    return {
        "rollout/reward": sum(map(sum, given)) / n,
        "rollout/correct": mean(lambda tree: tree.outcome.correct),
        "rollout/answered": mean(lambda tree: tree.outcome.answered),
        "rollout/wrong": mean(_wrong),
        "rollout/groups_with_signal": sum(map(differ, given)) / len(groups),
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
