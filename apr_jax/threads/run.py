"""The runner: takes a thread through an engine, and on a spawn its children at the same time.

It knows no task (the protocol does) and no model (the engine does). Ids sampled are ids kept: text is
made from them to be parsed and never turned back into the ids of something already sampled.
"""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.engine import Engine, Sampling
from apr_jax.threads.protocol import MalformedSpawn, SpawnRequest, TaskProtocol
from apr_jax.threads.tree import Block, Spawn, Thread, ThreadTree


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one tree may use. A thread at its limit ends as a failure, a spawn over it as malformed."""

    context: int  # tokens of one thread, calls and joins included: the paper's window
    threads: int = 64  # threads of one tree
    depth: int = 1  # levels of children; the authors' traces have one


class TreeRunner:
    """Runs trees of one protocol through one engine; `run_all` decodes many at their own pace."""

    def __init__(
        self, engine: Engine, protocol: TaskProtocol, tokenizer: Tokenizer, budget: Budget, sampling: Sampling
    ):
        if budget.context > engine.context:
            raise ValueError(f"a window of {budget.context} tokens was asked of an engine that holds {engine.context}")
        self.engine, self.protocol, self.tokenizer = engine, protocol, tokenizer
        self.budget, self.sampling = budget, sampling
        self.spawn_open = tokenizer.token(protocol.spawn_open)
        self.spawn_close = tokenizer.token(protocol.spawn_close)
        self.join_open = tokenizer.token(protocol.join_open)
        self.stop = frozenset({tokenizer.eos, self.spawn_close, self.join_open})

    async def run(self, problem: Any, name: Sequence[int], condition: str = "") -> ThreadTree:
        """One tree. `name` is the tree's identity, `condition` goes first on the root's prompt."""
        counts = Counter()
        prompt = condition + self.protocol.root_prompt(problem)
        root = await self._thread(prompt, tuple(name), 0, self.budget.threads - 1, counts)
        text = self._text(root)
        correct = root.failure is None and self.protocol.correct(problem, text)
        info = {
            "correct": correct,
            "claimed": self.protocol.result(text) is not None,
            "failures": dict(Counter(thread.failure for thread in root.walk() if thread.failure)),
            "malformed": {
                kind.removeprefix("malformed:"): n for kind, n in counts.items() if kind.startswith("malformed:")
            },
            "guarded": counts["guarded"],
        }
        return ThreadTree(root, info)

    async def _thread(self, prompt: str, name: tuple[int, ...], depth: int, allowance: int, counts: Counter) -> Thread:
        """`allowance` is how many threads it and its descendants may still open."""
        ids = (self.tokenizer.bos, *self.tokenizer.encode(prompt))
        if len(ids) >= self.budget.context:
            return Thread((Block(ids, sampled=False),), failure="length")
        live = _LiveThread(self.engine, ids, name)
        try:
            return await self._turns(live, depth, allowance, counts)
        finally:
            live.close()

    async def _turns(self, live: "_LiveThread", depth: int, allowance: int, counts: Counter) -> Thread:
        """Writes, spawns, joins, writes again, until the thread ends. What its children leave of the allowance
        is split among them evenly, so that what one may open does not depend on how fast another is."""
        for turn in range(self.budget.context):  # every turn grows the context, so the window ends the loop
            start = len(live.ids)
            failure = await self._write(live, counts)
            if failure is not None or live.ids[-1] != self.spawn_close:
                return live.thread(failure)
            try:
                request, call_at = self._request(live.ids, start, depth, allowance)
            except MalformedSpawn as error:
                counts[f"malformed:{error.kind}"] += 1
                return live.thread(f"malformed:{error.kind}")
            each = (allowance - len(request.children)) // len(request.children)
            children = await _gather(
                self._thread(child, (*live.name, turn, index), depth + 1, each, counts)
                for index, child in enumerate(request.children)
            )
            allowance -= sum(1 for child in children for _ in child.walk())
            results = [None if child.failure else self.protocol.result(self._text(child)) for child in children]
            joined = self._join_ids(live.ids, call_at, results)
            live.join(len(live.ids) - call_at, tuple(children), joined)
        return live.thread("length")

    async def _write(self, live: "_LiveThread", counts: Counter) -> str | None:
        """Decodes until the thread ends or has closed a spawn; returns a failure or None. The guard is
        here: a thread that begins to write a join block itself has that token replaced by the opening of a
        spawn, as the authors do."""
        while (limit := self.budget.context - len(live.ids)) > 0:
            decoded = await self.engine.decode(live.sequence, self.stop, limit, self.sampling)
            live.items.append(Block(decoded.ids, sampled=True, logprobs=decoded.logprobs))
            if not decoded.stopped:
                return "length"
            if decoded.ids[-1] != self.join_open:
                return None
            counts["guarded"] += 1
            live.replace_last(self.spawn_open)
        return "length"

    def _request(self, ids: list[int], start: int, depth: int, allowance: int) -> tuple[SpawnRequest, int]:
        """The spawn that `ids` end in and the index where its call begins; raises MalformedSpawn."""
        request = self.protocol.parse_spawn(self.tokenizer.decode(ids))
        opened = [index for index in range(start, len(ids)) if ids[index] == self.spawn_open]
        if request is None or not opened or len(self.tokenizer.decode(ids[: opened[-1]])) != request.position:
            # Read or not, it was not opened by its own token: the call could not be cut out by ids.
            raise MalformedSpawn("unopened", "a spawn was closed that was not opened")
        if depth >= self.budget.depth:
            raise MalformedSpawn("too_deep", f"a spawn at depth {depth}, the limit is {self.budget.depth}")
        if len(request.children) > allowance:
            raise MalformedSpawn("too_many", f"{len(request.children)} children, {allowance} more threads are allowed")
        return request, opened[-1]

    def _join_ids(self, ids: list[int], call_at: int, results: Sequence[str | None]) -> tuple[int, ...]:
        """The ids of the join block alone: the parent's own ids before it are never encoded again."""
        before = self.tokenizer.decode(ids[:call_at])
        after = self.protocol.join(self.tokenizer.decode(ids), results)
        return tuple(self.tokenizer.encode(after[len(before) :]))

    def _text(self, thread: Thread) -> str:
        return self.tokenizer.decode([token for block in thread.context for token in block.content])


class _LiveThread:
    """A thread while it runs: its sequence in the engine and its blocks so far, always in step."""

    def __init__(self, engine: Engine, prompt: Sequence[int], name: tuple[int, ...]):
        self.engine, self.name = engine, name
        self.items: list[Block | Spawn] = [Block(tuple(prompt), sampled=False)]
        self.sequence = engine.open(prompt, name)
        self.forks = 0

    @property
    def ids(self) -> list[int]:
        return self.sequence.ids

    def thread(self, failure: str | None) -> Thread:
        return Thread(tuple(item for item in self.items if isinstance(item, Spawn) or len(item)), failure=failure)

    def replace_last(self, token: int) -> None:
        """Puts a forced token in the place of the last sampled one."""
        block = self.items[-1]
        self.items[-1] = Block(block.content[:-1], sampled=True, logprobs=block.logprobs[:-1])
        self.items.append(Block((token,), sampled=False))
        self._continue(len(self.ids) - 1, (token,))

    def join(self, call_length: int, children: tuple[Thread, ...], joined: tuple[int, ...]) -> None:
        """Cuts the last `call_length` tokens out as a call and goes on with the join."""
        call: list[Block] = []
        left = call_length
        while left > 0:
            block = self.items.pop()
            cut = max(len(block) - left, 0)
            call.insert(0, _slice(block, slice(cut, None)))
            if cut:
                self.items.append(_slice(block, slice(0, cut)))
            left -= len(block) - cut
        self.items.append(Spawn(tuple(call), children, Block(joined, sampled=False)))
        self._continue(len(self.ids) - call_length, joined)

    def _continue(self, length: int, forced: tuple[int, ...]) -> None:
        # Each fork has a name of its own, or a position written twice would draw the same noise twice.
        self.forks += 1
        parent, self.sequence = self.sequence, self.engine.fork(self.sequence, length, (*self.name, self.forks))
        self.engine.free(parent)
        self.engine.extend(self.sequence, forced)

    def close(self) -> None:
        self.engine.free(self.sequence)


def _slice(block: Block, part: slice) -> Block:
    return Block(block.content[part], block.sampled, None if block.logprobs is None else block.logprobs[part])


async def _gather(work) -> list:
    """As `asyncio.gather`, but where one fails the others stop too, and with them their decoding."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise


async def run_all(
    jobs: Sequence[Callable[[], Awaitable[ThreadTree]]], done: Callable[[int, ThreadTree], None] = lambda i, t: None
) -> list[ThreadTree]:
    """All trees, in the order of the jobs whatever order they end in; `done(index, tree)` as each ends."""

    async def one(index: int) -> ThreadTree:
        tree = await jobs[index]()
        done(index, tree)
        return tree

    return list(await asyncio.gather(*(one(index) for index in range(len(jobs)))))
