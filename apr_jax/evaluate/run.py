"""Runs problems through a runner and keeps exactly one record per problem.

A failure of the model, such as a malformed spawn, is part of a record, which then counts as wrong. A failure of the
system (out of memory, a dead server, a bug) is never a record: it ends the evaluation.

An evaluation may end at any moment: records are appended to ``PATH.partial`` as trees end, and one started
again runs only the problems that have none there. Draws depend on a tree's name alone, so the trees are the
same however often the evaluation was stopped; log-probabilities may differ in their last place (`JaxEngine`).
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

NAME_TAG = -1  # first in the names of evaluated trees; training's begin with a step, which is never negative
LOGPROB_DIGITS = 3  # in records: for the viewer, not for training


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
    """The records of all problems, in their order, as they then stand in `path` (JSON lines).

    `task` and `variant` say what the problems are and which protocol the runner has. `name` says what is evaluated, as
    ``"sft_apr"`` (default: the file's stem). What an earlier run left at `path` is taken over where task, variant,
    name, condition, problem and weights are the same, and only there. `weights` is the `fingerprint` of the model that
    decodes: without it a path is for one checkpoint. `at_once` trees run side by side; it changes no record.

    Raises what the runner raises for a tree, when the other trees have been cancelled. That problem then has no
    record; those of finished trees stay in ``PATH.partial``, and the same call goes on.
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
            if 0 <= record.index < len(blank) and _question(record) == _question(blank[record.index]):
                records.setdefault(record.index, record)
    missing = [one for one in blank if one.index not in records]
    if missing:
        # Written anew first: the last line may have been cut by a kill.
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


def _question(record: Record) -> tuple:
    """What was asked of whom: a record counts for nothing else."""
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
                error.add_note(f"({blank.name}, problem {blank.index}; the same command goes on from here)")
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
    """The texts that a thread wrote, each without a break by the system; calls hold no steps and are left out."""
    runs: list[list[int]] = [[]]
    for item in thread.blocks:
        if isinstance(item, Block) and item.sampled:
            runs[-1].extend(item.content)
        elif isinstance(item, Spawn) or len(item):
            runs.append([])
    return [decode(run) for run in runs if run]
