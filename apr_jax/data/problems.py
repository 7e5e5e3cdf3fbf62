"""The problems of a data set: which candidates of a task become its training and held-out problems, and their files."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from apr_jax.errors import UserError
from apr_jax.io.files import whole
from apr_jax.io.json_lines import JsonLines, to_line
from apr_jax.tasks.task import Task

MOST_REFUSED = 50  # candidates in a row of that many times the rest wanted, before the task counts as used up
LEAST_TRIED = 500  # candidates that are looked at in any case


class ProblemFile(Sequence[Any]):
    """The problems of a file of JSON lines, read where they lie: memory does not grow with their number. Raises
    FileNotFoundError, and UserError that names the line of one that is broken."""

    def __init__(self, task: Task, path: Path):
        self.task, self.path, self._rows = task, path, JsonLines(path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        try:
            return self.task.read_problem(self._rows[index])
        except UserError as error:
            number = index + 1 if index >= 0 else len(self) + index + 1
            raise UserError(error if str(self.path) in str(error) else f"{self.path}, line {number}: {error}") from None


def write_problems(path: Path, task: Task, problems: Iterable[Any]) -> int:
    """Writes a file of problems, whole or not at all; returns how many they are."""
    count = 0
    with whole(path) as part, part.open("w") as file:
        for problem in problems:
            file.write(to_line(task.problem_json(problem)))
            count += 1
    return count


def choose_problems(
    task: Task, train: int, held_out: int, repeats: bool, candidates: Callable[[str], Iterator[Sequence[Any]]]
) -> Iterator[tuple[str, Iterator[Any]]]:
    """(split, its problems), held-out ones first; each split is used up before the next is asked for.

    Held-out problems are distinct. Training problems are the first candidates, in their order, that are not held out
    and, unless `repeats` allows it, were not there before. `candidates(split)` gives them in batches, shorter than the
    first one where there are no more. Raises UserError where a task has too few.
    """
    held: set[Hashable] = set()
    seen: set[bytes] = set()

    def new(problem: Any) -> bool:
        key = task.key(problem)
        short = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()  # there may be millions
        return key not in held and short not in seen and not seen.add(short)

    def distinct(problem: Any) -> bool:
        key = task.key(problem)
        return key not in held and not held.add(key)

    def chosen(split: str, count: int, keep: Callable[[Any], bool]) -> Iterator[Any]:
        have = tried = size = 0
        for problems in candidates(split):
            for problem in problems:
                if have < count and problem is not None and keep(problem):
                    have += 1
                    yield problem
            if have == count:
                return
            tried += len(problems)
            size = size or len(problems)
            if tried > MOST_REFUSED * (have + LEAST_TRIED) or len(problems) < size or not problems:
                raise UserError(
                    f"{count} {split.replace('_', '-')} problems were asked for, {task.spec} gives about {have}: widen "
                    "its problems, ask for fewer, or allow data.repeats"
                )

    yield "held_out", chosen("held_out", held_out, distinct)
    keep = (lambda problem: task.key(problem) not in held) if repeats else new
    yield "train", chosen("train", train, keep)


def shared(task: Task, *files: Iterable[Any]) -> int:
    """How many problems two files have in common, by `Task.key`."""
    one, two = ({task.key(problem) for problem in problems} for problems in files)
    return len(one & two)
