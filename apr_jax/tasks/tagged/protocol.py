"""A `TaskProtocol` of tags around free text. A task provides only the root's prompt and the check of a result.

15 in 2 to 9                                                                     the root's prompt
<spawn><thread>15 in 2 to 5</thread><thread>15 in 6 to 9</thread></spawn>        the root writes a spawn
15 in 2 to 5                                                                     a child's prompt
15/2 no 15/3 yes <return>3</return>                                              a child writes its result
<join><result>3</result><nothing/></join>                                        the join, which replaces the spawn
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.protocol import MalformedSpawn, SpawnRequest, TaskProtocol
from apr_jax.threads.tree import Block, Spawn, Thread

TAGS = (
    "<spawn>", "</spawn>", "<thread>", "</thread>", "<join>", "</join>", "<result>", "</result>", "<nothing/>",
    "<return>", "</return>",
)  # fmt: skip
SPAWN_ERRORS = ("unopened", "empty", "bad_thread")  # bad_thread: text between the threads of a spawn, or a tag in one

_THREAD = re.compile(r"<thread>([^<>]+)</thread>")
_RETURN = re.compile(r"<return>([^<>]+)</return>")


class TagRules(Protocol):
    """The functions that a task provides to `TagProtocol`."""

    def root_prompt(self, problem: Any) -> str:
        """Return the prompt of the root thread. It ends with a line end."""

    def correct(self, problem: Any, result: str | None) -> bool:
        """Return whether the root's result is correct. None means that the root returned nothing."""

    def steps(self, text: str) -> tuple[int, int]:
        """Return (number of correct steps, number of steps) of a text that a thread wrote."""


class TagProtocol(TaskProtocol):
    """A `TaskProtocol` that reads tags. With `inherit`, children begin with their parent's context.

    For any text, however malformed, the only error of a method is MalformedSpawn.
    """

    spawn_open, spawn_close, join_open = "<spawn>", "</spawn>", "<join>"

    def __init__(self, rules: TagRules, inherit: bool = False):
        self.rules, self.inherit = rules, inherit

    def root_prompt(self, problem: Any) -> str:
        return self.rules.root_prompt(problem)

    def parse_spawn(self, text: str) -> SpawnRequest | None:
        """Return the spawn at the end of `text`, or None where `text` does not end in one.

        Raises MalformedSpawn with a kind of SPAWN_ERRORS.
        """
        if not text.endswith(self.spawn_close):
            return None
        position = text.rfind(self.spawn_open)
        block = text[position + len(self.spawn_open) : -len(self.spawn_close)]
        if position < 0 or self.spawn_close in block:
            raise MalformedSpawn("unopened", "a spawn was closed that was not open")
        if not block:
            raise MalformedSpawn("empty", "a spawn without a thread")
        if rest := _THREAD.sub("", block):
            raise MalformedSpawn("bad_thread", f"{rest[:100]!r} is in a spawn, but outside of its threads")
        children = tuple(f"{child}\n" for child in _THREAD.findall(block))
        return SpawnRequest(children, position, inherit=self.inherit)

    def join(self, spawn: SpawnRequest, results: Sequence[str | None]) -> str:
        if len(results) != len(spawn.children):
            raise ValueError(f"{len(spawn.children)} children were spawned, {len(results)} results were given")
        return _join_block(results)

    def join_nothing(self) -> str:
        return _join_block(())

    def result(self, text: str) -> str | None:
        """Return the content of the last ``<return>`` of a finished thread, or None where there is none."""
        found = _RETURN.findall(text)
        return found[-1] if found else None

    def correct(self, problem: Any, text: str) -> bool:
        return self.rules.correct(problem, self.result(text))

    def steps(self, text: str) -> tuple[int, int]:
        return self.rules.steps(text)


def tag_spawn(children: Sequence[Thread], results: Sequence[str | None]) -> Spawn:
    """Return the spawn of solved children, for a solver's tree of text.

    The prompt of each child ends with a line end. `results` has the result of each child, None for nothing.
    """
    call = "".join(f"<thread>{child.blocks[0].content.removesuffix(chr(10))}</thread>" for child in children)
    return Spawn(
        (Block(f"<spawn>{call}</spawn>", sampled=True),),
        tuple(children),
        Block(_join_block(results), sampled=False),
    )


def _join_block(results: Sequence[str | None]) -> str:
    parts = ("<nothing/>" if result is None else f"<result>{result}</result>" for result in results)
    return f"<join>{''.join(parts)}</join>"


def tag_tokenizer(phrases: Iterable[str], max_number: int) -> Tokenizer:
    """Return a tokenizer with one token for each tag, each phrase of a task and each number up to `max_number`."""
    numbers = (str(number) for number in range(10, max_number + 1))
    return Tokenizer.build((*TAGS, *phrases), (r"[0-9]+",), numbers)
