"""Atomic writes of files: after a kill or on a full disk the previous file is still there, unchanged."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

# Seconds without a change after which a part file counts as left by a killed process. Writing one takes minutes.
LEFT_AFTER = 24 * 3600


def part_of(path: Path) -> Path:
    """Return the temporary path at which a new version of `path` is written, in the same folder. The name is unique
    over all processes of all machines that share the folder; process ids would not be."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file or folder atomically: ``with whole(path) as part`` renames `part` to `path` when the block ends. An
    existing file at `path` is replaced. After an error `part` is deleted. Creates the folder of `path` where it is
    missing."""
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
    """Write a text file in UTF-8 atomically. Creates its folder where it is missing."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def remove_left(parts: Iterable[Path]) -> None:
    """Remove the files and folders in `parts` that have not changed for `LEFT_AFTER` seconds, which killed processes
    left. Younger ones may belong to a running process and stay."""
    for left in list(parts):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if time.time() - left.stat().st_mtime < LEFT_AFTER:
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()
