"""A recipe makes one kind of supervision: the tree of ids of problem number i, or the reason why it is dropped."""

import dataclasses
import random
from collections import Counter

from apr_jax.checks import at_least, check_fields
from apr_jax.data.store import CALL_FORCED, CALL_SAMPLED, block_rows
from apr_jax.errors import UserError
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.problem import Problem
from apr_jax.tasks.countdown.protocol import CountdownProtocol
from apr_jax.tasks.countdown.solver import SOLVERS, SolverConfig
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import Thread, ThreadTree, encode_tree
from apr_jax.threads.metrics import longest_context, sequential_tokens, total_tokens

_CALL = (CALL_FORCED, CALL_SAMPLED)
TOKEN_BIN = 512  # the paper's bins of SoS+ budgets, tokens
DROPPED = ("wrong", "too_long")  # why a tree is not kept, in the order they are looked at


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How problems become trees. `window` bounds the context of every thread; `piece` a thread with its calls
    (0: no bound).

    `conditioned` puts a budget that the trace itself keeps first on the root's prompt (the paper's conditioned
    models, figures 4a and 4b): for SoS+ its tokens rounded up to bins of 512, for APR its children per spawn.
    `correct_only` keeps solved problems alone (rejection sampling, table 2).
    """

    style: str  # "apr" or "sosp": how a root begins, and the store's name
    solver: SolverConfig
    window: int
    piece: int = 0
    search: str = ""  # which of SOLVERS; "": the style's own
    correct_only: bool = False
    conditioned: bool = False
    seed: int | str = 0  # part of each tree's seed; in a data set a text with the part's name

    BOUNDS = (at_least(1, "window"), at_least(0, "piece"))

    def __post_init__(self):
        check_fields(self)
        CountdownProtocol(self.style)  # raises for an unknown one
        if self.search and self.search not in SOLVERS:
            raise UserError(f"search is one of {', '.join(sorted(SOLVERS))}, was given {self.search!r}")

    def make(self, problem: Problem, index: int, tokenizer: Tokenizer) -> tuple[ThreadTree, str | None]:
        """The tree of problem number `index`, a pure function of (recipe, problem, index), and why it is dropped.

        Its info is the solver's with `found`: which of its threads, depth first, found the target.
        """
        rng = random.Random(f"{self.seed}/{self.style}/{index}")
        text = SOLVERS[self.search or self.style](problem, self.solver, rng)
        found = [at for at, thread in enumerate(text.threads()) if not gave_up(thread)]
        text = dataclasses.replace(text, info=text.info | {"index": index, "found": found})
        if self.correct_only and not text.info["solved"]:
            return text, "wrong"
        tree = encode_tree(text, tokenizer.encode, tokenizer.bos, tokenizer.eos)
        if self.conditioned:
            tree = _conditioned(tree, self.style, tokenizer)
        if longest_context(tree) > self.window or (self.piece and _longest_piece(tree) > self.piece):
            return tree, "too_long"
        return tree, None


def gave_up(thread: Thread) -> bool:
    """Whether a solver's thread of text ended without the target."""
    return trace.GOAL_REACHED not in thread.context[-1].content


def _longest_piece(tree: ThreadTree) -> int:
    return max(sum(len(block) for _, block, _, _ in block_rows(thread)) for thread in tree.threads())


def _conditioned(tree: ThreadTree, style: str, tokenizer: Tokenizer) -> ThreadTree:
    """The tree with its own budget first on the root's prompt, after the beginning-of-text token."""
    if style == "apr":
        spawns = [len(spawn.children) for thread in tree.threads() for spawn in thread.spawns]
        budget = round(sum(spawns) / len(spawns)) if spawns else 0
    else:
        budget = -(-total_tokens(tree) // TOKEN_BIN) * TOKEN_BIN
    prompt, *rest = tree.root.blocks
    bos, *ids = prompt.content
    condition = tokenizer.encode(CountdownProtocol(style).condition(budget))
    prompt = dataclasses.replace(prompt, content=(bos, *condition, *ids))
    return ThreadTree(dataclasses.replace(tree.root, blocks=(prompt, *rest)), tree.info | {"budget": budget})


COUNTED = ("trees", "solved", "children", "tokens", "sequential_tokens", "unshared_tokens", "longest")


def count_tree(counts: Counter, tree: ThreadTree) -> None:
    """Adds a kept tree to what a manifest tells (`COUNTED`): sums, but for the longest context."""
    counts["trees"] += 1
    counts["solved"] += tree.info["solved"]
    counts["children"] += sum(1 for _ in tree.threads()) - 1
    counts["tokens"] += total_tokens(tree)
    counts["sequential_tokens"] += sequential_tokens(tree)
    counts["unshared_tokens"] += unshared_tokens(tree)
    counts["longest"] = max(counts["longest"], longest_context(tree))


def unshared_tokens(tree: ThreadTree) -> int:
    """Tokens where a thread's prefix is written out again for every call, as the authors train: each call with
    all before it is a sequence, and so is the thread's end."""
    total = 0
    for thread in tree.threads():
        context = call = 0
        for _, block, role, _ in block_rows(thread):
            if role in _CALL:
                call += len(block)
                continue
            if call:
                total += context + call
                call = 0
            context += len(block)
        total += context
    return total
