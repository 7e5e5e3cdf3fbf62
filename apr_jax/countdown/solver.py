"""The symbolic solvers whose traces are the first supervision (paper, appendix A.3).

Both expand a state into all pair-and-operation results, keep the `beam` best under the multiply
heuristic, shuffle them, and search on. They differ in what a *promising* expansion leads to:

* `solve_sosp` (SoS+, one thread): its nodes are searched at once, one after the other, in line.
* `solve_apr` (APR): its nodes become the children of one spawn; the thread goes on after the join.

*Promising* is a coin: the authors' generator draws true with probability 0.9 for APR (the paper's text
says 0.1) and 0.5 for SoS+.
"""

import dataclasses
import functools
import heapq
import itertools
import random

from apr_jax.countdown import trace
from apr_jax.countdown.problem import Problem, successors
from apr_jax.threads import Block, Spawn, Thread, ThreadTree


@functools.cache
def _factors(target: int) -> tuple[int, ...]:
    return tuple(factor for factor in range(2, target + 1) if target % factor == 0) or (target,)


@functools.cache
def _distance(number: int, target: int) -> int:
    return min(abs(number - factor) for factor in _factors(target))


def multiply_heuristic(numbers: tuple[int, ...], target: int) -> int:
    """Sum over the numbers of the distance to the nearest factor of the target (2 to target)."""
    return sum(_distance(number, target) for number in numbers)


def multiply_heuristic_paper(numbers: tuple[int, ...], target: int) -> int:
    """The formula printed in the paper: the minimum where the authors' code sums."""
    return min(_distance(number, target) for number in numbers)


HEURISTICS = {"multiply": multiply_heuristic, "multiply_paper": multiply_heuristic_paper}


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """Settings of one recipe; beams are drawn per problem from closed ranges.

    `max_value` keeps results above it out of the search (None: the paper's unbounded search): shorter
    traces and fewer facts of arithmetic to learn, at a few solutions lost. `shuffle` off writes what the
    beam kept in the order it was generated in: a small model that decodes greedily then goes through the
    operations, where after shuffled traces it writes the likeliest one again and again.
    """

    beam: tuple[int, int]
    sub_beam: tuple[int, int] | None = None  # of children; drawn at or above the problem's beam
    promising: float = 0.9
    heuristic: str = "multiply"
    max_value: int | None = None
    shuffle: bool = True

    def __post_init__(self):
        if self.heuristic not in HEURISTICS:
            raise ValueError(f"heuristic is one of {sorted(HEURISTICS)}, was given {self.heuristic!r}")
        for name in ("beam", "sub_beam"):
            value = getattr(self, name)
            if value is not None and not 1 <= value[0] <= value[1]:
                raise ValueError(f"{name} needs 1 <= lowest <= highest, was given {value}")
        if not 0 <= self.promising <= 1:
            raise ValueError(f"promising is a probability from 0 to 1, was given {self.promising}")

    @classmethod
    def paper_sosp(cls, **changes) -> "SolverConfig":
        return cls(**{"beam": (1, 5), "promising": 0.5, **changes})

    @classmethod
    def paper_apr(cls, **changes) -> "SolverConfig":
        return cls(**{"beam": (1, 10), "sub_beam": (1, 15), "promising": 0.9, **changes})


@dataclasses.dataclass(frozen=True)
class _Node:
    name: str  # as in the trace: "0,1,2"
    numbers: tuple[int, ...]
    operations: tuple[str, ...]
    parent: "_Node | None"


def _path(node: _Node, numbers: tuple[int, ...], operation: str, target: int, top: _Node) -> str:
    """The solution path from `top` to the goal reached by `operation` at `node`."""
    nodes = [node]
    while nodes[-1] is not top:
        nodes.append(nodes[-1].parent)
    nodes.reverse()
    lines = [trace.moving(top.name)]
    for here, below in zip(nodes, nodes[1:]):
        lines.append(trace.state(target, here.numbers, here.operations) + "\n")
        lines.append(trace.exploring(below.operations[-1], below.numbers))
        lines.append(trace.generated(below.name, target, below.numbers, below.operations[-1]))
        lines.append(trace.moving(below.name))
    lines.append(trace.state(target, node.numbers, node.operations) + "\n")
    lines.append(trace.exploring(operation, numbers))
    lines.append(trace.reached(target, target))
    return "".join(lines)


FOUND_BELOW = ("found below",)  # an answer whose path already stands in the trace: levels above only close


class _Search:
    """What one problem's searches share: the settings drawn for it and the random stream."""

    def __init__(self, target: int, config: SolverConfig, rng: random.Random):
        self.target, self.config, self.rng = target, config, rng
        self.heuristic = HEURISTICS[config.heuristic]
        self.beam = rng.randint(*config.beam)
        low, high = config.sub_beam or (self.beam, self.beam)
        self.sub_beam = rng.randint(max(low, self.beam), max(high, self.beam))

    def promising(self) -> bool:
        return self.rng.random() < self.config.promising

    def expand(self, node: _Node, beam: int, lines: list[str]):
        """Writes a node's expansion. Returns its children, best first, as (heuristic, node), and the
        (numbers, operation) that reached the target, or None."""
        target, cap = self.target, self.config.max_value
        lines.append(trace.state(target, node.numbers, node.operations) + "\n")
        kept = [
            (self.heuristic(numbers, target), index, numbers, operation)
            for index, (numbers, operation) in enumerate(successors(node.numbers))
            if cap is None or numbers[-1] <= cap
        ]
        kept.sort(key=lambda entry: entry[0])
        del kept[beam:]
        if self.config.shuffle:
            self.rng.shuffle(kept)
        else:
            kept.sort(key=lambda entry: entry[1])
        children = []
        for rank, _, numbers, operation in kept:
            lines.append(trace.exploring(operation, numbers))
            if len(numbers) > 1:
                child = _Node(f"{node.name},{len(children)}", numbers, (*node.operations, operation), node)
                lines.append(trace.generated(child.name, target, numbers, operation))
                children.append((rank, child))
            elif numbers[0] == target:
                lines.append(trace.reached(target, target))
                return [], (numbers, operation)
            else:
                lines.append(trace.missed(numbers[0], target))
        children.sort(key=lambda entry: entry[0])
        return children, None


def _beam_search(search: _Search, top: _Node, beam: int, lines: list[str], branch):
    """The loop both solvers share: takes `beam` nodes at a time from the queue, best first.

    `branch(children, top)` decides what an expansion leads to: it returns (handled, answer) where
    `handled` keeps the children out of the queue and `answer` is a solution that ends the search.
    Writes to `lines`; returns the answer of `branch`, or (node, numbers, operation), or None.
    """
    order = itertools.count()
    queue = [(0, next(order), top)]
    while queue:
        layer = [heapq.heappop(queue)[2] for _ in range(min(beam, len(queue)))]
        for index, node in enumerate(layer):
            children, goal = search.expand(node, beam, lines)
            if goal is not None:
                return (node, *goal)
            handled, answer = branch(children)
            if answer is not None:
                return answer
            if not handled:
                for rank, child in children:
                    heapq.heappush(queue, (rank, next(order), child))
            if index < len(layer) - 1:
                lines.append(trace.moving(layer[index + 1].name))
        if queue:
            lines.append(trace.moving(queue[0][2].name))
    lines.append(trace.NO_SOLUTION)
    return None


def solve_sosp(problem: Problem, config: SolverConfig, rng: random.Random, condition: str = "") -> ThreadTree:
    """One SoS+ trace: a tree of one thread. `condition` goes first on the prompt's line."""
    search = _Search(problem.target, config, rng)
    root = _Node("0", problem.numbers, (), None)
    lines: list[str] = []

    def descend(top: _Node, level: int):
        def branch(children):
            if not search.promising():
                return False, None
            for _, child in children:
                lines.append(trace.sub_search_open(level + 1, child.name))
                answer = descend(child, level + 1)
                lines.append(trace.sub_search_close(level + 1, answer is not None))
                if answer is not None:
                    return True, answer
            return True, None

        answer = _beam_search(search, top, search.beam, lines, branch)
        if answer is not None and answer is not FOUND_BELOW:
            lines.append(_path(*answer, problem.target, root))
        return FOUND_BELOW if answer is not None else None

    answer = descend(root, 0)
    prompt = trace.state(problem.target, problem.numbers, ())
    written = "".join(lines).removeprefix(prompt)
    thread = Thread((Block(condition + prompt, sampled=False), Block(written, sampled=True)))
    return ThreadTree(thread, _info(problem, search, answer is not None, "sosp"))


def solve_apr(problem: Problem, config: SolverConfig, rng: random.Random, condition: str = "") -> ThreadTree:
    """One APR tree: the root's promising expansions are spawned, children search on by themselves."""
    search = _Search(problem.target, config, rng)
    root = _Node("0", problem.numbers, (), None)
    thread, answer = _apr_thread(search, root, search.beam, 0, condition)
    return ThreadTree(thread, _info(problem, search, answer is not None, "apr"))


def _apr_thread(search: _Search, top: _Node, beam: int, level: int, condition: str = ""):
    """The thread that searches below `top`, and its solution as (node, numbers, operation) or None."""
    target = search.target
    prompt = trace.moving(top.name) + trace.state(target, top.numbers, top.operations)
    lines = [trace.moving(top.name)]
    blocks: list[Block | Spawn] = [Block(condition + prompt, sampled=False)]

    def cut() -> None:
        text = "".join(lines)
        blocks.append(Block(text.removeprefix(prompt) if len(blocks) == 1 else text, sampled=True))
        lines.clear()

    def branch(children):
        if level > 0 or len(children) < 2 or not search.promising():
            return False, None
        cut()
        runs = [_apr_thread(search, child, search.sub_beam, level + 1) for _, child in children]
        call = [trace.SPAWN_OPEN]
        join = [trace.JOIN_OPEN]
        for index, ((_, child), (_, answer)) in enumerate(zip(children, runs)):
            call.append(trace.spawn_line(index, level + 1, child.name))
            join.append(trace.join_line(index, level + 1, child.name, answer is not None))
            if answer is not None:
                join.append(_path(*answer, target, child))
        call.append(trace.SPAWN_CLOSE)
        join.append(trace.JOIN_CLOSE)
        blocks.append(
            Spawn(
                call=(Block("".join(call), sampled=True),),
                children=tuple(thread for thread, _ in runs),
                join=Block("".join(join), sampled=False),
            )
        )
        answers = [answer for _, answer in runs if answer is not None]
        if answers:
            lines.append(trace.reached(target, target))
        return True, answers[0] if answers else None

    answer = _beam_search(search, top, beam, lines, branch)
    if answer is not None:
        lines.append(_path(*answer, target, top))
    cut()
    return Thread(tuple(blocks)), answer


def _info(problem: Problem, search: _Search, solved: bool, style: str) -> dict:
    return {
        "numbers": list(problem.numbers),
        "target": problem.target,
        "style": style,
        "solved": solved,
        "beam": search.beam,
        "sub_beam": search.sub_beam,
    }


SOLVERS = {"apr": solve_apr, "sosp": solve_sosp}
