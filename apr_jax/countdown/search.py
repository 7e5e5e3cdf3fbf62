"""What all solvers share: settings, heuristics, and the expansion of one state.

An expansion is where solvers spend their time, so it ranks successors as numbers and writes out only the few that
the beam keeps.
"""

import dataclasses
import functools
import itertools
import operator
import random
from typing import NamedTuple

from apr_jax.countdown import trace
from apr_jax.countdown.problem import combine

# The authors' generator draws "promising" as true with these probabilities; the paper's text says APR_PAPER_PROMISING.
APR_PROMISING, SOSP_PROMISING = 0.9, 0.5
APR_PAPER_PROMISING = 0.1

# name -> (distance of one number to the target, how the distances of a state's numbers make its rank)
HEURISTICS = {
    "multiply": ("factor", "sum"),  # distances to the nearest factor of the target (2 to target): the authors' code
    "multiply_paper": ("factor", "min"),  # the formula printed in the paper
    "sum": ("target", "mean"),  # distances to the target: Stream of Search's
}


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """Settings of one solver; beams are drawn per problem from closed ranges.

    `max_value` keeps results above it out of the search (None: the paper's unbounded search): shorter
    traces and fewer facts of arithmetic to learn, at a few solutions lost. `shuffle` off writes what the
    beam kept in the order it was generated in: a small model that decodes greedily then goes through the
    operations, where after shuffled traces it writes the likeliest one again and again. `depth` is how many
    levels of children APR spawns (1: the authors'). `strategies` is what SoS draws from, problem by problem.
    """

    beam: tuple[int, int]
    sub_beam: tuple[int, int] | None = None  # of children; drawn at or above the problem's beam
    promising: float = APR_PROMISING
    heuristic: str = "multiply"
    max_value: int | None = None
    shuffle: bool = True
    depth: int = 1
    strategies: tuple[str, ...] = ("dfs", "bfs")

    def __post_init__(self):
        if self.heuristic not in HEURISTICS:
            raise ValueError(f"heuristic is one of {sorted(HEURISTICS)}, was given {self.heuristic!r}")
        for name in ("beam", "sub_beam"):
            value = getattr(self, name)
            if value is not None and not 1 <= value[0] <= value[1]:
                raise ValueError(f"{name} needs 1 <= lowest <= highest, was given {value}")
        if not 0 <= self.promising <= 1:
            raise ValueError(f"promising is a probability from 0 to 1, was given {self.promising}")
        if self.depth < 0:
            raise ValueError(f"depth is 0 or more levels of children, was given {self.depth}")
        if not self.strategies or not {*self.strategies} <= {"dfs", "bfs"}:
            raise ValueError(f"strategies are dfs, bfs or both, was given {self.strategies}")

    @classmethod
    def paper_sos(cls, **changes) -> "SolverConfig":
        return cls(**{"beam": (1, 5), **changes})

    @classmethod
    def paper_sosp(cls, **changes) -> "SolverConfig":
        return cls(**{"beam": (1, 5), "promising": SOSP_PROMISING, **changes})

    @classmethod
    def paper_apr(cls, **changes) -> "SolverConfig":
        return cls(**{"beam": (1, 10), "sub_beam": (1, 15), "promising": APR_PROMISING, **changes})


class Node(NamedTuple):
    """A state of the search."""

    name: str  # as in the trace: "0,1,2"
    numbers: tuple[int, ...]
    operations: tuple[str, ...]
    parent: "Node | None"


class Goal(NamedTuple):
    """Where the target was reached: `operation` at `node` leaves `numbers`, the target alone."""

    node: Node
    numbers: tuple[int, ...]
    operation: str


@functools.cache
def _near(distance: str, target: int) -> list[int]:
    """The distance of every number below the target; from there on it is number - target for both kinds."""
    if distance == "target":
        return [target - number for number in range(target)]
    factors = [factor for factor in range(2, target + 1) if target % factor == 0] or [target]
    return [min(abs(number - factor) for factor in factors) for number in range(target)]


def rank(heuristic: str, numbers: tuple[int, ...], target: int) -> float:
    """How far a state is from the target; the least is searched first."""
    distance, fold = HEURISTICS[heuristic]
    near = _near(distance, target)
    distances = [near[number] if number < target else number - target for number in numbers]
    return min(distances) if fold == "min" else sum(distances) / (len(numbers) if fold == "mean" else 1)


@functools.cache
def _pairs(count: int) -> tuple[tuple[int, int], ...]:
    return tuple(itertools.combinations(range(count), 2))


_RANK, _PLACE = operator.itemgetter(0), operator.itemgetter(1)
_FAR = float("inf")


class Search:
    """What one problem's searches share: the settings drawn for it and the random stream."""

    def __init__(self, target: int, config: SolverConfig, rng: random.Random):
        self.target, self.config, self.rng = target, config, rng
        distance, self._fold = HEURISTICS[config.heuristic]
        self._near = _near(distance, target)
        self._cap = _FAR if config.max_value is None else config.max_value
        self._unlimited = config.max_value is None and config.shuffle
        self.beam = rng.randint(*config.beam)
        low, high = config.sub_beam or (self.beam, self.beam)
        self.sub_beam = rng.randint(max(low, self.beam), max(high, self.beam))

    def promising(self) -> bool:
        return self.rng.random() < self.config.promising

    def expand(self, node: Node, beam: int | None, lines: list[str], limit: float = _FAR):
        """Writes a node's expansion. Returns its children, best first, as (rank, node), and the `Goal` or None.

        Of all successors those ranked at most `limit` are kept, of these the `beam` best (None: all).
        """
        target, numbers = self.target, node.numbers
        lines.append(trace.state(target, numbers, node.operations) + "\n")
        if len(numbers) == 2:
            return [], self._finish(node, beam, lines, limit)
        children = []
        for ranked, _, rest, (value, operation) in self._kept(numbers, beam, limit):
            state = (*rest, value)
            child = Node(f"{node.name},{len(children)}", state, (*node.operations, operation), node)
            lines.append(trace.explored(child.name, target, state, operation))
            children.append((ranked, child))
        children.sort(key=_RANK)
        return children, None

    def _finish(self, node: Node, beam: int | None, lines: list[str], limit: float) -> Goal | None:
        """Writes the expansion of a state of two numbers, four of five in a search: each result ends there."""
        target, numbers = self.target, node.numbers
        results = combine(*numbers)
        if self._unlimited and limit == _FAR and (beam is None or beam >= len(results)):
            draw = self.rng.random
            results = sorted(results, key=lambda _: draw())  # nothing to rank
        else:
            results = [result for _, _, _, result in self._kept(numbers, beam, limit)]
        for value, operation in results:
            if value == target:
                lines.append(trace.exploring(operation, (value,)) + trace.reached(value, target))
                return Goal(node, (value,), operation)
            lines.append(trace.dead_end(operation, value, target))
        return None

    def _kept(self, numbers: tuple[int, ...], beam: int | None, limit: float) -> list[tuple]:
        """The entries of `_ranked` that the beam keeps, in the order they are written in."""
        kept = self._ranked(numbers, limit)
        if beam is not None and beam < len(kept):
            kept.sort(key=_RANK)
            del kept[beam:]
        if self.config.shuffle:
            draw = self.rng.random
            kept.sort(key=lambda _: draw())  # several times faster than `shuffle` for a few entries
        else:
            kept.sort(key=_PLACE)
        return kept

    def _ranked(self, numbers: tuple[int, ...], limit: float) -> list[tuple]:
        """All successors as (rank, place, other numbers, (value, operation)); places are those of
        `problem.successors`, whose order breaks ties."""
        target, near, fold, cap = self.target, self._near, self._fold, self._cap
        distances = [near[number] if number < target else number - target for number in numbers]
        total, left = sum(distances), len(numbers) - 1
        found, place = [], 0
        for i, j in _pairs(len(numbers)):
            rest = (*numbers[:i], *numbers[i + 1 : j], *numbers[j + 1 :]) if left > 1 else ()
            if fold == "min":
                others = min((distance for k, distance in enumerate(distances) if k != i and k != j), default=_FAR)
            else:
                others = total - distances[i] - distances[j]
            for result in combine(numbers[i], numbers[j]):
                value = result[0]
                distance = near[value] if value < target else value - target
                if fold == "sum":
                    ranked = others + distance
                elif fold == "min":
                    ranked = min(others, distance)
                else:
                    ranked = (others + distance) / left
                if ranked <= limit and value <= cap:
                    found.append((ranked, place, rest, result))
                place += 1
        return found
