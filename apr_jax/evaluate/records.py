"""Records of trees, and their files: one JSON object a line.

`TreeRecord` holds all that is counted of one problem's tree, whether it was evaluated (`Record`) or measured
(`apr_jax.evaluate.latency.sample.Sample`).
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
    """What is counted of the tree of one problem. Lengths are tokens."""

    index: int  # of the problem in its list
    problem: dict[str, Any]  # `Task.problem_json`
    task: str = ""  # a spec, as `load_task` reads it
    variant: str = ""  # of the task
    condition: str = ""  # first on the root's prompt
    correct: bool = False
    answered: bool = False  # the root returned a result, right or wrong
    failures: dict[str, int] = dataclasses.field(default_factory=dict)  # threads: "length", "tokens", "malformed:KIND"
    malformed: dict[str, int] = dataclasses.field(default_factory=dict)  # spawns by kind
    suppressed_joins: int = 0  # join blocks that a thread began to write itself
    total_tokens: int = 0
    sampled_tokens: int = 0
    sequential_tokens: int = 0
    longest_context: int = 0
    children: int = 0
    duplicate_children: int = 0
    depth: int = 0

    def line(self) -> str:
        """The record as one line of JSON."""
        return to_line(vars(self))


def tree_counts(tree: ThreadTree) -> dict[str, Any]:
    """The fields of a `TreeRecord` that a tree decides. The tree is a rollout: it has an outcome."""
    outcome = tree.outcome
    return {
        "correct": outcome.correct, "answered": outcome.answered, "failures": outcome.failures,
        "malformed": outcome.malformed, "suppressed_joins": outcome.suppressed_joins,
        "total_tokens": total_tokens(tree), "sampled_tokens": sampled_tokens(tree),
        "sequential_tokens": sequential_tokens(tree), "longest_context": longest_context(tree),
        "children": children(tree), "duplicate_children": duplicate_children(tree), "depth": depth(tree),
    }  # fmt: skip


def problem_rows(task: Task, problems: Sequence[Any]) -> list[dict[str, Any]]:
    """The JSON form of problems, as it comes back from a file: tuples are lists."""
    return [json.loads(json.dumps(task.problem_json(problem))) for problem in problems]


REQUIRED = ("index", "problem", "task", "variant", "correct", "answered", "failures")  # without one it is no answer


@dataclasses.dataclass(frozen=True)
class Record(TreeRecord):
    """An evaluated problem: its tree, and whether it is right."""

    name: str = ""  # what was evaluated
    weights: str = ""  # whose tree it is: `fingerprint` of the model; "": not told
    steps: int = 0  # that threads wrote themselves
    steps_right: int = 0
    tree: dict[str, Any] | None = None  # as `tree_to_json`; `thread_tree` reads it

    @property
    def thread_tree(self) -> ThreadTree | None:
        return None if self.tree is None else tree_from_json(self.tree)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Record":
        """The record of a line's object. Raises UserError where it is none; its tree is read by `thread_tree`."""
        if missing := [name for name in REQUIRED if name not in row]:
            raise UserError(f"no record: {missing[0]} is missing")
        try:
            record = cls(**row)
        except TypeError as error:  # other fields
            raise UserError(f"no record: {error}") from None
        for field in dataclasses.fields(cls):
            kind, value = get_origin(field.type) or field.type, getattr(record, field.name)
            if field.name != "tree" and not (isinstance(value, kind) and isinstance(value, bool) == (kind is bool)):
                raise UserError(f"no record: {field.name} is {str(value)[:40]!r}, no {kind.__name__}")
        for name in ("failures", "malformed"):
            if not all(isinstance(count, int) for count in getattr(record, name).values()):
                raise UserError(f"no record: {name} is {str(getattr(record, name))[:40]}, no counts by kind")
        return record


def read_records(path: str | Path) -> list[Record]:
    """All records of a file. Raises FileNotFoundError, and UserError that names the line for one that is broken."""
    records = []
    for number, row in read_lines(path):
        try:
            records.append(Record.from_row(row))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return records


def whole_records(path: Path) -> list[Record]:
    """The records of a file that a killed run may have left; no file, no records. A line that was cut short or has
    other fields is left out, so that its problem is run again."""
    records = []
    for _, row in read_lines(path, cut_short=True):
        with contextlib.suppress(UserError):
            records.append(Record.from_row(row))
    return records
