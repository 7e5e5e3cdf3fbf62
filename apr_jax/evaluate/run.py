"""Evaluates problems with a `TreeRunner` and keeps exactly one record per problem.

A failure of the model, such as a malformed spawn, is stored in the problem's record, which then counts as wrong. A
failure of the system (out of memory, a dead server, a bug) is never stored as a record: it ends the evaluation.

An evaluation may be killed at any time. Each record is appended to ``PATH.partial`` when its tree ends, and the same
call resumes with the problems that have no record yet. Sampling depends on a tree's name alone, so the trees are the
same however often the evaluation was interrupted. Log-probabilities may differ in their last digit (see `JaxEngine`).
"""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apr_jax.evaluate.records import Record, problem_rows, tree_counts, whole_records
from apr_jax.io.files import write_text
from apr_jax.io.json_lines import append
from apr_jax.io.progress import Progress
from apr_jax.tasks.task import Task
from apr_jax.threads.run import TreeRunner, together
from apr_jax.threads.tree import Block, Spawn, Thread, ThreadTree
from apr_jax.threads.tree_json import tree_to_json

NAME_TAG = -1  # begins the names of evaluated trees; names in training begin with the step, which is never negative
LOGPROB_DIGITS = 3  # decimal places of log-probabilities in records: enough for the viewer, too few for training


def evaluate(
    runner: TreeRunner,
    problems: Sequence[Any],
    path: str | Path,
    *,
    task: Task,
    variant: str,
    name: str | None = None,
    condition: str = "",
    weights: str = "",
    progress_title: str | None = None,
    at_once: int = 256,
) -> list[Record]:
    """Evaluate all problems. Returns their records in the problems' order, and writes them to `path` (JSON lines).

    `task` and `variant` are those of the problems and of the runner's protocol. `name` is the name of the evaluated
    model, e.g. ``"sft_apr"`` (default: the file's stem). `weights` is the `fingerprint` of its weights. A record that
    an earlier run left at `path` is reused if task, variant, name, condition, weights and problem are all the same.
    Without `weights`, a path must be used for one checkpoint only. At most `at_once` trees run side by side; the
    number changes no record.

    An error that the runner raises for a tree is raised here, after the other trees have been cancelled. The failed
    problem then has no record. The records of finished trees stay in ``PATH.partial``, and the same call resumes.
    """
    path = Path(path)
    name = path.stem if name is None else name
    partial = path.with_name(path.name + ".partial")
    blank = [
        Record(i, problem, task.spec, variant, condition, name=name, weights=weights)
        for i, problem in enumerate(problem_rows(task, problems))
    ]
    records: dict[int, Record] = {}
    for source in (path, partial):
        for record in whole_records(source):
            if 0 <= record.index < len(blank) and _identity(record) == _identity(blank[record.index]):
                records.setdefault(record.index, record)
    missing = [one for one in blank if one.index not in records]
    if missing:
        # Rewrite the file first, since a kill may have cut its last line.
        write_text(partial, "".join(record.line() for record in records.values()))
        with partial.open("a") as file:
            progress = Progress(progress_title or f"evaluate {name}", len(problems), "problems", len(records))

            def done(record: Record) -> None:
                records[record.index] = record
                append(file, vars(record))
                right = sum(record.correct for record in records.values())
                progress.update(len(records), f"{right} right")

            asyncio.run(_run(runner, problems, missing, at_once, done))
    ordered = [records[index] for index in range(len(problems))]
    text = "".join(record.line() for record in ordered)
    if not path.exists() or path.read_text() != text:
        write_text(path, text)
    partial.unlink(missing_ok=True)
    return ordered


def _identity(record: Record) -> tuple:
    """The fields of a stored record that must all be the same for it to be reused."""
    return record.task, record.variant, record.name, record.condition, record.weights, record.problem


async def _run(
    runner: TreeRunner, problems: Sequence[Any], blanks: Sequence[Record], at_once: int, done: Callable[[Record], None]
) -> None:
    gate = asyncio.Semaphore(at_once)

    async def one(blank: Record) -> None:
        async with gate:
            try:
                tree = await runner.run(problems[blank.index], (NAME_TAG, blank.index), blank.condition)
                record = _record(blank, tree, runner)
            except Exception as error:
                error.add_note(f"({blank.name}, problem {blank.index}; the same command continues from here)")
                raise
            done(record)

    await together(map(one, blanks))


def _record(blank: Record, tree: ThreadTree, runner: TreeRunner) -> Record:
    texts = (text for thread in tree.threads() for text in _written(thread, runner.tokenizer.decode))
    counts = list(map(runner.protocol.steps, texts))
    return dataclasses.replace(
        blank, **tree_counts(tree), steps=sum(n for _, n in counts), steps_right=sum(right for right, _ in counts),
        tree=tree_to_json(tree, LOGPROB_DIGITS),
    )  # fmt: skip


def _written(thread: Thread, decode: Callable[[list[int]], str]) -> list[str]:
    """Return the texts that a thread wrote itself, split wherever the system inserted tokens. The texts of spawns are
    left out, since they contain no steps."""
    runs: list[list[int]] = [[]]
    for item in thread.blocks:
        if isinstance(item, Block) and item.sampled:
            runs[-1].extend(item.content)
        elif isinstance(item, Spawn) or len(item):
            runs.append([])
    return [decode(run) for run in runs if run]
