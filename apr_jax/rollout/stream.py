"""A streamed answer: server-sent events from bytes, and the parts of an answer of SGLang's put together.

A part holds all ids so far, or (a server with incremental streaming) the new ones alone; `completion_tokens` tells
which. Log-probabilities come either way, too, and not always the way of the ids.
"""

import re

FIELDS = ("data", "event", "id", "retry")


class StreamError(Exception):
    """A stream that holds something else than parts of an answer, or parts that contradict each other: one line."""


class Events:
    """The data of the events in a stream of bytes, several lines of it joined; comments and other fields are left out.
    Lines end as server-sent events allow it, and nowhere else: text may hold any other separator. What stands after
    the last blank line is an event as well."""

    def __init__(self):
        self._rest = b""
        self._begun = False
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The events that `chunk` ends. Raises StreamError for a line that is no field."""
        # A carriage return at the end may be half of a line's end.
        *lines, self._rest = re.split(rb"\r\n|\n|\r(?=[^\n])", self._rest + chunk)
        return [event for line in lines for event in self._line(line)]

    def end(self) -> list[str]:
        """The events that stood open when the stream ended."""
        lines = [*re.split(rb"\r\n|\n|\r", self._rest), b""]
        return [event for line in lines for event in self._line(line)]

    def _line(self, line: bytes) -> list[str]:
        text = line.decode(errors="replace")
        text, self._begun = text if self._begun else text.removeprefix("\ufeff"), True
        field, _, value = text.partition(":")
        if text and field not in ("", *FIELDS):
            raise StreamError(f"the answer is no stream of JSON: {text[:60]!r}")
        if field == "data":
            self._data.append(value.removeprefix(" "))
        if text or not self._data:
            return []
        data, self._data = "\n".join(self._data), []
        return [data]


class Answer:
    """The parts of one answer, put together: `ids` and `meta`, the last part's with the log-probabilities of all.
    `ended`: the server said that nothing comes any more."""

    def __init__(self):
        self.ended = False
        self.ids: list = []
        self.meta: dict = {}
        self._logprobs: list[list] = []  # of each part

    def add(self, event: dict) -> None:
        """Raises StreamError."""
        ids, meta = event.get("output_ids"), event.get("meta_info")
        if not isinstance(ids, list) or not isinstance(meta, dict):
            raise StreamError("the answer holds no output_ids and meta_info as SGLang's does")
        count = meta.get("completion_tokens")
        if type(count) is not int:
            count = len(ids)  # all ids so far, if what came before agrees
        if len(ids) == count:
            if ids[: len(self.ids)] != self.ids:
                raise StreamError(
                    f"the answer's first {len(self.ids)} tokens changed, or it tells no completion_tokens"
                )
            self.ids = list(ids)
        elif len(self.ids) + len(ids) == count:
            self.ids = self.ids + ids
        else:
            raise StreamError(
                f"the answer has {len(self.ids)} tokens and {len(ids)} more, its completion_tokens say {count}"
            )
        told = meta.get("output_token_logprobs")
        self._logprobs.append(told if isinstance(told, list) else [])
        kept = {name: self.meta[name] for name in ("input_token_logprobs",) if name in self.meta}
        self.meta = {**kept, **meta, "output_token_logprobs": self._joined()}

    def _joined(self) -> list:
        """Entries of the last part where those are all, else of all parts."""
        last = self._logprobs[-1]
        return last if len(last) == len(self.ids) else [entry for part in self._logprobs for entry in part]
