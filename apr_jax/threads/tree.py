"""The thread tree: made by a solver or a rollout, read by training, metrics and the viewer.

A *thread* is a prompt and then blocks; where it spawned, a `Spawn` stands between two blocks. The
context of a thread is its blocks in order, without the calls and the children of its spawns:

    prompt | written ... [call | children] join | written ... [call | children] join | written

Content is text (`str`) in a tree that a solver wrote, token ids (`tuple[int, ...]`) in a tree that is
trained on or was sampled; nothing here looks inside it. Who wrote a block is recorded once, in
`Block.sampled`, and every training mask is derived from it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive tokens with one writer: the model (`sampled`) or the system (forced).

    `logprobs`, one per token, is present where a model sampled the block: the log-probability of
    each token under the distribution that it was drawn from. `model_logprobs`: under the model's own
    distribution, where that is another one.
    """

    content: Sequence
    sampled: bool
    logprobs: tuple[float, ...] | None = None
    model_logprobs: tuple[float, ...] | None = None

    def __post_init__(self):
        for logprobs in (self.logprobs, self.model_logprobs):
            if logprobs is not None and len(logprobs) != len(self.content):
                raise ValueError(f"{len(logprobs)} log-probabilities for {len(self.content)} tokens")

    def __len__(self) -> int:
        return len(self.content)

    def cut(self, part: slice) -> "Block":
        """Some of its consecutive tokens."""
        given = {name: getattr(self, name) for name in ("logprobs", "model_logprobs")}
        logprobs = {name: None if values is None else values[part] for name, values in given.items()}
        return Block(self.content[part], self.sampled, **logprobs)


@dataclasses.dataclass(frozen=True)
class Spawn:
    """A call of children: `call` leaves the thread's context, `join` enters it. All children inherit, or none."""

    call: tuple[Block, ...]
    children: tuple["Thread", ...]
    join: Block

    def __post_init__(self):
        if len({child.inherits for child in self.children}) > 1:
            raise ValueError("all children of a spawn inherit its context, or none")


@dataclasses.dataclass(frozen=True)
class Thread:
    """One thread; `blocks[0]` is its prompt. `failure` names why it ended without an answer of its own
    making ('length', 'malformed:KIND', ...), None where it ended by itself.

    A thread that `inherits` begins with its parent's context up to the spawn, which stands in the parent
    alone: its own blocks follow that, its prompt first.
    """

    blocks: tuple[Block | Spawn, ...]
    failure: str | None = None
    inherits: bool = False

    @property
    def spawns(self) -> tuple[Spawn, ...]:
        return tuple(item for item in self.blocks if isinstance(item, Spawn))

    @property
    def children(self) -> tuple["Thread", ...]:
        return tuple(child for spawn in self.spawns for child in spawn.children)

    @property
    def context(self) -> tuple[Block, ...]:
        """The blocks of its own that a next token would see: joins included, calls left out."""
        return tuple(item.join if isinstance(item, Spawn) else item for item in self.blocks)

    @property
    def text(self) -> str:
        """The thread's whole context (only for trees of text)."""
        return "".join(block.content for block in self.context)

    @property
    def request_tokens(self) -> tuple[int, ...]:
        """Tokens that the model wrote in this thread, by request to a stateless server: one request up to and with each
        call, one after the last join. A request's prompt is all that stands before it."""
        counts = [0]
        for item in self.blocks:
            if isinstance(item, Spawn):
                counts[-1] += sum(len(block) for block in item.call if block.sampled)
                counts.append(0)
            else:
                counts[-1] += len(item) * item.sampled
        return tuple(counts)

    @property
    def sampled_tokens(self) -> int:
        """Tokens that the model wrote in this thread, calls included, children not."""
        return sum(self.request_tokens)

    def walk(self) -> Iterator["Thread"]:
        """This thread, then its descendants, depth first."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclasses.dataclass(frozen=True)
class TreeOutcome:
    """What a rollout learned about its tree."""

    correct: bool  # the root ended by itself with the right answer
    answered: bool  # the root gave an answer, right or wrong
    failures: dict[str, int] = dataclasses.field(default_factory=dict)  # threads by the failure that ended them
    malformed: dict[str, int] = dataclasses.field(default_factory=dict)  # spawns that could not be run, by kind
    suppressed_joins: int = 0  # join blocks that a thread began to write itself, each replaced by a spawn
    forced_spawns: int = 0  # ends of the root that came before the budget's least children, replaced by a spawn


@dataclasses.dataclass(frozen=True)
class ThreadTree:
    """A root thread; `info` is JSON and holds what a solver knows of it (problem, seed, beam, ...)."""

    root: Thread
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    outcome: TreeOutcome | None = None  # None: a demonstration, not a rollout

    def threads(self) -> Iterator[Thread]:
        yield from self.root.walk()


def map_blocks(thread: Thread, change: Callable[[Block], Block]) -> Thread:
    """The same tree with every block replaced by `change(block)`."""

    def item(entry: Block | Spawn) -> Block | Spawn:
        if isinstance(entry, Block):
            return change(entry)
        return Spawn(
            call=tuple(change(block) for block in entry.call),
            children=tuple(map_blocks(child, change) for child in entry.children),
            join=change(entry.join),
        )

    return dataclasses.replace(thread, blocks=tuple(item(entry) for entry in thread.blocks))


def decode_tree(tree: ThreadTree, decode: Callable[[Sequence[int]], str]) -> ThreadTree:
    """A tree of ids as a tree of text; `decode` leaves special tokens out. The inverse of `encode_tree`."""
    root = map_blocks(tree.root, lambda block: Block(decode(block.content), block.sampled))
    return dataclasses.replace(tree, root=root)


def encode_tree(tree: ThreadTree, encode: Callable[[str], Sequence[int]], bos: int, eos: int) -> ThreadTree:
    """A tree of text as a tree of ids: every thread with a context of its own starts with `bos`, and a thread
    that ended by itself ends with `eos` as its last written token. Blocks are encoded one by one: the
    tokenizer is prefix-stable at their ends, so the ids are those of the whole text."""

    def ends(thread: Thread) -> Thread:
        blocks = list(thread.blocks)
        if not thread.inherits:
            blocks[0] = dataclasses.replace(blocks[0], content=(bos, *blocks[0].content))
        if thread.failure is None:
            blocks[-1] = dataclasses.replace(blocks[-1], content=(*blocks[-1].content, eos))
        for index, entry in enumerate(blocks):
            if isinstance(entry, Spawn):
                blocks[index] = dataclasses.replace(entry, children=tuple(ends(child) for child in entry.children))
        return dataclasses.replace(thread, blocks=tuple(blocks))

    root = map_blocks(tree.root, lambda block: dataclasses.replace(block, content=tuple(encode(block.content))))
    return dataclasses.replace(tree, root=ends(root))
