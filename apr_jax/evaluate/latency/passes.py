"""Latency passes: a pass runs problems through an engine and measures one sample per problem, under one setting.

A sample's latency is split along the chain of requests that decided it. A sample also has the latency predicted for the
same tree if every thread had an engine to itself: the seconds per token times the sequential tokens, plus the prefills
between them.

A pass may be killed at any time. Each sample is appended to a JSON Lines file when it ends, and the same pass resumes
with the samples that are missing. A sample during which a server failed is measured again. No sample is lost or stored
twice. Any other failure of the system (out of memory, a bug) ends the pass and is never stored as a sample.
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
from apr_jax.evaluate.latency.chain import critical_path, latency_parts
from apr_jax.evaluate.latency.costs import Costs, predict
from apr_jax.evaluate.latency.sample import Sample, Setting, measured_samples, read_samples
from apr_jax.evaluate.records import problem_rows, tree_counts
from apr_jax.evaluate.run import NAME_TAG
from apr_jax.io.files import write_text
from apr_jax.io.json_lines import append, read_lines
from apr_jax.io.progress import Progress
from apr_jax.rollout.client import ServerError
from apr_jax.rollout.measure import Measurement, Measurements
from apr_jax.tasks.task import Task
from apr_jax.threads.run import TreeRunner, together
from apr_jax.threads.tree import Block, Thread, ThreadTree, map_blocks

WARM_UP_TAG = -2  # begins the names of the trees that warm the engine up
ATTEMPTS = 4  # at one sample, when servers fail


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


async def warm_up(runner: TreeRunner, measurements: Measurements, problems: Sequence[Any]) -> None:
    """Run all problems at once without keeping a measurement, so that the engine is warm."""
    await together(runner.run(problem, (WARM_UP_TAG, index)) for index, problem in enumerate(problems))
    measurements.clear()


async def measure(
    runner: TreeRunner, task: Task, problems: Sequence[Any], path: str | Path, setting: Setting,
    measurements: Measurements, costs: Costs, recover: Callable[[], Awaitable[None]],
    log: Callable[[str], None] = _log,
) -> list[Sample]:  # fmt: skip
    """Return the samples of all problems under one setting, in the problems' order. Samples that are missing in `path`
    are measured, `setting.concurrency` at a time, and appended to it when they end.

    When a server has failed, `recover` is awaited, which returns when the server is ready again. Samples that the
    failure touched are then measured again. A pass that measures all samples without such a failure appends its
    throughput to ``passes.jsonl`` beside `path`.

    Raises the errors of `recover`, ServerError if a sample fails ATTEMPTS times, and any other error of a tree at once.
    The other trees are then cancelled. Finished samples stay in the file.
    """
    path, rows, old = Path(path), problem_rows(task, problems), read_samples(path)
    samples = measured_samples(old, setting, rows)
    missing = [index for index in range(len(rows)) if index not in samples]
    if not missing:
        return [samples[index] for index in range(len(rows))]
    if any(True for _ in read_lines(path, cut_short=True)) and not old:
        raise UserError(f"{path} holds samples of an earlier version of this code: give another --out")
    write_text(path, "".join(sample.line() for sample in old))  # a kill may have cut the last line
    title = f"{setting.title}, {setting.engine}, {setting.concurrency} at once, {setting.budget_title}"
    progress = Progress(title, len(rows), "samples", len(samples))
    gate, healing = asyncio.Semaphore(setting.concurrency), asyncio.Lock()
    began = time.perf_counter()
    with path.open("a") as file:

        async def one(index: int) -> None:
            async with gate:
                blank = _blank(setting, index, rows[index])
                for attempts in range(1, ATTEMPTS + 1):
                    sample, trouble = await _sample(runner, problems[index], blank, measurements, costs)
                    if trouble is None:
                        break
                    log(f"sample {index} is measured again: {trouble}")
                    async with healing:
                        await recover()
                else:
                    raise ServerError(f"sample {index} failed {ATTEMPTS} times: {trouble}")
                sample = dataclasses.replace(sample, tries=attempts)
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
    """Return a problem's sample with its setting filled in and nothing measured yet."""
    where = dataclasses.asdict(setting)
    return Sample(index, problem, setting.task, setting.variant, setting.condition, setting=where)


async def _sample(
    runner: TreeRunner, problem: Any, blank: Sample, measurements: Measurements, costs: Costs
) -> tuple[Sample | None, str | None]:
    """Measure one sample. Returns (sample, None), or (None, reason) if a server failed meanwhile."""
    name, began, start = (NAME_TAG, blank.index), time.time(), time.perf_counter()
    try:
        tree = await runner.run(problem, name, blank.condition)
    except ServerError as error:
        measurements.take(name)
        return None, str(error)
    except Exception as error:
        error.add_note(f"(sample {blank.index}; the same command continues from here)")
        raise
    latency = time.perf_counter() - start
    calls = measurements.take(name)
    if again := [one for one in calls if one.attempts > 1]:
        return None, f"{again[0].server} needed {again[0].attempts} attempts for one of its requests"
    return _completed(blank, tree, calls, began, start, latency, costs), None


def _completed(
    blank: Sample, tree: ThreadTree, calls: list[Measurement], began: float, start: float, latency: float, costs: Costs
) -> Sample:
    """Fill in a sample's counts of its tree, its measured times and its predicted times."""
    chain, predicted = critical_path(calls), predict(tree.root, costs)
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
    """Return a hash of a tree's ids, of who wrote them, and of where its threads begin and end. Log-probabilities are
    left out."""
    plain = map_blocks(thread, lambda block: Block(tuple(block.content), block.sampled))
    return hashlib.blake2b(repr(plain).encode(), digest_size=8).hexdigest()


# ---------------------------------------------------------------------- throughput


@dataclasses.dataclass(frozen=True)
class Throughput:
    """The throughput of a pass that nothing interrupted."""

    samples: int
    per_second: float  # samples per second
    tokens: float  # decoded tokens per second


def _write_throughput(path: Path, setting: Setting, samples: Sequence[Sample], seconds: float) -> None:
    row = {
        "setting": dataclasses.asdict(setting), "samples": len(samples), "seconds": seconds,
        "output_tokens": sum(sample.output_tokens for sample in samples),
    }  # fmt: skip
    with path.open("a") as file:
        append(file, row)


def read_throughput(path: str | Path) -> dict[Setting, Throughput]:
    """Read the throughput of each setting's last complete pass from ``passes.jsonl``. Broken lines are skipped."""
    found = {}
    for _, row in read_lines(path, cut_short=True):
        try:
            n, seconds = row["samples"], row["seconds"]
            found[Setting(**row["setting"])] = Throughput(n, n / seconds, row["output_tokens"] / seconds)
        except (ValueError, TypeError, KeyError, ZeroDivisionError):
            continue
    return found
