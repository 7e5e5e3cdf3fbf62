"""The SGLang engine. A sequence is a list of ids. A decode sends all of them to a server, whose radix cache holds the
keys and values of prefixes that it has seen before.

Always true:

* Ids are sent and ids are received, never text. Every id is checked before it is sent, since an id outside the
  vocabulary crashes the server. Every answer is checked before it is used.
* The engine itself keeps sequences within the context. A server refuses prompts that are close to its context, and
  without an error cuts answers a little before it. `context_of_servers` returns the length that works, and the engine
  asks for nothing longer.
* A request that fails for a reason that may pass is repeated from its beginning (`apr_jax.rollout.client`).
"""

import dataclasses
import math
import time
from collections.abc import Sequence as Ids

from apr_jax.errors import UserError
from apr_jax.rollout.client import Client, Patience, ServerError, checked_url
from apr_jax.rollout.measure import Lineage, Measurement, Measurements, Origin
from apr_jax.rollout.placement import AllToOne, Placement
from apr_jax.rollout.stream import nested
from apr_jax.threads.engine import Decoded, Sampling, Watch

INTERVAL = 1 << 20  # tokens per part of a streamed answer: the first token comes at once, then all others together
WATCHED_INTERVAL = 8  # the same, where somebody watches
LOGPROBS = ("both", "drawn", "none")
ROUNDING = 0.01  # a log-probability is at most 0, but rounding may raise it by up to this much


class _Sequence:
    """The engine's handle of one sequence: its ids, its thread, and the index of the server that decodes it."""

    def __init__(self, ids: Ids[int], origin: Origin, server: int):
        self.ids, self.origin, self.server = list(map(int, ids)), origin, server
        self.freed = False


@dataclasses.dataclass(frozen=True)
class _Answer:
    """A checked answer. The server's own numbers are None if it did not report them."""

    ids: list[int]
    logprobs: list[float]
    cached: int | None  # prompt tokens found in the server's cache
    seconds: float | None  # duration of the request, by the server's clock
    queue: float | None  # seconds in the server's queue
    first: float  # time of the first token, in seconds of `time.perf_counter`
    end: float  # time of the last token


class SglangEngine:
    """An `Engine` on one or several SGLang servers that serve the same model. Written for and tried with SGLang 0.5.23.

    `context` is the most tokens of a sequence (`context_of_servers`), `vocab_size` the number of the model's tokens. At
    most `at_once` requests are open at each server; further ones wait in the engine. `placement` assigns threads to
    servers. `measurements` receives one entry per request that decodes. Raises UserError for invalid settings.

    Log-probabilities: at temperature 0 and 1 the server returns the model's own, which are exact. At any other
    temperature it returns those of the distribution with that temperature, and the model's own need a second request
    that sends the finished sequence as its prompt. `logprobs="drawn"` omits the second request. `logprobs="none"` makes
    the server compute no log-probabilities. Unknown ones are NaN. With top_k or top_p the server's log-probabilities
    are inexact: they are those before tokens were cut, so they are too low by -log of the probability that was kept.

    Above temperature 0 samples depend on the batch composition and cannot be repeated, since the server does not draw
    by the sequence's name.
    """

    def __init__(
        self, servers: Ids[str], *, context: int, vocab_size: int, placement: Placement | None = None,
        at_once: int = 64, patience: Patience = Patience(), measurements: Measurements | None = None,
        logprobs: str = "both",
    ):  # fmt: skip
        self.servers = [checked_url(url) for url in servers]
        if not self.servers:
            raise UserError("an SGLang engine needs one server at least, was given none")
        if logprobs not in LOGPROBS:
            raise UserError(f"logprobs is one of {', '.join(LOGPROBS)}, was given {logprobs!r}")
        for name, value in (("context", context), ("vocab_size", vocab_size), ("at_once", at_once)):
            if value < 1:
                raise UserError(f"{name} is 1 or more, was given {value}")
        self.context, self.vocab_size = context, vocab_size
        self.placement = AllToOne() if placement is None else placement
        self.measurements, self.logprobs = measurements, logprobs
        self._client = Client(self.servers, at_once, patience)
        self._lineage = Lineage()

    # ------------------------------------------------------------------ the Engine protocol

    def open(self, ids: Ids[int], name: Ids[int]) -> _Sequence:
        if not 1 <= len(ids) <= self.context:
            raise ValueError(f"a sequence holds 1 to {self.context} tokens, was given {len(ids)}")
        origin = self._lineage.open(name)
        return _Sequence(ids, origin, self.placement.place(origin, len(self.servers)))

    def fork(self, sequence: _Sequence, length: int, name: Ids[int]) -> _Sequence:
        if not 1 <= length <= len(sequence.ids):
            raise ValueError(f"a fork keeps 1 to {len(sequence.ids)} tokens, was given {length}")
        origin = self._lineage.fork(sequence.origin, name)
        same_thread = origin == sequence.origin
        server = sequence.server if same_thread else self.placement.place(origin, len(self.servers))
        return _Sequence(sequence.ids[:length], origin, server)

    def extend(self, sequence: _Sequence, ids: Ids[int]) -> None:
        sequence.ids.extend(map(int, ids))

    async def decode(
        self, sequence: _Sequence, stop: frozenset[int], limit: int, sampling: Sampling, watch: Watch | None = None
    ) -> Decoded:
        """Implement `Engine.decode`. Raises ValueError for a freed or full sequence, UserError for an id outside the
        vocabulary or a `sampling` that SGLang cannot apply, and ServerError if the server fails."""
        if sequence.freed:
            raise ValueError("a freed sequence cannot decode")
        limit = min(limit, self.context - len(sequence.ids))
        if limit < 1:
            raise ValueError(f"no room to decode: {len(sequence.ids)} of {self.context} tokens")
        self._check_ids(sequence.ids)
        self._check_ids(stop)
        self._truncation(sampling)  # raises before a request is sent
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < limit and not (ids and ids[-1] in stop):
            # A second round is needed only if the server stopped at an end token of its own that is not in `stop`.
            # SGLang cannot ignore that token alone.
            seen = None if watch is None else _Seen(watch, len(ids), self.vocab_size)
            answer = await self._generate(sequence, ids, stop, limit - len(ids), sampling, seen)
            if seen is not None:
                seen.add(answer.ids, whole=True)
            ids += answer.ids
            logprobs += answer.logprobs
        model_logprobs = logprobs
        if sampling.temperature not in (0, 1):
            model_logprobs = await self._scores(sequence, ids) if self.logprobs == "both" else [math.nan] * len(ids)
        sequence.ids.extend(ids)
        return Decoded(tuple(ids), tuple(logprobs), ids[-1] in stop, tuple(model_logprobs))

    def free(self, sequence: _Sequence) -> None:
        if not sequence.freed:
            sequence.freed = True
            self._lineage.close(sequence.origin)

    async def close(self) -> None:
        """Close the connections. The next decode opens new ones."""
        await self._client.close()

    # ------------------------------------------------------------------ requests

    def _check_ids(self, ids) -> None:
        for one in ids:
            if not 0 <= one < self.vocab_size:
                raise UserError(f"ids are 0 to {self.vocab_size - 1}, was given {one}: it would crash the server")

    def _truncation(self, sampling: Sampling) -> tuple[int, float]:
        """Return SGLang's (top_k, top_p) for the distribution of `sampling`. Raises UserError if both are set: SGLang
        measures both on the whole distribution, `Sampling` measures top_p on the tokens that top_k left."""
        top_k = sampling.top_k if 0 < sampling.top_k < self.vocab_size else -1
        if sampling.temperature == 0 or top_k == 1:  # one token remains, whatever top_p is
            return top_k, 1.0
        if top_k > 0 and sampling.top_p < 1:
            raise UserError(
                f"SGLang applies top_k and top_p both to the whole distribution, not one after the other: give one of "
                f"them, was given top_k {sampling.top_k} and top_p {sampling.top_p}"
            )
        return top_k, sampling.top_p

    async def _generate(
        self, sequence: _Sequence, written: list[int], stop: frozenset[int], limit: int, sampling: Sampling,
        seen: "_Seen | None",
    ) -> _Answer:  # fmt: skip
        """Send one request of a decode and record its measurement. `written` are the ids of the decode so far. `seen`
        gets the ids of the answer as they arrive."""
        prompt = [*sequence.ids, *written]
        top_k, top_p = self._truncation(sampling)
        body = {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_k": top_k,
                "top_p": top_p,
                "max_new_tokens": limit,
                "stop_token_ids": sorted(stop),
                "skip_special_tokens": False,
                "stream_interval": INTERVAL if seen is None else WATCHED_INTERVAL,
            },
            "return_logprob": self.logprobs != "none",
            "stream": True,
        }
        url, asked = self.servers[sequence.server], time.perf_counter()
        answer, start, attempts = await self._client.generate(
            sequence.server,
            body,
            lambda event, first: self._read(url, event, first, len(prompt), stop, limit),
            None if seen is None else seen.add,
        )
        if self.measurements is not None:
            self.measurements.append(
                Measurement(
                    sequence.origin.name, sequence.origin.depth, url, len(prompt), len(answer.ids), asked, start,
                    answer.first, answer.end, answer.cached, attempts, answer.seconds, answer.queue,
                )
            )  # fmt: skip
        return answer

    async def _scores(self, sequence: _Sequence, ids: list[int]) -> list[float]:
        """Return the model's own log-probabilities of `ids` after a sequence, by a request with `ids` in its prompt."""
        url = self.servers[sequence.server]
        body = {
            "input_ids": [*sequence.ids, *ids],
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 1, "stream_interval": INTERVAL},
            "return_logprob": True,
            "logprob_start_len": len(sequence.ids) - 1,
            "stream": True,
        }

        def read(event: dict, first: float | None) -> list[float]:
            entries = nested(event, "meta_info", "input_token_logprobs")
            return _logprobs(url, entries[-len(ids) :] if isinstance(entries, list) else entries, ids)

        return (await self._client.generate(sequence.server, body, read))[0]

    def _read(self, url: str, event: dict, first: float | None, prompt: int, stop: frozenset[int], limit: int):
        """Check an answer against its request and convert it. `prompt` is the number of prompt tokens. Raises
        ServerError for an answer that does not fit the request."""
        end = time.perf_counter()
        ids, meta = event.get("output_ids"), event.get("meta_info")
        if not isinstance(ids, list) or not all(type(one) is int for one in ids) or not isinstance(meta, dict):
            raise ServerError(f"{url}: the answer holds no output_ids and meta_info as SGLang's does")
        if wrong := [one for one in ids if not 0 <= one < self.vocab_size]:
            raise ServerError(f"{url}: answered with id {wrong[0]}, the vocabulary ends at {self.vocab_size - 1}")
        if not 1 <= len(ids) <= limit:
            raise ServerError(f"{url}: answered with {len(ids)} tokens, 1 to {limit} were asked for")
        if any(one in stop for one in ids[:-1]):
            raise ServerError(f"{url}: continued after a stop token")
        if meta.get("prompt_tokens") not in (None, prompt):
            raise ServerError(f"{url}: read {meta['prompt_tokens']} of {prompt} prompt tokens")
        if ids[-1] not in stop and len(ids) < limit and nested(meta, "finish_reason", "type") != "stop":
            raise ServerError(
                f"{url}: ended after {len(ids)} of {limit} tokens without a stop token: it cannot hold "
                f"{self.context} tokens"
            )
        known = self.logprobs != "none"
        logprobs = _logprobs(url, meta.get("output_token_logprobs"), ids) if known else [math.nan] * len(ids)
        return _Answer(
            ids, logprobs, _number(meta.get("cached_tokens")),
            _number(meta.get("e2e_latency")), _number(meta.get("queue_time")), end if first is None else first, end,
        )  # fmt: skip


class _Seen:
    """The ids of one request that its decode's `watch` has received. `before` is the number of the decode's ids before
    the request."""

    def __init__(self, watch: Watch, before: int, vocab_size: int):
        self._watch, self._before, self._vocab_size = watch, before, vocab_size
        self._ids: list[int] = []

    def add(self, ids: list, whole: bool = False) -> None:
        """Pass on what is new in an answer so far. After a broken attempt the answer begins anew: ids that differ from
        the earlier attempt are passed on again. With `whole` the answer is complete, and may be shorter than the
        earlier one. Ids that cannot be right are not passed on; `_read` raises their error later."""
        if not all(type(one) is int and 0 <= one < self._vocab_size for one in ids):
            return
        shorter = min(len(self._ids), len(ids))
        same = next((at for at in range(shorter) if self._ids[at] != ids[at]), shorter)
        if same < len(ids) or (whole and same < len(self._ids)):
            self._ids = list(ids)
            self._watch(self._before + same, tuple(ids[same:]))


def _logprobs(url: str, entries, ids: list[int]) -> list[float]:
    """Return the log-probabilities of `ids` from SGLang's list of [log-probability, id, ...]. Raises ServerError if an
    entry is missing, is of another id or has no valid log-probability."""
    try:
        values = [float(entry[0]) for entry in entries]
        if [entry[1] for entry in entries] == ids and all(map(_is_logprob, values)):
            return values
    except (TypeError, ValueError, IndexError, KeyError):
        pass
    raise ServerError(f"{url}: the answer lacks the log-probabilities of its {len(ids)} tokens")


def _is_logprob(value: float) -> bool:
    return math.isfinite(value) and value < ROUNDING


def _number(value):
    """Return a JSON number, and None for anything else."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
