"""JSON lines: files that hold one JSON object a line, encoded as UTF-8. Blank lines are passed over."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from apr_jax.errors import UserError

NEWLINE = ord("\n")


def to_line(row: dict[str, Any]) -> str:
    """An object as one line, its end included."""
    return json.dumps(row, separators=(",", ":")) + "\n"


def append(file: TextIO, row: dict[str, Any]) -> None:
    """Writes one line to an open file and flushes it, so that a kill loses no line that was written."""
    file.write(to_line(row))
    file.flush()


def read_lines(path: str | Path, cut_short: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, each with the number of its line, counted from 1.

    Raises FileNotFoundError, and UserError that names the file and the line for a line that holds no JSON object.
    With `cut_short` the file is one that a killed process may have left: a line that holds no whole object is left out,
    and no file is no lines.
    """
    path = Path(path)
    if cut_short and not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = _parsed(line)
            except ValueError as error:
                if cut_short:
                    continue
                raise _broken(path, number, error) from None
            yield number, row


class JsonLines(Sequence[dict[str, Any]]):
    """The objects of a file by their index. The file is mapped into memory and a line is parsed when it is asked for:
    memory does not grow with the number of lines. A slice is a list.

    Raises FileNotFoundError; an index or slice raises UserError that names the file and the line for a line that holds
    no JSON object.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        size = os.stat(self.path).st_size
        self._bytes_S = np.memmap(self.path, np.uint8, "r") if size else np.zeros(0, np.uint8)  # an empty map is none
        breaks_N = np.flatnonzero(self._bytes_S == NEWLINE)
        starts_N, ends_N = np.append(0, breaks_N + 1), np.append(breaks_N, size)
        filled_N = ends_N > starts_N  # the end of the file, behind its last newline, among the others
        self._starts_N, self._ends_N = starts_N[filled_N], ends_N[filled_N]

    def __reduce__(self):
        return JsonLines, (self.path,)  # another process maps the file itself

    def __len__(self) -> int:
        return len(self._starts_N)

    def __getitem__(self, index: int | slice):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        start, end = int(self._starts_N[index]), int(self._ends_N[index])
        try:
            return _parsed(self._bytes_S[start:end].tobytes())
        except ValueError as error:
            number = int(np.count_nonzero(self._bytes_S[:start] == NEWLINE)) + 1
            raise _broken(self.path, number, error) from None


def _parsed(line: bytes) -> dict[str, Any]:
    """Raises ValueError where a line holds no JSON object."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("no UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}")
    return row


def _broken(path: Path, number: int, error: ValueError) -> UserError:
    return UserError(f"{path}, line {number}: no JSON object: {error}")
