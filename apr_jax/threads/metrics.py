"""The cost of a thread tree, in the measures of the APR paper's evaluation.

Every function counts block lengths alone: tokens for a tree of ids, characters for a tree of text. All worked
examples use this tree, whose root spawns two children (lengths in brackets):

    root   prompt[5] written[4] (call[3]) join[2] written[1]
    child 1                     prompt[6] written[7]
    child 2                     prompt[6] written[2]
"""

from collections import Counter
from collections.abc import Iterable

from apr_jax.threads.tree import Block, Spawn, Thread, ThreadTree


def _blocks(thread: Thread) -> Iterable[Block]:
    """Yield a thread's own blocks in the order of writing, with its calls and joins but without its children."""
    for item in thread.blocks:
        if isinstance(item, Spawn):
            yield from item.call
            yield item.join
        else:
            yield item


def _length(blocks: Iterable[Block]) -> int:
    return sum(map(len, blocks))


def total_tokens(tree: ThreadTree) -> int:
    """Return the number of tokens in all threads: prompts, written blocks, calls and joins. Context that a child
    inherits is counted once, in its parent.

    Example: 5 + 4 + 3 + 2 + 1 of the root, 6 + 7 and 6 + 2 of its children = 36.
    """
    return sum(_length(_blocks(thread)) for thread in tree.threads())


def sampled_tokens(tree: ThreadTree) -> int:
    """Return the number of tokens that the model sampled, calls included: the decode steps of all threads.

    Example: written 4 + 1 and call 3 of the root, written 7 and 2 of its children = 17.
    """
    return sum(thread.sampled_tokens for thread in tree.threads())


def sequential_tokens(tree: ThreadTree) -> int:
    """Return the length of the longest chain of causally dependent tokens (the paper's sequential tokens). Tokens
    along a thread add up; a spawn counts its call, its longest child and its join.

    Example: 5 + 4, then 3 + max(6 + 7, 6 + 2) + 2, then 1 = 28.
    """
    return _chain(tree.root)


def _chain(thread: Thread) -> int:
    """Return the length of the longest chain of dependent tokens in a thread and its descendants. The recursion is as
    deep as spawns are nested, which `Budget.depth` bounds."""
    children = sum(max(map(_chain, spawn.children), default=0) for spawn in thread.spawns)
    return _length(_blocks(thread)) + children


def longest_context(tree: ThreadTree) -> int:
    """Return the most tokens that any thread held in its context at one time. A call counts until its join replaces
    it. So a tree fits a window exactly where this number is not above the window.

    Example: the root held 5 + 4 + 3 = 12 at its call and 5 + 4 + 2 + 1 = 12 at its end, child 1 held 13.
    """
    return _held(tree.root, 0)


def _held(thread: Thread, inherited: int) -> int:
    """Return the most tokens that a thread or one of its descendants held; the thread began with `inherited`."""
    now = most = inherited
    for item in thread.blocks:
        if isinstance(item, Spawn):
            below = [_held(child, now if child.inherits else 0) for child in item.children]
            most = max(most, now + _length(item.call), *below)
            now += len(item.join)
        else:
            now += len(item)
        most = max(most, now)
    return most


def children(tree: ThreadTree) -> int:
    """Return the number of threads without the root (the paper's children per tree). Example: 2."""
    return sum(1 for _ in tree.threads()) - 1


def depth(tree: ThreadTree) -> int:
    """Return the number of levels of children, 0 where no thread was spawned. Example: 1."""

    def below(thread: Thread) -> int:
        return max((1 + below(child) for child in thread.children), default=0)

    return below(tree.root)


def duplicate_children(tree: ThreadTree) -> int:
    """Return the number of children with the same prompt as an earlier child of their spawn: repeated work.

    Example: 1 if both prompts are the same, else 0.
    """
    spawns = [spawn for thread in tree.threads() for spawn in thread.spawns]
    prompts = [Counter(tuple(child.blocks[0].content) for child in spawn.children) for spawn in spawns]
    return sum(count.total() - len(count) for count in prompts)
