"""The symbolic solvers whose traces are the first supervision (paper, appendix A.3).

All expand a state into its pair-and-operation results, keep the `beam` best under a heuristic, shuffle
them, and search on. They differ in what follows an expansion:

* `solve_sos` (Stream of Search): one strategy for the whole trace, depth first (without a beam) or breadth first.
* `solve_sos_plus` (SoS+, one thread): a *promising* expansion's nodes are searched at once, one after the other.
* `solve_apr` (APR): they become the children of one spawn; the thread goes on after the join.

*Promising* is a coin, see `search.APR_PROMISING`.
"""

import dataclasses
import heapq
import operator
import random

from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.problem import Problem
from apr_jax.tasks.countdown.search import SPELLED, Goal, Node, Search, SolverConfig
from apr_jax.threads import Block, Spawn, Thread, ThreadTree


def _path(goal: Goal, target: int, top: Node) -> str:
    """The solution path from `top` to the goal."""
    node, numbers, operation = goal
    nodes = [node]
    while nodes[-1] is not top:
        nodes.append(nodes[-1].parent)
    nodes.reverse()
    lines = [trace.moving(top.name)]
    for here, below in zip(nodes, nodes[1:]):
        lines.append(here.state)
        lines.append(trace.explored(below.name, target, below.numbers, below.operation, below.done)[0])
        lines.append(trace.moving(below.name))
    lines.append(node.state)
    lines.append(trace.exploring(operation, numbers))
    lines.append(trace.reached(target, target))
    return "".join(lines)


_RANK = operator.itemgetter(0)
FOUND_BELOW = ("found below",)  # an answer whose path already stands in the trace: levels above only close


def _beam_search(search: Search, top: Node, beam: int, lines: list[str], branch):
    """The loop that SoS+ and APR share: takes `beam` nodes at a time from the queue, best first.

    `branch(children)` decides what an expansion leads to: it returns (handled, answer) where
    `handled` keeps the children out of the queue and `answer` is a solution that ends the search.
    Writes to `lines`; returns the answer of `branch`, or a `Goal`, or None.
    """
    queue: list[tuple[float, Node]] = [(0, top)]
    while queue:
        queue.sort(key=_RANK)  # stable: of equal ranks the older first
        layer = queue[:beam]
        del queue[:beam]
        for index, (_, node) in enumerate(layer, 1):
            children, goal = search.expand(node, beam, lines)
            if goal is not None:
                return goal
            handled, answer = branch(children)
            if answer is not None:
                return answer
            if not handled:
                queue += children
            if index < len(layer):
                lines.append(trace.moving(layer[index][1].name))
        if queue:
            lines.append(trace.moving(min(queue, key=_RANK)[1].name))
    lines.append(trace.NO_SOLUTION)
    return None


def solve_sos(problem: Problem, config: SolverConfig, rng: random.Random) -> ThreadTree:
    """One trace of Stream of Search, of a strategy drawn from `config.strategies`, written as the original generator
    writes it: it ends at the goal, without the path, which is the operations of the state that it stands at
    (`trace.read_search`). `shuffle` and `rank_root` are of "bfs" alone: "dfs" always goes from best to worst."""
    search = Search(problem.target, config, rng)
    root = Node.root(problem.numbers, problem.target)
    strategy = rng.choice(config.strategies)
    lines: list[str] = []
    found = (_breadth_first if strategy == "bfs" else _depth_first)(search, root, lines)
    return ThreadTree(_one_thread(problem, lines), _info(problem, search, found, "sos") | {"strategy": strategy})


def _depth_first(search: Search, node: Node, lines: list[str]) -> bool:
    """Searches below `node`, best child first; whether the target was found. What is ranked above the target is left
    out. After each child but the last the search is back at `node`, and writes its state again. There is no line for a
    search that ends without the target."""
    target = search.target
    lines.append(node.state)
    successors = sorted(search.successors(node.numbers, limit=target), key=_RANK)  # stable, as theirs
    for step, (_, numbers, operation) in enumerate(successors):
        if step:
            lines += [trace.moving(node.name), node.state]
        if len(numbers) == 1:
            if _leaf(numbers[0], operation, target, lines):
                return True
            continue
        child, written = node.below(step, numbers, operation, target)
        lines += [written, trace.moving(child.name)]
        if _depth_first(search, child, lines):
            return True
    return False


def _breadth_first(search: Search, root: Node, lines: list[str]) -> bool:
    """Takes `beam` nodes at a time from the queue, best first; whether the target was found. States of one number are
    queued, too, though nothing follows from them; their names count none of their siblings."""
    target = search.target
    queue = [_Queued(0, root)]
    while queue:
        layer = [heapq.heappop(queue).node for _ in range(min(search.beam, len(queue)))]
        for index, node in enumerate(layer, 1):
            lines.append(node.state)
            successors = search.successors(node.numbers)
            ranks = [ranked for ranked, *_ in successors]
            children: list[_Queued] = []
            for place in search.keep(range(len(ranks)), ranks, search.beam, node.parent is None):
                _, numbers, operation = successors[place]
                child, written = node.below(len(children) if len(numbers) > 1 else 0, numbers, operation, target)
                if len(numbers) > 1:
                    lines.append(written)
                elif _leaf(numbers[0], operation, target, lines):
                    return True
                children.append(_Queued(ranks[place], child))
            for child in sorted(children):  # stable: of equal ranks the first written is queued first
                heapq.heappush(queue, child)
            if index < len(layer):
                lines.append(trace.moving(layer[index].name))
        if queue:
            lines.append(trace.moving(queue[0].node.name))
    lines.append(trace.NO_SOLUTION.removesuffix("\n"))  # the one line without an end
    return False


@dataclasses.dataclass(slots=True)
class _Queued:
    """A node in the queue of a heap. Equal ranks are in no order, which the original's heap depends on."""

    rank: float
    node: Node

    def __lt__(self, other: "_Queued") -> bool:
        return self.rank < other.rank


def _leaf(value: int, operation: str, target: int, lines: list[str]) -> bool:
    """Writes an operation that leaves one number; whether it is the target."""
    lines.append(trace.exploring(operation, (value,)))
    lines.append((trace.reached if value == target else trace.missed)(value, target))
    return value == target


def _one_thread(problem: Problem, lines: list[str]) -> Thread:
    prompt = trace.state(problem.target, problem.numbers, ())
    written = "".join(lines).removeprefix(prompt)
    return Thread((Block(prompt, sampled=False), Block(written, sampled=True)))


def solve_sos_plus(problem: Problem, config: SolverConfig, rng: random.Random) -> ThreadTree:
    """One SoS+ trace: a tree of one thread."""
    search = Search(problem.target, config, rng)
    root = Node.root(problem.numbers, problem.target)
    lines: list[str] = []

    def descend(top: Node, level: int):
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
            lines.append(_path(answer, problem.target, root))
        return FOUND_BELOW if answer is not None else None

    answer = descend(root, 0)
    info = _info(problem, search, answer is not None, SPELLED["sos_plus"])
    return ThreadTree(_one_thread(problem, lines), info)


def solve_apr(problem: Problem, config: SolverConfig, rng: random.Random) -> ThreadTree:
    """One APR tree: promising expansions are spawned, the root's and those of children above `config.depth`."""
    search = Search(problem.target, config, rng)
    root = Node.root(problem.numbers, problem.target)
    thread, answer = _apr_thread(search, root, search.beam, 0)
    return ThreadTree(thread, _info(problem, search, answer is not None, "apr"))


def _apr_thread(search: Search, top: Node, beam: int, level: int):
    """The thread that searches below `top`, and its solution as (node, numbers, operation) or None."""
    target = search.target
    prompt = trace.moving(top.name) + top.state.removesuffix("\n")
    lines = [trace.moving(top.name)]
    blocks: list[Block | Spawn] = [Block(prompt, sampled=False)]

    def cut() -> None:
        text = "".join(lines)
        blocks.append(Block(text.removeprefix(prompt) if len(blocks) == 1 else text, sampled=True))
        lines.clear()

    def branch(children):
        if level >= search.config.depth or len(children) < 2 or not search.promising():
            return False, None
        cut()
        runs = [_apr_thread(search, child, search.sub_beam, level + 1) for _, child in children]
        call = [trace.SPAWN_OPEN]
        join = [trace.JOIN_OPEN]
        for index, ((_, child), (_, answer)) in enumerate(zip(children, runs)):
            call.append(trace.spawn_line(index, level + 1, child.name))
            join.append(trace.join_line(index, level + 1, child.name, answer is not None))
            if answer is not None:
                join.append(_path(answer, target, child))
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
        lines.append(_path(answer, target, top))
    cut()
    return Thread(tuple(blocks)), answer


def _info(problem: Problem, search: Search, solved: bool, style: str) -> dict:
    return {
        "numbers": list(problem.numbers),
        "target": problem.target,
        "style": style,
        "solved": solved,
        "beam": search.beam,
        "sub_beam": search.sub_beam,
    }


SOLVERS = {"apr": solve_apr, "sos_plus": solve_sos_plus, "sos": solve_sos}
