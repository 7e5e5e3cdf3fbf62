"""The interface of a task: a user implements it to train models on a task, and all other code uses only this interface.

    class Task
        name, variants, Settings    its name, the ways to demonstrate it, its section of settings
        problems, key, ...          its problems
        demonstration               a solver's thread tree, to train on
        protocol                    what a spawn means, and which results are correct

A task is chosen by name or, for a user's own, by ``package.module:Class`` (`load_task`).
"""

import abc
import dataclasses
import inspect
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from apr_jax.errors import UserError
from apr_jax.io.module import load_module
from apr_jax.settings import from_json
from apr_jax.text.hub import HubTokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import TaskProtocol, ThreadTree

BUILT_IN = {
    "countdown": "apr_jax.tasks.countdown.task:Countdown",
    "factors": "apr_jax.tasks.tagged.factors:Factors",
    "sums": "apr_jax.tasks.tagged.sums:Sums",
    "jsonl": "apr_jax.tasks.jsonl.task:Jsonl",
}
TRAIN, HELD_OUT = SPLITS = ("train", "held_out")


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """The settings of a task without settings."""


class Task(abc.ABC):
    """A task with its settings. Except for file access, methods are pure functions of their arguments and the settings.

    A *problem* is an object of any type, preferably a frozen dataclass. A *variant* is one way to demonstrate a problem
    and to prompt a model for it: Countdown has parallel threads ("apr") and one long thread ("sos_plus"). A model is
    trained on one variant or on several together.
    """

    name: ClassVar[str]  # the name of the task and of its section of settings; a Python identifier
    variants: ClassVar[tuple[str, ...]]  # at least one, the main one first; Python identifiers
    edition: ClassVar[int] = (
        1  # raise it when a change of the code changes problems or trees: runs make them again then
    )
    Settings: ClassVar[type] = NoSettings  # a frozen dataclass; each field has a default, a subsection is a dataclass

    def __init__(self, settings: Any = None):
        """`settings` is an instance of `Settings`; None stands for its defaults."""
        self.settings = self.Settings() if settings is None else settings
        kind = f"{type(self).__module__}:{type(self).__qualname__}"
        self.spec = type(self).name if BUILT_IN.get(type(self).name) == kind else kind  # `load_task` accepts it

    # ------------------------------------------------------------------ problems

    @abc.abstractmethod
    def problems(self, seed: int, split: str, indices: Sequence[int]) -> list[Any]:
        """Return the candidates for problems of a split, "train" or "held_out", with the given numbers, from 0 on.

        Each candidate is a function of (seed, split, index). None stands for a candidate that must not be in the split.
        A list shorter than `indices` means that the task has no more candidates.

        A data set takes the first suitable candidates. It leaves out held-out problems from training, and problems
        whose `key` occurred before.
        """

    @abc.abstractmethod
    def read_problem(self, row: Mapping[str, Any]) -> Any:
        """Return the problem whose `problem_json` is `row`. Raises UserError for any other object."""

    def problem_json(self, problem: Any) -> dict[str, Any]:
        """Return a problem as a JSON object. Default: the fields of a dataclass."""
        return dataclasses.asdict(problem)

    def key(self, problem: Any) -> Hashable:
        """Return a value that is equal for problems that the task regards as the same. Default: the problem itself."""
        return problem

    def describe(self, problem: Any) -> str:
        """Return a problem as one line of text for people. Default: the names and values of its JSON form."""
        return ", ".join(f"{name} {value}" for name, value in self.problem_json(problem).items())

    # ------------------------------------------------------------------ training

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer for models that are trained from random weights."""

    @abc.abstractmethod
    def demonstration(self, problem: Any, variant: str, seed: int, split: str, index: int) -> ThreadTree | None:
        """Return a solver's tree of text for problem number `index`, or None where there is nothing to train on.

        The tree is a function of all arguments. It may show a search that fails. `split` is "train" or "validation":
        validation problems are held-out problems whose demonstrations measure the loss.

        The tree's `info` is a JSON object. The data set overwrites its entries `solved`, `index` and `found`. An entry
        `condition` states that the root's prompt begins with that condition already.
        """

    def condition_of(self, tree: ThreadTree, variant: str) -> str:
        """Return the condition of an encoded demonstration, or "" for none. Default: "".

        A condition is text at the start of the root's prompt that asks the model for a budget, such as a number of
        children. For a demonstration it states the budget that the tree uses.
        """
        return ""

    # ------------------------------------------------------------------ threads

    @abc.abstractmethod
    def protocol(self, variant: str) -> TaskProtocol:
        """Return the rules for threads of a variant. Raises UserError for an unknown variant."""

    def condition(self, variant: str, budget: int) -> str:
        """Return the condition that asks for a budget, in the form of `condition_of`.

        The unit of the budget is the variant's, such as children or tokens. Raises UserError where the variant has no
        budgets.
        """
        raise UserError(f"the {variant} models of {self.spec} cannot be asked for a budget")

    def levels(self, variant: str) -> int:
        """Return how many levels of children the demonstrations of a variant have; 0: no thread spawns. Default: 1."""
        return 1

    def spawns(self, variant: str) -> bool:
        """Return whether threads of a variant have children."""
        return self.levels(variant) > 0

    # ------------------------------------------------------------------ files of its own

    def files(self) -> Sequence[Path]:
        """Return the files that problems and demonstrations are read from, whose contents a data set depends on. Raises
        UserError or FileNotFoundError where one is missing. Default: none."""
        return ()

    def check(self, tokenizer: Tokenizer | HubTokenizer) -> None:
        """Check the files and names in the settings, before a data set is made in the tokens of `tokenizer`. Raises
        UserError or FileNotFoundError. Default: nothing is checked."""

    # ------------------------------------------------------------------ reports

    def title(self, variant: str) -> str:
        """Return a variant's name for people, as in tables and figures. Default: the variant itself."""
        return variant

    def published_changes(self, variant: str) -> Mapping[str, float]:
        """Return how GRPO changed quantities of a variant's trees in a publication, for comparison in a report.

        Keys are "children" and "tokens a sequence"; values are relative changes: 0.34 is 34 % more. Default: empty.
        """
        return {}

    # ------------------------------------------------------------------ files of other programs

    def read_problems(self, path: Path) -> Iterator[Any]:
        """Yield the problems in a file of another program. Raises UserError for a wrong file, and by default."""
        raise UserError(f"the task {self.spec} reads no files of other programs")

    def read_demonstrations(self, path: Path) -> Iterator[tuple[Any, str, ThreadTree]]:
        """Yield (problem, variant, tree of text) for each demonstration in a file of another program.

        Raises UserError for a wrong file, and by default.
        """
        raise UserError(f"the task {self.spec} reads no files of other programs")

    def write_demonstrations(self, path: Path, trees: Iterable[ThreadTree], tokenizer: Tokenizer) -> None:
        """Write trees of text in the format of another program. Raises UserError by default.

        The trees are demonstrations of this task, with the `info` that `demonstration` gave them.
        """
        raise UserError(f"the task {self.spec} writes no files of other programs")

    # ------------------------------------------------------------------ checks

    def check_variant(self, variant: str) -> str:
        """Return `variant`. Raises UserError where the task has no such variant."""
        if variant not in self.variants:
            raise UserError(f"variants of {self.spec} are {', '.join(self.variants)}, was given {variant!r}")
        return variant


MAX_LEFT_OUT = 1000  # after more consecutive candidates that are None, a task counts as exhausted


def first_problems(task: Task, split: str, count: int, first: int = 0, seed: int = 0) -> tuple[list[Any], int]:
    """Return the first `count` problems of a split from candidate number `first` on, and the next candidate's number.

    There are fewer problems if the task has no more. They may repeat: `Task.key` is not compared.
    """
    found: list[Any] = []
    index, left_out = first, 0
    while len(found) < count and left_out <= MAX_LEFT_OUT:
        asked = range(index, index + count - len(found))
        candidates = task.problems(seed, split, asked)
        index += len(candidates)
        new = [problem for problem in candidates if problem is not None]
        left_out = 0 if new else left_out + len(candidates)
        found += new
        if len(candidates) < len(asked):
            break
    return found, index


def find_task(spec: str) -> type[Task]:
    """Return the class of a task by its name or by ``package.module:Class``.

    Modules are looked up in the current folder, too. Raises UserError where there is no such class, or where it does
    not implement `Task` correctly.
    """
    module, sign, name = BUILT_IN.get(spec, spec).partition(":")
    allowed = f"task is one of {', '.join(BUILT_IN)} or package.module:Class"
    if not sign or not module or not name or module.startswith("."):
        raise UserError(f"{allowed}, was given {spec!r}")
    try:
        found = getattr(load_module(module), name, None)
    except UserError as error:
        raise UserError(f"{allowed}, was given {spec!r}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(f"{allowed}, was given {spec!r}: {module} has no class {name} that is a Task")
    if inspect.isabstract(found):
        raise UserError(f"{spec} is an incomplete task, it lacks {', '.join(sorted(found.__abstractmethods__))}")
    variants = getattr(found, "variants", ())
    if not isinstance(variants, tuple) or not variants:
        raise UserError(f"the variants of a task are a tuple of names, {spec} has {variants!r}")
    for kind, given in (("name", [getattr(found, "name", None)]), ("variant", variants)):
        if wrong := [one for one in given if not isinstance(one, str) or not one.isidentifier()]:
            raise UserError(f"the {kind} of a task is a Python identifier, {spec} has {wrong[0]!r}")
    return found


def load_task(spec: str, settings: Any = None) -> Task:
    """Return a task by its name or by ``package.module:Class``.

    `settings` is an instance of its `Settings` or their JSON form (`settings_json`); None stands for the defaults.
    Raises UserError for a wrong task or setting.
    """
    kind = find_task(spec)
    if isinstance(settings, Mapping):
        settings = from_json(kind.Settings, settings)
    task = kind(settings)
    task.spec = spec
    return task


def settings_json(task: Task) -> dict[str, Any]:
    """Return a task's settings as a JSON object."""
    return dataclasses.asdict(task.settings)
