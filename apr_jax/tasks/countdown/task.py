"""Countdown as a `Task`: settings, problems, demonstrations by solvers, and protocols."""

import dataclasses
import random
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apr_jax.checks import FieldError, at_least, check_fields, from_to_below
from apr_jax.errors import UserError
from apr_jax.tasks.countdown import authors
from apr_jax.tasks.countdown.problem import MAX_SOLVABLE_NUMBERS, Problem, ProblemRange, solvable
from apr_jax.tasks.countdown.protocol import CountdownProtocol
from apr_jax.tasks.countdown.search import SOS_PLUS_PROMISING, STORED_NAMES, SolverConfig
from apr_jax.tasks.countdown.solver import SOLVERS
from apr_jax.tasks.countdown.vocabulary import SMALLEST_MAX_NUMBER, countdown_tokenizer
from apr_jax.tasks.task import HELD_OUT, Task
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import ThreadTree
from apr_jax.threads.metrics import total_tokens

APR, SOS_PLUS = "apr", "sos_plus"
TOKEN_BIN = 512  # tokens per bin of SoS+ budgets, as in the paper
# Relative changes by GRPO in the paper (figures 5 and 7). APR: 6.1 to 8.2 children, 1,471 to 1,796 tokens a sequence.
# SoS+, whose traces are one sequence: 2,201 to 2,660 tokens.
PUBLISHED_CHANGES = {
    APR: {"children": 0.344, "tokens a sequence": 0.221},
    SOS_PLUS: {"tokens a sequence": 2660 / 2201 - 1},
}


def _fixed(value: Any) -> Any:
    """Return a dataclass field with a constant value, for a field of `SolverConfig` that is no setting of a variant."""
    return dataclasses.field(default=value, init=False)


@dataclasses.dataclass(frozen=True)
class AprSettings(SolverConfig):
    """The settings of the APR solver and of the selection of its trees for training.

    With `correct_only`, only trees of solved problems are trained on (rejection sampling, the paper's table 2). With
    `conditioned`, the root's prompt begins with the tree's number of children per spawn (the paper's conditioned
    models, figure 4).
    """

    beam: tuple[int, int] = (3, 5)
    sub_beam: tuple[int, int] = (4, 5)
    strategies: tuple[str, ...] = _fixed(("dfs", "bfs"))
    correct_only: bool = False
    conditioned: bool = False


@dataclasses.dataclass(frozen=True)
class SosPlusSettings(SolverConfig):
    """The settings of the SoS+ solver and of the selection of its traces for training.

    With `search` "sos", the solver is that of Stream of Search, with one of `strategies` for a whole trace (the paper's
    table 1). With `correct_only`, only traces of solved problems are trained on. With `conditioned`, the prompt begins
    with the trace's number of tokens, rounded up to a multiple of 512.
    """

    beam: tuple[int, int] = (1, 5)
    promising: float = SOS_PLUS_PROMISING
    sub_beam: tuple[int, int] | None = _fixed(None)
    depth: int = _fixed(0)
    search: str = SOS_PLUS
    correct_only: bool = False
    conditioned: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.search not in (SOS_PLUS, "sos"):
            raise FieldError("search", f"is {SOS_PLUS} or sos, was given {self.search!r}")


@dataclasses.dataclass(frozen=True)
class CountdownSettings:
    """The settings of Countdown.

    `unseen_targets` is the fraction of targets that only held-out problems have, as in Stream of Search. With 0, as in
    the paper, held-out problems differ from training problems in their numbers only. `largest_token` is the largest
    number that is one token; the tokenizer spells larger numbers in digits.
    """

    problems: ProblemRange = ProblemRange(max_number=10, max_target=30)
    unseen_targets: float = 0.0
    largest_token: int = 99
    apr: AprSettings = AprSettings()
    sos_plus: SosPlusSettings = SosPlusSettings()

    BOUNDS = (from_to_below(0, 1, "unseen_targets"), at_least(SMALLEST_MAX_NUMBER, "largest_token"))

    def __post_init__(self):
        check_fields(self)


class Countdown(Task):
    """Countdown: reach a target with each number used once. Variants: parallel threads (APR) and one thread (SoS+)."""

    name = "countdown"
    variants = (APR, SOS_PLUS)
    Settings = CountdownSettings

    def problems(self, seed: int, split: str, indices: Sequence[int]) -> list[Problem | None]:
        drawn = self.settings.problems.draw_each([random.Random(f"{seed}/{split}/{index}") for index in indices])
        allowed = self._targets(seed, split)
        return [problem if problem.target in allowed else None for problem in drawn]

    def _targets(self, seed: int, split: str) -> set[int]:
        """Return the targets that problems of a split may have."""
        ranges, fraction = self.settings.problems, self.settings.unseen_targets
        every = list(range(ranges.min_target, ranges.max_target + 1))
        if not fraction:
            return {*every}
        count = min(max(1, round(fraction * len(every))), len(every) - 1)
        unseen = set(random.Random(f"{seed}/targets").sample(every, count))
        return unseen if split == HELD_OUT else {*every} - unseen

    def read_problem(self, row: Mapping[str, Any]) -> Problem:
        if not {"numbers", "target"} <= row.keys() or not isinstance(row["numbers"], list):
            raise UserError(f"a problem has numbers and a target, was given {str(dict(row))[:80]}")
        return Problem(tuple(row["numbers"]), row["target"])

    def key(self, problem: Problem) -> Hashable:
        return problem.key

    def describe(self, problem: Problem) -> str:
        return f"{' '.join(map(str, problem.numbers))} to {problem.target}"

    def tokenizer(self) -> Tokenizer:
        return countdown_tokenizer(self.settings.largest_token)

    def demonstration(self, problem: Problem, variant: str, seed: int, split: str, index: int) -> ThreadTree | None:
        own = self._own(variant)
        rng = random.Random(f"{split}/{seed}/{STORED_NAMES[variant]}/{index}")
        tree = SOLVERS[APR if variant == APR else own.search](problem, own, rng)
        return None if own.correct_only and not tree.info["solved"] else tree

    def _own(self, variant: str) -> AprSettings | SosPlusSettings:
        return getattr(self.settings, self.check_variant(variant))

    def condition_of(self, tree: ThreadTree, variant: str) -> str:
        if not self._own(variant).conditioned:
            return ""
        if variant == APR:
            spawns = [len(spawn.children) for thread in tree.threads() for spawn in thread.spawns]
            return self.condition(variant, round(sum(spawns) / len(spawns)) if spawns else 0)
        return self.condition(variant, -(-total_tokens(tree) // TOKEN_BIN) * TOKEN_BIN)

    def condition(self, variant: str, budget: int) -> str:
        return self.protocol(variant).condition(budget)

    def protocol(self, variant: str) -> CountdownProtocol:
        return CountdownProtocol(self.check_variant(variant))

    def levels(self, variant: str) -> int:
        return self._own(variant).depth

    def title(self, variant: str) -> str:
        return {APR: "APR", SOS_PLUS: "SoS+"}[self.check_variant(variant)]

    def published_changes(self, variant: str) -> Mapping[str, float]:
        return PUBLISHED_CHANGES[self.check_variant(variant)]

    def read_problems(self, path: Path) -> Iterator[Problem]:
        """Yield the problems in a file of the paper's authors.

        Raises UserError for a wrong file, and for a problem of up to six numbers that has no solution.
        """
        for problem in authors.read_problems(path):
            if len(problem.numbers) <= MAX_SOLVABLE_NUMBERS and not solvable(problem):
                raise UserError(f"{path}: {self.describe(problem)} has no solution: leave it out")
            yield problem

    def read_demonstrations(self, path: Path) -> Iterator[tuple[Problem, str, ThreadTree]]:
        """Yield (problem, variant, tree) from a file of the paper's authors. Stream of Search counts as "sos_plus"."""
        for problem, tree in authors.read_traces(path):
            yield problem, APR if tree.info["style"] == STORED_NAMES[APR] else SOS_PLUS, tree

    def write_demonstrations(self, path: Path, trees: Iterable[ThreadTree], tokenizer: Tokenizer) -> None:
        """Write solvers' trees of text as a file of traces in the format of the paper's authors."""
        authors.write_traces(path, ((self.read_problem(tree.info), tree) for tree in trees), tokenizer.encode)
