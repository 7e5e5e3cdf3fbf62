"""What a thread tree cost, as the paper counts it (section 5, "What it measures").

Every function counts block lengths alone: tokens for a tree of ids, characters for a tree of text. The
worked examples are all of this tree, whose root spawns two children (lengths in brackets):

    root   prompt[5] written[4] (call[3]) join[2] written[1]
    child 1                     prompt[6] written[7]
    child 2                     prompt[6] written[2]
"""

from collections import Counter
from collections.abc import Iterable

from apr_jax.threads.tree import Block, Spawn, Thread, ThreadTree


def _blocks(thread: Thread) -> Iterable[Block]:
    """A thread's own blocks in the order they were written, calls and joins included, children not."""
    for item in thread.blocks:
        if isinstance(item, Spawn):
            yield from item.call
            yield item.join
        else:
            yield item


def _length(blocks: Iterable[Block]) -> int:
    return sum(map(len, blocks))


def total_tokens(tree: ThreadTree) -> int:
    """Every token of every thread once: prompts, what was written, calls and joins. What a child inherits is its
    parent's, counted there.

    Example: 5 + 4 + 3 + 2 + 1 of the root, 6 + 7 and 6 + 2 of its children = 36.
    """
    return sum(_length(_blocks(thread)) for thread in tree.threads())


def sampled_tokens(tree: ThreadTree) -> int:
    """The tokens that the model wrote, calls included: what decoding cost.

    Example: written 4 + 1 and called 3 in the root, written 7 and 2 in its children = 17.
    """
    return sum(thread.sampled_tokens for thread in tree.threads())


def sequential_tokens(tree: ThreadTree) -> int:
    """The longest chain of causally dependent tokens (the paper's sequential tokens): along a thread
    tokens add up, and a spawn lasts for its call, its longest child and its join.

    Example: 5 + 4, then 3 + max(6 + 7, 6 + 2) + 2, then 1 = 28.
    """
    return _chain(tree.root)


def _chain(thread: Thread) -> int:
    """Recursion goes as deep as spawns are nested, which a budget bounds."""
    children = sum(max(map(_chain, spawn.children), default=0) for spawn in thread.spawns)
    return _length(_blocks(thread)) + children


def longest_context(tree: ThreadTree) -> int:
    """The most tokens any thread ever held at once. A call counts until its join takes its place, so an
    answer counts within a window exactly where this is not above the window.

    Example: the root held 5 + 4 + 3 = 12 at its call and 5 + 4 + 2 + 1 = 12 at its end, child 1 held 13.
    """
    return _held(tree.root, 0)


def _held(thread: Thread, inherited: int) -> int:
    """The most that the thread or one below it ever held."""
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
    """All threads but the root (the paper's children per tree). Example: 2."""
    return sum(1 for _ in tree.threads()) - 1


def depth(tree: ThreadTree) -> int:
    """Levels of children: 0 where nothing was spawned. Example: 1."""

    def below(thread: Thread) -> int:
        return max((1 + below(child) for child in thread.children), default=0)

    return below(tree.root)


def duplicate_children(tree: ThreadTree) -> int:
    """Children whose prompt an earlier child of the same spawn already had: work done twice.

    Example: 1 if both prompts are the same, else 0.
    """
    spawns = [spawn for thread in tree.threads() for spawn in thread.spawns]
    prompts = [Counter(tuple(child.blocks[0].content) for child in spawn.children) for spawn in spawns]
    return sum(count.total() - len(count) for count in prompts)
