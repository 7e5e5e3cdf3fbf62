"""The runner: takes a thread through an engine, and on a spawn its children at the same time.

It knows no task (the protocol does) and no model (the engine does). Ids sampled are ids kept: text is
made from them to be parsed and never turned back into the ids of something already sampled.
"""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple

from apr_jax.checks import check_fields
from apr_jax.errors import UserError
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.engine import Decoded, Engine, Sampling
from apr_jax.threads.protocol import MalformedSpawn, SpawnRequest, TaskProtocol
from apr_jax.threads.tree import Block, Spawn, Thread, ThreadTree, TreeOutcome

MALFORMED = ("stop", "fail")
_UNLIMITED = 1 << 62


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one tree may use. A thread at its limit ends as a failure, a spawn over it is malformed.

    `malformed` says what becomes of a thread whose spawn cannot be run: "stop", it ends as a failure, or "fail", the
    children that cannot be run count as children that found nothing, and it goes on. Either way it is counted by kind.
    A spawn that no token opened ends its thread: there is no call to cut out; so does a thread's malformed spawn number
    `threads`, since each may be as long as the window and leaves nothing behind.
    """

    context: int  # tokens of one thread, calls and joins included: the paper's window
    threads: int = 64  # threads of one tree
    depth: int = 1  # levels of children; the authors' traces have one
    tokens: int | None = None  # sampled by one tree; None: no limit
    # Of a root: one that ends with fewer, and may have more, has its end replaced by the opening of a spawn.
    min_children: int = 0
    malformed: str = "stop"

    def __post_init__(self):
        check_fields(self)
        for name, least in (("context", 1), ("threads", 1), ("depth", 0), ("tokens", 1), ("min_children", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} of a budget is at least {least}, was given {value}")
        if self.min_children >= self.threads:
            raise UserError(f"{self.min_children} children at least need more than {self.threads} threads")
        if self.min_children and not self.depth:
            raise UserError(f"{self.min_children} children at least need a depth of 1 or more")
        if self.malformed not in MALFORMED:
            raise UserError(f"malformed is one of {', '.join(MALFORMED)}, was given {self.malformed!r}")


class _Allowance(NamedTuple):
    """What a thread and its descendants may still use."""

    threads: int
    tokens: int

    def share(self, children: int) -> "_Allowance":
        """What each child gets: an even part, so that what one may use does not depend on how fast another is. A part
        of the tokens stays for the parent."""
        return _Allowance((self.threads - children) // children, self.tokens // (children + 1))

    def less(self, children: Sequence[Thread]) -> "_Allowance":
        below = [thread for child in children for thread in child.walk()]
        return _Allowance(self.threads - len(below), self.tokens - sum(thread.sampled_tokens for thread in below))


class TreeRunner:
    """Runs trees of one protocol through one engine; `run_all` decodes many at their own pace."""

    def __init__(
        self, engine: Engine, protocol: TaskProtocol, tokenizer: Tokenizer, budget: Budget, sampling: Sampling
    ):
        if budget.context > engine.context:
            raise UserError(f"a window of {budget.context} tokens was asked of an engine that holds {engine.context}")
        self.engine, self.protocol, self.tokenizer = engine, protocol, tokenizer
        self.budget, self.sampling = budget, sampling
        self.spawn_open = tokenizer.token(protocol.spawn_open)
        self.spawn_close = tokenizer.token(protocol.spawn_close)
        self.join_open = tokenizer.token(protocol.join_open)
        for text in (protocol.spawn_open, protocol.spawn_close, protocol.join_open):
            if tokenizer.token(text) in tokenizer.ends:
                raise UserError(f"{text!r} is the task's and must not end a text: take it out of eos_token_id")
        self.stop = tokenizer.ends | {self.spawn_close, self.join_open}

    async def run(self, problem: Any, name: Sequence[int], condition: str = "") -> ThreadTree:
        """One tree. `name` is the tree's identity, `condition` goes first on the root's prompt."""
        counts = Counter()
        prompt = (self.tokenizer.bos, *self.tokenizer.encode(condition + self.protocol.root_prompt(problem)))
        budget = self.budget
        allowance = _Allowance(budget.threads - 1, _UNLIMITED if budget.tokens is None else budget.tokens)
        root = await self._thread(prompt, tuple(name), 0, allowance, counts)
        text = self.text(root)
        malformed = {kind.removeprefix("malformed:"): n for kind, n in counts.items() if kind.startswith("malformed:")}
        outcome = TreeOutcome(
            correct=root.failure is None and bool(self.protocol.correct(problem, text)),
            answered=self.protocol.result(text) is not None,
            failures=dict(Counter(thread.failure for thread in root.walk() if thread.failure)),
            malformed=malformed,
            suppressed_joins=counts["suppressed_joins"],
            forced_spawns=counts["forced_spawns"],
        )
        return ThreadTree(root, outcome=outcome)

    async def _thread(
        self, prompt: tuple[int, ...], name: tuple[int, ...], depth: int, allowance: _Allowance, counts: Counter,
        parent: tuple["_LiveThread", int] | None = None,
    ) -> Thread:  # fmt: skip
        """One thread to its end. `parent`: the one whose context it inherits, and how many tokens of it."""
        inherited = 0 if parent is None else parent[1]
        if inherited + len(prompt) >= self.budget.context:
            return Thread((Block(prompt, sampled=False),), failure="length", inherits=parent is not None)
        if parent is None:
            sequence = self.engine.open(prompt, name)
        else:
            sequence = self.engine.fork(parent[0].sequence, inherited, name)
            self.engine.extend(sequence, prompt)
        live = _LiveThread(self.engine, sequence, prompt, name, inherits=parent is not None)
        try:
            return await self._turns(live, depth, allowance, counts)
        finally:
            live.close()

    async def _turns(self, live: "_LiveThread", depth: int, allowance: _Allowance, counts: Counter) -> Thread:
        """Writes, spawns, joins, writes again, until the thread ends."""
        malformed = 0
        for turn in range(self.budget.context):  # every turn grows the context, so the window ends the loop
            start = len(live.ids)
            failure, written = await self._write(live, depth, allowance, counts)
            allowance = allowance._replace(tokens=allowance.tokens - written)
            if failure is not None or live.ids[-1] != self.spawn_close:
                return live.thread(failure)
            call_at = self._opened(live.ids, start)
            request, runnable = None, 0
            try:
                request = self._request(live.ids, call_at)
                runnable, kind = self._runnable(len(request.children), depth, allowance.threads)
            except MalformedSpawn as error:
                kind = error.kind
            if kind is not None:
                counts[f"malformed:{kind}"] += 1
                malformed += 1
                if self.budget.malformed == "stop" or call_at is None or malformed >= self.budget.threads:
                    return live.thread(f"malformed:{kind}")
            children: list[Thread] = []
            if runnable:
                share = allowance.share(runnable)
                inherited = (live, call_at) if request.inherit else None
                first = () if request.inherit else (self.tokenizer.bos,)
                children = await together(
                    self._thread(
                        (*first, *self.tokenizer.encode(child)), (*live.name, turn, index), depth + 1, share, counts,
                        inherited,
                    )
                    for index, child in enumerate(request.children[:runnable])
                )  # fmt: skip
                allowance = allowance.less(children)
            live.join(len(live.ids) - call_at, tuple(children), self._join_ids(request, children))
        return live.thread("length")

    async def _write(
        self, live: "_LiveThread", depth: int, allowance: _Allowance, counts: Counter
    ) -> tuple[str | None, int]:
        """Decodes until the thread ends, has closed a spawn or has sampled what it may; returns a failure or None, and
        how many tokens it sampled. The guard is here: a thread that begins to write a join block itself has that token
        replaced by the opening of a spawn, as the authors do."""
        written = 0
        while (room := self.budget.context - len(live.ids)) > 0:
            if (limit := min(room, allowance.tokens - written)) < 1:
                return "tokens", written
            decoded = await self.engine.decode(live.sequence, self.stop, limit, self.sampling)
            written += len(decoded.ids)
            live.add(decoded)
            if not decoded.stopped:
                return ("length" if limit == room else "tokens"), written
            early = (
                depth == 0
                and decoded.ids[-1] in self.tokenizer.ends
                and live.children < self.budget.min_children
                and allowance.threads > 0
            )
            if decoded.ids[-1] != self.join_open and not early:
                return None, written
            counts["forced_spawns" if early else "suppressed_joins"] += 1
            live.replace_last(self.spawn_open)
        return "length", written

    def _opened(self, ids: list[int], start: int) -> int | None:
        """Where the call that `ids` end in begins: at the last opening of a spawn since `start`."""
        return next((index for index in range(len(ids) - 1, start - 1, -1) if ids[index] == self.spawn_open), None)

    def _request(self, ids: list[int], call_at: int | None) -> SpawnRequest:
        """The spawn that `ids` end in; raises MalformedSpawn."""
        request = self.protocol.parse_spawn(self.tokenizer.decode(ids))
        if request is None or call_at is None or len(self.tokenizer.decode(ids[:call_at])) != request.position:
            # Read or not, it was not opened by its own token: the call could not be cut out by ids.
            raise MalformedSpawn("unopened", "a spawn was closed that was not opened")
        return request

    def _runnable(self, wanted: int, depth: int, threads: int) -> tuple[int, str | None]:
        """How many of a spawn's children, the first ones, may be run, and where that is not all of them why."""
        if depth >= self.budget.depth:
            return 0, "too_deep"
        return (threads, "too_many") if wanted > threads else (wanted, None)

    def _join_ids(self, request: SpawnRequest | None, children: Sequence[Thread]) -> tuple[int, ...]:
        """The ids of the join block of a spawn, of which the first `children` were run; None: it could not be read."""
        if request is None:
            return tuple(self.tokenizer.encode(self.protocol.join_nothing()))
        results = [None if child.failure else self.protocol.result(self.text(child)) for child in children]
        results += [None] * (len(request.children) - len(children))
        return tuple(self.tokenizer.encode(self.protocol.join(request, results)))

    def text(self, thread: Thread) -> str:
        """What stands in a finished thread itself, as the protocol reads it."""
        return self.tokenizer.decode([token for block in thread.context for token in block.content])


class _LiveThread:
    """A thread while it runs: its sequence in the engine and its blocks so far, always in step."""

    def __init__(self, engine: Engine, sequence, prompt: Sequence[int], name: tuple[int, ...], inherits: bool):
        self.engine, self.sequence, self.name, self.inherits = engine, sequence, name, inherits
        self.items: list[Block | Spawn] = [Block(tuple(prompt), sampled=False)]
        self.forks = 0

    @property
    def ids(self) -> list[int]:
        return self.sequence.ids

    @property
    def children(self) -> int:
        return sum(len(item.children) for item in self.items if isinstance(item, Spawn))

    def thread(self, failure: str | None) -> Thread:
        items = (item for item in self.items if isinstance(item, Spawn) or len(item))
        return Thread(tuple(items), failure=failure, inherits=self.inherits)

    def add(self, decoded: Decoded) -> None:
        other = decoded.model_logprobs if decoded.model_logprobs != decoded.logprobs else None
        self.items.append(Block(decoded.ids, sampled=True, logprobs=decoded.logprobs, model_logprobs=other))

    def replace_last(self, token: int) -> None:
        """Puts a forced token in the place of the last sampled one."""
        self.items[-1] = self.items[-1].cut(slice(0, -1))
        self.items.append(Block((token,), sampled=False))
        self._continue(len(self.ids) - 1, (token,))

    def join(self, call_length: int, children: tuple[Thread, ...], joined: tuple[int, ...]) -> None:
        """Cuts the last `call_length` tokens out as a call and goes on with the join."""
        call: list[Block] = []
        left = call_length
        while left > 0:
            block = self.items.pop()
            cut = max(len(block) - left, 0)
            call.insert(0, block.cut(slice(cut, None)))
            if cut:
                self.items.append(block.cut(slice(0, cut)))
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


async def together(work: Iterable[Awaitable]) -> list:
    """As `asyncio.gather`; but where one raises, the others are cancelled and have ended before the error is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def run_all(
    jobs: Sequence[Callable[[], Awaitable[ThreadTree]]], done: Callable[[int, ThreadTree], None] = lambda i, t: None
) -> list[ThreadTree]:
    """All trees, in the order of the jobs whatever order they end in; `done(index, tree)` as each ends. Where one
    raises, the others are cancelled, and the error is raised when all of them have ended."""

    async def one(index: int) -> ThreadTree:
        tree = await jobs[index]()
        done(index, tree)
        return tree

    return await together(one(index) for index in range(len(jobs)))
