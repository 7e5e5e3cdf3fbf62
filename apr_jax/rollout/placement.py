"""Which of several servers a thread's requests go to. A thread stays where it began: its context is cached there."""

from itertools import count
from typing import Protocol

from apr_jax.rollout.measure import Origin


class Placement(Protocol):
    def place(self, origin: Origin, servers: int) -> int:
        """The index of the server for a thread that begins; `servers` is 1 or more."""


class AllToOne:
    """Everything to the first server: one cache holds all, children share what they can."""

    def place(self, origin: Origin, servers: int) -> int:
        return 0


class RoundRobin:
    """Threads to one server after the other, roots and children alike."""

    def __init__(self):
        self._next = count()

    def place(self, origin: Origin, servers: int) -> int:
        return next(self._next) % servers


class RootsApart:
    """The paper's: roots to the first server, children to the others, one after the other (it had 1 and 7)."""

    def __init__(self):
        self._next = count()

    def place(self, origin: Origin, servers: int) -> int:
        if origin.depth == 0 or servers == 1:
            return 0
        return 1 + next(self._next) % (servers - 1)


PLACEMENTS = {"one": AllToOne, "round_robin": RoundRobin, "roots_apart": RootsApart}
