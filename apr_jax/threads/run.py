"""The runner: decodes a thread in an engine and, when the thread spawns, its children in the same engine at the same
time.

The runner uses the task through its protocol alone, and the model through the engine alone. Sampled ids are kept: they
are decoded to text for parsing, and that text is never encoded again.
"""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple

from apr_jax.checks import at_least, check_fields
from apr_jax.errors import UserError
from apr_jax.settings import shared
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.engine import Decoded, Engine, Sampling, Watch
from apr_jax.threads.observer import Observer
from apr_jax.threads.protocol import MalformedSpawn, SpawnRequest, TaskProtocol
from apr_jax.threads.tree import Block, Spawn, Thread, ThreadTree, TreeOutcome, decode_tree

MALFORMED = ("stop", "fail")
_UNLIMITED = 1 << 62


@dataclasses.dataclass(frozen=True)
class Budget:
    """The limits of one tree. A thread that reaches a limit of tokens ends as a failure; a spawn above the limit of
    threads or depth is malformed.

    `malformed` is the policy for a spawn that cannot be run. With "stop" its thread ends as a failure. With "fail" the
    children that cannot be run count as children that found nothing, and the thread resumes after the join. Every
    malformed spawn is counted by its kind under both policies. Two cases end the thread under "fail" too:

    * The spawn has no opening token, so no call can be cut out of the context.
    * The thread has written `threads` malformed spawns. Each may be as long as the window, but only its short join
      stays in the context, so such a thread would run for very long.
    """

    context: int = shared("window")  # tokens in one thread's context, calls and joins included: the paper's window
    threads: int = 64  # threads of one tree
    depth: int = 1  # levels of children; the authors' traces have one
    tokens: int | None = None  # sampled tokens of one tree; None: no limit
    # Children of the root. Where a root ends with fewer, its end token is replaced by the opening of a spawn, unless
    # the tree has no threads left.
    min_children: int = 0
    malformed: str = "stop"

    BOUNDS = (at_least(1, "context", "threads", "tokens"), at_least(0, "depth", "min_children"))

    def __post_init__(self):
        check_fields(self)
        if self.min_children >= self.threads:
            raise UserError(f"{self.min_children} children at least need more than {self.threads} threads")
        if self.min_children and not self.depth:
            raise UserError(f"{self.min_children} children at least need a depth of 1 or more")
        if self.malformed not in MALFORMED:
            raise UserError(f"malformed is one of {', '.join(MALFORMED)}, was given {self.malformed!r}")


class _Allowance(NamedTuple):
    """The numbers of further threads and sampled tokens that a thread and its descendants may still use."""

    threads: int
    tokens: int

    def share(self, children: int) -> "_Allowance":
        """Return the allowance of each of `children` children. All get the same, so no child's limit depends on how
        fast another one is. The parent keeps an equal part of the tokens."""
        return _Allowance((self.threads - children) // children, self.tokens // (children + 1))

    def less(self, children: Sequence[Thread]) -> "_Allowance":
        """Return the allowance that is left after `children` and their descendants have run."""
        below = [thread for child in children for thread in child.walk()]
        return _Allowance(self.threads - len(below), self.tokens - sum(thread.sampled_tokens for thread in below))


class TreeRunner:
    """A runner of thread trees of one task protocol in one engine. Many calls of `run` may be awaited at the same time
    (`run_all`).

    Raises UserError where the budget's window is above the engine's context, where a task's spawn or join marker is not
    one token, or where it is one of the tokenizer's end tokens. An `observer` learns of every thread and its tokens; it
    changes neither.
    """

    def __init__(
        self, engine: Engine, protocol: TaskProtocol, tokenizer: Tokenizer, budget: Budget, sampling: Sampling,
        observer: Observer | None = None,
    ):  # fmt: skip
        if budget.context > engine.context:
            raise UserError(f"a window of {budget.context} tokens was asked of an engine that holds {engine.context}")
        self.engine, self.protocol, self.tokenizer = engine, protocol, tokenizer
        self.budget, self.sampling = budget, sampling
        self.observer, self._watched = observer or Observer(), observer is not None
        self.spawn_open = tokenizer.token(protocol.spawn_open)
        self.spawn_close = tokenizer.token(protocol.spawn_close)
        self.join_open = tokenizer.token(protocol.join_open)
        for text in (protocol.spawn_open, protocol.spawn_close, protocol.join_open):
            if tokenizer.token(text) in tokenizer.ends:
                raise UserError(f"{text!r} is the task's and must not end a text: take it out of eos_token_id")
        self.stop = tokenizer.ends | {self.spawn_close, self.join_open}

    async def run(self, problem: Any, name: Sequence[int], condition: str = "") -> ThreadTree:
        """Run one tree and return it with its outcome. `name` is the identity of the root's sequence (`Engine.open`);
        `condition` is text in front of the root's prompt."""
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
        tree = ThreadTree(root, outcome=outcome)
        if self.protocol.reward is None:
            return tree
        reward = self.protocol.reward(problem, decode_tree(tree, self.tokenizer.decode))
        return dataclasses.replace(tree, outcome=dataclasses.replace(outcome, reward=reward))

    async def _thread(
        self, prompt: tuple[int, ...], name: tuple[int, ...], depth: int, allowance: _Allowance, counts: Counter,
        parent: tuple["_LiveThread", int] | None = None,
    ) -> Thread:  # fmt: skip
        """Run one thread to its end. `parent`: (the thread whose context it inherits, the number of inherited
        tokens)."""
        self.observer.started(name, depth, prompt)
        thread = await self._run_thread(prompt, name, depth, allowance, counts, parent)
        self.observer.ended(name, thread)
        return thread

    async def _run_thread(
        self, prompt: tuple[int, ...], name: tuple[int, ...], depth: int, allowance: _Allowance, counts: Counter,
        parent: tuple["_LiveThread", int] | None,
    ) -> Thread:  # fmt: skip
        inherited = 0 if parent is None else parent[1]
        if inherited + len(prompt) >= self.budget.context:
            return Thread((Block(prompt, sampled=False),), failure="length", inherits=parent is not None)
        if parent is None:
            sequence = self.engine.open(prompt, name)
        else:
            sequence = self.engine.fork(parent[0].sequence, inherited, name)
            self.engine.extend(sequence, prompt)
        live = _LiveThread(self.engine, sequence, prompt, name, None if parent is None else inherited)
        try:
            return await self._turns(live, depth, allowance, counts)
        finally:
            live.close()

    async def _turns(self, live: "_LiveThread", depth: int, allowance: _Allowance, counts: Counter) -> Thread:
        """Write, spawn and join in turns until the thread ends."""
        malformed = 0
        for turn in range(self.budget.context):  # every turn adds at least its join, so the window ends the thread
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
            call = len(live.ids) - call_at
            self.observer.spawned(live.name, call, runnable)
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
            joined = self._join_ids(request, children)
            live.join(call, tuple(children), joined)
            self.observer.joined(live.name, call, joined)
        return live.thread("length")

    async def _write(
        self, live: "_LiveThread", depth: int, allowance: _Allowance, counts: Counter
    ) -> tuple[str | None, int]:
        """Decode until the thread ends, closes a spawn or reaches a limit. Returns (failure or None, number of sampled
        tokens).

        The guard: where a model samples the opening of a join block, that token is replaced by the opening of a spawn,
        as in the authors' code. A model would otherwise invent its children's results."""
        written = 0
        while (room := self.budget.context - len(live.ids)) > 0:
            if (limit := min(room, allowance.tokens - written)) < 1:
                return "tokens", written
            decoded = await self.engine.decode(live.sequence, self.stop, limit, self.sampling, self._watch(live))
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
            self.observer.replaced(live.name, self.spawn_open)
        return "length", written

    def _watch(self, live: "_LiveThread") -> Watch | None:
        """Return the watcher of the next decode of a thread, None where nobody observes."""
        if not self._watched:
            return None
        begin = len(live.ids) - (live.inherited or 0)
        return lambda at, ids: self.observer.decoded(live.name, begin + at, ids)

    def _opened(self, ids: list[int], start: int) -> int | None:
        """Return the index at which the call at the end of `ids` begins: the last opening of a spawn at or after
        `start`. None where there is no opening."""
        return next((index for index in range(len(ids) - 1, start - 1, -1) if ids[index] == self.spawn_open), None)

    def _request(self, ids: list[int], call_at: int | None) -> SpawnRequest:
        """Return the spawn at the end of `ids`, whose call begins at index `call_at`. Raises MalformedSpawn."""
        request = self.protocol.parse_spawn(self.tokenizer.decode(ids))
        if request is None or call_at is None or len(self.tokenizer.decode(ids[:call_at])) != request.position:
            # The text may spell an opening in other tokens. Without the opening token the ids of the call are unknown.
            raise MalformedSpawn("unopened", "a spawn was closed that was not opened")
        return request

    def _runnable(self, wanted: int, depth: int, threads: int) -> tuple[int, str | None]:
        """Return (n, kind) for a spawn of `wanted` children in a thread at level `depth` of a tree that may have
        `threads` more threads. The first n children may be run. `kind` is the kind of malformed spawn where n is below
        `wanted`, else None."""
        if depth >= self.budget.depth:
            return 0, "too_deep"
        return (threads, "too_many") if wanted > threads else (wanted, None)

    def _join_ids(self, request: SpawnRequest | None, children: Sequence[Thread]) -> tuple[int, ...]:
        """Return the ids of a spawn's join block. `children` are the children that were run, which are the first ones
        of the request; `request` is None where the spawn could not be parsed."""
        if request is None:
            return tuple(self.tokenizer.encode(self.protocol.join_nothing()))
        results = [None if child.failure else self.protocol.result(self.text(child)) for child in children]
        results += [None] * (len(request.children) - len(children))
        return tuple(self.tokenizer.encode(self.protocol.join(request, results)))

    def text(self, thread: Thread) -> str:
        """Return the text of a finished thread's own context: prompt, written blocks and joins."""
        return self.tokenizer.decode([token for block in thread.context for token in block.content])


class _LiveThread:
    """A running thread: its sequence in the engine and its blocks so far. After each method both hold the same ids.
    `inherited` is the number of tokens of its parent's context, None where it inherits no context."""

    def __init__(self, engine: Engine, sequence, prompt: Sequence[int], name: tuple[int, ...], inherited: int | None):
        self.engine, self.sequence, self.name, self.inherited = engine, sequence, name, inherited
        self.items: list[Block | Spawn] = [Block(tuple(prompt), sampled=False)]
        self.forks = 0

    @property
    def ids(self) -> list[int]:
        return self.sequence.ids

    @property
    def children(self) -> int:
        return sum(len(item.children) for item in self.items if isinstance(item, Spawn))

    def thread(self, failure: str | None) -> Thread:
        """Return the finished thread, without empty blocks."""
        items = (item for item in self.items if isinstance(item, Spawn) or len(item))
        return Thread(tuple(items), failure=failure, inherits=self.inherited is not None)

    def add(self, decoded: Decoded) -> None:
        """Add sampled tokens as a block. The engine has appended them to the sequence already."""
        other = decoded.model_logprobs if decoded.model_logprobs != decoded.logprobs else None
        self.items.append(Block(decoded.ids, sampled=True, logprobs=decoded.logprobs, model_logprobs=other))

    def replace_last(self, token: int) -> None:
        """Replace the last sampled token by a forced one."""
        self.items[-1] = self.items[-1].cut(slice(0, -1))
        self.items.append(Block((token,), sampled=False))
        self._continue(len(self.ids) - 1, (token,))

    def join(self, call_length: int, children: tuple[Thread, ...], joined: tuple[int, ...]) -> None:
        """Move the last `call_length` tokens from the context into the call of a spawn, and append `joined`, the ids
        of the join, to the context."""
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
        # Draws depend on name and position. A position is written again after a join, so the fork needs a new name.
        self.forks += 1
        parent, self.sequence = self.sequence, self.engine.fork(self.sequence, length, (*self.name, self.forks))
        self.engine.free(parent)
        self.engine.extend(self.sequence, forced)

    def close(self) -> None:
        self.engine.free(self.sequence)


async def together(work: Iterable[Awaitable]) -> list:
    """Await all of `work` at the same time and return the results in order. Where one raises, the others are
    cancelled and have ended before the error is raised; `asyncio.gather` would leave them running."""
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
    """Run all jobs at the same time and return their trees in the order of the jobs. Calls `done(index, tree)` as
    each tree ends. Where a job raises, the others are cancelled and have ended before the error is raised."""

    async def one(index: int) -> ThreadTree:
        tree = await jobs[index]()
        done(index, tree)
        return tree

    return await together(one(index) for index in range(len(jobs)))
