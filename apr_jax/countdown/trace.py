"""The trace language: every line that a search writes, rendered here and parsed here.

The lines are the authors' to the letter, so that their data and checkpoints stay usable. Operations
are strings such as ``"89-86=3"``, node names are strings such as ``"0,1,2"`` (the root is ``"0"``).
"""

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


def spawn_line(child: int, level: int, node: str) -> str:
    return f"<Start Sub Search {child} at level {level}> Moving to Node #{node}\n"


def join_line(child: int, level: int, node: str, solved: bool) -> str:
    outcome = GOAL_REACHED if solved else "No Solution"
    return f"<{outcome} in Sub Search {child} at level {level} at Node #{node}>\n"


def sub_search_open(level: int, node: str) -> str:
    return f"Start Sub Search at level {level}: Moving to Node #{node}\n"


def sub_search_close(level: int, solved: bool) -> str:
    return f"Exit Sub Search at level {level}\n" + ("" if solved else "No solution found in sub search\n")
