"""The symbolic solvers whose traces are the first supervision (paper, appendix A.3).

All expand a state into its pair-and-operation results, keep the `beam` best under a heuristic, shuffle
them, and search on. They differ in what follows an expansion:

* `solve_sos` (Stream of Search): one strategy for the whole trace, depth or breadth first.
* `solve_sosp` (SoS+, one thread): a *promising* expansion's nodes are searched at once, one after the other, in line.
* `solve_apr` (APR): they become the children of one spawn; the thread goes on after the join.

*Promising* is a coin, see `search.APR_PROMISING`.
"""

import operator
import random

from apr_jax.countdown import trace
from apr_jax.countdown.problem import Problem
from apr_jax.countdown.search import Goal, Node, Search, SolverConfig
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


def solve_sos(problem: Problem, config: SolverConfig, rng: random.Random, condition: str = "") -> ThreadTree:
    """One SoS trace, of a strategy drawn from `config.strategies`: "bfs" takes `beam` nodes at a time, best first;
    "dfs" goes down at once and, as Stream of Search does, leaves out what is ranked above the target, not what falls
    out of a beam."""
    search = Search(problem.target, config, rng)
    root = Node.root(problem.numbers, problem.target)
    strategy = rng.choice(config.strategies)
    lines: list[str] = []
    if strategy == "bfs":
        goal = _beam_search(search, root, search.beam, lines, lambda children: (False, None))
    else:
        goal = _depth_first(search, root, lines)
    if goal is not None:
        lines.append(_path(goal, problem.target, root))
    info = _info(problem, search, goal is not None, "sos") | {"strategy": strategy}
    return ThreadTree(_one_thread(problem, lines, condition), info)


def _depth_first(search: Search, root: Node, lines: list[str]) -> Goal | None:
    stack = [root]
    while stack:
        children, goal = search.expand(stack.pop(), None, lines, limit=search.target)
        if goal is not None:
            return goal
        stack += [child for _, child in reversed(children)]
        if stack:
            lines.append(trace.moving(stack[-1].name))
    lines.append(trace.NO_SOLUTION)
    return None


def _one_thread(problem: Problem, lines: list[str], condition: str) -> Thread:
    prompt = trace.state(problem.target, problem.numbers, ())
    written = "".join(lines).removeprefix(prompt)
    return Thread((Block(condition + prompt, sampled=False), Block(written, sampled=True)))


def solve_sosp(problem: Problem, config: SolverConfig, rng: random.Random, condition: str = "") -> ThreadTree:
    """One SoS+ trace: a tree of one thread. `condition` goes first on the prompt's line."""
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
    return ThreadTree(_one_thread(problem, lines, condition), _info(problem, search, answer is not None, "sosp"))


def solve_apr(problem: Problem, config: SolverConfig, rng: random.Random, condition: str = "") -> ThreadTree:
    """One APR tree: promising expansions are spawned, the root's and those of children above `config.depth`."""
    search = Search(problem.target, config, rng)
    root = Node.root(problem.numbers, problem.target)
    thread, answer = _apr_thread(search, root, search.beam, 0, condition)
    return ThreadTree(thread, _info(problem, search, answer is not None, "apr"))


def _apr_thread(search: Search, top: Node, beam: int, level: int, condition: str = ""):
    """The thread that searches below `top`, and its solution as (node, numbers, operation) or None."""
    target = search.target
    prompt = trace.moving(top.name) + top.state.removesuffix("\n")
    lines = [trace.moving(top.name)]
    blocks: list[Block | Spawn] = [Block(condition + prompt, sampled=False)]

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


SOLVERS = {"apr": solve_apr, "sosp": solve_sosp, "sos": solve_sos}
