"""The task protocol: the text operations of one task that a runner needs to run its threads."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from apr_jax.threads.tree import ThreadTree


class MalformedSpawn(ValueError):
    """A spawn block that cannot be run, as written by a model. `kind` is a short fixed name, by which these errors are
    counted."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class SpawnRequest:
    """A spawn parsed from a parent's text. `children` are the prompts of the children. The spawn block begins at
    character `position` of the text; the join block later replaces it in the parent's context. Where `inherit` is true
    a child's context is the parent's context up to the spawn block, then the child's prompt.

    A task that needs more data at the join, such as names of the children, derives a class with further fields."""

    children: tuple[str, ...]
    position: int
    inherit: bool = dataclasses.field(default=False, kw_only=True)


class TaskProtocol(Protocol):
    """What a task's prompts, spawns, joins and answers look like. All methods take text, return text and are pure; none
    executes model output as code.

    `spawn_open` and `spawn_close` begin and end a spawn block; a thread that writes `spawn_close` waits for its
    children. `join_open` begins a join block. A model must not write `join_open` itself: the runner replaces it by
    `spawn_open`, as the authors' code does. Each of the three must be a single token.

    `reward(problem, tree)` is the reward of a rollout in GRPO; the tree is a tree of text with its outcome. None, which
    derived classes inherit: the reward is 1 for a `correct` rollout, else 0.
    """

    spawn_open: str
    spawn_close: str
    join_open: str
    reward: Callable[[Any, ThreadTree], float] | None = None

    def root_prompt(self, problem: Any) -> str:
        """Return the prompt of the root thread."""

    def parse_spawn(self, text: str) -> SpawnRequest | None:
        """Return the spawn at the end of `text`, a thread's whole context; None where `text` does not end in one.
        Raises MalformedSpawn for a spawn block that cannot be run."""

    def join(self, spawn: SpawnRequest, results: Sequence[str | None]) -> str:
        """Return the join block that replaces the spawn block in the parent's context. `spawn` is the request that
        `parse_spawn` returned. `results` has one entry per child: None for a child that found nothing, failed or was
        not run. Raises ValueError for another number of results."""

    def join_nothing(self) -> str:
        """Return the join block of a spawn that could not be parsed, under the budget's policy that a malformed spawn
        counts as children that failed."""

    def result(self, text: str) -> str | None:
        """Return the result that a finished thread passes to its parent, None where it found none. `text` is the
        thread's own context, without the part that it inherited."""

    def correct(self, problem: Any, text: str) -> bool:
        """Return whether a finished root thread solved its problem. Accuracy is counted from this, and the reward where
        the protocol has no `reward`."""

    def steps(self, text: str) -> tuple[int, int]:
        """Return (correct steps, all steps) of a text that a model wrote. A step is a unit of the task, such as one
        arithmetic operation."""
