"""The parser of SGLang's streamed answers: server-sent events from bytes, and one answer from the events' parts.

Each part contains all ids so far or, if the server streams incrementally, only the new ids. The field
`completion_tokens`, the number of ids so far, distinguishes the two. Log-probabilities also come in either form, and
not always in the same form as the ids.
"""

import re

FIELDS = ("data", "event", "id", "retry")


class StreamError(Exception):
    """An invalid stream: not parts of an answer, or parts that contradict each other. The message is one line."""


class Events:
    """An incremental parser of server-sent events that returns the data of each event.

    Several data lines of an event are joined by newlines; comments and other fields are dropped. A line ends only with
    CR, LF or CRLF, as the specification says: text may contain other Unicode line separators. Data after the last blank
    line counts as an event.
    """

    def __init__(self):
        self._rest = b""
        self._begun = False
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """Return the data of the events that `chunk` completes. Raises StreamError for a line that is not a field."""
        # A carriage return at the end of a chunk may be the first half of CRLF, so it stays for the next chunk.
        *lines, self._rest = re.split(rb"\r\n|\n|\r(?=[^\n])", self._rest + chunk)
        return [event for line in lines for event in self._line(line)]

    def end(self) -> list[str]:
        """Return the data of the event that was incomplete when the stream ended, if any."""
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
    """One answer, joined from its streamed parts. `ids` are all its ids. `meta` is the last part's `meta_info` with the
    log-probabilities of all ids. `ended` is true once the server has sent its end mark."""

    def __init__(self):
        self.ended = False
        self.ids: list = []
        self.meta: dict = {}
        self._logprobs: list[list] = []  # one list per part

    def add(self, event: dict) -> None:
        """Add one part. Raises StreamError if it lacks a field or contradicts the earlier parts."""
        ids, meta = event.get("output_ids"), event.get("meta_info")
        if not isinstance(ids, list) or not isinstance(meta, dict):
            raise StreamError("the answer holds no output_ids and meta_info as SGLang's does")
        count = meta.get("completion_tokens")
        if type(count) is not int:
            count = len(ids)  # assume all ids so far; the check below finds out if they are not
        if len(ids) == count:
            if ids[: len(self.ids)] != self.ids:
                raise StreamError(f"the answer's first {len(self.ids)} tokens changed, or it has no completion_tokens")
            self.ids = list(ids)
        elif len(self.ids) + len(ids) == count:
            self.ids = self.ids + ids
        else:
            raise StreamError(
                f"the answer has {len(self.ids)} tokens and {len(ids)} more, its completion_tokens say {count}"
            )
        logprobs = meta.get("output_token_logprobs")
        self._logprobs.append(logprobs if isinstance(logprobs, list) else [])
        kept = {name: self.meta[name] for name in ("input_token_logprobs",) if name in self.meta}
        self.meta = {**kept, **meta, "output_token_logprobs": self._joined()}

    def _joined(self) -> list:
        """The log-probabilities of all ids: the last part's if they are complete, else those of all parts joined."""
        last = self._logprobs[-1]
        return last if len(last) == len(self.ids) else [entry for part in self._logprobs for entry in part]


def nested(content, *names: str):
    """Return the entry at a path of keys in nested dictionaries, and None if it does not exist."""
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content
