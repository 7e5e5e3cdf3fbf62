"""A task whose problems and demonstrations are files of JSON lines. `apr_jax.tasks.jsonl.files` describes the lines.

    c = default_config("jsonl")
    c.jsonl.train, c.jsonl.held_out, c.jsonl.demonstrations = "train.jsonl", "held_out.jsonl", "demonstrations.jsonl"
    c.data.train, c.data.held_out = 160, 40

Threads follow the tagged protocol: a spawn names its children's prompts between tags, and a thread returns a text.
"""

import dataclasses
import functools
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from apr_jax.checks import FieldError, at_least, check_fields
from apr_jax.errors import UserError
from apr_jax.io.module import load_module
from apr_jax.io.paths import user_path
from apr_jax.tasks.jsonl.files import Files, JsonlProblem, read_problem
from apr_jax.tasks.jsonl.inline import TAG
from apr_jax.tasks.tagged.protocol import TAGS, TagProtocol
from apr_jax.tasks.task import HELD_OUT, TRAIN, Task
from apr_jax.text.hub import HubTokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.tree import ThreadTree

CHILDREN = ("fresh", "inherit")
THREADS = "threads"  # the one variant
Reward = Callable[[JsonlProblem, str | None, ThreadTree], float]
_NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")


@dataclasses.dataclass(frozen=True)
class JsonlSettings:
    """Files, reward and threads of a task.

    `train`, `held_out` and `demonstrations` are files of JSON lines. Supervised training needs the last. The first
    `data.validation` problems of `held_out` also measure its loss, by their demonstrations. GRPO's validation problems
    are problems of `train` that it sets aside.

    `reward` is ``package.module:function``; the current folder is searched, too. "": GRPO's reward is 1 for a right
    answer, else 0. The function takes (problem, answer, tree) and returns a number. `answer` is the text that the root
    returned, None where the root returned nothing or was cut off. `tree` is the rollout, a `ThreadTree` of text.
    Accuracy never depends on the reward.

    `levels` is the largest number of levels of children in a demonstration, 0 where threads have none; `budget.depth`
    must be at least as large. `children` is "fresh", where a child sees its own prompt alone, or "inherit", where a
    child's prompt follows its parent's context.
    """

    train: str = ""
    held_out: str = ""
    demonstrations: str = ""
    reward: str = ""
    levels: int = 1
    children: str = "fresh"

    BOUNDS = (at_least(0, "levels"),)

    def __post_init__(self):
        check_fields(self)
        if self.children not in CHILDREN:
            raise FieldError("children", f"is one of {', '.join(CHILDREN)}, was given {self.children!r}")
        if self.reward and not re.fullmatch(r"[^:.][^:]*:[^:]+", self.reward):
            raise FieldError("reward", f"is package.module:function, was given {self.reward!r}")


class Jsonl(Task):
    """Problems with one right answer each. A returned text is right if it is the same text or the same number: 7, 7.0
    and 0.7e1 are the same."""

    name = "jsonl"
    variants = (THREADS,)
    Settings = JsonlSettings

    # ------------------------------------------------------------------ the files

    def files(self) -> tuple[Path, ...]:
        """The files that the settings name, problems first. Raises UserError where a file of problems is not named, and
        FileNotFoundError."""
        for name in (TRAIN, HELD_OUT):
            if not getattr(self.settings, name):
                raise UserError(f"{self.name}.{name} is a file of problems, one JSON object a line, was given ''")
        given = {name: getattr(self.settings, name) for name in (TRAIN, HELD_OUT, "demonstrations")}
        paths = {name: user_path(value) for name, value in given.items() if value}
        for name, path in paths.items():
            if not path.is_file():
                raise FileNotFoundError(f"{self.name}.{name}: no file {path}")
        return tuple(paths.values())

    def check(self, tokenizer: Tokenizer | HubTokenizer) -> None:
        """Check all files and the reward. Raises UserError for the first wrong line, for a character or a tag that the
        tokenizer lacks, and for a reward function that does not exist."""
        files = self._read()
        if self.settings.reward:
            load_reward(self.settings.reward)
        lacking = {part for part in (*TAGS, *files.characters) if tokenizer.unknown in tokenizer.encode(part)}
        for place, text in files.texts() if lacking else ():
            if tokenizer.unknown in tokenizer.encode(text):
                parts = [part for piece in TAG.split(text) for part in ([piece] if piece in TAGS else piece)]
                found = next((part for part in parts if part in lacking), text[:40])
                raise UserError(f"{place} has {found!r}, which the tokenizer lacks")

    def _read(self) -> Files:
        stamps = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in self.files())
        return _read_files(stamps, self.settings.levels, self.settings.children)

    # ------------------------------------------------------------------ what is asked

    def problems(self, seed: int, split: str, indices: Sequence[int]) -> list[JsonlProblem]:
        """The problems of lines `indices` of the split's file, whatever the seed. Empty lines are not counted."""
        files = self._read()
        return [files.problem(split, index) for index in indices if index < len(files.problems[split])]

    def read_problem(self, row: Mapping[str, Any]) -> JsonlProblem:
        return read_problem(row)

    def key(self, problem: JsonlProblem) -> str:
        """The prompt: two problems with one prompt count as the same, so training has none with a held-out prompt."""
        return problem.prompt

    def describe(self, problem: JsonlProblem) -> str:
        prompt = " ".join(problem.prompt.split())
        return f"{problem.id}, {prompt if len(prompt) <= 60 else f'{prompt[:60]}...'}"

    # ------------------------------------------------------------------ what is learned

    def tokenizer(self) -> Tokenizer:
        """One token for every tag and for every character of the files and of printable ASCII."""
        return Tokenizer.build(TAGS, (), self._read().characters)

    def demonstration(
        self, problem: JsonlProblem, variant: str, seed: int, split: str, index: int
    ) -> ThreadTree | None:
        """The demonstration with the problem's id, None where the file has none."""
        self.check_variant(variant)
        return self._read().demonstration(problem)

    def levels(self, variant: str) -> int:
        return self.settings.levels

    # ------------------------------------------------------------------ what is done

    def protocol(self, variant: str) -> "JsonlProtocol":
        self.check_variant(variant)
        return JsonlProtocol(self)

    def root_prompt(self, problem: JsonlProblem) -> str:
        return problem.root_prompt

    def correct(self, problem: JsonlProblem, result: str | None) -> bool:
        return result is not None and same_answer(problem.answer, result)

    def steps(self, text: str) -> tuple[int, int]:
        return 0, 0  # nothing is known about the steps of a text


class JsonlProtocol(TagProtocol):
    """The tagged protocol, with the settings' reward where they name one."""

    def __init__(self, task: Jsonl):
        super().__init__(task, inherit=task.settings.children == "inherit")
        if task.settings.reward:
            self.reward = functools.partial(self._reward, task.settings.reward)

    def _reward(self, spec: str, problem: JsonlProblem, tree: ThreadTree) -> float:
        """Return the reward of a rollout. Raises UserError where the function returns no finite number."""
        answer = None if tree.root.failure else self.result(tree.root.text)
        value = load_reward(spec)(problem, answer, tree)
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"the reward is a finite number, {spec} gave {value!r} for problem {problem.id}")
        return float(value)


@functools.lru_cache(maxsize=4)
def _read_files(stamps: tuple[tuple[Path, int, int], ...], levels: int, children: str) -> Files:
    """Return the checked files. The cache's key has times and sizes, so that changed files are read again."""
    train, held_out, *demonstrations = (path for path, _, _ in stamps)
    protocol = TagProtocol(None, inherit=children == "inherit")
    return Files({TRAIN: train, HELD_OUT: held_out}, next(iter(demonstrations), None), protocol, levels)


@functools.cache
def load_reward(spec: str) -> Reward:
    """Return the function named ``package.module:function``. Raises UserError where it does not exist."""
    module, _, name = spec.partition(":")
    allowed = f"jsonl.reward is package.module:function, was given {spec!r}"
    try:
        function = getattr(load_module(module), name, None)
    except UserError as error:
        raise UserError(f"{allowed}: {error}") from None
    if not callable(function):
        raise UserError(f"{allowed}: {module} has no function {name}")
    return function


def same_answer(right: str, given: str) -> bool:
    """Whether two texts are equal, or are equal numbers."""
    if right == given:
        return True
    found = [_number(text) for text in (right, given)]
    return None not in found and found[0] == found[1]


def _number(text: str) -> Decimal | None:
    found = _NUMBER.fullmatch(text)
    try:
        return Decimal(found[1]) if found else None
    except InvalidOperation:  # an exponent of more than 18 digits
        return None
