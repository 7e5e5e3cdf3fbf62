"""Problems to measure: held-out ones of a task, or those of a file."""

import json
from pathlib import Path
from typing import Any

from apr_jax.errors import UserError
from apr_jax.tasks.task import HELD_OUT, Task

SEED = 0
MOST_LEFT_OUT = 100  # candidates in a row that are no problems, after which a task counts as having no more


def held_out_problems(task: Task, count: int, first: int = 0) -> tuple[list[Any], int]:
    """The first `count` held-out problems of a task from candidate number `first` on, and the number of the candidate
    behind them. Fewer where the task has no more."""
    found, index, left_out = [], first, 0
    while len(found) < count and left_out <= MOST_LEFT_OUT:
        asked = range(index, index + count - len(found))
        candidates = task.problems(SEED, HELD_OUT, asked)
        index += len(candidates)
        new = [problem for problem in candidates if problem is not None]
        left_out = 0 if new else left_out + len(candidates)
        found += new
        if len(candidates) < len(asked):
            break
    return found, index


def read_problem_file(path: Path, task: Task, count: int) -> list[Any]:
    """The first `count` problems of a file of JSON lines (`Task.problem_json`); fewer where it has no more. Raises
    FileNotFoundError, and UserError that names the line of one that is no problem."""
    problems = []
    with path.open(errors="replace") as file:
        for number, line in enumerate(file, 1):
            if len(problems) == count:
                break
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError("no JSON object")
                problems.append(task.read_problem(row))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number} is no problem of {task.spec}: {error}") from None
    return problems
