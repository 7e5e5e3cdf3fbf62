"""Files that are there whole or not at all: a kill or a full disk leaves what was there before."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

LEFT_AFTER = 24 * 3600  # seconds without a change after which a part file is a killed process'; one takes minutes


def part_of(path: Path) -> Path:
    """Where what becomes `path` is written first: a name beside it that no other process has, on any machine that sees
    the folder, since process ids may be equal there."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """``with whole(path) as part``: the file or folder written at `part` becomes `path` when the block ends, in the
    place of a file of that name. After an error nothing of it stays. Makes the folder that `path` lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all, and makes its folder."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def remove_left(parts: Iterable[Path]) -> None:
    """Removes those part files and folders that killed processes left. A process that still runs has some, too: they
    are not as old."""
    for left in list(parts):
        with contextlib.suppress(FileNotFoundError):  # another process removes it
            if time.time() - left.stat().st_mtime < LEFT_AFTER:
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()
