"""Passes: problems run through any engine under the clock, one sample each.

A sample's time is taken apart along the chain of requests that it waited for. Beside it stands what a model of latency
predicts for the same tree on a machine that runs every thread by itself: sequential tokens times the time of one, and
the prefills between them.

A pass may end at any moment: samples are appended to a file of JSON lines as they end, and a pass started again
measures those that are missing. A sample during which a server failed is measured anew; none is lost or doubled. Any
other failure of the system (out of memory, a bug) ends the pass: it is never a sample.
"""

import asyncio
import dataclasses
import hashlib
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from apr_jax.errors import UserError
from apr_jax.evaluate.latency.chain import latency_parts, waited_for
from apr_jax.evaluate.latency.costs import Costs, predict
from apr_jax.evaluate.latency.sample import Sample, Setting, measured_samples, read_samples
from apr_jax.evaluate.records import problem_rows, tree_counts
from apr_jax.evaluate.run import NAME_TAG
from apr_jax.io.files import write_text
from apr_jax.io.json_lines import append, read_lines
from apr_jax.io.progress import Progress
from apr_jax.rollout.measure import Measurement, Measurements
from apr_jax.rollout.sglang import ServerError
from apr_jax.tasks.task import Task
from apr_jax.threads.run import TreeRunner, together
from apr_jax.threads.tree import Block, Thread, ThreadTree, map_blocks

WARM_TAG = -2  # first in the names of trees that are run but not measured
TRIES = 4  # of one sample, when servers fail


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


async def warm_up(runner: TreeRunner, measurements: Measurements, problems: Sequence[Any]) -> None:
    """Runs trees that nobody measures, all at once."""
    await together(runner.run(problem, (WARM_TAG, index)) for index, problem in enumerate(problems))
    measurements.clear()


async def measure(
    runner: TreeRunner, task: Task, problems: Sequence[Any], path: str | Path, setting: Setting,
    measurements: Measurements, costs: Costs, recover: Callable[[], Awaitable[None]],
    tell: Callable[[str], None] = _tell,
) -> list[Sample]:  # fmt: skip
    """The samples of all problems under one setting, in their order; those that `path` does not hold yet are measured
    and appended to it as they end, `setting.concurrency` at a time.

    `recover` is awaited when a server has failed, and returns when it is there again; the samples that the failure
    touched are measured anew. Raises what it raises, ServerError where a sample fails TRIES times, and at once any
    other error of a tree. The trees beside it are then cancelled; finished samples stay. A pass without interruption
    leaves its throughput in ``passes.jsonl`` beside the samples.
    """
    path, rows, old = Path(path), problem_rows(task, problems), read_samples(path)
    samples = measured_samples(old, setting, rows)
    missing = [index for index in range(len(rows)) if index not in samples]
    if not missing:
        return [samples[index] for index in range(len(rows))]
    if any(True for _ in read_lines(path, cut_short=True)) and not old:
        raise UserError(f"{path} holds samples of an earlier version: give another --out")
    write_text(path, "".join(sample.line() for sample in old))  # the last line may have been cut by a kill
    title = f"{setting.title}, {setting.engine}, {setting.concurrency} at once, {setting.budget_title}"
    progress = Progress(title, len(rows), "samples", len(samples))
    gate, healing = asyncio.Semaphore(setting.concurrency), asyncio.Lock()
    began = time.perf_counter()
    with path.open("a") as file:

        async def one(index: int) -> None:
            async with gate:
                blank = _blank(setting, index, rows[index])
                for tries in range(1, TRIES + 1):
                    sample, trouble = await _sample(runner, problems[index], blank, measurements, costs)
                    if trouble is None:
                        break
                    tell(f"sample {index} is measured anew: {trouble}")
                    async with healing:
                        await recover()
                else:
                    raise ServerError(f"sample {index} failed {TRIES} times: {trouble}")
                sample = dataclasses.replace(sample, tries=tries)
                samples[index] = sample
                append(file, vars(sample))
                right = sum(sample.correct for sample in samples.values())
                progress.update(len(samples), f"{right} right")

        await together(map(one, missing))
    found = [samples[index] for index in range(len(rows))]
    if len(missing) == len(rows) and all(sample.tries == 1 for sample in found):
        _write_throughput(path.with_name("passes.jsonl"), setting, found, time.perf_counter() - began)
    return found


def _blank(setting: Setting, index: int, problem: dict[str, Any]) -> Sample:
    """A sample before it is measured."""
    where = dataclasses.asdict(setting)
    return Sample(index, problem, setting.task, setting.variant, setting.condition, setting=where)


async def _sample(
    runner: TreeRunner, problem: Any, blank: Sample, measurements: Measurements, costs: Costs
) -> tuple[Sample | None, str | None]:
    """(sample, None), or (None, why it is of no use)."""
    name, began, start = (NAME_TAG, blank.index), time.time(), time.perf_counter()
    try:
        tree = await runner.run(problem, name, blank.condition)
    except ServerError as error:
        measurements.take(name)
        return None, str(error)
    except Exception as error:
        error.add_note(f"(sample {blank.index}; the same command goes on from here)")
        raise
    latency = time.perf_counter() - start
    calls = measurements.take(name)
    if again := [one for one in calls if one.tries > 1]:
        return None, f"{again[0].server} needed {again[0].tries} tries for one of its requests"
    return _described(blank, tree, calls, began, start, latency, costs), None


def _described(
    blank: Sample, tree: ThreadTree, calls: list[Measurement], began: float, start: float, latency: float, costs: Costs
) -> Sample:
    chain, predicted = waited_for(calls), predict(tree.root, costs)
    roots = [one.first for one in calls if one.depth == 0 and one.first is not None]
    cached = [one.cached_tokens for one in calls]
    return dataclasses.replace(
        blank, **tree_counts(tree), began=began, latency=latency,
        first_token=min(roots) - start if roots else None, **latency_parts(chain, latency),
        predicted_prefill=predicted.prefill, predicted_decode=predicted.decode, predicted_chain_tokens=predicted.tokens,
        chain_requests=len(chain), chain_tokens=sum(one.output_tokens for one in chain), requests=len(calls),
        prompt_tokens=sum(one.prompt_tokens for one in calls), cached_tokens=None if None in cached else sum(cached),
        output_tokens=sum(one.output_tokens for one in calls), digest=_digest(tree.root),
    )  # fmt: skip


def _digest(thread: Thread) -> str:
    """Of all ids, who wrote them and where threads begin and end; not of log-probabilities."""
    plain = map_blocks(thread, lambda block: Block(tuple(block.content), block.sampled))
    return hashlib.blake2b(repr(plain).encode(), digest_size=8).hexdigest()


# ---------------------------------------------------------------------- throughput


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Of a pass that nothing interrupted."""

    samples: int
    per_second: float  # samples
    tokens: float  # decoded per second


def _write_throughput(path: Path, setting: Setting, samples: Sequence[Sample], seconds: float) -> None:
    row = {
        "setting": dataclasses.asdict(setting), "samples": len(samples), "seconds": seconds,
        "output_tokens": sum(sample.output_tokens for sample in samples),
    }  # fmt: skip
    with path.open("a") as file:
        append(file, row)


def read_throughput(path: str | Path) -> dict[Setting, Throughput]:
    """The last whole pass of each setting, from ``passes.jsonl``."""
    found = {}
    for _, row in read_lines(path, cut_short=True):
        try:
            n, seconds = row["samples"], row["seconds"]
            found[Setting(**row["setting"])] = Throughput(n, n / seconds, row["output_tokens"] / seconds)
        except (ValueError, TypeError, KeyError, ZeroDivisionError):
            continue
    return found
