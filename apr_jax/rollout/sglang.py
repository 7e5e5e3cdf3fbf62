"""The SGLang engine: a sequence is its ids and nothing else, a decode is a request with all of them to a server, whose
radix cache finds what it has seen before.

Always true:

* Ids go out and ids come back; no text is looked at. Every id is checked before it is sent, since one outside the
  vocabulary ends the whole server, and every answer before it is believed.
* The sum of lengths is done here. The server refuses prompts close to its context and cuts answers a little before it
  without a word; `context_of_servers` says how much it can really hold, and nothing longer is asked for.
* A request is tried again, from its beginning, while that makes sense: nothing of an answer that broke off is kept.
"""

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import Sequence as Ids

import httpx

from apr_jax.errors import UserError
from apr_jax.rollout.measure import Lineage, Measurement, Measurements, Origin
from apr_jax.rollout.placement import AllToOne, Placement
from apr_jax.rollout.stream import Answer, Events, StreamError
from apr_jax.threads.engine import Decoded, Sampling

QUIET = 1 << 20  # tokens between two parts of a streamed answer: the first comes at once, the next is the last
CONNECT = 10.0  # seconds
LOGPROBS = ("both", "drawn", "none")
ROUNDED = 0.01  # above 0 no log-probability is but for rounding
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between tries; doubles from one to the next


class ServerError(ConnectionError):
    """A server that cannot be reached or does not answer as an SGLang server does: one line that names it."""


class _Passing(Exception):
    """What may be over at the next try."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """Seconds. A request lasts for two tries and `retry` at most."""

    request: float = 600.0  # for one try, waiting in the server's queue included
    retry: float = 60.0  # from the first failure of a request until it is given up

    def __post_init__(self):
        for name in ("request", "retry"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} of a patience is above 0 s, was given {getattr(self, name)}")


class _Sequence:
    """A handle: the context so far, whose it is and where it is decoded."""

    def __init__(self, ids: Ids[int], origin: Origin, server: int):
        self.ids, self.origin, self.server = list(map(int, ids)), origin, server
        self.freed = False


@dataclasses.dataclass(frozen=True)
class _Answer:
    ids: list[int]
    logprobs: list[float]
    cached: int | None
    seconds: float | None
    queue: float | None
    first: float  # points in time
    end: float


class SglangEngine:
    """An `Engine` on one or several SGLang servers of one model (version 0.5.23 was read and tried).

    `vocabulary`: the model's words. `at_once` requests are with a server at a time, further ones wait here.
    `placement` says which thread goes where. `measurements` receives one entry per request that decodes.

    Log-probabilities. At temperature 0 and 1 the server's are the model's own, and exact. At another temperature they
    are those of the distribution with the temperature in it, exact where nothing is left out; the model's own then
    take a second request that reads the finished text. `logprobs` "drawn" spares that request, "none" has the server
    compute none at all: what is not known then is NaN. With top_k or top_p the server does not scale what is left up
    to 1: those told are from before words were left out, too low by the log of the share kept at their position.

    Samples above temperature 0 depend on company and cannot be repeated: the server has no draw by name.
    """

    def __init__(
        self, servers: Ids[str], *, context: int, vocabulary: int, placement: Placement | None = None,
        at_once: int = 64, patience: Patience = Patience(), measurements: Measurements | None = None,
        logprobs: str = "both",
    ):  # fmt: skip
        self.servers = [_checked(url) for url in servers]
        if not self.servers:
            raise UserError("an SGLang engine needs one server at least, was given none")
        if logprobs not in LOGPROBS:
            raise UserError(f"logprobs is one of {', '.join(LOGPROBS)}, was given {logprobs!r}")
        for name, value in (("context", context), ("vocabulary", vocabulary), ("at_once", at_once)):
            if value < 1:
                raise UserError(f"{name} is 1 or more, was given {value}")
        self.context, self.vocabulary, self.at_once = context, vocabulary, at_once
        self.placement = AllToOne() if placement is None else placement
        self.patience, self.measurements, self.logprobs = patience, measurements, logprobs
        self._lineage = Lineage()
        self._loop: asyncio.AbstractEventLoop | None = None  # that client and gates belong to
        self._client: httpx.AsyncClient | None = None
        self._gates: list[asyncio.Semaphore] = []

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
        goes_on = origin == sequence.origin
        server = sequence.server if goes_on else self.placement.place(origin, len(self.servers))
        return _Sequence(sequence.ids[:length], origin, server)

    def extend(self, sequence: _Sequence, ids: Ids[int]) -> None:
        sequence.ids.extend(map(int, ids))

    async def decode(self, sequence: _Sequence, stop: frozenset[int], limit: int, sampling: Sampling) -> Decoded:
        """Raises ValueError where there is no room, UserError where an id is outside the vocabulary or the server would
        draw from another distribution than `sampling` says, ServerError where the server cannot do it."""
        if sequence.freed:
            raise ValueError("a freed sequence cannot decode")
        limit = min(limit, self.context - len(sequence.ids))
        if limit < 1:
            raise ValueError(f"no room to decode: {len(sequence.ids)} of {self.context} tokens")
        self._check_ids(sequence.ids)
        self._check_ids(stop)
        self._truncation(sampling)  # refused before anything is sent
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < limit and not (ids and ids[-1] in stop):
            # More than one round only where the server stopped at an end token of its own that is not in `stop`: it
            # has no way to ignore that one alone.
            answer = await self._generate(sequence, ids, stop, limit - len(ids), sampling)
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
        """Ends the connections; a decode opens new ones."""
        client, self._client, self._loop = self._client, None, None
        if client is not None:
            await client.aclose()

    # ------------------------------------------------------------------ requests

    def _check_ids(self, ids) -> None:
        for one in ids:
            if not 0 <= one < self.vocabulary:
                raise UserError(f"ids are 0 to {self.vocabulary - 1}, was given {one}: it would end the server")

    def _truncation(self, sampling: Sampling) -> tuple[int, float]:
        """The server's (top_k, top_p) for the same distribution. Both at once it takes from the whole distribution,
        `Sampling` one after the other. Raises UserError."""
        top_k = sampling.top_k if 0 < sampling.top_k < self.vocabulary else -1
        if sampling.temperature == 0 or top_k == 1:  # one token stays, whatever top_p is
            return top_k, 1.0
        if top_k > 0 and sampling.top_p < 1:
            raise UserError(
                f"SGLang applies top_k and top_p both to the whole distribution, not one after the other: give one of "
                f"them, was given top_k {sampling.top_k} and top_p {sampling.top_p}"
            )
        return top_k, sampling.top_p

    async def _generate(
        self, sequence: _Sequence, written: list[int], stop: frozenset[int], limit: int, sampling: Sampling
    ) -> _Answer:
        """One request of a decode, measured."""
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
                "stream_interval": QUIET,
            },
            "return_logprob": self.logprobs != "none",
            "stream": True,
        }
        url, asked = self.servers[sequence.server], time.perf_counter()
        answer, start, tries = await self._ask(
            sequence.server, body, lambda event, first: self._read(url, event, first, len(prompt), stop, limit)
        )
        if self.measurements is not None:
            self.measurements.append(
                Measurement(
                    sequence.origin.name, sequence.origin.depth, url, len(prompt), len(answer.ids), asked, start,
                    answer.first, answer.end, answer.cached, tries, answer.seconds, answer.queue,
                )
            )  # fmt: skip
        return answer

    async def _scores(self, sequence: _Sequence, ids: list[int]) -> list[float]:
        """The model's own log-probabilities of `ids` after a sequence: a request that reads them as its prompt."""
        url = self.servers[sequence.server]
        body = {
            "input_ids": [*sequence.ids, *ids],
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 1, "stream_interval": QUIET},
            "return_logprob": True,
            "logprob_start_len": len(sequence.ids) - 1,
            "stream": True,
        }

        def read(event: dict, first: float | None) -> list[float]:
            entries = _field(event, "meta_info", "input_token_logprobs")
            return _logprobs(url, entries[-len(ids) :] if isinstance(entries, list) else entries, ids)

        return (await self._ask(sequence.server, body, read))[0]

    async def _ask(self, server: int, body: dict, read):
        """(what `read(answer as one event, time of first token)` makes of it, when the first try began, tries). Raises
        ServerError."""
        client, gate = self._connection(server)
        url = self.servers[server]
        async with gate:
            start = time.perf_counter()
            tries, pause, failed = 0, FIRST_PAUSE, None
            while True:
                tries += 1
                try:
                    async with asyncio.timeout(self.patience.request):
                        return read(*await _stream(client, url, body)), start, tries
                except _Passing as error:
                    reason = str(error)
                except TimeoutError:
                    reason = f"no answer within {self.patience.request:g} s"
                except httpx.RequestError as error:
                    reason = _reason(error)
                now = time.perf_counter()
                failed = now if failed is None else failed
                if now + pause - failed > self.patience.retry:
                    raise ServerError(f"{url}: {reason} (given up after {tries} tries)")
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _connection(self, server: int) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """One client for all servers. Connections belong to an event loop: a new loop gets a new client."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._client, self._loop = make_client(), loop
            self._gates = [asyncio.Semaphore(self.at_once) for _ in self.servers]
        return self._client, self._gates[server]

    def _read(self, url: str, event: dict, first: float | None, prompt: int, stop: frozenset[int], limit: int):
        """The answer that a stream held. Raises ServerError for one that is not to be believed."""
        end = time.perf_counter()
        ids, meta = event.get("output_ids"), event.get("meta_info")
        if not isinstance(ids, list) or not all(type(one) is int for one in ids) or not isinstance(meta, dict):
            raise ServerError(f"{url}: the answer holds no output_ids and meta_info as SGLang's does")
        if wrong := [one for one in ids if not 0 <= one < self.vocabulary]:
            raise ServerError(f"{url}: answered with id {wrong[0]}, the vocabulary ends at {self.vocabulary - 1}")
        if not 1 <= len(ids) <= limit:
            raise ServerError(f"{url}: answered with {len(ids)} tokens, 1 to {limit} were asked for")
        if any(one in stop for one in ids[:-1]):
            raise ServerError(f"{url}: went on after a stop token")
        if meta.get("prompt_tokens") not in (None, prompt):
            raise ServerError(f"{url}: read {meta['prompt_tokens']} of {prompt} prompt tokens")
        if ids[-1] not in stop and len(ids) < limit and _field(meta, "finish_reason", "type") != "stop":
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


async def context_of_servers(servers: Ids[str], patience: float = 10.0) -> int:
    """The most tokens that a sequence may hold on every one of these servers. Raises ServerError."""
    found = []
    async with make_client() as client:
        for url in map(_checked, servers):
            try:
                async with asyncio.timeout(patience):
                    response = await client.get(f"{url}/server_info")
                longest = response.json()["max_req_input_len"] if response.status_code == 200 else None
            except TimeoutError:
                raise ServerError(f"{url}: no answer within {patience:g} s") from None
            except httpx.RequestError as error:
                raise ServerError(f"{url}: {_reason(error)}") from None
            except (ValueError, KeyError, TypeError):
                longest = None
            if type(longest) is not int or longest < 2:
                raise ServerError(f"{url}: /server_info tells no max_req_input_len as SGLang's does")
            # A prompt must be shorter than that, and a whole sequence is a prompt where it is scored.
            found.append(longest - 1)
    return min(found)


def make_client() -> httpx.AsyncClient:
    """A client without limits of its own but for connecting: engines bound what is under way and how long it may last.
    Proxies that the environment names are left alone, since servers stand on this machine or beside it."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(None, connect=CONNECT), limits=httpx.Limits(max_connections=None), trust_env=False
    )


async def _stream(client: httpx.AsyncClient, url: str, body: dict) -> tuple[dict, float | None]:
    """(a streamed answer as one event, when its first token came). Raises _Passing, ServerError, httpx.RequestError."""
    answer, first = Answer(), None
    async with client.stream("POST", f"{url}/generate", json=body) as response:
        if response.status_code != 200:
            _refused(url, response.status_code, _message(await response.aread()))
        events = Events()
        try:
            async for chunk in response.aiter_bytes():
                first = _add(url, answer, events.feed(chunk), first)
                if answer.ended:
                    break
            first = _add(url, answer, events.end(), first)
        except StreamError as error:
            raise ServerError(f"{url}: {error}") from None
    if answer.meta.get("finish_reason") is None:
        raise _Passing("the answer broke off")
    return {"output_ids": answer.ids, "meta_info": answer.meta}, first


def _add(url: str, answer: Answer, events: list[str], first: float | None) -> float | None:
    """Adds events to an answer; returns when its first token came. Raises _Passing, ServerError, StreamError."""
    for data in events:
        if data.strip() == "[DONE]":
            answer.ended = True
        if answer.ended:
            break
        event = _event(url, data)
        if _field(event, "meta_info", "finish_reason", "type") == "abort":
            reason = event["meta_info"]["finish_reason"]
            code = reason.get("status_code")
            _refused(url, code if type(code) is int else 500, str(reason.get("message")))
        answer.add(event)
        if first is None and answer.ids:
            first = time.perf_counter()
    return first


def _event(url: str, data: str) -> dict:
    """What one part of a stream holds. Raises _Passing, ServerError for an error."""
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise ServerError(f"{url}: the answer is no stream of JSON: {data[:60]!r}")
    if "error" in event:
        code = _field(event, "error", "code")
        _refused(url, code if type(code) is int else 400, _message(json.dumps(event).encode()))
    return event


def _refused(url: str, status: int, message: str) -> None:
    """Raises what an answer with an error is."""
    text = f"answered with error {status}" + (f": {message[:200]}" if message else "")
    if status >= 500 or status in (408, 429):
        raise _Passing(text)
    raise ServerError(f"{url}: {text}")


def _message(content: bytes) -> str:
    """The first line of what an error says, from JSON of SGLang's or anything else."""
    text = content.decode(errors="replace")
    try:
        found = json.loads(text)
        error = found.get("error", found)
        text = error if isinstance(error, str) else str(error.get("message", error))
    except (ValueError, AttributeError, RecursionError):
        pass
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _logprobs(url: str, entries, ids: list[int]) -> list[float]:
    """Of `ids`, from a list of [log-probability, id, ...]."""
    try:
        values = [float(entry[0]) for entry in entries]
        if [entry[1] for entry in entries] == ids and all(map(_is_logprob, values)):
            return values
    except (TypeError, ValueError, IndexError, KeyError):
        pass
    raise ServerError(f"{url}: the answer lacks the log-probabilities of its {len(ids)} tokens")


def _is_logprob(value: float) -> bool:
    return math.isfinite(value) and value < ROUNDED


def _field(content, *names: str):
    """What stands in dictionaries within one another, None where it does not."""
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _number(value):
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _checked(url: str) -> str:
    try:
        read = httpx.URL(url)
        if read.scheme in ("http", "https") and read.host:
            return url.rstrip("/")
    except httpx.InvalidURL:
        pass
    raise UserError(f"a server is given as http://HOST:PORT, was given {url!r}")


def _reason(error: httpx.RequestError) -> str:
    if isinstance(error, httpx.ConnectError):
        return "refuses connections"
    if isinstance(error, httpx.ConnectTimeout):
        return f"cannot be reached within {CONNECT:g} s"
    return f"the connection broke off ({type(error).__name__})"
