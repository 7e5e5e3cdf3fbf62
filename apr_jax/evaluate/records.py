"""Records of evaluated problems, and their files: JSON lines, one record a line.

`TreeRecord` holds what is counted on one problem's tree. Two records build on it: an evaluation's `Record`, and a
latency sample (`apr_jax.evaluate.latency.sample.Sample`).
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

from apr_jax.errors import UserError
from apr_jax.io.json_lines import read_lines, to_line
from apr_jax.tasks.task import Task
from apr_jax.threads.metrics import (
    children,
    depth,
    duplicate_children,
    longest_context,
    sampled_tokens,
    sequential_tokens,
    total_tokens,
)
from apr_jax.threads.tree import ThreadTree
from apr_jax.threads.tree_json import tree_from_json


@dataclasses.dataclass(frozen=True)
class TreeRecord:
    """One problem, and the counts of its rollout tree. All lengths are in tokens."""

    index: int  # the problem's position in the evaluated list
    problem: dict[str, Any]  # JSON form of the problem, from `Task.problem_json`
    task: str = ""  # name or "package.module:Class", as `load_task` takes it
    variant: str = ""  # the task's variant, e.g. "apr"
    condition: str = ""  # text at the start of the root's prompt
    correct: bool = False
    answered: bool = False  # the root returned a result, right or wrong
    failures: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # "length", "tokens" or "malformed:KIND": threads
    malformed: dict[str, int] = dataclasses.field(default_factory=dict)  # malformed spawns by kind
    suppressed_joins: int = 0  # join blocks that a thread began to write itself; the runner prevents them
    total_tokens: int = 0
    sampled_tokens: int = 0
    sequential_tokens: int = 0
    longest_context: int = 0
    children: int = 0
    duplicate_children: int = 0
    depth: int = 0

    def line(self) -> str:
        """Return the record as one line of JSON."""
        return to_line(vars(self))


def tree_counts(tree: ThreadTree) -> dict[str, Any]:
    """Return the fields of a `TreeRecord` that are computed from a rollout tree. The tree must have an `outcome`."""
    outcome = tree.outcome
    return {
        "correct": outcome.correct, "answered": outcome.answered, "failures": outcome.failures,
        "malformed": outcome.malformed, "suppressed_joins": outcome.suppressed_joins,
        "total_tokens": total_tokens(tree), "sampled_tokens": sampled_tokens(tree),
        "sequential_tokens": sequential_tokens(tree), "longest_context": longest_context(tree),
        "children": children(tree), "duplicate_children": duplicate_children(tree), "depth": depth(tree),
    }  # fmt: skip


def problem_rows(task: Task, problems: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the JSON form of each problem, as it would be read from a file: tuples become lists."""
    return [json.loads(json.dumps(task.problem_json(problem))) for problem in problems]


REQUIRED = ("index", "problem", "task", "variant", "correct", "answered", "failures")  # every stored record has these


@dataclasses.dataclass(frozen=True)
class Record(TreeRecord):
    """The evaluation of one problem: its tree, its counts, and whether the answer is right."""

    name: str = ""  # the evaluated model, e.g. "sft_apr"
    weights: str = ""  # `fingerprint` of the model's weights; "": unknown
    steps: int = 0  # reasoning steps that the threads wrote themselves, counted by `TaskProtocol.steps`
    steps_right: int = 0  # how many of these steps are right
    tree: dict[str, Any] | None = None  # from `tree_to_json`; `thread_tree` reads it

    @property
    def thread_tree(self) -> ThreadTree | None:
        """The problem's tree, None if the record has none. Raises UserError if the stored tree is broken."""
        return None if self.tree is None else tree_from_json(self.tree)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Record":
        """Build a record from a parsed JSON line. Raises UserError for a field that is missing, unknown or of another
        type. The tree is not checked here; `thread_tree` checks it."""
        if missing := [name for name in REQUIRED if name not in row]:
            raise UserError(f"no record: {missing[0]} is missing")
        try:
            record = cls(**row)
        except TypeError as error:  # unknown fields
            raise UserError(f"no record: {error}") from None
        for field in dataclasses.fields(cls):
            kind, value = get_origin(field.type) or field.type, getattr(record, field.name)
            if field.name != "tree" and not (isinstance(value, kind) and isinstance(value, bool) == (kind is bool)):
                raise UserError(f"no record: {field.name} is {str(value)[:40]!r}, must be of type {kind.__name__}")
        for name in ("failures", "malformed"):
            if not all(isinstance(count, int) for count in getattr(record, name).values()):
                given = str(getattr(record, name))[:40]
                raise UserError(f"no record: {name} is {given}, must be integers by kind")
        return record


def read_records(path: str | Path) -> list[Record]:
    """Read all records of a file. Raises FileNotFoundError, and UserError with the line's number for a broken line."""
    records = []
    for number, row in read_lines(path):
        try:
            records.append(Record.from_row(row))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return records


def whole_records(path: Path) -> list[Record]:
    """Read the intact records of a file that a killed run may have left. A missing file gives an empty list. A line
    that was cut short or has unknown fields is skipped, so that its problem is evaluated again."""
    records = []
    for _, row in read_lines(path, cut_short=True):
        with contextlib.suppress(UserError):
            records.append(Record.from_row(row))
    return records
