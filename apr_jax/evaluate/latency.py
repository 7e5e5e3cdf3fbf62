"""Latency of thread trees: problems run through any engine under the clock, one sample each.

A sample's time is taken apart along the chain of requests that it waited for: a thread's next request waits for its
last one, or for the child that ended last. Beside it stands what a model of latency predicts for the same tree on a
machine that runs every thread by itself: sequential tokens times the time of one, and the prefills between them.

A run may end at any moment: samples are appended to a file of JSON lines as they end, and a run started again
measures those that are missing. A sample during which a server failed is measured anew; none is lost or doubled. Any
other failure of the system (out of memory, a bug) ends the run: it is never a sample.
"""

import asyncio
import dataclasses
import hashlib
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from apr_jax.evaluate.costs import Costs, predict
from apr_jax.evaluate.evaluate import NAME_TAG, wilson_interval
from apr_jax.io.progress import Progress
from apr_jax.rollout.measure import Measurement, Measurements
from apr_jax.rollout.sglang import ServerError
from apr_jax.threads.metrics import children, longest_context, sequential_tokens, total_tokens
from apr_jax.threads.run import TreeRunner, together
from apr_jax.threads.tree import Block, Thread, ThreadTree, map_blocks

WARM_TAG = -2  # first in the names of trees that are run but not measured
TRIES = 4  # of one sample, when servers fail


@dataclasses.dataclass(frozen=True)
class Setting:
    """What samples were measured under; each problem has one sample per setting."""

    model: str  # "apr", "sosp"
    weights: str  # tells checkpoints apart
    engine: str  # "sglang", or "jax": in this process
    servers: int
    placement: str
    concurrency: int  # trees at once; 1 is the paper's
    window: int  # tokens of a thread
    depth: int
    least_children: int
    temperature: float
    condition: str = ""  # first on the root's prompt
    problems: str = ""  # tells lists of problems apart, whatever of them is measured

    @property
    def title(self) -> str:
        """Short, for tables: only what differs from the plainest setting."""
        parts = [f"window {self.window}"]
        if self.condition:
            parts.append(self.condition.strip())
        if self.least_children:
            parts.append(f"{self.least_children} children at least")
        if self.depth != 1 and self.model != "sosp":
            parts.append(f"depth {self.depth}")
        if self.temperature:
            parts.append(f"temperature {self.temperature:g}")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One tree under the clock. Times in seconds; `queue` + `prefill` + `decode` + `overhead` = `latency`."""

    setting: dict[str, Any]
    index: int  # of the problem in its list
    problem: dict[str, Any]
    correct: bool
    failures: dict[str, int]
    began: float = 0.0  # seconds since 1970
    latency: float = 0.0
    first_token: float | None = None  # from the sample's start to the root's first token; None: not known
    queue: float = 0.0  # waiting for a place, here or in the server
    prefill: float = 0.0  # up to requests' first tokens; where those are not known it is in `decode`
    decode: float = 0.0
    overhead: float = 0.0  # parsing, joining, HTTP between requests
    predicted_prefill: float = 0.0
    predicted_decode: float = 0.0
    chain_requests: int = 0
    chain_tokens: int = 0  # decoded by the requests that were waited for
    predicted_chain_tokens: int = 0
    requests: int = 0
    prompt_tokens: int = 0  # of all requests, each with its whole context
    cached_tokens: int | None = None  # of those, not computed again; None where the engine does not tell
    output_tokens: int = 0
    total_tokens: int = 0
    sequential_tokens: int = 0
    longest_context: int = 0
    children: int = 0
    tree: str = ""  # digest of its ids: the same trees have the same
    tries: int = 1  # more where a server failed during the first

    @property
    def predicted(self) -> float:
        return self.predicted_prefill + self.predicted_decode

    @property
    def gap(self) -> dict[str, float]:
        """What the latency has more than predicted, part by part; the parts' sum is the whole."""
        return {
            "queue": self.queue, "prefill": self.prefill - self.predicted_prefill,
            "decode": self.decode - self.predicted_decode, "overhead": self.overhead,
        }  # fmt: skip

    def line(self) -> str:
        return json.dumps(vars(self), separators=(",", ":")) + "\n"


def read_samples(path: str | Path) -> list[Sample]:
    """All whole samples of a file, which a killed run may have left; no file, no samples. What is left out here is
    measured again: a line that was cut short, and in old files a tree that a failure of the system ended."""
    samples = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else ():
        try:
            row = json.loads(line)
            if row.pop("ran", True):  # only old files say so
                samples.append(Sample(**row))
        except (ValueError, TypeError, AttributeError):
            continue
    return samples


# ---------------------------------------------------------------------- what a sample waited for


def waited_for(calls: Sequence[Measurement]) -> list[Measurement]:
    """The requests of one tree that decided when it ended, in order: the last one of all, before it the last that it
    can have waited for, and so on. A request waits for its own thread's and for those of threads above and below."""
    chain: list[Measurement] = []
    now = max(calls, key=lambda one: one.end, default=None)
    while now is not None:
        chain.append(now)
        before = (one for one in calls if one.end <= now.asked and _related(one.thread, now.thread))
        now = max(before, key=lambda one: one.end, default=None)
    return chain[::-1]


def _related(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[: len(b)] == b or b[: len(a)] == a


def _parts(chain: Sequence[Measurement], latency: float) -> dict[str, float]:
    """A latency in parts: `queue`, `prefill`, `decode` of the chain, and the rest as `overhead`."""
    queue = prefill = decode = 0.0
    for one in chain:
        first = one.start if one.first is None else one.first
        there = min(one.server_queue or 0.0, first - one.start)
        queue += one.start - one.asked + there
        prefill += first - one.start - there
        decode += one.end - first
    return {"queue": queue, "prefill": prefill, "decode": decode, "overhead": latency - queue - prefill - decode}


# ---------------------------------------------------------------------- measuring


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


async def warm_up(runner: TreeRunner, measurements: Measurements, problems: Sequence[Any]) -> None:
    """Runs trees that nobody measures, all at once."""
    await together(runner.run(problem, (WARM_TAG, index)) for index, problem in enumerate(problems))
    measurements.clear()


async def measure(
    runner: TreeRunner, problems: Sequence[Any], path: str | Path, setting: Setting, measurements: Measurements,
    costs: Costs, recover: Callable[[], Awaitable[None]], tell: Callable[[str], None] = _tell,
) -> list[Sample]:  # fmt: skip
    """The samples of all problems under one setting, in their order; those that `path` does not hold yet are measured
    and appended to it as they end, `setting.concurrency` at a time.

    `recover` is awaited when a server has failed, and returns when it is there again; the samples that the failure
    touched are measured anew. Raises what it raises, ServerError where a sample fails TRIES times, and at once any
    other error of a tree. The trees beside it are then cancelled; finished samples stay. A pass without interruption
    leaves its throughput in ``passes.jsonl`` beside the samples.
    """
    path = Path(path)
    described = [json.loads(json.dumps(dataclasses.asdict(problem))) for problem in problems]
    where = dataclasses.asdict(setting)
    old, samples = read_samples(path), {}
    for sample in old:
        i = sample.index
        if sample.setting == where and described[i : i + 1] == [sample.problem]:
            samples.setdefault(i, sample)
    missing = [index for index in range(len(problems)) if index not in samples]
    if not missing:
        return [samples[index] for index in range(len(problems))]
    _write_whole(path, "".join(sample.line() for sample in old))  # the last line may have been cut by a kill
    title = f"{setting.model}, {setting.engine}, {setting.concurrency} at once, {setting.title}"
    progress = Progress(title, len(problems), "samples", len(samples))
    gate, healing = asyncio.Semaphore(setting.concurrency), asyncio.Lock()
    began = time.perf_counter()
    with path.open("a") as file:

        async def one(index: int) -> None:
            async with gate:
                blank = Sample(where, index, described[index], False, {})
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
                file.write(sample.line())
                file.flush()
                right = sum(sample.correct for sample in samples.values())
                progress.update(len(samples), f"{right} right")

        await together(map(one, missing))
    found = [samples[index] for index in range(len(problems))]
    if len(missing) == len(problems) and all(sample.tries == 1 for sample in found):
        whole = {
            "setting": where, "samples": len(found), "seconds": time.perf_counter() - began,
            "output_tokens": sum(sample.output_tokens for sample in found),
        }  # fmt: skip
        with path.with_name("passes.jsonl").open("a") as file:
            file.write(json.dumps(whole) + "\n")
    return found


async def _sample(
    runner: TreeRunner, problem: Any, blank: Sample, measurements: Measurements, costs: Costs
) -> tuple[Sample | None, str | None]:
    """(sample, None), or (None, why it is of no use)."""
    name, began, start = (NAME_TAG, blank.index), time.time(), time.perf_counter()
    try:
        tree = await runner.run(problem, name, blank.setting["condition"])
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
        blank, correct=tree.outcome.correct, failures=tree.outcome.failures, began=began, latency=latency,
        first_token=min(roots) - start if roots else None, **_parts(chain, latency),
        predicted_prefill=predicted.prefill, predicted_decode=predicted.decode, predicted_chain_tokens=predicted.tokens,
        chain_requests=len(chain), chain_tokens=sum(one.output_tokens for one in chain), requests=len(calls),
        prompt_tokens=sum(one.prompt_tokens for one in calls), cached_tokens=None if None in cached else sum(cached),
        output_tokens=sum(one.output_tokens for one in calls), total_tokens=total_tokens(tree),
        sequential_tokens=sequential_tokens(tree), longest_context=longest_context(tree), children=children(tree),
        tree=_digest(tree.root),
    )  # fmt: skip


def _digest(thread: Thread) -> str:
    """Of all ids, who wrote them and where threads begin and end; not of log-probabilities."""
    plain = map_blocks(thread, lambda block: Block(tuple(block.content), block.sampled))
    return hashlib.blake2b(repr(plain).encode(), digest_size=8).hexdigest()


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


# ---------------------------------------------------------------------- summing up


def by_setting(samples: Iterable[Sample]) -> list[tuple[Setting, list[Sample]]]:
    """Samples by what they were measured under, settings in the order in which they first come."""
    groups: dict[Setting, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(Setting(**sample.setting), []).append(sample)
    return list(groups.items())


def summarise_latency(samples: Sequence[Sample]) -> dict[str, Any]:
    """The samples of one setting in numbers, JSON-able: seconds, and shares of them from 0 to 1."""
    right = sum(sample.correct for sample in samples)
    low, high = wilson_interval(right, len(samples))
    times = sorted(sample.latency for sample in samples)

    def mean(values: Iterable[float]) -> float:
        return sum(values) / max(len(samples), 1)

    latency = mean(times)
    firsts = [sample.first_token for sample in samples]
    told = all(sample.cached_tokens is not None for sample in samples)
    prompts = sum(sample.prompt_tokens for sample in samples)
    return {
        "n": len(samples), "right": right, "accuracy": right / max(len(samples), 1),
        "accuracy_low": low, "accuracy_high": high,
        "latency": latency, "latency_median": statistics.median(times) if times else 0.0,
        "latency_90": times[int(0.9 * (len(times) - 1))] if times else 0.0,
        "first_token": None if None in firsts else mean(firsts),
        **{f"{part}_share": mean(getattr(sample, part) for sample in samples) / (latency or 1.0)
           for part in ("queue", "prefill", "decode", "overhead")},
        "cached_share": sum(s.cached_tokens for s in samples) / max(prompts, 1) if told and samples else None,
        "predicted": mean(sample.predicted for sample in samples),
        "gap": {part: mean(sample.gap[part] for sample in samples)
                for part in ("queue", "prefill", "decode", "overhead")},
        "requests": mean(sample.requests for sample in samples),
        "output_tokens": mean(sample.output_tokens for sample in samples),
        "chain_tokens": mean(sample.chain_tokens for sample in samples),
        "sequential_tokens": mean(sample.sequential_tokens for sample in samples),
        "total_tokens": mean(sample.total_tokens for sample in samples),
        "children": mean(sample.children for sample in samples),
        "disturbed": sum(sample.tries > 1 for sample in samples),
        "failures": dict(sorted(sum((Counter(sample.failures) for sample in samples), Counter()).items())),
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Of a pass that nothing interrupted."""

    samples: int
    per_second: float  # samples
    tokens: float  # decoded per second


def read_throughput(path: str | Path) -> dict[Setting, Throughput]:
    """The last whole pass of each setting, from ``passes.jsonl``."""
    found = {}
    for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
        try:
            row = json.loads(line)
            n, seconds = row["samples"], row["seconds"]
            found[Setting(**row["setting"])] = Throughput(n, n / seconds, row["output_tokens"] / seconds)
        except (ValueError, TypeError, KeyError, ZeroDivisionError):
            continue
    return found
