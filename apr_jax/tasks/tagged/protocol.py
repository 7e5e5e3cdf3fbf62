"""A `TaskProtocol` of tags around free text, for any task that can say how it begins and what is right:

15 in 2 to 9
<spawn><thread>15 in 2 to 5</thread><thread>15 in 6 to 9</thread></spawn>        the parent writes
15 in 2 to 5                                                                     a child's prompt
15/2 no 15/3 yes <return>3</return>                                              a child writes
<join><result>3</result><nothing/></join>                                        in the place of the spawn
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.protocol import MalformedSpawn, SpawnRequest
from apr_jax.threads.tree import Block, Spawn, Thread

TAGS = (
    "<spawn>", "</spawn>", "<thread>", "</thread>", "<join>", "</join>", "<result>", "</result>", "<nothing/>",
    "<return>", "</return>",
)  # fmt: skip
SPAWN_ERRORS = ("unopened", "empty", "bad_thread")  # the last: text between the threads of a spawn, or a tag in one

_THREAD = re.compile(r"<thread>([^<>]+)</thread>")
_RETURN = re.compile(r"<return>([^<>]+)</return>")


class TagRules(Protocol):
    """The task, as `TagProtocol` asks it."""

    def root_prompt(self, problem: Any) -> str:
        """The first text of the root thread; ends with a line end."""

    def correct(self, problem: Any, result: str | None) -> bool:
        """Whether what the root returned, None for nothing, is right."""

    def steps(self, text: str) -> tuple[int, int]:
        """How many steps of a written text are right, and how many it holds."""


class TagProtocol:
    """`inherit`: children begin with their parent's context, not with a fresh one. No method raises anything but
    MalformedSpawn for any text."""

    spawn_open, spawn_close, join_open = "<spawn>", "</spawn>", "<join>"

    def __init__(self, rules: TagRules, inherit: bool = False):
        self.rules, self.inherit = rules, inherit

    def root_prompt(self, problem: Any) -> str:
        return self.rules.root_prompt(problem)

    def parse_spawn(self, text: str) -> SpawnRequest | None:
        if not text.endswith(self.spawn_close):
            return None
        position = text.rfind(self.spawn_open)
        block = text[position + len(self.spawn_open) : -len(self.spawn_close)]
        if position < 0 or self.spawn_close in block:
            raise MalformedSpawn("unopened", "a spawn was closed that was not open")
        if not block:
            raise MalformedSpawn("empty", "a spawn without a thread")
        if rest := _THREAD.sub("", block):
            raise MalformedSpawn("bad_thread", f"{rest[:100]!r} stands in a spawn outside its threads")
        children = tuple(f"{child}\n" for child in _THREAD.findall(block))
        return SpawnRequest(children, position, inherit=self.inherit)

    def join(self, spawn: SpawnRequest, results: Sequence[str | None]) -> str:
        if len(results) != len(spawn.children):
            raise ValueError(f"{len(spawn.children)} children were spawned, {len(results)} results were given")
        return _join_block(results)

    def join_nothing(self) -> str:
        return _join_block(())

    def result(self, text: str) -> str | None:
        """What the last return holds."""
        found = _RETURN.findall(text)
        return found[-1] if found else None

    def correct(self, problem: Any, text: str) -> bool:
        return self.rules.correct(problem, self.result(text))

    def steps(self, text: str) -> tuple[int, int]:
        return self.rules.steps(text)


def tag_spawn(children: Sequence[Thread], results: Sequence[str | None]) -> Spawn:
    """The spawn of a tree of text by a solver: children whose prompts end in a line end, and what each returns."""
    call = "".join(f"<thread>{child.blocks[0].content.removesuffix(chr(10))}</thread>" for child in children)
    return Spawn(
        (Block(f"<spawn>{call}</spawn>", sampled=True),),
        tuple(children),
        Block(_join_block(results), sampled=False),
    )


def _join_block(results: Sequence[str | None]) -> str:
    parts = ("<nothing/>" if result is None else f"<result>{result}</result>" for result in results)
    return f"<join>{''.join(parts)}</join>"


def tag_tokenizer(words: Iterable[str], max_number: int) -> Tokenizer:
    """One token for every tag, for every of a task's words and for every number up to `max_number`."""
    numbers = (str(number) for number in range(10, max_number + 1))
    return Tokenizer.build((*TAGS, *words), (r"[0-9]+",), numbers)
