"""A config and a tree that the tests of GRPO's objective, reward and loop share."""

from apr_jax.threads import Block, Spawn, Thread, ThreadTree, TreeOutcome
from apr_jax.train.objective import GrpoConfig
from apr_jax.train.optimizer import OptimizerConfig

OPTIMIZER = OptimizerConfig(peak_lr=1e-2, schedule="constant", weight_decay=0.0)


def make_config(**changes):
    values = {"steps": 2, "prompts": 3, "group": 4, "optimizer": OPTIMIZER, "batch_rows": 4, "row_length": 128}
    return GrpoConfig(**values | {"inner_steps": 1} | changes)


def hand_made_tree(**outcome):
    """A root with 5 sampled tokens, 3 before its call and 2 in it, and two children, with 4 and with no sampled tokens.
    `outcome` has fields of `TreeOutcome`; the default is a wrong answer."""
    prompt, four = Block((5, 6), False), Block((7, 8, 9, 10), True)
    spawn = Spawn((Block((12, 13), True),), (Thread((prompt, four)), Thread((prompt,))), Block((14, 15, 16), False))
    outcome = TreeOutcome(**{"correct": False, "answered": True} | outcome)
    return ThreadTree(Thread((prompt, Block((7, 8, 9), True), spawn)), outcome=outcome)
