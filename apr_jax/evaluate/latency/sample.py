"""Samples of latency: one tree under the clock each, and the file of them, one JSON object a line."""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from apr_jax.evaluate.records import TreeRecord
from apr_jax.io.json_lines import read_lines


@dataclasses.dataclass(frozen=True)
class Setting:
    """What samples were measured under; each problem has one sample per setting."""

    task: str  # a spec, as `load_task` reads it
    variant: str  # of the task
    title: str  # of the variant, for people: `Task.title`
    weights: str  # tells checkpoints apart
    engine: str  # "sglang", or "jax": in this process
    servers: int
    placement: str
    concurrency: int  # trees at once; 1 is the paper's
    window: int  # tokens of a thread
    depth: int
    min_children: int
    temperature: float
    condition: str = ""  # first on the root's prompt
    problems: str = ""  # tells lists of problems apart, whatever of them is measured

    @property
    def budget_title(self) -> str:
        """The budget and the sampling, short, for tables: only what differs from the plainest setting."""
        parts = [f"window {self.window}"]
        if self.condition:
            parts.append(self.condition.strip())
        if self.min_children:
            parts.append(f"{self.min_children} children at least")
        if self.depth != 1:
            parts.append(f"depth {self.depth}")
        if self.temperature:
            parts.append(f"temperature {self.temperature:g}")
        return ", ".join(parts)

    @property
    def engine_title(self) -> str:
        """Where samples come from, for titles: nobody is to take one for the other."""
        if self.engine == "jax":
            return "JAX engine, in process"
        servers = "1 SGLang server" if self.servers == 1 else f"{self.servers} SGLang servers"
        return servers if self.servers == 1 else f"{servers}, {self.placement.replace('_', ' ')}"


@dataclasses.dataclass(frozen=True)
class Sample(TreeRecord):
    """One tree under the clock. Times in seconds; `queue` + `prefill` + `decode` + `overhead` = `latency`."""

    setting: dict[str, Any] = dataclasses.field(default_factory=dict)
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
    digest: str = ""  # of the tree's ids: the same trees have the same
    tries: int = 1  # more where a server failed during the first

    @property
    def predicted(self) -> float:
        return self.predicted_prefill + self.predicted_decode

    @property
    def gap(self) -> dict[str, float]:
        """The measured seconds beyond the predicted ones, part by part; their sum is `latency` - `predicted`."""
        return {
            "queue": self.queue, "prefill": self.prefill - self.predicted_prefill,
            "decode": self.decode - self.predicted_decode, "overhead": self.overhead,
        }  # fmt: skip


Group = tuple[Setting, Sequence[Sample]]  # the samples of one setting


def read_samples(path: str | Path) -> list[Sample]:
    """All whole samples of a file, which a killed run may have left; no file, no samples. A line that was cut short or
    has other fields is left out, and its sample is measured again."""
    samples = []
    for _, row in read_lines(path, cut_short=True):
        with contextlib.suppress(TypeError):
            sample = Sample(**row)
            Setting(**sample.setting)
            samples.append(sample)
    return samples


def by_setting(samples: Iterable[Sample]) -> list[Group]:
    """Samples by what they were measured under, settings in the order in which they first come."""
    groups: dict[Setting, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(Setting(**sample.setting), []).append(sample)
    return list(groups.items())


def measured_samples(
    samples: Iterable[Sample], setting: Setting, problems: Sequence[dict[str, Any]]
) -> dict[int, Sample]:
    """By index: the first sample of each problem, given in its JSON form, under one setting."""
    where, found = dataclasses.asdict(setting), {}
    for sample in samples:
        if sample.setting == where and problems[sample.index : sample.index + 1] == [sample.problem]:
            found.setdefault(sample.index, sample)
    return found
