"""The HTTP client of SGLang servers. It sends generation requests, reads their streamed answers, and repeats a request
that failed for a reason that may pass."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from typing import TypeVar

import httpx

from apr_jax.errors import UserError
from apr_jax.rollout.stream import Answer, Events, StreamError, nested

CONNECT = 10.0  # seconds to open a connection
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts; each pause is twice the one before

Result = TypeVar("Result")


class ServerError(ConnectionError):
    """A server that cannot be reached or does not answer as an SGLang server does. The message is one line that begins
    with the server's address."""


class _TransientError(Exception):
    """A failure that another attempt may not meet."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a request may take, in seconds. Altogether a request takes at most two attempts and `retry`."""

    request: float = 600.0  # for one attempt, including the wait in the server's queue
    retry: float = 60.0  # from the first failure of a request until it is given up

    def __post_init__(self):
        for name in ("request", "retry"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} of a patience is above 0 s, was given {getattr(self, name)}")


class Client:
    """The client of several SGLang servers. At most `at_once` requests are open at each server; further ones wait."""

    def __init__(self, servers: Ids[str], at_once: int, patience: Patience):
        self.servers, self.at_once, self.patience = servers, at_once, patience
        self._loop: asyncio.AbstractEventLoop | None = None  # the event loop of `_http` and `_gates`
        self._http: httpx.AsyncClient | None = None
        self._gates: list[asyncio.Semaphore] = []

    async def generate(
        self, server: int, body: dict, read: Callable[[dict, float | None], Result],
        part: Callable[[list], None] | None = None,
    ) -> tuple[Result, float, int]:  # fmt: skip
        """Send a request to ``/generate`` of the server with index `server`, and repeat it after transient failures.

        `read(event, first)` checks and converts the answer: `event` is the whole answer as one event, `first` the time
        of its first token. `part(ids)` is called with all ids so far, as the server sent them, whenever some arrive.
        Returns (the result of `read`, the start of the first attempt, the number of attempts);
        times are seconds of `time.perf_counter`. Each attempt begins anew: nothing of a broken answer is kept. Raises
        ServerError when the request is refused, the answer is invalid or `patience` is at its end.
        """
        http, gate = self._connection(server)
        url = self.servers[server]
        async with gate:
            start = time.perf_counter()
            attempts, pause, failed = 0, FIRST_PAUSE, None
            while True:
                attempts += 1
                try:
                    async with asyncio.timeout(self.patience.request):
                        return read(*await _stream(http, url, body, part)), start, attempts
                except _TransientError as error:
                    reason = str(error)
                except TimeoutError:
                    reason = f"no answer within {self.patience.request:g} s"
                except httpx.RequestError as error:
                    reason = _reason(error)
                now = time.perf_counter()
                failed = now if failed is None else failed
                if now + pause - failed > self.patience.retry:
                    raise ServerError(f"{url}: {reason} (given up after {attempts} attempts)")
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    async def close(self) -> None:
        """Close the connections. The next request opens new ones."""
        http, self._http, self._loop = self._http, None, None
        if http is not None:
            await http.aclose()

    def _connection(self, server: int) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """Return the HTTP client, one for all servers, and the server's semaphore. Connections belong to an event loop,
        so a new loop gets a new client."""
        loop = asyncio.get_running_loop()
        if self._http is None or self._loop is not loop:
            self._http, self._loop = make_http_client(), loop
            self._gates = [asyncio.Semaphore(self.at_once) for _ in self.servers]
        return self._http, self._gates[server]


async def context_of_servers(servers: Ids[str], patience: float = 10.0) -> int:
    """Return the most tokens that a sequence may have on every one of these servers.

    Raises ServerError if a server does not answer within `patience` seconds or its answer is not SGLang's, and
    UserError for an invalid address.
    """
    found = []
    async with make_http_client() as http:
        for url in map(checked_url, servers):
            try:
                async with asyncio.timeout(patience):
                    response = await http.get(f"{url}/server_info")
                longest = response.json()["max_req_input_len"] if response.status_code == 200 else None
            except TimeoutError:
                raise ServerError(f"{url}: no answer within {patience:g} s") from None
            except httpx.RequestError as error:
                raise ServerError(f"{url}: {_reason(error)}") from None
            except (ValueError, KeyError, TypeError):
                longest = None
            if type(longest) is not int or longest < 2:
                raise ServerError(f"{url}: /server_info has no max_req_input_len as SGLang's does")
            # A prompt must be shorter than max_req_input_len, and scoring sends a whole sequence as a prompt.
            found.append(longest - 1)
    return min(found)


def make_http_client() -> httpx.AsyncClient:
    """Make an HTTP client whose only limit is the time to connect. Its users bound the number and duration of requests.
    Proxies in the environment are ignored, since servers run on this machine or near it."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(None, connect=CONNECT), limits=httpx.Limits(max_connections=None), trust_env=False
    )


def checked_url(url: str) -> str:
    """Return a server's address without a slash at its end. Raises UserError if it is not http://HOST:PORT."""
    try:
        read = httpx.URL(url)
        if read.scheme in ("http", "https") and read.host:
            return url.rstrip("/")
    except httpx.InvalidURL:
        pass
    raise UserError(f"a server is given as http://HOST:PORT, was given {url!r}")


async def _stream(
    http: httpx.AsyncClient, url: str, body: dict, part: Callable[[list], None] | None
) -> tuple[dict, float | None]:
    """Make one attempt. Returns (the streamed answer joined to one event, the time of its first token). `part` as in
    `Client.generate`. Raises _TransientError, ServerError or httpx.RequestError."""
    answer, first = Answer(), None
    async with http.stream("POST", f"{url}/generate", json=body) as response:
        if response.status_code != 200:
            _raise_error(url, response.status_code, _message(await response.aread()))
        events = Events()
        try:
            async for chunk in response.aiter_bytes():
                before = len(answer.ids)
                first = _add(url, answer, events.feed(chunk), first)
                if part is not None and len(answer.ids) > before:
                    part(answer.ids)
                if answer.ended:
                    break
            first = _add(url, answer, events.end(), first)
        except StreamError as error:
            raise ServerError(f"{url}: {error}") from None
    if answer.meta.get("finish_reason") is None:
        raise _TransientError("the answer broke off")
    return {"output_ids": answer.ids, "meta_info": answer.meta}, first


def _add(url: str, answer: Answer, events: list[str], first: float | None) -> float | None:
    """Add events to an answer. Returns the time of its first token, None while it has none. Raises _TransientError,
    ServerError or StreamError."""
    for data in events:
        if data.strip() == "[DONE]":
            answer.ended = True
        if answer.ended:
            break
        event = _event(url, data)
        if nested(event, "meta_info", "finish_reason", "type") == "abort":
            reason = event["meta_info"]["finish_reason"]
            code = reason.get("status_code")
            _raise_error(url, code if type(code) is int else 500, str(reason.get("message")))
        answer.add(event)
        if first is None and answer.ids:
            first = time.perf_counter()
    return first


def _event(url: str, data: str) -> dict:
    """Parse the JSON of one event. Raises _TransientError or ServerError if it reports an error, and ServerError if it
    is not a JSON object."""
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise ServerError(f"{url}: the answer is no stream of JSON: {data[:60]!r}")
    if "error" in event:
        code = nested(event, "error", "code")
        _raise_error(url, code if type(code) is int else 400, _message(json.dumps(event).encode()))
    return event


def _raise_error(url: str, status: int, message: str) -> None:
    """Raise the exception of an HTTP error status: _TransientError if a later attempt may succeed, else ServerError."""
    text = f"answered with error {status}" + (f": {message[:200]}" if message else "")
    if status >= 500 or status in (408, 429):
        raise _TransientError(text)
    raise ServerError(f"{url}: {text}")


def _message(content: bytes) -> str:
    """Return the first line of an error's message. `content` is SGLang's JSON or any other text."""
    text = content.decode(errors="replace")
    try:
        found = json.loads(text)
        error = found.get("error", found)
        text = error if isinstance(error, str) else str(error.get("message", error))
    except (ValueError, AttributeError, RecursionError):
        pass
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _reason(error: httpx.RequestError) -> str:
    """Describe a failed connection."""
    if isinstance(error, httpx.ConnectError):
        return "refuses connections"
    if isinstance(error, httpx.ConnectTimeout):
        return f"cannot be reached within {CONNECT:g} s"
    return f"the connection broke off ({type(error).__name__})"
