"""JSON lines: files with one JSON object per line, in UTF-8. Blank lines are skipped.

Shape letters of this module: X bytes of a file, R lines (rows) of a file.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from apr_jax.errors import UserError

NEWLINE = ord("\n")


def to_line(row: dict[str, Any]) -> str:
    """Return an object as one line of JSON that ends in a newline."""
    return json.dumps(row, separators=(",", ":")) + "\n"


def append(file: TextIO, row: dict[str, Any]) -> None:
    """Write an object as one line to an open file and flush it, so that a kill loses no earlier line."""
    file.write(to_line(row))
    file.flush()


def read_lines(path: str | Path, cut_short: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for the lines of a file. Numbers start at 1.

    Raises FileNotFoundError. Raises UserError with the file and the line number for a line without a JSON object. With
    `cut_short` a killed process may have left the file: a line without a whole object is skipped, and a missing file
    has no lines.
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
    """The objects of a file as a sequence. The file is mapped into memory, and a line is parsed on each access, so only
    two integers per line are kept. A slice is a list of objects.

    Raises FileNotFoundError. An access to a line without a JSON object raises UserError with the file and the line
    number.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        size = os.stat(self.path).st_size
        self._bytes_X = np.memmap(self.path, np.uint8, "r") if size else np.zeros(0, np.uint8)  # no empty memory maps
        self._breaks_R = breaks_R = np.flatnonzero(self._bytes_X == NEWLINE)
        starts_R, ends_R = np.append(0, breaks_R + 1), np.append(breaks_R, size)
        filled_R = ends_R > starts_R  # false for blank lines, and after the last newline at the end of the file
        self._starts_R, self._ends_R = starts_R[filled_R], ends_R[filled_R]

    def __reduce__(self):
        return JsonLines, (self.path,)  # pickled as its path: another process maps the file again

    def __len__(self) -> int:
        return len(self._starts_R)

    def __getitem__(self, index: int | slice):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        start, end = int(self._starts_R[index]), int(self._ends_R[index])
        try:
            return _parsed(self._bytes_X[start:end].tobytes())
        except ValueError as error:
            raise _broken(self.path, self.number(index), error) from None

    def number(self, index: int) -> int:
        """Return the number in the file, counted from 1, of the line at an index. Blank lines have no index."""
        return int(np.searchsorted(self._breaks_R, self._starts_R[index])) + 1


def _parsed(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line. Raises ValueError where the line is no JSON object."""
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
