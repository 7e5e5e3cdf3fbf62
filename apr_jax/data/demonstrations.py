"""Encodes a task's demonstrations as trees of token ids, decides which fit the model, and counts them."""

import dataclasses
from collections import Counter
from typing import Any

from apr_jax.data.store import CALL_FORCED, CALL_SAMPLED, block_rows
from apr_jax.tasks.task import Task
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import ThreadTree, encode_tree
from apr_jax.threads.metrics import longest_context, sequential_tokens, total_tokens

_CALL = (CALL_FORCED, CALL_SAMPLED)
# Counts in a data set's manifest. A problem without a tree in the data set counts under the first of these reasons.
NO_DEMONSTRATION, TOO_LONG = DROPPED = ("no_demonstration", "too_long")
PROBLEM_COUNTS = ("problems", "solved_by_solver", *DROPPED)
TREE_COUNTS = ("trees", "solved", "children", "tokens", "sequential_tokens", "unshared_tokens", "longest")


def encode_demonstration(
    task: Task, problem: Any, variant: str, index: int, text: ThreadTree, tokenizer: Tokenizer
) -> ThreadTree:
    """Encode a solver's tree of text as a tree of token ids, and insert its condition.

    The condition is text at the start of the root's prompt that states the budget of the tree (`Task.condition_of`). If
    `text.info` has a `condition` already, the prompt is not changed. The returned tree's info is `text.info` with these
    entries added:
    `solved`: whether the root's answer is correct.
    `index`: the number of the problem.
    `found`: the numbers of the threads that returned a result, counted depth first from 0, the root.
    `condition`: the condition, only where it is not empty.
    """
    protocol = task.protocol(variant)
    found = [at for at, thread in enumerate(text.threads()) if protocol.result(thread.text) is not None]
    solved = protocol.correct(problem, text.root.text)
    info = text.info | {"solved": solved, "index": index, "found": found}
    tree = encode_tree(ThreadTree(text.root, info), tokenizer.encode, tokenizer.bos, tokenizer.eos)
    if "condition" in info or not (condition := task.condition_of(tree, variant)):
        return tree
    prompt, *rest = tree.root.blocks
    bos, *ids = prompt.content
    prompt = dataclasses.replace(prompt, content=(bos, *tokenizer.encode(condition), *ids))
    return ThreadTree(dataclasses.replace(tree.root, blocks=(prompt, *rest)), info | {"condition": condition})


def fits(tree: ThreadTree, window: int, row_length: int = 0) -> bool:
    """Return whether a tree can be trained on.

    Each thread's context must have at most `window` tokens. Each segment, a thread with its calls and inheriting
    children, must have at most `row_length` tokens, unless `row_length` is 0.
    """
    return longest_context(tree) <= window and (not row_length or _longest_segment(tree) <= row_length)


def _longest_segment(tree: ThreadTree) -> int:
    return max(sum(len(block) for _, block, _, _ in block_rows(thread)) for thread in tree.threads())


def no_counts() -> dict[str, Any]:
    """Return the counts of a data set without trees: every count is zero.

    Counts are sums over trees, with two exceptions: `longest` is the number of tokens of the longest context, and
    `conditions` is the number of trees by condition.
    """
    return {**dict.fromkeys((*PROBLEM_COUNTS, *TREE_COUNTS), 0), "conditions": Counter()}


def add_counts(total: dict[str, Any], more: dict[str, Any]) -> None:
    """Add the counts in `more` to `total`, in place; a count that `total` lacks starts at zero."""
    for name, count in more.items():
        if name == "longest":
            total[name] = max(total.get(name, 0), count)
        elif name == "conditions":
            total[name] = Counter(total.get(name, {})) + Counter(count)
        else:
            total[name] = total.get(name, 0) + count


def count_tree(counts: dict[str, Any], tree: ThreadTree) -> None:
    """Add a tree that the data set keeps to `counts`, in place."""
    counts["trees"] += 1
    counts["solved"] += tree.info["solved"]
    counts["children"] += sum(1 for _ in tree.threads()) - 1
    counts["tokens"] += total_tokens(tree)
    counts["sequential_tokens"] += sequential_tokens(tree)
    counts["unshared_tokens"] += unshared_tokens(tree)
    counts["longest"] = max(counts["longest"], longest_context(tree))
    counts["conditions"][tree.info.get("condition", "")] += 1


def unshared_tokens(tree: ThreadTree) -> int:
    """Return the tokens of a tree if no prefix were shared, as the paper's authors train.

    Each call and each end of a thread is then a sequence of its own, which repeats all context before it.
    """
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
