"""Engines in memory for tests: they play scripts or draw at random, and check how they are used."""

import asyncio
import random

from apr_jax.threads import Spawn
from apr_jax.threads.engine import Decoded


class FakeSequence:
    def __init__(self, ids, name, tape, thread):
        self.ids, self.name, self.tape, self.thread = list(ids), tuple(name), tape, tuple(thread)


class FakeEngine:
    """`tape(name, ids)` gives the tokens that a thread will write, as an iterator that its forks go on with; a child
    that inherits its parent's context, a fork by a child's name, has its own.

    Trees end in an order that `shuffle` decides: every decode waits some turns of the event loop first.
    """

    def __init__(self, tape, context=4096, shuffle=0):
        self.tape, self.context, self.random = tape, context, random.Random(shuffle)
        self.live = set()
        self.names = []
        self.decodes = 0

    def _add(self, sequence):
        self.live.add(sequence)
        self.names.append(sequence.name)
        return sequence

    def open(self, ids, name):
        assert ids
        return self._add(FakeSequence(ids, name, self.tape(tuple(name), tuple(ids)), thread=name))

    def fork(self, sequence, length, name):
        assert sequence in self.live and 1 <= length <= len(sequence.ids)
        ids = sequence.ids[:length]
        if len(name) == len(sequence.thread) + 1:  # the same thread goes on
            return self._add(FakeSequence(ids, name, sequence.tape, sequence.thread))
        return self._add(FakeSequence(ids, name, self.tape(tuple(name), tuple(ids)), thread=name))

    def extend(self, sequence, ids):
        assert sequence in self.live
        sequence.ids.extend(ids)

    async def decode(self, sequence, stop, limit, sampling):
        assert sequence in self.live and 1 <= limit <= self.context - len(sequence.ids)
        self.decodes += 1
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)
        ids = []
        while len(ids) < limit and not (ids and ids[-1] in stop):
            ids.append(next(sequence.tape))
        sequence.ids.extend(ids)
        logprobs = tuple(-0.25 * i for i in range(len(ids)))
        return Decoded(tuple(ids), logprobs, ids[-1] in stop, logprobs)

    def free(self, sequence):
        assert sequence in self.live, "freed twice"
        self.live.remove(sequence)


def scripts_of(tree, name):
    """What every thread of a tree of ids wrote, calls included, by the name that a runner gives the thread."""
    scripts = {}

    def add(thread, name):
        written = []
        turn = 0
        for item in thread.blocks:
            if isinstance(item, Spawn):
                for index, child in enumerate(item.children):
                    add(child, (*name, turn, index))
                turn += 1
                written.extend(token for block in item.call for token in block.content)
            elif item.sampled:
                written.extend(item.content)
        scripts[name] = tuple(written)

    add(tree.root, tuple(name))
    return scripts


def scripted(scripts, **settings):
    """An engine that plays token ids by thread name; it runs out where a thread writes more than its script."""
    return FakeEngine(lambda name, ids: iter(scripts[name]), **settings)


def drawing(vocabulary, likely, **settings):
    """An engine of noise: tokens drawn by the thread's name alone, half of them from `likely`."""

    def tape(name, ids):
        rng = random.Random(repr(name))
        while True:
            yield rng.choice(likely) if rng.random() < 0.5 else rng.randrange(vocabulary)

    return FakeEngine(tape, **settings)
