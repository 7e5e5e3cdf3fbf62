"""Fake engines without a model for tests: they play scripts or draw random tokens, and assert that callers keep to the
engine contract."""

import asyncio
import random

from apr_jax.threads import Spawn
from apr_jax.threads.engine import Decoded


class FakeSequence:
    """A sequence of `FakeEngine`. `thread` is the name of the thread that writes it; `tape` yields that thread's
    tokens."""

    def __init__(self, ids, name, tape, thread):
        self.ids, self.name, self.tape, self.thread = list(ids), tuple(name), tape, tuple(thread)


class FakeEngine:
    """An `Engine` whose threads write given tokens.

    `tape(name, ids)` returns an iterator over the tokens that a thread will write. `name` is the thread's name; `ids`
    is its context at the beginning. When a thread resumes in a fork, the fork continues the same iterator. A fork for a
    child that inherits the context gets an iterator of its own.

    `shuffle` seeds the order in which trees end: every decode first waits a random number of turns of the event loop.
    `live` are the sequences that were not freed; `names` are the names of all sequences, in order.
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
        if len(name) == len(sequence.thread) + 1:  # one more number: the same thread resumes
            return self._add(FakeSequence(ids, name, sequence.tape, sequence.thread))
        return self._add(FakeSequence(ids, name, self.tape(tuple(name), tuple(ids)), thread=name))

    def extend(self, sequence, ids):
        assert sequence in self.live
        sequence.ids.extend(ids)

    async def decode(self, sequence, stop, limit, sampling, watch=None):
        assert sequence in self.live and 1 <= limit <= self.context - len(sequence.ids)
        self.decodes += 1
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)
        ids = []
        while len(ids) < limit and not (ids and ids[-1] in stop):
            ids.append(next(sequence.tape))
        sequence.ids.extend(ids)
        if watch is not None:
            for at in range(0, len(ids), 3):  # in parts, as an engine does
                watch(at, tuple(ids[at : at + 3]))
        logprobs = tuple(-0.25 * i for i in range(len(ids)))
        return Decoded(tuple(ids), logprobs, ids[-1] in stop, logprobs)

    def free(self, sequence):
        assert sequence in self.live, "freed twice"
        self.live.remove(sequence)


def scripts_of(tree, name):
    """Return the tokens that each thread of a tree of ids wrote, calls included, by the name that a runner gives the
    thread. `name` is the root's."""
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
    """Return an engine that plays `scripts`: the ids of each thread by its name. Decoding beyond a script raises an
    error."""
    return FakeEngine(lambda name, ids: iter(scripts[name]), **settings)


def drawing(vocab_size, likely, **settings):
    """Return an engine of random tokens that depend on the thread's name alone. Half of them are from `likely`, the
    others from all `vocab_size` ids."""

    def tape(name, ids):
        rng = random.Random(repr(name))
        while True:
            yield rng.choice(likely) if rng.random() < 0.5 else rng.randrange(vocab_size)

    return FakeEngine(tape, **settings)
