"""From a task's demonstration of text to the tree of ids that is trained on, or the reason why there is none."""

import dataclasses
from collections import Counter
from typing import Any

from apr_jax.data.store import CALL_FORCED, CALL_SAMPLED, block_rows
from apr_jax.tasks.task import Task
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import ThreadTree, encode_tree
from apr_jax.threads.metrics import longest_context, sequential_tokens, total_tokens

_CALL = (CALL_FORCED, CALL_SAMPLED)
NO_DEMONSTRATION, TOO_LONG = DROPPED = ("no_demonstration", "too_long")  # why a problem has no tree, as first seen
SEEN = ("problems", "solved_by_solver", *DROPPED)
COUNTED = ("trees", "solved", "children", "tokens", "sequential_tokens", "unshared_tokens", "longest")


def encode_demonstration(
    task: Task, problem: Any, variant: str, index: int, text: ThreadTree, tokenizer: Tokenizer
) -> ThreadTree:
    """The tree of ids of a demonstration, with its condition (`Task.condition_of`) first on the root's prompt.

    Its info is the demonstration's and `solved` (its root has the right answer), `index`, `found` (the numbers of its
    threads, depth first, that returned a result) and, where there is one, `condition`.
    """
    protocol = task.protocol(variant)
    found = [at for at, thread in enumerate(text.threads()) if protocol.result(thread.text) is not None]
    solved = protocol.correct(problem, text.root.text)
    info = text.info | {"solved": solved, "index": index, "found": found}
    tree = encode_tree(ThreadTree(text.root, info), tokenizer.encode, tokenizer.bos, tokenizer.eos)
    if "condition" in info or not (condition := task.condition_of(tree, variant)):
        return tree  # where the demonstration tells its condition, its prompt has it already
    prompt, *rest = tree.root.blocks
    bos, *ids = prompt.content
    prompt = dataclasses.replace(prompt, content=(bos, *tokenizer.encode(condition), *ids))
    return ThreadTree(dataclasses.replace(tree.root, blocks=(prompt, *rest)), info | {"condition": condition})


def fits(tree: ThreadTree, window: int, row_length: int = 0) -> bool:
    """Whether every thread's context fits a window of so many tokens, and with its calls a row (0: any length does)."""
    return longest_context(tree) <= window and (not row_length or _longest_segment(tree) <= row_length)


def _longest_segment(tree: ThreadTree) -> int:
    return max(sum(len(block) for _, block, _, _ in block_rows(thread)) for thread in tree.threads())


def no_counts() -> dict[str, Any]:
    """The counts of no demonstration: sums by name, but for `longest`, the longest context, and `conditions`, trees by
    their condition."""
    return {**dict.fromkeys((*SEEN, *COUNTED), 0), "conditions": Counter()}


def add_counts(total: dict[str, Any], more: dict[str, Any]) -> None:
    """Adds counts to others."""
    for name, count in more.items():
        if name == "longest":
            total[name] = max(total.get(name, 0), count)
        elif name == "conditions":
            total[name] = Counter(total.get(name, {})) + Counter(count)
        else:
            total[name] = total.get(name, 0) + count


def count_tree(counts: dict[str, Any], tree: ThreadTree) -> None:
    """Adds a kept tree to the counts of its data set."""
    counts["trees"] += 1
    counts["solved"] += tree.info["solved"]
    counts["children"] += sum(1 for _ in tree.threads()) - 1
    counts["tokens"] += total_tokens(tree)
    counts["sequential_tokens"] += sequential_tokens(tree)
    counts["unshared_tokens"] += unshared_tokens(tree)
    counts["longest"] = max(counts["longest"], longest_context(tree))
    counts["conditions"][tree.info.get("condition", "")] += 1


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
