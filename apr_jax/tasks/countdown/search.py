"""What all solvers share: settings, heuristics, and the expansion of one state.

An expansion is where solvers spend their time, so it ranks successors as numbers and makes nodes and lines only of
those that the beam keeps. Caches of results or of their lines do not pay: new problems miss them too often.
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

# The authors' generator draws "promising" as true with these probabilities; the paper's text says 0.1 for APR.
APR_PROMISING, SOS_PLUS_PROMISING = 0.9, 0.5

# How a solver is spelled where another spelling would be another thing: in the seeds of its draws and the info of its
# trees, which decide the bytes of a data set, and in the authors' files.
SPELLED = {"apr": "apr", "sos_plus": "sosp", "sos": "sos"}

# name -> (distance of one number to the target, how the distances of a state's numbers make its rank)
HEURISTICS = {
    "multiply": ("factor", "sum"),  # distances to the nearest factor of the target (2 to target): the authors' code
    "multiply_paper": ("factor", "min"),  # the formula printed in the paper
    "sum": ("target", "mean"),  # distances to the target: Stream of Search's
}


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """Settings of one solver; beams are drawn per problem from closed ranges.

    `beam_weights` is how often each beam of the range is drawn, lowest first (empty: all alike). `max_value` keeps
    results above it out of the search (0: the paper's unbounded search): shorter traces and fewer facts of
    arithmetic to learn, at a few solutions lost. `distinct` keeps one of the operations that leave the same numbers
    (4-2 and 4/2; of 3, 3, 9 either 3 with the 9), where the authors' beam may hold one state several times.
    `shuffle` off writes what the beam kept in the order it was generated in: a small model that decodes greedily then
    goes through the operations, where after shuffled traces it writes the likeliest one again and again. `rank_root`
    writes what is kept at the problem's own state best first: narrow lists then begin like wide ones, and a pupil of
    beams that are drawn need not know the beam before the list's end. `depth` is how many levels of children APR
    spawns (1: the authors'). `strategies` is what SoS draws from, problem by problem.
    """

    beam: tuple[int, int]
    beam_weights: tuple[float, ...] = ()
    sub_beam: tuple[int, int] | None = None  # of children; drawn at or above the problem's beam
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
            breadths = self.beam[1] - self.beam[0] + 1
            if len(weights) != breadths or min(weights) < 0 or not sum(weights):
                raise UserError(
                    f"beam_weights are none or {breadths}, one of 0 or more for each beam of {self.beam}, was given "
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
        return cls(**{"beam": (1, 5), **changes})

    @classmethod
    def paper_sos_plus(cls, **changes) -> "SolverConfig":
        return cls(**{"beam": (1, 5), "promising": SOS_PLUS_PROMISING, **changes})

    @classmethod
    def paper_apr(cls, **changes) -> "SolverConfig":
        return cls(**{"beam": (1, 10), "sub_beam": (1, 15), "promising": APR_PROMISING, **changes})


@dataclasses.dataclass(slots=True, eq=False)
class Node:
    """A state of the search, with what its lines need, written once."""

    name: str  # as in the trace: "0,1,2"
    numbers: tuple[int, ...]
    parent: "Node | None"
    operation: str  # that led from the parent here; "" of the root
    done: str  # all operations from the root on, as the trace lists them
    state: str  # its "Current State" line

    @classmethod
    def root(cls, numbers: tuple[int, ...], target: int) -> "Node":
        return cls("0", numbers, None, "", "", trace.state(target, numbers, ()) + "\n")

    def below(self, step: int, numbers: tuple[int, ...], operation: str, target: int) -> tuple["Node", str]:
        """The child that an operation leads to, and the two lines (`trace.explored`) that generate it."""
        name, done = f"{self.name},{step}", f"{self.done}, '{operation}'" if self.done else f"'{operation}'"
        written, state = trace.explored(name, target, numbers, operation, done)
        return Node(name, numbers, self, operation, done, state), written


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


def _first_of_each(places: Iterable[int], states: Iterable) -> list[int]:
    """Of the places whose states are equal the first."""
    first: dict = {}
    for place, state in zip(places, states):
        first.setdefault(state, place)
    return list(first.values())


_RANK = operator.itemgetter(0)
_FAR = float("inf")


class Search:
    """What one problem's searches share: the settings drawn for it and the random stream."""

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
        return self.rng.random() < self.config.promising

    def successors(self, numbers: tuple[int, ...], limit: float = _FAR) -> list[tuple[float, tuple[int, ...], str]]:
        """(rank, numbers, operation) of every state one operation away that the settings do not leave out and that is
        ranked at most `limit`, in the order of `problem.successors`."""
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
        """Writes a node's expansion to its `beam` best successors. Returns its children, best first, as (rank, node),
        and the `Goal` or None."""
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
        """Writes the expansion of a state of two numbers, four of five in a search: each result ends there."""
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
        """The places of the `beam` best, in the order that they are written in."""
        kept = sorted(places, key=ranks.__getitem__)[:beam]  # stable: of equal ranks the first
        if root and self.config.rank_root:
            return kept
        if not self._shuffles:
            kept.sort()
            return kept
        # What `random.shuffle` does, draw by draw, without its calls: most lists here have two to four items.
        bits = self._bits
        for last in range(len(kept) - 1, 0, -1):
            width = (last + 1).bit_length()
            at = bits(width)
            while at > last:
                at = bits(width)
            kept[last], kept[at] = kept[at], kept[last]
        return kept

    def _ranked(self, numbers: tuple[int, ...]) -> tuple[list, list[tuple]]:
        """All successors' ranks, and (other numbers, (value, operation)) of each, in the order of
        `problem.successors`."""
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
