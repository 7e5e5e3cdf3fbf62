"""The thread tree: the output of a solver or a rollout, and the input of training, metrics and the viewer.

A *thread* is a prompt and then blocks of tokens. Where the thread spawned children, a `Spawn` stands between its
blocks: the call, with which the thread asked for children, the child threads, and the join, a block with their results.
The context of a thread is its blocks in order, with the joins of its spawns but without their calls and children:

    prompt | written ... [call | children] join | written ... [call | children] join | written

Content is text (`str`) in a solver's tree, and token ids (`tuple[int, ...]`) in a tree that was sampled or is trained
on; this module treats both alike. The writer of a block is recorded once, in `Block.sampled`, and every training mask
is derived from it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive tokens with one writer: the model (`sampled`) or the system (forced).

    `logprobs` has one value per token where a model sampled the block in a rollout: the token's log-probability under
    the distribution that it was drawn from. `model_logprobs` has the log-probabilities under the model's own
    distribution; None where the two distributions are the same.

    Raises ValueError where the number of log-probabilities is not the number of tokens.
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
        """Return a block of the tokens in the slice `part`, with their log-probabilities."""
        given = {name: getattr(self, name) for name in ("logprobs", "model_logprobs")}
        logprobs = {name: None if values is None else values[part] for name, values in given.items()}
        return Block(self.content[part], self.sampled, **logprobs)


@dataclasses.dataclass(frozen=True)
class Spawn:
    """A spawn of children. `call` is the text that asked for the children; `join` replaces it in the thread's context.

    Raises ValueError where some children inherit the thread's context and others do not.
    """

    call: tuple[Block, ...]
    children: tuple["Thread", ...]
    join: Block

    def __post_init__(self):
        if len({child.inherits for child in self.children}) > 1:
            raise ValueError("all children of a spawn inherit its context, or none")


@dataclasses.dataclass(frozen=True)
class Thread:
    """One thread; `blocks[0]` is its prompt. `failure` is the reason why the runner ended it: 'length', 'tokens' or
    'malformed:KIND'. It is None for a thread that wrote its end.

    Where `inherits` is true the thread's context begins with its parent's context up to the spawn. Those blocks are
    stored in the parent only; `blocks` follow them, the prompt first.
    """

    blocks: tuple[Block | Spawn, ...]
    failure: str | None = None
    inherits: bool = False

    @property
    def spawns(self) -> tuple[Spawn, ...]:
        """The thread's own spawns, in order."""
        return tuple(item for item in self.blocks if isinstance(item, Spawn))

    @property
    def children(self) -> tuple["Thread", ...]:
        """The children of all own spawns, in order; without their descendants."""
        return tuple(child for spawn in self.spawns for child in spawn.children)

    @property
    def context(self) -> tuple[Block, ...]:
        """The thread's own blocks that its next token would see: joins included, calls left out."""
        return tuple(item.join if isinstance(item, Spawn) else item for item in self.blocks)

    @property
    def text(self) -> str:
        """The text of the thread's own context. For trees of text only."""
        return "".join(block.content for block in self.context)

    @property
    def request_tokens(self) -> tuple[int, ...]:
        """Numbers of sampled tokens in this thread, as if a stateless server had decoded it by requests: one number per
        spawn, for the request that ends with its call, and one for the request after the last join. A request's prompt
        is the context before it."""
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
        """The number of tokens that the model sampled in this thread, calls included, children excluded."""
        return sum(self.request_tokens)

    def walk(self) -> Iterator["Thread"]:
        """Yield this thread, then its descendants, depth first."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclasses.dataclass(frozen=True)
class TreeOutcome:
    """The outcome of a rollout: whether its answer is right, and counts of failures and interventions in its tree."""

    correct: bool  # the root wrote its end and solved the problem
    answered: bool  # the root gave an answer, right or wrong
    failures: dict[str, int] = dataclasses.field(default_factory=dict)  # number of failed threads by failure
    malformed: dict[str, int] = dataclasses.field(default_factory=dict)  # number of malformed spawns by kind
    suppressed_joins: int = 0  # openings of a join that the model sampled; each was replaced by the opening of a spawn
    forced_spawns: int = 0  # ends of the root with too few children; each was replaced by the opening of a spawn
    reward: float | None = None  # of `TaskProtocol.reward`; None: the reward is 1 for a correct tree, else 0


@dataclasses.dataclass(frozen=True)
class ThreadTree:
    """A root thread with its descendants. `info` is a JSON object with facts about the tree: a solver writes its
    problem, seed, beam and the like."""

    root: Thread
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    outcome: TreeOutcome | None = None  # None: a demonstration, not a rollout

    def threads(self) -> Iterator[Thread]:
        """Yield all threads: the root, then its descendants, depth first."""
        yield from self.root.walk()


def map_blocks(thread: Thread, change: Callable[[Block], Block]) -> Thread:
    """Return a thread with every block of it and its descendants replaced by `change(block)`."""

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
    """Convert a tree of ids into a tree of text, without log-probabilities. The inverse of `encode_tree` where
    `decode` leaves out the begin and end tokens."""
    root = map_blocks(tree.root, lambda block: Block(decode(block.content), block.sampled))
    return dataclasses.replace(tree, root=root)


def encode_tree(tree: ThreadTree, encode: Callable[[str], Sequence[int]], bos: int, eos: int) -> ThreadTree:
    """Convert a tree of text into a tree of ids. A thread that does not inherit its context starts with `bos`; a
    thread without a failure ends with `eos`, in its last block. Each block is encoded alone. The tokenizer is
    prefix-stable at the ends of blocks, so the ids are the ids of the whole text."""

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
