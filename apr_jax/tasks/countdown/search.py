"""The common part of all Countdown solvers: settings, heuristics, and the expansion of one state.

Solvers spend most of their time in expansions. So an expansion ranks all successors as plain numbers, and creates nodes
and lines only for the successors in the beam. Caching results or lines does not pay off: new problems rarely hit.
"""

import dataclasses
import functools
import itertools
import operator
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from apr_jax.checks import FieldError, at_least, check_fields
from apr_jax.errors import UserError
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.problem import combine

# The probability that a solver searches an expansion's children on their own. The authors' generator has these values;
# the paper's text states 0.1 for APR.
APR_PROMISING, SOS_PLUS_PROMISING = 0.9, 0.5

# The name of each solver in random seeds, in the info of trees and in the authors' files. Another name would give other
# traces for the same seed, and other bytes in a data set.
STORED_NAMES = {"apr": "apr", "sos_plus": "sosp", "sos": "sos"}

# name -> (the distance of a number to "factor" or "target", the reduction of a state's distances to its rank)
HEURISTICS = {
    "multiply": ("factor", "sum"),  # in the authors' code: distances to the nearest factor of the target, 2 to target
    "multiply_paper": ("factor", "min"),  # the formula in the paper
    "sum": ("target", "mean"),  # Stream of Search: distances to the target itself
}


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """The settings of a solver.

    A beam is the number of successors that an expansion keeps. It is drawn for each problem from a closed range.

    * `beam_weights`: how often each beam of the range is drawn, from the lowest on; empty for equal weights.
    * `sub_beam`: the range for the beam of children.
    * `promising`: the probability that the children of an expansion are searched on their own (SoS+), or spawned (APR).
    * `max_value`: operations with larger results are left out; 0 for no limit, as in the paper. A limit makes traces
      shorter and leaves less arithmetic to learn, but loses a few solutions.
    * `distinct`: keeps only one of several operations that leave the same numbers, such as 4-2 and 4/2, or each 3 of
      3, 3, 9 with the 9. The authors' beam may contain the same state several times.
    * `shuffle`: writes the kept successors in random order; else they are written in the order of generation. A small
      model that decodes greedily then goes through the operations in order. After training on shuffled traces it
      repeats the likeliest operation again and again.
    * `rank_root`: writes the kept successors of the root best first. The lists of small and large beams then begin
      alike, so a model trained on several beams need not know the beam before the list ends.
    * `depth`: the number of levels of children that APR spawns; the authors' is 1.
    * `strategies`: Stream of Search draws one of these for each problem.
    """

    beam: tuple[int, int]
    beam_weights: tuple[float, ...] = ()
    sub_beam: tuple[int, int] | None = None  # drawn at or above the problem's beam
    promising: float = APR_PROMISING
    heuristic: str = "multiply"
    max_value: int = 0
    distinct: bool = False
    shuffle: bool = True
    rank_root: bool = False
    depth: int = 1
    strategies: tuple[str, ...] = ("dfs", "bfs")

    BOUNDS = (at_least(0, "max_value"),)

    def __post_init__(self):
        for name in ("beam", "sub_beam"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != 2:
                raise FieldError(name, f"is two numbers, lowest and highest, was given {value}")
        check_fields(self)
        if self.heuristic not in HEURISTICS:
            raise UserError(f"heuristic is one of {sorted(HEURISTICS)}, was given {self.heuristic!r}")
        for name in ("beam", "sub_beam"):
            value = getattr(self, name)
            if value is not None and not 1 <= value[0] <= value[1]:
                raise UserError(f"{name} needs 1 <= lowest <= highest, was given {value}")
        if weights := self.beam_weights:
            beams = self.beam[1] - self.beam[0] + 1
            if len(weights) != beams or min(weights) < 0 or not sum(weights):
                raise UserError(
                    f"beam_weights are none or {beams}, one of 0 or more for each beam of {self.beam}, was given "
                    f"{weights}"
                )
        if not 0 <= self.promising <= 1:
            raise UserError(f"promising is a probability from 0 to 1, was given {self.promising}")
        if self.depth < 0:
            raise UserError(f"depth is 0 or more levels of children, was given {self.depth}")
        if not self.strategies or not {*self.strategies} <= {"dfs", "bfs"}:
            raise UserError(f"strategies are dfs, bfs or both, was given {self.strategies}")

    @classmethod
    def paper_sos(cls, **changes) -> "SolverConfig":
        """Return the paper's settings for Stream of Search, with `changes`."""
        return cls(**{"beam": (1, 5), **changes})

    @classmethod
    def paper_sos_plus(cls, **changes) -> "SolverConfig":
        """Return the paper's settings for SoS+, with `changes`."""
        return cls(**{"beam": (1, 5), "promising": SOS_PLUS_PROMISING, **changes})

    @classmethod
    def paper_apr(cls, **changes) -> "SolverConfig":
        """Return the paper's settings for APR, with `changes`."""
        return cls(**{"beam": (1, 10), "sub_beam": (1, 15), "promising": APR_PROMISING, **changes})


@dataclasses.dataclass(slots=True, eq=False)
class Node:
    """A state of the search, with the parts of its trace lines, which are written once and reused."""

    name: str  # as in the trace: "0,1,2"
    numbers: tuple[int, ...]
    parent: "Node | None"
    operation: str  # the operation that leads from the parent to this node; "" for the root
    done: str  # all operations from the root to this node, as the trace lists them
    state: str  # its "Current State" line

    @classmethod
    def root(cls, numbers: tuple[int, ...], target: int) -> "Node":
        """Return the root node of a problem."""
        return cls("0", numbers, None, "", "", trace.state(target, numbers, ()) + "\n")

    def below(self, step: int, numbers: tuple[int, ...], operation: str, target: int) -> tuple["Node", str]:
        """Return the child node after an operation, and the two trace lines that generate it (`trace.explored`)."""
        name, done = f"{self.name},{step}", f"{self.done}, '{operation}'" if self.done else f"'{operation}'"
        written, state = trace.explored(name, target, numbers, operation, done)
        return Node(name, numbers, self, operation, done, state), written


class Goal(NamedTuple):
    """A solution: `operation` at `node` leaves `numbers`, which is the target alone."""

    node: Node
    numbers: tuple[int, ...]
    operation: str


@functools.cache
def _near(distance: str, target: int) -> list[int]:
    """Return the distance of each number below the target. For other numbers, of both kinds, it is number - target."""
    if distance == "target":
        return [target - number for number in range(target)]
    factors = [factor for factor in range(2, target + 1) if target % factor == 0] or [target]
    return [min(abs(number - factor) for factor in factors) for number in range(target)]


def rank(heuristic: str, numbers: tuple[int, ...], target: int) -> float:
    """Return the rank of a state: its distance from the target. The lowest rank is searched first."""
    distance, fold = HEURISTICS[heuristic]
    near = _near(distance, target)
    distances = [near[number] if number < target else number - target for number in numbers]
    return min(distances) if fold == "min" else sum(distances) / (len(numbers) if fold == "mean" else 1)


@functools.cache
def _pairs(count: int) -> tuple[tuple[int, int], ...]:
    return tuple(itertools.combinations(range(count), 2))


def _first_of_each(places: Iterable[int], states: Iterable) -> list[int]:
    """Return the first place of each distinct state."""
    first: dict = {}
    for place, state in zip(places, states):
        first.setdefault(state, place)
    return list(first.values())


_RANK = operator.itemgetter(0)
_FAR = float("inf")


class Search:
    """The search for one problem: its drawn settings and its random stream, shared by all of its threads.

    A *place* is the index of a successor in the order of `problem.successors`.
    """

    def __init__(self, target: int, config: SolverConfig, rng: random.Random):
        self.target, self.config, self.rng = target, config, rng
        distance, self._fold = HEURISTICS[config.heuristic]
        self._near = _near(distance, target)
        self._cap = config.max_value or _FAR
        self._distinct = config.distinct
        self._shuffles, self._bits = config.shuffle, rng.getrandbits
        if config.beam_weights:
            (self.beam,) = rng.choices(range(config.beam[0], config.beam[1] + 1), config.beam_weights)
        else:
            self.beam = rng.randint(*config.beam)
        low, high = config.sub_beam or (self.beam, self.beam)
        self.sub_beam = rng.randint(max(low, self.beam), max(high, self.beam))

    def promising(self) -> bool:
        """Draw whether an expansion is promising: its children are then spawned (APR) or searched at once (SoS+).

        The probability is `config.promising`.
        """
        return self.rng.random() < self.config.promising

    def successors(self, numbers: tuple[int, ...], limit: float = _FAR) -> list[tuple[float, tuple[int, ...], str]]:
        """Return (rank, numbers, operation) for each successor with a rank of at most `limit`.

        Successors that `max_value` or `distinct` leave out are not included. The order is that of `problem.successors`.
        """
        if len(numbers) == 2:
            found = [((), result) for result in combine(*numbers)]
            ranks = [self._distance(value) for _, (value, _) in found]
        else:
            ranks, found = self._ranked(numbers)
        places = [place for place, ranked in enumerate(ranks) if ranked <= limit and found[place][1][0] <= self._cap]
        states = [(*rest, value) for rest, (value, _) in found]
        if self._distinct:
            places = _first_of_each(places, (tuple(sorted(states[place])) for place in places))
        return [(ranks[place], states[place], found[place][1][1]) for place in places]

    def _distance(self, number: int) -> int:
        return self._near[number] if number < self.target else number - self.target

    def expand(self, node: Node, beam: int, lines: list[str]):
        """Write a node's expansion to its `beam` best successors to `lines`.

        Returns the children as a list of (rank, node), best first, and the `Goal` or None.
        """
        if len(node.numbers) == 2:
            return [], self._finish(node, beam, lines)
        target, cap = self.target, self._cap
        ranks, successors = self._ranked(node.numbers)
        places = range(len(ranks))
        if cap < _FAR:
            places = [place for place in places if successors[place][1][0] <= cap]
        if self._distinct:
            states = (tuple(sorted((*rest, value))) for rest, (value, _) in map(successors.__getitem__, places))
            places = _first_of_each(places, states)
        lines.append(node.state)
        before = f"{node.done}, " if node.done else ""
        children = []
        for step, place in enumerate(self.keep(places, ranks, beam, node.parent is None)):
            rest, (value, operation) = successors[place]
            numbers, below, done = (*rest, value), f"{node.name},{step}", f"{before}'{operation}'"
            written, state = trace.explored(below, target, numbers, operation, done)
            lines.append(written)
            children.append((ranks[place], Node(below, numbers, node, operation, done, state)))
        children.sort(key=_RANK)
        return children, None

    def _finish(self, node: Node, beam: int, lines: list[str]) -> Goal | None:
        """Write the expansion of a node of two numbers, whose successors are final. Returns the `Goal` or None.

        Four of five expansions in a search are of this kind.
        """
        target, near, cap = self.target, self._near, self._cap
        results = combine(*node.numbers)
        ranks = [near[value] if value < target else value - target for value, _ in results]
        places = range(len(ranks))
        if cap < _FAR:
            places = [place for place in places if results[place][0] <= cap]
        if self._distinct:
            places = _first_of_each(places, (results[place][0] for place in places))
        kept = [results[place] for place in self.keep(places, ranks, beam)]
        for step, (value, operation) in enumerate(kept):
            if value == target:
                lines.append(node.state + trace.dead_ends(kept[:step], target))
                lines.append(trace.exploring(operation, (value,)) + trace.reached(value, target))
                return Goal(node, (value,), operation)
        lines.append(node.state + trace.dead_ends(kept, target))
        return None

    def keep(self, places: Sequence[int], ranks: Sequence[float], beam: int, root: bool = False) -> list[int]:
        """Return the places of the `beam` best successors, in the order in which they are written."""
        kept = sorted(places, key=ranks.__getitem__)[:beam]  # stable: of equal ranks, the first is kept
        if root and self.config.rank_root:
            return kept
        if not self._shuffles:
            kept.sort()
            return kept
        # The same draws as `random.shuffle`, but without its function calls: most lists have two to four items.
        bits = self._bits
        for last in range(len(kept) - 1, 0, -1):
            width = (last + 1).bit_length()
            at = bits(width)
            while at > last:
                at = bits(width)
            kept[last], kept[at] = kept[at], kept[last]
        return kept

    def _ranked(self, numbers: tuple[int, ...]) -> tuple[list, list[tuple]]:
        """Return the rank and (other numbers, (value, operation)) of each successor, in `problem.successors`' order."""
        target, near, fold = self.target, self._near, self._fold
        distances = [near[number] if number < target else number - target for number in numbers]
        total, left = sum(distances), len(numbers) - 1
        ranks, found = [], []
        for i, j in _pairs(len(numbers)):
            rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
            if fold == "min":
                others = min(distance for k, distance in enumerate(distances) if k != i and k != j)
            else:
                others = total - distances[i] - distances[j]
            for result in combine(numbers[i], numbers[j]):
                value = result[0]
                distance = near[value] if value < target else value - target
                if fold == "sum":
                    ranks.append(others + distance)
                elif fold == "min":
                    ranks.append(min(others, distance))
                else:
                    ranks.append((others + distance) / left)
                found.append((rest, result))
        return ranks, found
