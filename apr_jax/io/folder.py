"""A folder that is there whole or not at all: written beside its place and renamed into it."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def whole_path(folder: Path | str) -> Path:
    """The path without links. Raises OSError where they lead in a circle."""
    try:
        return Path(folder).resolve()
    except RuntimeError as error:
        raise OSError(str(error)) from None


@contextlib.contextmanager
def replaced(folder: Path | str, foreign: Callable[[Path], str | None], kind: str) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` at the end of the block; an exception in the block
    leaves what was there. What a killed process left is cleared first.

    `foreign` names something in an existing folder that is no `kind`'s ("export"), or gives None. Raises OSError, also
    where `folder` is a file or holds something foreign.
    """
    folder = whole_path(folder)
    if not folder.name:
        raise FileExistsError(f"{folder} cannot be replaced by an {kind}: give a folder in it")
    if any((outer / "_CHECKPOINT_METADATA").exists() for outer in folder.parents):
        raise FileExistsError(f"{folder} lies in a saved step, which holds nothing else: give another folder")
    part, old = (folder.with_name(f".{folder.name}.{state}") for state in ("part", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed between the two renames
    for rest in (part, old):
        if rest.exists():
            shutil.rmtree(rest)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, the {kind} needs a folder")
    if folder.exists() and (other := foreign(folder)):
        raise FileExistsError(f"{folder} holds files that are no {kind}'s, such as {other}: give another folder")
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
