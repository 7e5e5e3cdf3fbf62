"""Runs problems through a runner, keeps exactly one record per problem, and sums them up.

A failure of the model, such as a malformed spawn, is part of a record, which then counts as wrong. A failure of the
system (out of memory, a dead server, a bug) is never a record: it ends the evaluation.

An evaluation may end at any moment: records are appended to ``PATH.partial`` as trees end, and one started
again runs only the problems that have none there. Draws depend on a tree's name alone, so the trees are the
same however often the evaluation was stopped; log-probabilities may differ in their last place (`JaxEngine`).
"""

import asyncio
import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_origin

from apr_jax.errors import UserError
from apr_jax.io.progress import Progress
from apr_jax.threads.metrics import (
    children,
    depth,
    duplicate_children,
    longest_context,
    sampled_tokens,
    sequential_tokens,
    total_tokens,
)
from apr_jax.threads.run import TreeRunner, together
from apr_jax.threads.tree import Block, Spawn, Thread, ThreadTree
from apr_jax.threads.tree_json import tree_from_json, tree_to_json

NAME_TAG = -1  # first in the names of evaluated trees; training's begin with a step, which is never negative
SYSTEM_FAILURE = "error:"  # how failures of the system begin in old files, which held them as records
LOGPROB_DIGITS = 3  # in records: for the viewer, not for training


@dataclasses.dataclass(frozen=True)
class Record:
    """The tree of one problem, and whether it is right. Lengths are tokens."""

    index: int  # of the problem in its list
    name: str  # what was evaluated
    condition: str
    problem: dict[str, Any]  # Countdown: {"numbers": [...], "target": ...}
    correct: bool
    claimed: bool  # the root returned a result, right or wrong
    failures: dict[str, int]  # threads by how they failed: "length", "tokens", "malformed:KIND"
    malformed: dict[str, int] = dataclasses.field(default_factory=dict)  # spawns by kind
    guarded: int = 0  # join blocks that a thread began to write itself
    total_tokens: int = 0
    sampled_tokens: int = 0
    sequential_tokens: int = 0
    longest_context: int = 0
    children: int = 0
    duplicate_children: int = 0
    depth: int = 0
    operations_right: int = 0  # of those that threads wrote themselves
    operations: int = 0
    tree: dict[str, Any] | None = None  # as `tree_to_json`; `thread_tree` reads it
    weights: str = ""  # whose tree it is: `fingerprint` of the model; "": not told

    @property
    def thread_tree(self) -> ThreadTree | None:
        return None if self.tree is None else tree_from_json(self.tree)

    @property
    def system_failure(self) -> str | None:
        """What ended the run of the tree, as "error:MemoryError": such a record, of an old file, is no result."""
        return next((kind for kind in self.failures if kind.startswith(SYSTEM_FAILURE)), None)

    def line(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(vars(self), separators=(",", ":")) + "\n"

    @classmethod
    def read(cls, line: str) -> "Record":
        """Raises UserError where the line is no whole record; its tree is read by `thread_tree`."""
        try:
            record = cls(**json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:  # no JSON, or other fields
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
    """All records of a file. Raises FileNotFoundError, and UserError that names the line for one that is broken or is
    no result."""
    records = []
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), 1):
        try:
            record = Record.read(line)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if record.system_failure:
            raise UserError(
                f"{path}, line {number}: problem {record.index} was not answered but ended by a failure of the system "
                f"({record.system_failure}): evaluate again, which runs it anew"
            )
        records.append(record)
    return records


def evaluate(
    runner: TreeRunner,
    problems: Sequence[Any],
    path: str | Path,
    *,
    name: str | None = None,
    condition: str = "",
    weights: str = "",
    progress_title: str | None = None,
    at_once: int = 256,
) -> list[Record]:
    """The records of all problems, in their order, as they then stand in `path` (JSON lines).

    `name` says what is evaluated, as ``"sft_apr"`` (default: the file's stem). What an earlier run left at
    `path` is taken over where name, condition, problem and weights are the same, and only there. `weights` is the
    `fingerprint` of the model that decodes: without it a path is for one checkpoint. `at_once` trees run side by side;
    it changes no record.

    Raises what the runner raises for a tree, when the other trees have been cancelled. That problem then has no
    record; those of finished trees stay in ``PATH.partial``, and the same call goes on.
    """
    path = Path(path)
    name = path.stem if name is None else name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    described = [json.loads(json.dumps(dataclasses.asdict(problem))) for problem in problems]
    mine = (name, condition, weights)
    records: dict[int, Record] = {}
    for source in (path, partial):
        for record in _whole_records(source):
            i = record.index
            same = (record.name, record.condition, record.weights) == mine
            if same and described[i : i + 1] == [record.problem]:
                records.setdefault(i, record)
    missing = [index for index in range(len(problems)) if index not in records]
    if missing:
        # Written anew first: the last line may have been cut by a kill.
        _replace(partial, "".join(record.line() for record in records.values()))
        blank = [
            Record(i, name, condition, problem, False, False, {}, weights=weights)
            for i, problem in enumerate(described)
        ]
        with partial.open("a") as file:
            progress = Progress(progress_title or f"evaluate {name}", len(problems), "problems", len(records))

            def done(record: Record) -> None:
                records[record.index] = record
                file.write(record.line())
                file.flush()
                right = sum(record.correct for record in records.values())
                progress.update(len(records), f"{right} right")

            asyncio.run(_run(runner, problems, [blank[i] for i in missing], at_once, done))
    ordered = [records[index] for index in range(len(problems))]
    text = "".join(record.line() for record in ordered)
    if not path.exists() or path.read_text() != text:
        _replace(path, text)
    partial.unlink(missing_ok=True)
    return ordered


async def _run(runner: TreeRunner, problems, blanks: Sequence[Record], at_once: int, done) -> None:
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
        blank, correct=tree.outcome.correct, claimed=tree.outcome.answered, failures=tree.outcome.failures,
        malformed=tree.outcome.malformed, guarded=tree.outcome.suppressed_joins,
        total_tokens=total_tokens(tree), sampled_tokens=sampled_tokens(tree), sequential_tokens=sequential_tokens(tree),
        longest_context=longest_context(tree), children=children(tree), duplicate_children=duplicate_children(tree),
        depth=depth(tree), operations_right=sum(right for right, _ in counts), operations=sum(n for _, n in counts),
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


def _whole_records(path: Path) -> list[Record]:
    """The records of a file that a killed run may have left; no file, no records. A line that was cut short and one
    that is no result are left out, so that their problems are run again."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            record = Record.read(line)
        except UserError:
            continue
        if not record.system_failure:
            records.append(record)
    return records


def _replace(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a rate, (low, high) from 0 to 1; z = 1.96 covers 95 %.

    (0, 1) where nothing was counted. Raises ValueError unless 0 <= right <= total.

    >>> [round(end, 3) for end in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    if not 0 <= right <= total:
        raise ValueError(f"right is from 0 to total, was given {right} of {total}")
    if total == 0:
        return 0.0, 1.0
    rate, spread = right / total, z * z / total
    centre = rate + spread / 2
    half = z * math.sqrt(rate * (1 - rate) / total + spread / (4 * total))
    # At its ends the formula is exact only up to rounding.
    low = (centre - half) / (1 + spread) if right else 0.0
    return low, (centre + half) / (1 + spread) if right < total else 1.0


def paired_difference(
    before: Sequence[Record], after: Sequence[Record], z: float = 1.96
) -> tuple[float, float, float, int, int]:
    """How much more often `after` is right than `before` on the same problems: (difference, low, high, problems gained,
    problems lost), rates from -1 to 1. The interval is that of a mean of paired differences, which is far narrower than
    those of the two accuracies: most problems are answered the same. Raises ValueError where the problems differ.

    Example: of 100 problems 9 are gained and 4 lost: 0.05, from -0.02 to 0.12.
    """
    if not before or [record.problem for record in before] != [record.problem for record in after]:
        raise ValueError("a paired difference needs the same problems in the same order")
    n = len(before)
    gained = sum(b.correct and not a.correct for a, b in zip(before, after))
    lost = sum(a.correct and not b.correct for a, b in zip(before, after))
    mean = (gained - lost) / n
    half = z * math.sqrt(max((gained + lost) / n - mean * mean, 0.0) / n)
    return mean, mean - half, mean + half, gained, lost


def accuracy_by_window(records: Sequence[Record], windows: Iterable[int]) -> list[tuple[int, float]]:
    """The paper's cumulative accuracy (figure 4b): for each window in tokens the share of all problems
    answered right with every thread inside the window.

    Example: right answers with longest contexts 100 and 300 of 4 problems give [(200, 0.25), (400, 0.5)]
    for windows 200 and 400.
    """
    return _cumulative([record.longest_context for record in records if record.correct], len(records), windows)


def accuracy_by_sequential(records: Sequence[Record], edges: Iterable[int]) -> list[tuple[int, float]]:
    """For each edge the share of all problems answered right in at most so many sequential tokens
    (the paper's figure 6)."""
    return _cumulative([record.sequential_tokens for record in records if record.correct], len(records), edges)


def _cumulative(costs: Sequence[int], total: int, edges: Iterable[int]) -> list[tuple[int, float]]:
    return [(edge, sum(cost <= edge for cost in costs) / max(total, 1)) for edge in edges]


def even_edges(values: Iterable[int], count: int = 8, step: int = 64) -> list[int]:
    """At most `count` even edges, multiples of `step`, the last of which holds every value."""
    top = max([*values, 1])
    width = -(-top // (count * step)) * step
    return [width * i for i in range(1, -(-top // width) + 1)]


def summarise(records: Sequence[Record]) -> dict:
    """One evaluation in numbers, JSON-able; `ran` of `n` problems have a tree, and means are per tree. Every failure of
    the model counts as wrong. Raises ValueError for a record that is no result (`Record.system_failure`)."""
    if failed := [record for record in records if record.system_failure]:
        raise ValueError(f"problem {failed[0].index} is no result: {failed[0].system_failure}")
    n, right = len(records), sum(record.correct for record in records)
    ran = [record for record in records if record.tree is not None]
    low, high = wilson_interval(right, n)

    def mean(field: str) -> float:
        return sum(getattr(record, field) for record in ran) / max(len(ran), 1)

    def by_kind(field: str) -> dict[str, int]:
        return dict(sorted(sum((Counter(getattr(record, field)) for record in records), Counter()).items()))

    operations = sum(record.operations for record in ran)
    return {
        "name": records[0].name if records else "",
        "condition": records[0].condition if records else "",
        "n": n,
        "ran": len(ran),
        "right": right,
        "accuracy": right / max(n, 1),
        "accuracy_low": low,
        "accuracy_high": high,
        "claimed": sum(record.claimed for record in records) / max(n, 1),
        "total_tokens": mean("total_tokens"),
        "sampled_tokens": mean("sampled_tokens"),
        "sequential_tokens": mean("sequential_tokens"),
        "longest_context": mean("longest_context"),
        "children": mean("children"),
        "duplicate_children": mean("duplicate_children"),
        "operations": operations,
        "operations_right": sum(record.operations_right for record in ran) / max(operations, 1),
        "malformed": by_kind("malformed"),
        "failures": by_kind("failures"),
        "guarded": sum(record.guarded for record in records),
        "accuracy_by_window": accuracy_by_window(records, even_edges(record.longest_context for record in records)),
        "accuracy_by_sequential": accuracy_by_sequential(records, even_edges(r.sequential_tokens for r in records)),
    }
