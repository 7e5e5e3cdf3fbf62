"""The trace language: every line that a search writes, rendered here and parsed here.

The lines are the authors' to the letter, so that their data and checkpoints stay usable. Operations
are strings such as ``"89-86=3"``, node names are strings such as ``"0,1,2"`` (the root is ``"0"``).

The ``read_`` functions take one line (spaces around it do not matter) and return None for anything that is
not that line; they raise nothing and take time linear in the line, whatever a model wrote.
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
    """The state line without its line end, since a prompt stops there."""
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
    """What solvers write most, in one go: `exploring` and `generated` of an operation, and the `state` of the node,
    with its line end. `done` lists its operations, quoted, without the brackets."""
    left = str(numbers)[1:-1].removesuffix(",")  # of one number
    return (
        f"Exploring Operation: {operation}, Resulting Numbers: [{left}]\n"
        f"Generated Node #{node}: {target}:[{left}] Operation: {operation}\n",
        f"Current State: {target}:[{left}], Operations: [{done}]\n",
    )


def dead_ends(results: Iterable[tuple[int, str]], target: int) -> str:
    """`exploring` and `missed` of operations that leave one number each, as (value, operation)."""
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


# What is longer is no line of this language. Python refuses int() of 4,300 digits, and without a bound on lists and
# names a hostile text makes child prompts far longer than itself.
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
    """``"89-86=3"`` taken apart; nothing says that it is right."""

    left: int
    symbol: str  # one of + - * /
    right: int
    value: int


class State(NamedTuple):
    """A node: what is left there, and the operations that led to it."""

    target: int
    numbers: tuple[int, ...]
    operations: tuple[str, ...]


class Prompt(NamedTuple):
    """What a thread's text begins with."""

    text: str  # to the letter, without the line end behind it
    node: str | None  # None where nothing is moved to: the root of SoS and SoS+
    state: State


def _read_list(items: str) -> list[str]:
    return [item.strip() for item in items.split(",")] if items else []


def read_exploring(line: str) -> tuple[Operation, tuple[int, ...]] | None:
    """The operation and the resulting numbers of an "Exploring Operation" line."""
    if (match := _EXPLORING.fullmatch(line.strip())) is None:
        return None
    left, symbol, right, value = _OPERATION_PARTS.fullmatch(match[1]).groups()
    return Operation(int(left), symbol, int(right), int(value)), tuple(map(int, _read_list(match[2])))


def read_state(line: str) -> State | None:
    """A "Current State" line."""
    if (match := _STATE.fullmatch(line.strip())) is None:
        return None
    operations = tuple(operation.strip("'") for operation in _read_list(match[3]))
    return State(int(match[1]), tuple(map(int, _read_list(match[2]))), operations)


def read_moving(line: str) -> str | None:
    """The node that a line moves to at its end; a budget or the opening of a sub search may stand before."""
    match = _MOVING.search(line.strip())
    return match and match[1]


def read_generated_node(line: str) -> str | None:
    """The node of a "Generated Node" line, whatever follows the name."""
    match = _GENERATED_NODE.match(line.strip())
    return match and match[1]


def read_generated(line: str) -> State | None:
    """A "Generated Node" line; its one operation is the last step, not the whole way."""
    if (match := _GENERATED.fullmatch(line.strip())) is None:
        return None
    return State(int(match[1]), tuple(map(int, _read_list(match[2]))), (match[3],))


def read_spawn_line(line: str) -> tuple[int, str] | None:
    """The level and the node of one child's line in a spawn block."""
    match = _SPAWN_LINE.fullmatch(line.strip())
    return match and (int(match[1]), match[2])


def read_prompt(text: str) -> Prompt | None:
    """The prompt that a thread's whole text begins with, its budget included."""
    begin = _CONDITION.match(text).end()
    move = _PROMPT_MOVE.match(text, begin)
    line = _STATE.match(text, move.end() if move else begin)
    return line and Prompt(text[: line.end()], move and move[1], read_state(line[0]))


def read_path(text: str) -> str | None:
    """The solution path that a thread's whole text returns: what follows the last but one "Goal Reached"
    (the last one ends the path itself). None where there are fewer than two."""
    last = text.rfind(GOAL_REACHED)
    before = text.rfind(GOAL_REACHED, 0, max(last, 0))
    return None if before < 0 else text[before + len(GOAL_REACHED) :].strip()


def read_search(text: str) -> str | None:
    """The solution path of a whole trace of Stream of Search, which writes none: it begins with a state and ends with
    its only "Goal Reached"; the path is the operations of the last state, then the last operation. None for any other
    text, that of a child or an APR root among them. Whether the path is right is for the verifier to say."""
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
    """The solution path that a finished thread's whole text returns: the one it writes, or Stream of Search's."""
    path = read_path(text)
    return read_search(text) if path is None else path
