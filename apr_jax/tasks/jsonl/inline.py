"""Demonstrations written as one text: the text that the root writes, with each child's text inside the spawn.

    <spawn><thread>3+9            the first line of a thread is its prompt, which the parent writes
    <return>2</return></thread><thread>4+8
    <return>2</return></thread></spawn><return>4</return>

All text after a thread's first line is what the child writes, which may contain a spawn again. The root's prompt is the
problem's. Joins are left out, since they follow from what the children return. In a tree, the spawn above is

    <spawn><thread>3+9</thread><thread>4+8</thread></spawn>      what the parent writes
    3+9\n<return>2</return>     4+8\n<return>2</return>          two child threads, prompt and text
    <join><result>2</result><result>2</result></join>            replaces the spawn in the parent's context
"""

import re

from apr_jax.errors import UserError
from apr_jax.tasks.tagged.protocol import TAGS, TagProtocol, tag_spawn
from apr_jax.threads.protocol import MalformedSpawn
from apr_jax.threads.tree import Block, Spawn, Thread

TAG = re.compile(f"({'|'.join(map(re.escape, TAGS))})")
_RETURN = ("<return>", "</return>")


def read_inline(text: str, prompt: str, protocol: TagProtocol, levels: int) -> Thread:
    """Return the root thread of an inline demonstration. `prompt` is the root's; `levels` is the largest number of
    levels of children. Raises UserError for a tag that is missing or in a wrong place, and for more levels."""
    reader = _Reader(text, protocol)
    root = reader.thread(prompt, levels)
    if reader.tag:
        raise UserError(f"{reader.tag} is in a wrong place, {reader.place()}")
    return root


class _Reader:
    """Reads a text from left to right, as plain texts with one tag between each two of them."""

    def __init__(self, text: str, protocol: TagProtocol):
        self.protocol, self._pieces, self._read = protocol, TAG.split(text)[::-1], ""

    @property
    def tag(self) -> str:
        """The tag that follows the plain text read last; "" at the end of the text, or where a plain text is next."""
        return self._pieces[-1] if self._pieces and len(self._pieces) % 2 == 0 else ""

    def place(self) -> str:
        return f"after {self._read[-40:]!r}" if self._read else "at the beginning"

    def plain(self) -> str:
        self._read += (piece := self._pieces.pop())
        return piece

    def expect(self, *tags: str) -> None:
        """Read one of some tags. Raises UserError for another one."""
        if self.tag not in tags:
            raise UserError(f"{' or '.join(tags)} is expected {self.place()}, there is {self.tag or 'the end'}")
        self._read += self._pieces.pop()

    def thread(self, prompt: str, levels: int, inherits: bool = False) -> Thread:
        """Read a thread, up to the tag that ends it or the end of the text."""
        items: list[Block | Spawn] = [Block(prompt, sampled=False)]
        while True:
            written = self.written()
            if self.tag != "<spawn>":
                return Thread((*items, Block(written, sampled=True)), inherits=inherits)
            if not levels:
                raise UserError(f"a thread spawns below the last level of children, {self.place()}")
            items += [Block(written, sampled=True)] * bool(written)
            items.append(self.spawn(levels - 1))

    def written(self) -> str:
        """Read plain text and returns, up to any other tag."""
        parts = [self.plain()]
        while self.tag == "<return>":
            self.expect("<return>")
            if not (value := self.plain()) or "<" in value or ">" in value:
                raise UserError(f"a return is a text without < and >, was given {value!r}")
            self.expect("</return>")
            parts += ["<return>", value, "</return>", self.plain()]
        return "".join(parts)

    def spawn(self, levels: int) -> Spawn:
        self.expect("<spawn>")
        self.nothing()
        children = []
        while not children or self.tag != "</spawn>":
            self.expect("<thread>", *["</spawn>"] * bool(children))
            children.append(self.child(levels))
            self.expect("</thread>")
            self.nothing()
        self.expect("</spawn>")
        return tag_spawn(children, [self.protocol.result(child.text) for child in children])

    def child(self, levels: int) -> Thread:
        first, sign, rest = self.plain().partition("\n")
        if not first or not sign or "<" in first or ">" in first:
            raise UserError(f"a thread begins with its prompt, one line without < and >, was given {first + sign!r}")
        self._read = self._read.removesuffix(rest)
        self._pieces.append(rest)
        return self.thread(f"{first}\n", levels, self.protocol.inherit)

    def nothing(self) -> None:
        """Check that there is no plain text between threads. Raises UserError."""
        if text := self.plain():
            raise UserError(f"{text[:40]!r} stands in a spawn outside its threads")


def check_thread(thread: Thread, prompt: str, protocol: TagProtocol, levels: int, inherits: bool = False) -> None:
    """Check a thread of text against what a rollout would give. Raises UserError for another prompt, too many levels of
    children, a call that names other children than the spawn has, or a join of other results."""
    first = thread.blocks[0] if thread.blocks else None
    if not isinstance(first, Block) or first.sampled or first.content != prompt:
        shown = first.content[:60] if isinstance(first, Block) else "a spawn or nothing"
        raise UserError(f"a thread begins with its prompt {prompt[:60]!r}, not sampled, was given {shown!r}")
    if thread.inherits != inherits:
        raise UserError(f"inherits is {str(inherits).lower()} for the thread {prompt[:60]!r}")
    if isinstance(thread.blocks[-1], Spawn) and thread.failure is None:
        raise UserError(f"a thread ends with a block, not with a spawn: {prompt[:60]!r}")
    context = prompt
    for item in thread.blocks[1:]:
        if isinstance(item, Block):
            if wrong := [tag for tag in TAG.findall(item.content) if tag not in _RETURN]:
                raise UserError(f"{wrong[0]} stands in a block, it belongs in a call or a join")
            context += item.content
        else:
            _check_spawn(item, context, protocol, levels)
            context += item.join.content


def _check_spawn(spawn: Spawn, context: str, protocol: TagProtocol, levels: int) -> None:
    """Check one spawn, as `check_thread` does. `context` is the parent's context before the call."""
    call = "".join(block.content for block in spawn.call)
    if not levels:
        raise UserError(f"a thread spawns below the last level of children: {call[:60]!r}")
    try:
        request = protocol.parse_spawn(context + call)
    except MalformedSpawn as error:
        raise UserError(f"{error}, was given {call[:60]!r}") from None
    if request is None or request.position != len(context):
        raise UserError(f"a call is <spawn>...</spawn>, was given {call[:60]!r}")
    if len(request.children) != len(spawn.children):
        raise UserError(f"a call names {len(request.children)} children, the spawn has {len(spawn.children)}")
    for child, prompt in zip(spawn.children, request.children):
        check_thread(child, prompt, protocol, levels - 1, request.inherit)
    results = [None if child.failure else protocol.result(child.text) for child in spawn.children]
    if (spawn.join.content, spawn.join.sampled) != (join := protocol.join(request, results), False):
        raise UserError(
            f"the join of these children is {join[:80]!r}, not sampled, was given {spawn.join.content[:80]!r}"
        )
