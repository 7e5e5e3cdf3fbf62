"""The thread protocol of Countdown: parses spawns in the trace language, and writes root prompts and joins."""

import dataclasses
from collections.abc import Sequence

from apr_jax.errors import UserError
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.problem import Problem
from apr_jax.tasks.countdown.verify import check_path, operations
from apr_jax.threads.protocol import MalformedSpawn, SpawnRequest, TaskProtocol

SPAWN_ERRORS = (
    "unopened",  # the closing tag has no opening tag, or the spawn was closed before
    "empty",  # the spawn has no child
    "bad_line",  # a line of the spawn block is not a spawn line
    "unknown_node",  # a child's node does not occur in the text
    "bad_state",  # a line that a child's prompt needs cannot be parsed, or a parent of the child's node is missing
)

_CLOSE = trace.SPAWN_CLOSE.removesuffix("\n")
_CONDITIONS = {"apr": "Sub Call Budget: ", "sos_plus": "Token Budget: "}


@dataclasses.dataclass(frozen=True)
class CountdownSpawn(SpawnRequest):
    """A parsed spawn, with the node name and the level of each child, in the order of `children`."""

    nodes: tuple[str, ...]
    levels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class CountdownProtocol(TaskProtocol):
    """The `TaskProtocol` of Countdown. The variant affects only the prompt of a root thread:

    * ``"apr"``: the prompt is the root's node and state. A budget is a number of child threads (the paper: 0 to 10).
    * ``"sos_plus"``: the prompt is the state alone. A budget is a number of tokens (the paper: bins of 512).

    Only roots have a budget, and only for models that are trained with budgets. Raises UserError for any other variant.
    For any text, however malformed, the only error of a method is MalformedSpawn.
    """

    variant: str = "apr"

    spawn_open = trace.SPAWN_OPEN
    spawn_close = trace.SPAWN_CLOSE
    join_open = trace.JOIN_OPEN

    def __post_init__(self):
        if self.variant not in _CONDITIONS:
            raise UserError(f"variant is one of {sorted(_CONDITIONS)}, was given {self.variant!r}")

    def condition(self, budget: int) -> str:
        """Return the text that precedes a root's prompt to ask for a budget, as ``"Sub Call Budget: 6 "``.

        Raises UserError for a negative budget.
        """
        if budget < 0:
            raise UserError(f"a budget is 0 or more, was given {budget}")
        return f"{_CONDITIONS[self.variant]}{budget} "

    def root_prompt(self, problem: Problem) -> str:
        """Return the first text of the root thread, without the line end that follows it."""
        start = trace.moving("0") if self.variant == "apr" else ""
        return start + trace.state(problem.target, problem.numbers, ())

    def parse_spawn(self, text: str) -> CountdownSpawn | None:
        """Return the spawn at the end of `text`, or None where `text` does not end in one.

        A line end after the spawn is optional. The spawn block begins at the last `spawn_open`. A child's prompt is the
        state of its node: the state after the last move to the node, or else the first generated one, with the
        operations of the node's parents before its own. Lines that no child's prompt needs may be malformed. Raises
        MalformedSpawn with a kind of SPAWN_ERRORS.
        """
        body = text.removesuffix("\n")
        if not body.endswith(_CLOSE):
            return None
        position = body.rfind(trace.SPAWN_OPEN)
        block = body[position + len(trace.SPAWN_OPEN) : -len(_CLOSE)]
        if position < 0 or _CLOSE in block:
            raise MalformedSpawn("unopened", "a spawn was closed that was not open")
        if not block:
            raise MalformedSpawn("empty", "a spawn without a child")
        *lines, rest = block.split("\n")
        if rest:
            raise MalformedSpawn("bad_line", f"{rest[:100]!r} precedes the end of a spawn")
        nodes, levels = [], []
        for line in lines:
            if (parsed := trace.read_spawn_line(line)) is None:
                raise MalformedSpawn("bad_line", f"{line[:100]!r} is not a spawn line")
            levels.append(parsed[0])
            nodes.append(parsed[1])
        states = _Nodes(text[:position])
        prompts = {node: trace.moving(node) + trace.state(*states.find(node)) for node in dict.fromkeys(nodes)}
        return CountdownSpawn(tuple(prompts[node] for node in nodes), position, tuple(nodes), tuple(levels))

    def join(self, spawn: CountdownSpawn, results: Sequence[str | None]) -> str:
        """Return the join block. It has a line for each child, followed by the path that the child returned.

        Raises ValueError where the number of results differs from the number of children.
        """
        if len(results) != len(spawn.children):
            raise ValueError(f"{len(spawn.children)} children were spawned, {len(results)} results were given")
        parts = [trace.JOIN_OPEN]
        for index, (level, node, result) in enumerate(zip(spawn.levels, spawn.nodes, results)):
            parts.append(trace.join_line(index, level, node, result is not None))
            if result is not None:
                parts.append(result + "\n")
        parts.append(trace.JOIN_CLOSE)
        return "".join(parts)

    def join_nothing(self) -> str:
        """Return a join block without children."""
        return trace.JOIN_OPEN + trace.JOIN_CLOSE

    def result(self, text: str) -> str | None:
        """Return the solution path in a finished thread's text, correct or not, or None where there is none.

        The path is the text after the last but one "Goal Reached". A trace of Stream of Search has only one; its path
        is made from the operations of its last state.
        """
        return trace.read_result(text)

    def correct(self, problem: Problem, text: str) -> bool:
        """Return whether a finished root thread returned a path that solves its problem."""
        return bool(check_path(problem.numbers, problem.target, self.result(text)))

    def steps(self, text: str) -> tuple[int, int]:
        """Return (number of correct operations, number of operations) of a text."""
        return operations(text)


class _Nodes:
    """Finds the states of the nodes that a text defines.

    A line is parsed only when a child's prompt needs it, so other lines may be malformed. Each is parsed once.
    """

    def __init__(self, text: str):
        self.moved: dict[str, str] = {}
        self.generated: dict[str, str] = {}
        self.states: dict[str, trace.State] = {}
        lines = text.split("\n")
        for line, after in zip(lines, [*lines[1:], ""]):
            if "Current State:" in after and (node := trace.read_moving(line)):
                self.moved[node] = after
            elif node := trace.read_generated_node(line):
                self.generated.setdefault(node, line)

    def find(self, node: str) -> trace.State:
        """Return the state of a node. Raises MalformedSpawn of kind "unknown_node" or "bad_state".

        A node's name has a bounded number of parents, so this takes bounded time.
        """
        if node not in self.moved and node not in self.generated:
            raise MalformedSpawn("unknown_node", f"node #{node} does not occur before its spawn")
        steps = []
        while node not in self.states and node not in self.moved:
            if node not in self.generated:
                raise MalformedSpawn("bad_state", f"node #{node}, a parent of a child's node, is missing")
            steps.append(node)
            node = node.rpartition(",")[0]
        if node not in self.states:
            self.states[node] = _read(trace.read_state(self.moved[node]), node)
        for step in reversed(steps):
            own = _read(trace.read_generated(self.generated[step]), step)
            before = self.states[step.rpartition(",")[0]]
            self.states[step] = own._replace(operations=before.operations + own.operations)
        return self.states[steps[0] if steps else node]


def _read(state: trace.State | None, node: str) -> trace.State:
    if state is None:
        raise MalformedSpawn("bad_state", f"the state of node #{node} cannot be parsed")
    return state
