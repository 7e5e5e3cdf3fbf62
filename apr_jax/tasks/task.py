"""A task: all that a user writes to train models on it, and all that the rest of the code knows of it.

    class Task
        name, variants, Settings    what it is called, the ways it is demonstrated, its settings
        problems, key, ...          what is asked
        demonstration               a solver's thread tree, to train on
        protocol                    what a spawn means, and what is right

A task is chosen by name, or by ``package.module:Class`` for one of a user's own (`load_task`).
"""

import abc
import dataclasses
import inspect
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from apr_jax.errors import UserError
from apr_jax.io.module import load_module
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import TaskProtocol, ThreadTree

BUILT_IN = {
    "countdown": "apr_jax.tasks.countdown.task:Countdown",
    "factors": "apr_jax.tasks.tagged.factors:Factors",
    "sums": "apr_jax.tasks.tagged.sums:Sums",
}
TRAIN, HELD_OUT = SPLITS = ("train", "held_out")


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """The settings of a task that has none."""


class Task(abc.ABC):
    """A task with its settings. All methods are pure: two processes, or two days, get the same answer.

    A *problem* is whatever the task likes, best a frozen dataclass. A *variant* is one way to demonstrate and to ask:
    Countdown has threads ("apr") and one long thread ("sos_plus"). A model is trained on one variant.
    """

    name: ClassVar[str]  # of its section of settings; a Python identifier
    variants: ClassVar[tuple[str, ...]]  # the main one first; Python identifiers
    Settings: ClassVar[type] = NoSettings  # a frozen dataclass whose fields have defaults, nested where sections are

    def __init__(self, settings: Any = None):
        """`settings`: an instance of `Settings`; None: its defaults."""
        self.settings = self.Settings() if settings is None else settings
        kind = f"{type(self).__module__}:{type(self).__qualname__}"
        self.spec = type(self).name if BUILT_IN.get(type(self).name) == kind else kind  # how `load_task` finds it again

    # ------------------------------------------------------------------ what is asked

    @abc.abstractmethod
    def problems(self, seed: int, split: str, indices: Sequence[int]) -> list[Any]:
        """Candidates number `indices` (from 0) of a split ("train", "held_out"), each a function of (seed, split,
        index). None stands for a candidate that the split must not have. Fewer than asked for: there are no more.

        A data set takes the first ones that fit: it leaves out what is held out, and what came before (`key`)."""

    @abc.abstractmethod
    def read_problem(self, row: Mapping[str, Any]) -> Any:
        """The problem of its JSON form. Raises UserError for any other object."""

    def problem_json(self, problem: Any) -> dict[str, Any]:
        """A problem as a JSON object. Default: the fields of a dataclass."""
        return dataclasses.asdict(problem)

    def key(self, problem: Any) -> Hashable:
        """What two problems have in common that are the same to the task. Default: they are equal."""
        return problem

    def describe(self, problem: Any) -> str:
        """A problem in one line, for people. Default: its JSON form."""
        return ", ".join(f"{name} {value}" for name, value in self.problem_json(problem).items())

    # ------------------------------------------------------------------ what is learned

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of models that begin with random weights."""

    @abc.abstractmethod
    def demonstration(self, problem: Any, variant: str, seed: int, split: str, index: int) -> ThreadTree | None:
        """A solver's tree of text for problem number `index` of a split, a function of all arguments; None where there
        is none to learn from. A solver may fail: its tree is then one of a search without an answer.

        `split` is "train" or "validation": held-out problems whose demonstrations measure the loss. The tree's info is
        JSON. `solved`, `index` and `found` in it are the data set's own; `condition` in it says that the root's prompt
        begins with that text already."""

    def condition_of(self, tree: ThreadTree, variant: str) -> str:
        """What a demonstration, encoded as `tree`, has first on its root's prompt, to tell the model what is asked of
        it, such as a number of children. Default: nothing."""
        return ""

    # ------------------------------------------------------------------ what is done

    @abc.abstractmethod
    def protocol(self, variant: str) -> TaskProtocol:
        """What threads of a variant mean. Raises UserError for an unknown variant."""

    def condition(self, variant: str, budget: int) -> str:
        """What goes first on a root's prompt to ask for a budget, as `condition_of` gives it. Raises UserError where
        the variant has no budgets."""
        raise UserError(f"the {variant} models of {self.spec} cannot be asked for a budget")

    def levels(self, variant: str) -> int:
        """Levels of children that demonstrations of a variant have; 0: no thread spawns. Default: 1."""
        return 1

    def spawns(self, variant: str) -> bool:
        """Whether threads of a variant have children."""
        return self.levels(variant) > 0

    # ------------------------------------------------------------------ what is told

    def title(self, variant: str) -> str:
        """A variant's name for people."""
        return variant

    def published_changes(self, variant: str) -> Mapping[str, float]:
        """By how much GRPO changed a quantity of a variant's trees ("children", "tokens a sequence") in a publication,
        to be shown beside our own: 0.34 is 34 % more. Default: none is known."""
        return {}

    # ------------------------------------------------------------------ files of others

    def read_problems(self, path: Path) -> Iterator[Any]:
        """The problems of a file that another program wrote. Raises UserError, also where the task knows none."""
        raise UserError(f"the task {self.spec} reads no files of other programs")

    def read_demonstrations(self, path: Path) -> Iterator[tuple[Any, str, ThreadTree]]:
        """(problem, variant, tree of text) of a file that another program wrote. Raises as `read_problems`."""
        raise UserError(f"the task {self.spec} reads no files of other programs")

    def write_demonstrations(self, path: Path, trees: Iterable[ThreadTree], tokenizer: Tokenizer) -> None:
        """Demonstrations, with the info that the task gave them, as a file that other programs read. Raises as
        `read_problems`."""
        raise UserError(f"the task {self.spec} writes no files of other programs")

    # ------------------------------------------------------------------ checks

    def check_variant(self, variant: str) -> str:
        """The variant. Raises UserError where the task has no such one."""
        if variant not in self.variants:
            raise UserError(f"variants of {self.spec} are {', '.join(self.variants)}, was given {variant!r}")
        return variant


MOST_LEFT_OUT = 1000  # candidates in a row that are no problems of a split, after which a task has no more


def first_problems(task: Task, split: str, count: int, first: int = 0, seed: int = 0) -> tuple[list[Any], int]:
    """The first `count` problems of a split from candidate number `first` on, and the number of the candidate behind
    them. Fewer where the task has no more."""
    found: list[Any] = []
    index, left_out = first, 0
    while len(found) < count and left_out <= MOST_LEFT_OUT:
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
    """The class of a task by its name or by ``package.module:Class``, looked for also in the current folder. Raises
    UserError."""
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
        raise UserError(f"{spec} is no whole task, it lacks {', '.join(sorted(found.__abstractmethods__))}")
    variants = getattr(found, "variants", ())
    if not isinstance(variants, tuple) or not variants:
        raise UserError(f"the variants of a task are a tuple of names, {spec} has {variants!r}")
    for kind, given in (("name", [getattr(found, "name", None)]), ("variant", variants)):
        if wrong := [one for one in given if not isinstance(one, str) or not one.isidentifier()]:
            raise UserError(f"the {kind} of a task is a Python identifier, {spec} has {wrong[0]!r}")
    return found


def load_task(spec: str, settings: Any = None) -> Task:
    """A task by its name or ``package.module:Class``. `settings`: an instance of its `Settings`, or their JSON form
    (`settings_json`); None: defaults. Raises UserError."""
    kind = find_task(spec)
    if isinstance(settings, Mapping):
        settings = read_settings(kind.Settings, settings)
    task = kind(settings)
    task.spec = spec
    return task


def settings_json(task: Task) -> dict[str, Any]:
    """A task's settings as a JSON object."""
    return dataclasses.asdict(task.settings)


def read_settings(kind: type, values: Mapping[str, Any]) -> Any:
    """A dataclass of settings from nested mappings, lists taken for tuples; a setting that is left out has its default.
    Raises UserError where a value is wrong or no setting is called so."""
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    if unknown := sorted(values.keys() - fields.keys() - {f.name for f in dataclasses.fields(kind)}):
        raise UserError(f"{kind.__name__} has no {unknown[0]!r}, but {', '.join(fields)}")
    given = {}
    for name in fields.keys() & values.keys():
        value, default = values[name], _default(fields[name])
        if dataclasses.is_dataclass(default) and isinstance(value, Mapping):
            value = read_settings(type(default), value)
        given[name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default is dataclasses.MISSING else field.default
