"""Countdown as a task of threads: what a spawn in the trace language means and what a join gives back."""

import dataclasses
from collections.abc import Sequence

from apr_jax.errors import UserError
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.problem import Problem
from apr_jax.tasks.countdown.verify import check_path, operations
from apr_jax.threads.protocol import MalformedSpawn, SpawnRequest

SPAWN_ERRORS = (
    "unopened",  # a spawn is closed that was not opened, or was closed before
    "empty",  # it names no child
    "bad_line",  # a line of the block is no spawn line
    "unknown_node",  # a child's node does not occur in the text
    "bad_state",  # a line that a child's prompt needs cannot be read, or one of its parents is not there
)

_CLOSE = trace.SPAWN_CLOSE.removesuffix("\n")
_CONDITIONS = {"apr": "Sub Call Budget: ", "sos_plus": "Token Budget: "}


@dataclasses.dataclass(frozen=True)
class CountdownSpawn(SpawnRequest):
    """A spawn with the node and the level that each child's line names, in the order of `children`."""

    nodes: tuple[str, ...]
    levels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class CountdownProtocol:
    """A `TaskProtocol`. `variant` decides how a root thread begins, nothing else:

    * ``"apr"``: the root's node and state; its budget is a number of child threads (the paper: 0 to 10);
    * ``"sos_plus"``: the state alone; its budget is a number of tokens (the paper: bins of 512).

    Only the roots of conditioned models have a budget; children never do. Raises UserError for any other
    variant. No method raises anything but MalformedSpawn for any thread's text.
    """

    variant: str = "apr"

    spawn_open = trace.SPAWN_OPEN
    spawn_close = trace.SPAWN_CLOSE
    join_open = trace.JOIN_OPEN

    def __post_init__(self):
        if self.variant not in _CONDITIONS:
            raise UserError(f"variant is one of {sorted(_CONDITIONS)}, was given {self.variant!r}")

    def condition(self, budget: int) -> str:
        """The text that goes first on a root prompt to ask for a budget, as ``"Sub Call Budget: 6 "``. Raises UserError
        for a negative budget."""
        if budget < 0:
            raise UserError(f"a budget is 0 or more, was given {budget}")
        return f"{_CONDITIONS[self.variant]}{budget} "

    def root_prompt(self, problem: Problem) -> str:
        """The first text of the root thread, without a line end behind it."""
        start = trace.moving("0") if self.variant == "apr" else ""
        return start + trace.state(problem.target, problem.numbers, ())

    def parse_spawn(self, text: str) -> CountdownSpawn | None:
        """The spawn that `text` ends in (a line end behind it or not), None where it ends in none.

        The block begins at the last `spawn_open`. A child's prompt is its node's state: the last one that
        the text moved to, else the first generated one with the operations of its parents before its own.
        Lines that no child needs may be broken. Raises MalformedSpawn with a kind of SPAWN_ERRORS.
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
            raise MalformedSpawn("bad_line", f"{rest[:100]!r} stands before the end of a spawn")
        nodes, levels = [], []
        for line in lines:
            if (parsed := trace.read_spawn_line(line)) is None:
                raise MalformedSpawn("bad_line", f"{line[:100]!r} is no spawn line")
            levels.append(parsed[0])
            nodes.append(parsed[1])
        states = _Nodes(text[:position])
        prompts = {node: trace.moving(node) + trace.state(*states.find(node)) for node in dict.fromkeys(nodes)}
        return CountdownSpawn(tuple(prompts[node] for node in nodes), position, tuple(nodes), tuple(levels))

    def join(self, spawn: CountdownSpawn, results: Sequence[str | None]) -> str:
        """The join block: per child its line and the path that it returned. Raises ValueError where there is not one
        result for each child."""
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
        """The join block of no children."""
        return trace.JOIN_OPEN + trace.JOIN_CLOSE

    def result(self, text: str) -> str | None:
        """The path a finished thread returns: what follows its last but one "Goal Reached". A text that begins with a
        state and ends with its only one is a trace of Stream of Search: the operations that led there. Else None.
        Whether it is right is for `correct` to say."""
        return trace.read_result(text)

    def correct(self, problem: Problem, text: str) -> bool:
        """Whether a finished root thread returned a path, and the path solves its problem."""
        return bool(check_path(problem.numbers, problem.target, self.result(text)))

    def steps(self, text: str) -> tuple[int, int]:
        """The operations of a text, as `operations` counts them."""
        return operations(text)


class _Nodes:
    """The nodes that a text defines. Lines are kept as they are and read when a child needs them, each once,
    so that broken lines elsewhere do no harm."""

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
        """The state of a node; raises MalformedSpawn. Names are of bounded depth, so this is short."""
        if node not in self.moved and node not in self.generated:
            raise MalformedSpawn("unknown_node", f"node #{node} does not occur before its spawn")
        steps = []
        while node not in self.states and node not in self.moved:
            if node not in self.generated:
                raise MalformedSpawn("bad_state", f"node #{node}, a parent of a child's node, is not there")
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
        raise MalformedSpawn("bad_state", f"the state of node #{node} cannot be read")
    return state
