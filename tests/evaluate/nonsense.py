"""A task for untrained models, with no more than evaluation and latency need of a task."""

import dataclasses

from apr_jax.errors import UserError
from apr_jax.tasks.task import Task
from tests.tiny import TOKENIZER, NonsenseProtocol

SPEC = "tests.evaluate.nonsense:Nonsense"


@dataclasses.dataclass(frozen=True)
class Question:
    number: int


@dataclasses.dataclass(frozen=True)
class NonsenseSettings:
    width: int = 2  # children of each spawn
    first: int = 0  # the first problem's number


class Nonsense(Task):
    """Problems are numbers, and every fifth index has no problem. The variant "threads" spawns children and takes a
    budget as its condition; "serial" does neither."""

    name, variants, Settings = "nonsense", ("threads", "serial"), NonsenseSettings

    def problems(self, seed, split, indices):
        return [None if index % 5 == 4 else Question(self.settings.first + index) for index in indices]

    def read_problem(self, row):
        if set(row) != {"number"} or not isinstance(row["number"], int):
            raise UserError(f"a problem has a number, was given {row}")
        return Question(row["number"])

    def tokenizer(self):
        return TOKENIZER

    def demonstration(self, problem, variant, seed, split, index):
        return None

    def protocol(self, variant):
        self.check_variant(variant)
        return NonsenseProtocol(self.settings.width)

    def condition(self, variant, budget):
        return f"Sub Call Budget: {budget} " if variant == "threads" else super().condition(variant, budget)

    def levels(self, variant):
        return int(variant == "threads")

    def title(self, variant):
        return {"threads": "In threads", "serial": "Alone"}[variant]
