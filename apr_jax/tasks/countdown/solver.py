"""The symbolic solvers of Countdown, which write the traces for SFT (paper, appendix A.3).

Each solver expands a state by applying every operation to every pair of numbers, keeps the `beam` best results under a
heuristic, shuffles them, and searches those. The solvers differ in the step after an expansion:

* `solve_sos` (Stream of Search) follows one strategy for the whole trace, depth first (without a beam) or breadth
  first.
* `solve_sos_plus` (SoS+, one thread) searches below each child of a *promising* expansion to the end, one child after
  the other. It returns to its queue of other states only after that.
* `solve_apr` (APR) spawns the children of a promising expansion. The thread continues after the join.

Whether an expansion is promising is drawn at random, with the probability `SolverConfig.promising`.
"""

import dataclasses
import heapq
import operator
import random

from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.problem import Problem
from apr_jax.tasks.countdown.search import STORED_NAMES, Goal, Node, Search, SolverConfig
from apr_jax.threads import Block, Spawn, Thread, ThreadTree


def _path(goal: Goal, target: int, top: Node) -> str:
    """Return the text of the solution path from `top` to the goal."""
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
FOUND_BELOW = ("found below",)  # an answer whose path is already written; the levels above only write their ends


def _beam_search(search: Search, top: Node, beam: int, lines: list[str], branch):
    """Search below `top` and write to `lines`: the loop of SoS+ and APR. It takes `beam` nodes at a time, best first.

    `branch(children)` is called after each expansion and returns (handled, answer). If `handled`, the children are not
    queued. An `answer` other than None ends the search. Returns this answer, or a `Goal`, or None.
    """
    queue: list[tuple[float, Node]] = [(0, top)]
    while queue:
        queue.sort(key=_RANK)  # stable: of equal ranks, the older is first
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
    """Return a trace of Stream of Search as a tree of one thread, in the format of the original generator.

    The strategy is drawn from `config.strategies`. The trace ends at the goal without a solution path, since its last
    state has the operations of the path (`trace.read_search`). `shuffle` and `rank_root` affect "bfs" only: "dfs"
    always proceeds from best to worst.
    """
    search = Search(problem.target, config, rng)
    root = Node.root(problem.numbers, problem.target)
    strategy = rng.choice(config.strategies)
    lines: list[str] = []
    found = (_breadth_first if strategy == "bfs" else _depth_first)(search, root, lines)
    return ThreadTree(_one_thread(problem, lines), _info(problem, search, found, "sos") | {"strategy": strategy})


def _depth_first(search: Search, node: Node, lines: list[str]) -> bool:
    """Search below `node`, best child first, and return whether the target was found.

    Children of a rank above the target are left out. After each child but the last, the search moves back to `node` and
    writes its state again. A search that does not find the target writes no line about that.
    """
    target = search.target
    lines.append(node.state)
    successors = sorted(search.successors(node.numbers, limit=target), key=_RANK)  # stable, as in the original
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
    """Search with a queue, `beam` nodes at a time, best first, and return whether the target was found.

    As in the original, states of one number are queued, too, though they have no successors, and their names all end
    in 0.
    """
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
            for child in sorted(children):  # stable: of equal ranks, the first written is queued first
                heapq.heappush(queue, child)
            if index < len(layer):
                lines.append(trace.moving(layer[index].name))
        if queue:
            lines.append(trace.moving(queue[0].node.name))
    lines.append(trace.NO_SOLUTION.removesuffix("\n"))  # the only line without a line end, as in the original
    return False


@dataclasses.dataclass(slots=True)
class _Queued:
    """A node in a heap. Nodes compare by rank only, since the order of equal ranks must be that of the original."""

    rank: float
    node: Node

    def __lt__(self, other: "_Queued") -> bool:
        return self.rank < other.rank


def _leaf(value: int, operation: str, target: int, lines: list[str]) -> bool:
    """Write an operation that leaves one number, and return whether this is the target."""
    lines.append(trace.exploring(operation, (value,)))
    lines.append((trace.reached if value == target else trace.missed)(value, target))
    return value == target


def _one_thread(problem: Problem, lines: list[str]) -> Thread:
    prompt = trace.state(problem.target, problem.numbers, ())
    written = "".join(lines).removeprefix(prompt)
    return Thread((Block(prompt, sampled=False), Block(written, sampled=True)))


def solve_sos_plus(problem: Problem, config: SolverConfig, rng: random.Random) -> ThreadTree:
    """Return a trace of SoS+ as a tree of one thread."""
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
    info = _info(problem, search, answer is not None, STORED_NAMES["sos_plus"])
    return ThreadTree(_one_thread(problem, lines), info)


def solve_apr(problem: Problem, config: SolverConfig, rng: random.Random) -> ThreadTree:
    """Return a tree of APR. Threads at levels 0 (the root) to `config.depth` - 1 spawn their promising expansions."""
    search = Search(problem.target, config, rng)
    root = Node.root(problem.numbers, problem.target)
    thread, answer = _apr_thread(search, root, search.beam, 0)
    return ThreadTree(thread, _info(problem, search, answer is not None, "apr"))


def _apr_thread(search: Search, top: Node, beam: int, level: int):
    """Return the thread that searches below `top`, and its solution as (node, numbers, operation) or None."""
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


def _info(problem: Problem, search: Search, solved: bool, solver: str) -> dict:
    """Return the `info` of a solver's tree. The key "style" has the solver's name, as in stored data sets."""
    return {
        "numbers": list(problem.numbers),
        "target": problem.target,
        "style": solver,
        "solved": solved,
        "beam": search.beam,
        "sub_beam": search.sub_beam,
    }


SOLVERS = {"apr": solve_apr, "sos_plus": solve_sos_plus, "sos": solve_sos}
