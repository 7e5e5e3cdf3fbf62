"""Chooses the training and held-out problems of a data set among a task's candidates; stores problems in files."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from apr_jax.errors import UserError
from apr_jax.io.files import whole
from apr_jax.io.json_lines import JsonLines, to_line
from apr_jax.tasks.task import Task

# A task counts as exhausted after more than MAX_REJECTED * (problems found + MIN_CANDIDATES) candidates.
MAX_REJECTED = 50
MIN_CANDIDATES = 500


class ProblemFile(Sequence[Any]):
    """The problems in a file of JSON lines, as a read-only sequence.

    A problem is read from disk when it is indexed, so memory does not grow with the number of problems. Raises
    FileNotFoundError for a missing file. Indexing raises UserError, with the file and the line, for a broken line.
    """

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
            if str(self.path) in str(error):
                raise
            raise UserError(f"{self.path}, line {self._rows.number(index)}: {error}") from None


def write_problems(path: Path, task: Task, problems: Iterable[Any]) -> int:
    """Write problems to a file of JSON lines, and return their number. An error leaves no partial file."""
    count = 0
    with whole(path) as part, part.open("w") as file:
        for problem in problems:
            file.write(to_line(task.problem_json(problem)))
            count += 1
    return count


def choose_problems(
    task: Task, train: int, held_out: int, repeats: bool, candidates: Callable[[str], Iterator[Sequence[Any]]]
) -> Iterator[tuple[str, Iterator[Any]]]:
    """Yield ("held_out", its problems), then ("train", its problems).

    The problems of a split are the first suitable candidates, in order. Held-out problems are distinct by `Task.key`.
    Training problems are not held out, and are distinct unless `repeats` is true. `candidates(split)` yields batches of
    candidates; a batch shorter than the first one is the last.

    The caller must exhaust the held-out problems before it asks for the training split. Iterating over a split raises
    UserError where the task has too few problems.
    """
    held: set[Hashable] = set()
    seen: set[bytes] = set()

    def new(problem: Any) -> bool:
        key = task.key(problem)
        short = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()  # saves memory: there may be millions
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
            if tried > MAX_REJECTED * (have + MIN_CANDIDATES) or len(problems) < size or not problems:
                raise UserError(
                    f"{count} {split.replace('_', '-')} problems were asked for, {task.spec} gives about {have}: widen "
                    "its problems, ask for fewer, or allow data.repeats"
                )

    yield "held_out", chosen("held_out", held_out, distinct)
    keep = (lambda problem: task.key(problem) not in held) if repeats else new
    yield "train", chosen("train", train, keep)


def shared(task: Task, one: Iterable[Any], other: Iterable[Any]) -> int:
    """Return how many distinct problems two collections have in common, by `Task.key`."""
    keys, other_keys = ({task.key(problem) for problem in problems} for problems in (one, other))
    return len(keys & other_keys)
