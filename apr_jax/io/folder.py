"""Atomic replacement of a folder: the new one is written beside the old one and then renamed."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def whole_path(folder: Path | str) -> Path:
    """Return the absolute path with all symbolic links resolved. Raises OSError where the links form a circle."""
    try:
        return Path(folder).resolve()
    except RuntimeError as error:
        raise OSError(str(error)) from None


@contextlib.contextmanager
def replaced(folder: Path | str, foreign: Callable[[Path], str | None], kind: str) -> Iterator[Path]:
    """Replace `folder` atomically: ``with replaced(...) as part`` gives an empty folder to write into, which becomes
    `folder` when the block ends. After an exception in the block the old folder is still there. Parts that a killed
    process left are removed first.

    `kind` is the kind of content in words, such as "export". `foreign(folder)` returns the name of a file in an
    existing folder that does not belong to this kind, else None. Raises OSError where `folder` has such a file, is a
    file itself, is the root of the file system, or is inside a saved checkpoint.
    """
    folder = whole_path(folder)
    if not folder.name:
        raise FileExistsError(f"{folder} cannot be replaced by an {kind}: give a folder inside it")
    if any((outer / "_CHECKPOINT_METADATA").exists() for outer in folder.parents):
        raise FileExistsError(f"{folder} is inside a saved step, which can have no other files: give another folder")
    part, old = (folder.with_name(f".{folder.name}.{state}") for state in ("part", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # an earlier process was killed between its two renames
    for rest in (part, old):
        if rest.exists():
            shutil.rmtree(rest)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, the {kind} needs a folder")
    if folder.exists() and (other := foreign(folder)):
        raise FileExistsError(
            f"{folder} has files that do not belong to an {kind}, such as {other}: give another folder"
        )
    try:
        part.mkdir(parents=True)
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
