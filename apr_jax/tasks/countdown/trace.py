"""The trace language of Countdown: renders and parses every line that a search writes.

The lines equal those of the paper's authors, character for character, so that their data and checkpoints stay usable.
Operations are strings such as ``"89-86=3"``, node names are strings such as ``"0,1,2"`` (the root is ``"0"``).

Functions such as `moving` return one line with its line end; `state` returns it without. Most ``read_`` functions parse
one line, ignore spaces around it, and return None for any other line. For any text, however malformed, they raise no
errors and take linear time.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

SPAWN_OPEN = "<Calling Sub Searches>\n"
SPAWN_CLOSE = "<End Calling Sub Searches>\n"
JOIN_OPEN = "<Sub Searches>\n"
JOIN_CLOSE = "<End Sub Searches>\n"
NO_SOLUTION = "No solution found.\n"
GOAL_REACHED = "Goal Reached"


def state(target: int, numbers, operations) -> str:
    """Return a "Current State" line without its line end, since a prompt ends before the line end."""
    return f"Current State: {target}:{list(numbers)}, Operations: {list(operations)}"


def moving(node: str) -> str:
    return f"Moving to Node #{node}\n"


def exploring(operation: str, numbers) -> str:
    return f"Exploring Operation: {operation}, Resulting Numbers: {list(numbers)}\n"


def generated(node: str, target: int, numbers, operation: str) -> str:
    return f"Generated Node #{node}: {target}:{list(numbers)} Operation: {operation}\n"


def reached(value: int, target: int) -> str:
    return f"{value},{target} equal: {GOAL_REACHED}\n"


def missed(value: int, target: int) -> str:
    return f"{value},{target} unequal: No Solution\n"


def explored(node: str, target: int, numbers: tuple[int, ...], operation: str, done: str) -> tuple[str, str]:
    """Return the lines `exploring` and `generated` of an operation as one text, and the line `state` of the new node.

    Solvers write these most often, so they are rendered together for speed. `done` is the list of the node's
    operations, quoted, without the brackets. The state line has its line end.
    """
    left = str(numbers)[1:-1].removesuffix(",")  # a tuple of one number ends with a comma
    return (
        f"Exploring Operation: {operation}, Resulting Numbers: [{left}]\n"
        f"Generated Node #{node}: {target}:[{left}] Operation: {operation}\n",
        f"Current State: {target}:[{left}], Operations: [{done}]\n",
    )


def dead_ends(results: Iterable[tuple[int, str]], target: int) -> str:
    """Return the lines `exploring` and `missed` for each (value, operation); `value` is the only number left."""
    return "".join(
        [
            f"Exploring Operation: {operation}, Resulting Numbers: [{value}]\n{value},{target} unequal: No Solution\n"
            for value, operation in results
        ]
    )


def spawn_line(child: int, level: int, node: str) -> str:
    return f"<Start Sub Search {child} at level {level}> Moving to Node #{node}\n"


def join_line(child: int, level: int, node: str, solved: bool) -> str:
    outcome = GOAL_REACHED if solved else "No Solution"
    return f"<{outcome} in Sub Search {child} at level {level} at Node #{node}>\n"


def sub_search_open(level: int, node: str) -> str:
    return f"Start Sub Search at level {level}: Moving to Node #{node}\n"


def sub_search_close(level: int, solved: bool) -> str:
    return f"Exit Sub Search at level {level}\n" + ("" if solved else "No solution found in sub search\n")


# Longer numbers, lists and node names are not parsed. Python refuses int() of more than 4,300 digits. Without a bound
# on lists and names, a hostile text could produce prompts of children that are far longer than the text.
MAX_DIGITS = 40
MAX_ITEMS = 32
_NUMBER = rf"[0-9]{{1,{MAX_DIGITS}}}"
_NODE = rf"[0-9]{{1,4}}(?:,[0-9]{{1,4}}){{0,{MAX_ITEMS - 1}}}"
_NUMBERS = rf"\[((?:{_NUMBER}(?:, *{_NUMBER}){{0,{MAX_ITEMS - 1}}})?)\]"
_OPERATION = rf"{_NUMBER}[-+*/]{_NUMBER}={_NUMBER}"
_OPERATIONS = rf"\[((?:'{_OPERATION}'(?:, *'{_OPERATION}'){{0,{MAX_ITEMS - 1}}})?)\]"

_OPERATION_PARTS = re.compile(rf"({_NUMBER})([-+*/])({_NUMBER})=({_NUMBER})")
_EXPLORING = re.compile(rf"Exploring Operation: *({_OPERATION}), *Resulting Numbers: *{_NUMBERS}")
_STATE = re.compile(rf"Current State: *({_NUMBER}): *{_NUMBERS}, *Operations: *{_OPERATIONS}")
_MOVING = re.compile(rf"Moving to Node #({_NODE})\Z")
_GENERATED_NODE = re.compile(rf"Generated Node #({_NODE}):")
_GENERATED = re.compile(rf"Generated Node #{_NODE}: *({_NUMBER}): *{_NUMBERS} *Operation: *({_OPERATION})")
_SPAWN_LINE = re.compile(rf"<Start Sub Search {_NUMBER} at level ({_NUMBER})> Moving to Node #({_NODE})")
_CONDITION = re.compile(rf"(?:(?:Token|Sub Call) Budget: {_NUMBER} )?")
_PROMPT_MOVE = re.compile(rf"Moving to Node #({_NODE})\n")


class Operation(NamedTuple):
    """The parts of an operation such as ``"89-86=3"``. Its value need not be correct."""

    left: int
    symbol: str  # one of + - * /
    right: int
    value: int


class State(NamedTuple):
    """The state of a node: the target, the numbers that are left, and the operations from the root to the node."""

    target: int
    numbers: tuple[int, ...]
    operations: tuple[str, ...]


class Prompt(NamedTuple):
    """The beginning of a thread's text, up to the end of its first state."""

    text: str  # unchanged, without the line end that follows it
    node: str | None  # None for a prompt without a "Moving to Node" line: a root of SoS or SoS+
    state: State


def _read_list(items: str) -> list[str]:
    return [item.strip() for item in items.split(",")] if items else []


def read_exploring(line: str) -> tuple[Operation, tuple[int, ...]] | None:
    """Return the operation and the resulting numbers of an "Exploring Operation" line; None for any other line."""
    if (match := _EXPLORING.fullmatch(line.strip())) is None:
        return None
    left, symbol, right, value = _OPERATION_PARTS.fullmatch(match[1]).groups()
    return Operation(int(left), symbol, int(right), int(value)), tuple(map(int, _read_list(match[2])))


def read_state(line: str) -> State | None:
    """Return the state of a "Current State" line; None for any other line."""
    if (match := _STATE.fullmatch(line.strip())) is None:
        return None
    operations = tuple(operation.strip("'") for operation in _read_list(match[3]))
    return State(int(match[1]), tuple(map(int, _read_list(match[2]))), operations)


def read_moving(line: str) -> str | None:
    """Return the node name of a line that ends in "Moving to Node #NAME"; None for any other line.

    A budget or the start of a sub search may precede it in the line.
    """
    match = _MOVING.search(line.strip())
    return match and match[1]


def read_generated_node(line: str) -> str | None:
    """Return the node name of a "Generated Node" line, even if the rest is malformed; None for any other line."""
    match = _GENERATED_NODE.match(line.strip())
    return match and match[1]


def read_generated(line: str) -> State | None:
    """Return the state of a "Generated Node" line; None for any other line.

    The line has the node's last operation only, so `operations` has this one only.
    """
    if (match := _GENERATED.fullmatch(line.strip())) is None:
        return None
    return State(int(match[1]), tuple(map(int, _read_list(match[2]))), (match[3],))


def read_spawn_line(line: str) -> tuple[int, str] | None:
    """Return the level and the node name of a child's line in a spawn block; None for any other line."""
    match = _SPAWN_LINE.fullmatch(line.strip())
    return match and (int(match[1]), match[2])


def read_prompt(text: str) -> Prompt | None:
    """Return the prompt at the beginning of a thread's whole text, with its budget if any; None where there is none."""
    begin = _CONDITION.match(text).end()
    move = _PROMPT_MOVE.match(text, begin)
    line = _STATE.match(text, move.end() if move else begin)
    return line and Prompt(text[: line.end()], move and move[1], read_state(line[0]))


def read_path(text: str) -> str | None:
    """Return the solution path in a thread's whole text: the text after the last but one "Goal Reached".

    The last "Goal Reached" is the end of the path itself. Returns None where there are fewer than two.
    """
    last = text.rfind(GOAL_REACHED)
    before = text.rfind(GOAL_REACHED, 0, max(last, 0))
    return None if before < 0 else text[before + len(GOAL_REACHED) :].strip()


def read_search(text: str) -> str | None:
    """Return a solution path for a whole trace of Stream of Search, which contains no path itself.

    The path is made from the operations of the last state and the last operation. It may be wrong: the verifier checks
    it. Such a trace begins with a state and ends with its only "Goal Reached". Returns None for any other text, such as
    that of a child or of an APR root.
    """
    prompt, at = read_prompt(text), text.rfind("Current State:")
    *lines, last = text.rstrip().split("\n")
    if prompt is None or prompt.node is not None or text.count(GOAL_REACHED) != 1 or not last.endswith(GOAL_REACHED):
        return None
    state, explored = read_state(text[at:].partition("\n")[0]), read_exploring(lines[-1]) if lines else None
    if state is None or explored is None:
        return None
    left, path = list(prompt.state.numbers), []
    for step in (*state.operations, "{}{}{}={}".format(*explored[0])):
        one, _, other, value = _OPERATION_PARTS.fullmatch(step).groups()
        for number in map(int, (one, other)):
            if number in left:
                left.remove(number)
        left.append(int(value))
        path.append(exploring(step, left))
    return "".join(path) + last


def read_result(text: str) -> str | None:
    """Return the solution path in a finished thread's whole text: of `read_path`, or else of `read_search`."""
    path = read_path(text)
    return read_search(text) if path is None else path
