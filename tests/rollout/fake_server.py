"""A fake SGLang server for tests, with faults on request. Its next token is a function of the context.

It runs in a thread (`FakeServer`) or as a process: ``python -m tests.rollout.fake_server serve FOLDER PORT``. The
process takes FAKE_WAIT seconds for an answer. If FAKE_LASTS is set and FOLDER/ended does not exist, the process creates
that file and dies after FAKE_LASTS requests.
"""

import asyncio
import hashlib
import json
import os
import sys
import threading
from collections import deque
from pathlib import Path

from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer
from apr_jax.tasks.tagged.protocol import TAGS
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.engine import Decoded
from tests.threads.fake_engine import FakeEngine

TOKENIZER = countdown_tokenizer(30)  # as in tests.tiny, which cannot be imported here: it needs JAX
CONTEXT = 200  # tokens of the model's context; the server refuses prompts of CONTEXT - 6 tokens or more
SPARE = 7  # a sequence may have CONTEXT - SPARE tokens
LIKELY = tuple(map(TOKENIZER.token, (trace.SPAWN_OPEN, trace.SPAWN_CLOSE, trace.JOIN_OPEN))) + (TOKENIZER.eos,)


def next_token(ids):
    """Return the next id after a context: any token, often one of LIKELY."""
    digest = hashlib.blake2b(",".join(map(str, ids)).encode(), digest_size=4).digest()
    return LIKELY[digest[1] % len(LIKELY)] if digest[0] < 50 else digest[2] % len(TOKENIZER)


def logprob(ids):
    return -0.001 * (next_token(ids) + 1)


class ContextEngine(FakeEngine):
    """An engine in memory with the same tokens and log-probabilities as the fake server."""

    def __init__(self, context=CONTEXT - SPARE, **settings):
        super().__init__(lambda name, ids: iter(()), context=context, **settings)

    async def decode(self, sequence, stop, limit, sampling, watch=None):
        assert sequence in self.live and 1 <= limit <= self.context - len(sequence.ids)
        ids, logprobs = [], []
        await asyncio.sleep(0)
        while len(ids) < limit and not (ids and ids[-1] in stop):
            logprobs.append(logprob(sequence.ids))
            ids.append(next_token(sequence.ids))
            sequence.ids.append(ids[-1])
        if watch is not None:
            watch(0, tuple(ids))
        return Decoded(tuple(ids), tuple(logprobs), ids[-1] in stop, tuple(logprobs))


class FakeServer:
    """A fake server in a thread. Use it as a context manager. `requests` are the bodies it received.

    Each request takes one entry of `faults`: a name, an HTTP status, or None for no fault. An answer is streamed in
    parts that end at the token counts `parts`. Each part has all ids and log-probabilities so far; `incremental` names
    which of them are new ones only ("ids", "logprobs" or "both"). `own_end` is an id at which the server stops by
    itself. An answer takes `wait` seconds. `write` converts an event's JSON to bytes.
    """

    def __init__(self, faults=(), own_end=None, wait=0.0, parts=(1,), incremental="", write=None):
        self.parts, self.incremental = parts, incremental
        self.write = write or (lambda event: f"data: {event}\n\n".encode())
        self.faults, self.own_end, self.wait = deque(faults), own_end, wait
        self.requests, self.seen = [], []
        self.lasts = None  # requests until the process dies; None: it does not
        self.under_way = self.most_under_way = 0

    # -------------------------------------------------------------- in a thread

    def start(self, port=0):
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", port))
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def stop(self):
        async def end():
            self._server.close()
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()
            await asyncio.sleep(0.01)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    # -------------------------------------------------------------- HTTP

    async def _connected(self, reader, writer):
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and await self._answer(head.decode(), reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, head, reader, writer):
        """Answer one request. Returns whether the connection stays open."""
        length = next((int(h.split(":")[1]) for h in head.split("\r\n") if h.lower().startswith("content-length")), 0)
        body = await reader.readexactly(length)
        path = head.split()[1]
        if path == "/health":
            self._whole(writer, 200, b"")
        elif path == "/server_info":
            self._whole(writer, 200, json.dumps({"max_req_input_len": CONTEXT - 6}).encode())
        elif path == "/flush_cache":
            self.seen.clear()
            self._whole(writer, 200, b"")
        elif path == "/generate":
            return await self._generate(json.loads(body), writer)
        else:
            self._whole(writer, 404, b"")
        return True

    def _whole(self, writer, status, content):
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)

    async def _generate(self, body, writer):
        self.requests.append(body)
        if self.lasts is not None and len(self.requests) > self.lasts:
            os._exit(3)
        fault = self.faults.popleft() if self.faults else None
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self.wait)
            return await self._fulfil(body, fault, writer)
        finally:
            self.under_way -= 1

    async def _fulfil(self, body, fault, writer):
        if fault == "close":
            return False
        if fault == "slow":
            await asyncio.sleep(60)
        if isinstance(fault, int):
            self._whole(writer, fault, json.dumps({"error": {"message": f"fault {fault}\nmore"}}).encode())
            return True
        if fault == "html":
            self._whole(writer, 200, b"<html>a proxy</html>")
            return True
        ids = body["input_ids"]
        if len(ids) >= CONTEXT - 6:
            self._whole(writer, 400, json.dumps({"error": {"message": f"The input ({len(ids)}) is longer"}}).encode())
            return True
        *first, last = self._events(body)
        change = FAULTS.get(fault)
        if change:
            change(last)
        if fault == "no tokens":
            first = []
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        events = [*map(json.dumps, first), *([] if fault == "drop" else [json.dumps(last), "[DONE]"])]
        if fault == "error event":
            events = [json.dumps({"error": {"message": "no such thing", "code": 400}}), "[DONE]"]
        if fault == "nested":
            events = ["[" * 100_000]
        if fault == "end early":
            events = events[:1]
        for event in events:
            part = self.write(event)
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
        if fault == "drop":
            return False
        writer.write(b"0\r\n\r\n")
        return True

    def _events(self, body):
        """Return the parts of a streamed answer."""
        prompt, how = body["input_ids"], body["sampling_params"]
        assert all(0 <= one < len(TOKENIZER) for one in prompt), (
            "an id outside the vocabulary would crash a real server"
        )
        cached = max((_common(prompt, old) for old in self.seen), default=0)
        limit = min(how["max_new_tokens"], CONTEXT - 2 - len(prompt))
        stop = {*how.get("stop_token_ids", ()), *([] if self.own_end is None else [self.own_end])}
        ids, logprobs = [], []
        while len(ids) < limit and not (ids and ids[-1] in stop):
            context = prompt + ids
            logprobs.append([logprob(context) / (how["temperature"] or 1), next_token(context), None])
            ids.append(next_token(context))
        self.seen.append(prompt + ids)
        reason = {"type": "stop", "matched": ids[-1]} if ids[-1] in stop else {"type": "length", "length": limit}
        meta = {
            "prompt_tokens": len(prompt), "cached_tokens": min(cached, len(prompt) - 1), "finish_reason": reason,
            "e2e_latency": 0.01, "queue_time": 0.001,
        }  # fmt: skip
        if "logprob_start_len" in body:
            at = body["logprob_start_len"]
            meta["input_token_logprobs"] = [[None, prompt[at], None]] + [
                [logprob(prompt[:i]), prompt[i], None] for i in range(at + 1, len(prompt))
            ]
        ends = [end for end in self.parts if end < len(ids)] + [len(ids)]
        events = []
        for begin, end in zip([0, *ends], ends):
            new = {name: slice(begin if self.incremental in (name, "both") else 0, end) for name in ("ids", "logprobs")}
            part = {**meta, "completion_tokens": end, "output_token_logprobs": logprobs[new["logprobs"]]}
            if not body["return_logprob"]:
                del part["output_token_logprobs"]
            if end < len(ids):
                part["finish_reason"] = None
            events.append({"text": "", "output_ids": ids[new["ids"]], "meta_info": part})
        return events


def _common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def set_tokens(event, ids):
    """Replace the ids of an event, and their count."""
    event["output_ids"], event["meta_info"]["completion_tokens"] = ids, len(ids)


FAULTS = {
    "wrong id": lambda event: event["output_ids"].__setitem__(-1, len(TOKENIZER)),
    "text id": lambda event: event["output_ids"].__setitem__(-1, "7"),
    "too many": lambda event: set_tokens(event, event["output_ids"] * 300),
    "no tokens": lambda event: set_tokens(event, []),
    "other count": lambda event: event["meta_info"].update(completion_tokens=99),
    "other tokens": lambda event: set_tokens(event, [token ^ 1 for token in event["output_ids"]]),
    "no logprobs": lambda event: event["meta_info"].pop("output_token_logprobs"),
    "null logprob": lambda event: event["meta_info"]["output_token_logprobs"][0].__setitem__(0, None),
    "large logprob": lambda event: event["meta_info"]["output_token_logprobs"][0].__setitem__(0, 0.5),
    "fewer logprobs": lambda event: event["meta_info"]["output_token_logprobs"].pop(),
    "cut prompt": lambda event: event["meta_info"].update(prompt_tokens=1),
    "abort": lambda event: event["meta_info"].update(finish_reason={"type": "abort", "message": "gone"}),
}


def speak(folder):
    """Answers in the tokens of the exported model in a folder. Of a task of tags, every tag is likely."""
    global TOKENIZER, LIKELY
    TOKENIZER = Tokenizer.load(Path(folder) / "tokenizer.json")
    if tags := [ids[0] for ids in map(TOKENIZER.encode, TAGS) if len(ids) == 1]:
        LIKELY = (*tags, TOKENIZER.eos)


def main(_, folder, port):
    if (Path(folder) / "tokenizer.json").is_file():
        speak(folder)
    server, marker = FakeServer(wait=float(os.environ.get("FAKE_WAIT", 0))), Path(folder) / "ended"
    if (lasts := int(os.environ.get("FAKE_LASTS", 0))) and not marker.exists():
        server.lasts = lasts
        marker.touch()
    server.start(int(port))
    print("fake server", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
