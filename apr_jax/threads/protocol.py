"""What a task must say about its threads; everything above knows a task only through this."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol


class MalformedSpawn(ValueError):
    """A spawn that names nothing runnable; `kind` is one of a short list, for counting."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class SpawnRequest:
    """A spawn read from a parent's text. `children` are the child prompts; the spawn block begins at
    character `position` of the text and leaves the parent's context at the join. Where children `inherit`,
    each begins with the parent's context up to the spawn block, then comes its prompt.

    A task that needs more at the join (names of the children) derives a class with fields of its own."""

    children: tuple[str, ...]
    position: int
    inherit: bool = dataclasses.field(default=False, kw_only=True)


class TaskProtocol(Protocol):
    """Text in, text out; all of it pure, none of it runs model output as code.

    `spawn_close` ends a spawn; a thread that writes it is waiting for its children. A thread must never
    write `join_open` itself: the runner replaces it by `spawn_open` (the guard, as the authors do). Each of
    the three must be a single token.
    """

    spawn_open: str
    spawn_close: str
    join_open: str

    def root_prompt(self, problem: Any) -> str:
        """The first text of the root thread."""

    def parse_spawn(self, text: str) -> SpawnRequest | None:
        """The spawn that `text`, all that the thread sees, ends in, None where it ends in none; raises
        MalformedSpawn."""

    def join(self, spawn: SpawnRequest, results: Sequence[str | None]) -> str:
        """The join block that takes the place of the spawn block in the parent's context. `spawn` comes from
        `parse_spawn`; `results` has one entry for each of its children, None for a child that found nothing, failed
        or was not run. Raises ValueError for another number of results."""

    def join_nothing(self) -> str:
        """The join block of no children: for a spawn that could not be read, where its children count as failed."""

    def result(self, text: str) -> str | None:
        """What a finished thread gives back, None where it found nothing. `text` is what stands in the thread
        itself: what it inherited is not part of it."""

    def correct(self, problem: Any, text: str) -> bool:
        """Whether a finished root thread solved its problem: the reward, and the accuracy."""

    def steps(self, text: str) -> tuple[int, int]:
        """How many steps of a written text are right and how many it holds, by whatever the task calls a step."""
