"""Rules that assign threads to servers. A thread stays on its first server, which has its context cached."""

from itertools import count
from typing import Protocol

from apr_jax.rollout.measure import Origin


class Placement(Protocol):
    """A rule that assigns each new thread to a server."""

    def place(self, origin: Origin, servers: int) -> int:
        """Return the index of the server for a new thread, below `servers`, which is at least 1."""


class AllToOne:
    """All threads on the first server, so that its one cache serves parents and children."""

    def place(self, origin: Origin, servers: int) -> int:
        return 0


class RoundRobin:
    """Each new thread, root or child, on the next server in turn."""

    def __init__(self):
        self._next = count()

    def place(self, origin: Origin, servers: int) -> int:
        return next(self._next) % servers


class RootsApart:
    """Roots on the first server, children on the other servers in turn. The paper used 1 server and 7."""

    def __init__(self):
        self._next = count()

    def place(self, origin: Origin, servers: int) -> int:
        if origin.depth == 0 or servers == 1:
            return 0
        return 1 + next(self._next) % (servers - 1)


PLACEMENTS = {"one": AllToOne, "round_robin": RoundRobin, "roots_apart": RootsApart}
