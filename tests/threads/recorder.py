"""An observer that rebuilds every thread from its events, and a check that these are the threads of the trees."""

from apr_jax.threads import Spawn
from apr_jax.threads.observer import Observer


class Recorder(Observer):
    """`contexts` has, for each thread by its name, (id, sampled) of every token of its own context; `calls` has the
    same of its spawns. `again` counts events after which tokens were decoded again."""

    def __init__(self):
        self.contexts, self.depths, self.calls, self.children, self.threads = {}, {}, {}, {}, {}
        self.events = []
        self.again = 0

    def started(self, name, depth, prompt):
        assert name not in self.contexts
        self.contexts[name], self.depths[name] = [(token, False) for token in prompt], depth
        self.calls[name], self.children[name] = [], []
        self.events.append(("started", name))

    def decoded(self, name, at, ids):
        assert isinstance(ids, tuple) and name not in self.threads
        context = self.contexts[name]
        assert at <= len(context) and all(sampled for _, sampled in context[at:])
        self.again += at < len(context)
        context[at:] = [(token, True) for token in ids]
        self.events.append(("decoded", name))

    def replaced(self, name, token):
        self.contexts[name][-1] = (token, False)
        self.events.append(("replaced", name))

    def spawned(self, name, call, children):
        self.calls[name].append(self.contexts[name][-call:])
        self.children[name].append(children)
        self.events.append(("spawned", name))

    def joined(self, name, call, ids):
        self.contexts[name][-call:] = [(token, False) for token in ids]
        self.events.append(("joined", name))

    def ended(self, name, thread):
        self.threads[name] = thread
        self.events.append(("ended", name))


def check_recorded(recorder, trees):
    """Check that the recorded threads are exactly those of `trees`, which are given by the names of their roots."""
    names = set()

    def check(thread, name, depth):
        names.add(name)
        assert recorder.threads[name] is thread and recorder.depths[name] == depth
        assert recorder.contexts[name] == entries(thread.context)
        assert recorder.calls[name] == [entries(spawn.call) for spawn in thread.spawns]
        assert recorder.children[name] == [len(spawn.children) for spawn in thread.spawns]
        for turn, spawn in enumerate(thread.spawns):
            for index, child in enumerate(spawn.children):
                check(child, (*name, turn, index), depth + 1)

    for name, tree in trees.items():
        check(tree.root, name, 0)
    assert set(recorder.contexts) == set(recorder.threads) == names
    check_order(recorder, trees)


def check_order(recorder, trees):
    """Check that threads begin before and end after their events, and children between a spawn and its join."""
    where = {}
    for index, event in enumerate(recorder.events):
        where.setdefault(event, []).append(index)
    for (kind, name), found in where.items():
        assert where["started", name][0] <= found[0] and found[-1] <= where["ended", name][0]

    def check(thread, name):
        for turn, spawn in enumerate(thread.spawns):
            for index, child in enumerate(spawn.children):
                below = (*name, turn, index)
                assert where["spawned", name][turn] < where["started", below][0]
                assert where["ended", below][0] < where["joined", name][turn]
                check(child, below)

    for name, tree in trees.items():
        check(tree.root, name)


def entries(blocks):
    assert not any(isinstance(block, Spawn) for block in blocks)
    return [(token, block.sampled) for block in blocks for token in block.content]
