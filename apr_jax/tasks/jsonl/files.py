"""The files of a `jsonl` task: problems and demonstrations, one JSON object a line. All lines are checked before use.

    {"id": "a", "prompt": "3+9+4+8", "answer": 4}                                          a problem
    {"id": "a", "text": "<spawn><thread>3+9\\n<return>2</return></thread>...</spawn>..."}   a demonstration, inline
    {"id": "a", "tree": {"info": {}, "root": {"blocks": [...]}}}                           a demonstration as a tree

An id is a text or an integer; 1 and "1" are the same. An answer is a text or a number. Other fields are ignored.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apr_jax.errors import UserError
from apr_jax.io.json_lines import JsonLines
from apr_jax.tasks.jsonl.inline import TAG, check_thread, read_inline
from apr_jax.tasks.tagged.protocol import TagProtocol
from apr_jax.threads.tree import Thread, ThreadTree
from apr_jax.threads.tree_json import tree_from_json

FORMS = ("text", "tree")  # the fields that can hold a demonstration


@dataclasses.dataclass(frozen=True)
class JsonlProblem:
    """A line of a file of problems."""

    id: str
    prompt: str  # the root thread begins with it and a line end
    answer: str

    @property
    def root_prompt(self) -> str:
        return f"{self.prompt}\n"


def read_problem(row: Mapping[str, Any]) -> JsonlProblem:
    """Return the problem of a line's object. Raises UserError, whose message begins with the wrong field's name."""
    prompt = _text(row, "prompt", str)
    answer = _text(row, "answer", str, int, float)
    if tags := TAG.findall(prompt):
        raise UserError(f"prompt is a text without tags, was given {tags[0]}")
    if "<" in answer or ">" in answer:
        raise UserError(f"answer is a text without < and >, as threads return it, was given {answer[:40]!r}")
    return JsonlProblem(_text(row, "id", str, int), prompt, answer)


def _text(row: Mapping[str, Any], field: str, *kinds: type) -> str:
    """Return a field as text. Raises UserError for a field that is missing, empty, of another type than `kinds`, or
    contains half of a surrogate pair."""
    allowed = " or ".join({str: "a text", int: "an integer", float: "a number"}[kind] for kind in kinds)
    if field not in row:
        raise UserError(f"{field} is missing, it is {allowed}")
    value = row[field]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"{field} is {allowed}, was given {str(value)[:40]!r}")
    if not (text := str(value)):
        raise UserError(f"{field} is {allowed}, was given an empty text")
    _check_characters(field, text)
    return text


def _check_characters(field: str, text: str) -> None:
    """Check that a text can be encoded. Raises UserError for half of a surrogate pair, which JSON can spell."""
    if half := next((one for one in text if "\ud800" <= one <= "\udfff"), ""):
        raise UserError(f"{field} has the character {half!r}, half of a pair, which no tokenizer has")


def read_demonstration(row: Mapping[str, Any], problem: JsonlProblem, protocol: TagProtocol, levels: int) -> ThreadTree:
    """Return the tree of text of a demonstration's object. Raises UserError, whose message begins with the wrong
    field's name."""
    given = [form for form in FORMS if form in row]
    if len(given) != 1:
        raise UserError(f"{' or '.join(FORMS)}, one of the two, is needed, was given {' and '.join(given) or 'none'}")
    if given == ["text"]:
        text = _text(row, "text", str)
        with named("text"):
            root = read_inline(text, problem.root_prompt, protocol, levels)
    else:
        with named("tree"):
            root = _read_tree(row["tree"], problem, protocol, levels)
    return ThreadTree(root, {"id": problem.id})


def _read_tree(given: Any, problem: JsonlProblem, protocol: TagProtocol, levels: int) -> Thread:
    """Return the root of a tree given as JSON. Raises UserError."""
    if not isinstance(given, dict):
        raise UserError(f"a JSON object is needed, was given {str(given)[:40]!r}")
    tree = tree_from_json(given)
    if not isinstance(tree.root.blocks[0].content, str):
        raise UserError("a tree of text is needed, was given one of token ids")
    for text in texts_of(tree):
        _check_characters("a block", text)
    check_thread(tree.root, problem.root_prompt, protocol, levels)
    return tree.root


def texts_of(tree: ThreadTree) -> Iterator[str]:
    """Yield every text of a tree, calls and joins included."""
    for thread in tree.threads():
        yield from (block.content for block in thread.context)
        yield from (block.content for spawn in thread.spawns for block in spawn.call)


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Put `name` in front of the message of a UserError that is raised inside the ``with``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


class Files:
    """The checked files of a task. Raises FileNotFoundError, and UserError for the first wrong line: its message names
    the file, the line and the field."""

    def __init__(self, problems: Mapping[str, Path], demonstrations: Path | None, protocol: TagProtocol, levels: int):
        self._protocol, self._levels = protocol, levels
        self.problems = {split: JsonLines(path) for split, path in problems.items()}
        self.demonstrations = None if demonstrations is None else JsonLines(demonstrations)
        self._places: dict[str, tuple[str, int]] = {}  # split and index of a problem, by its id
        self._rows: dict[str, int] = {}  # index of a demonstration, by its problem's id
        for split, lines in self.problems.items():
            for index, row in enumerate(lines):
                with named(_place(lines, index)):
                    self._add_problem(split, index, read_problem(row))
        for index, row in enumerate(self.demonstrations or ()):
            with named(_place(self.demonstrations, index)):
                self._add_demonstration(index, row)

    def _add_problem(self, split: str, index: int, problem: JsonlProblem) -> None:
        if (there := self._places.get(problem.id)) is not None:
            place = _place(self.problems[there[0]], there[1])
            raise UserError(f"id must differ in every line, {problem.id!r} is the id of {place}")
        self._places[problem.id] = split, index

    def _add_demonstration(self, index: int, row: Mapping[str, Any]) -> None:
        name = _text(row, "id", str, int)
        if name not in self._places:
            raise UserError(f"id must be the id of a problem, there is no problem {name!r}")
        if name in self._rows:
            place = _place(self.demonstrations, self._rows[name])
            raise UserError(f"id must differ in every line, {name!r} is the id of {place}")
        read_demonstration(row, self.problem(*self._places[name]), self._protocol, self._levels)
        self._rows[name] = index

    def problem(self, split: str, index: int) -> JsonlProblem:
        return read_problem(self.problems[split][index])

    def demonstration(self, problem: JsonlProblem) -> ThreadTree | None:
        """Return the problem's demonstration, None where the file has none."""
        if (index := self._rows.get(problem.id)) is None:
            return None
        return read_demonstration(self.demonstrations[index], problem, self._protocol, self._levels)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield (place, text) for every text that a tokenizer has to encode. A place names file, line and field."""
        for split, lines in self.problems.items():
            for index in range(len(lines)):
                problem = self.problem(split, index)
                for field in ("prompt", "answer"):
                    yield f"{_place(lines, index)}: {field}", getattr(problem, field)
        for index, row in enumerate(self.demonstrations or ()):
            place = f"{_place(self.demonstrations, index)}: {next(form for form in FORMS if form in row)}"
            problem = self.problem(*self._places[str(row["id"])])
            tree = read_demonstration(row, problem, self._protocol, self._levels)
            yield from ((place, text) for text in texts_of(tree))

    @functools.cached_property
    def characters(self) -> tuple[str, ...]:
        """All characters of all texts, tags left out, sorted."""
        return tuple(sorted(set().union(*(TAG.sub("", text) for _, text in self.texts()))))


def _place(lines: JsonLines, index: int) -> str:
    return f"{lines.path}, line {lines.number(index)}"
