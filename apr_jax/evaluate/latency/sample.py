"""Samples of latency, and their files: JSON lines, one sample a line. A sample is one tree with its measured times."""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from apr_jax.evaluate.records import TreeRecord
from apr_jax.io.json_lines import read_lines


@dataclasses.dataclass(frozen=True)
class Setting:
    """The conditions under which samples were measured. A problem has one sample per setting."""

    task: str  # name or "package.module:Class", as `load_task` takes it
    variant: str  # the task's variant, e.g. "apr"
    title: str  # title of the variant for tables and figures, from `Task.title`
    weights: str  # digest of the model's weights
    engine: str  # "sglang", or "jax": in this process
    servers: int  # number of servers
    placement: str  # which server a thread's requests go to: a key of `PLACEMENTS`
    concurrency: int  # trees at once; the paper measured one at a time
    window: int  # most tokens of a thread
    depth: int  # levels of children below the root
    min_children: int  # the root may not end before it has spawned so many children
    temperature: float
    condition: str = ""  # text at the start of the root's prompt
    problems: str = ""  # digest of the file of problems; "": the problems come from the task

    @property
    def budget_title(self) -> str:
        """The budget and the temperature in short, for tables. The window always appears; another value appears only if
        it differs from the usual one."""
        parts = [f"window {self.window}"]
        if self.condition:
            parts.append(self.condition.strip())
        if self.min_children:
            parts.append(f"at least {self.min_children} children")
        if self.depth != 1:
            parts.append(f"depth {self.depth}")
        if self.temperature:
            parts.append(f"temperature {self.temperature:g}")
        return ", ".join(parts)

    @property
    def engine_title(self) -> str:
        """A title of the engine, for tables and figures. It distinguishes engines, number of servers and placement."""
        if self.engine == "jax":
            return "JAX engine, in process"
        servers = "1 SGLang server" if self.servers == 1 else f"{self.servers} SGLang servers"
        return servers if self.servers == 1 else f"{servers}, {self.placement.replace('_', ' ')}"


@dataclasses.dataclass(frozen=True)
class Sample(TreeRecord):
    """One tree with its measured times in seconds; `latency` = `queue` + `prefill` + `decode` + `overhead`."""

    setting: dict[str, Any] = dataclasses.field(default_factory=dict)  # `Setting` as a dictionary
    began: float = 0.0  # seconds since 1970
    latency: float = 0.0
    first_token: float | None = None  # from the sample's start to the root's first token; None: unknown
    queue: float = 0.0  # requests waiting for a free place, here or in the server
    prefill: float = 0.0  # from a request's start to its first token; part of `decode` if first tokens are unknown
    decode: float = 0.0
    overhead: float = 0.0  # parsing, joining, HTTP between requests
    predicted_prefill: float = 0.0
    predicted_decode: float = 0.0
    chain_requests: int = 0  # requests on the measured chain, `critical_path`
    chain_tokens: int = 0  # tokens that these requests decoded
    predicted_chain_tokens: int = 0  # sampled tokens on the chain that is predicted to take longest
    requests: int = 0
    prompt_tokens: int = 0  # sum over all requests, each with its whole context
    cached_tokens: int | None = None  # prompt tokens that the engine had cached; None: the engine does not report them
    output_tokens: int = 0
    digest: str = ""  # hash of the tree's ids: equal trees have equal digests
    tries: int = 1  # attempts at this sample; more than 1 if a server failed

    @property
    def predicted(self) -> float:
        """The predicted latency, in seconds."""
        return self.predicted_prefill + self.predicted_decode

    @property
    def gap(self) -> dict[str, float]:
        """Measured minus predicted seconds of each part. The parts add up to `latency` - `predicted`."""
        return {
            "queue": self.queue, "prefill": self.prefill - self.predicted_prefill,
            "decode": self.decode - self.predicted_decode, "overhead": self.overhead,
        }  # fmt: skip


Group = tuple[Setting, Sequence[Sample]]  # the samples of one setting


def read_samples(path: str | Path) -> list[Sample]:
    """Read the intact samples of a file that a killed run may have left. A missing file gives an empty list. A line
    that was cut short or has unknown fields is skipped, so that its sample is measured again."""
    samples = []
    for _, row in read_lines(path, cut_short=True):
        with contextlib.suppress(TypeError):
            sample = Sample(**row)
            Setting(**sample.setting)
            samples.append(sample)
    return samples


def by_setting(samples: Iterable[Sample]) -> list[Group]:
    """Group samples by setting, in the order in which the settings first appear."""
    groups: dict[Setting, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(Setting(**sample.setting), []).append(sample)
    return list(groups.items())


def measured_samples(
    samples: Iterable[Sample], setting: Setting, problems: Sequence[dict[str, Any]]
) -> dict[int, Sample]:
    """Return, by problem index, the first sample of each problem under one setting. Problems are in their JSON form."""
    where, found = dataclasses.asdict(setting), {}
    for sample in samples:
        if sample.setting == where and problems[sample.index : sample.index + 1] == [sample.problem]:
            found.setdefault(sample.index, sample)
    return found
