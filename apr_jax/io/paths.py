"""Paths that users give on a command line or in a setting, and reading of JSON files."""

import json
import os
from pathlib import Path
from typing import Any

from apr_jax.errors import UserError


def expand_home(given: str) -> str:
    """Replace `~` or `~NAME` at the beginning of a path by that user's home folder, which a shell does not do after
    ``--flag=``. Returns other paths unchanged. Raises UserError where NAME has no home folder."""
    found = os.path.expanduser(given)
    if found.startswith("~"):
        name = found.partition(os.sep)[0]
        raise UserError(f"{name} has no home folder, was given {given}: write ./{given} for a folder of that name")
    return found


def user_path(given: str) -> Path:
    """Return a given path with the home folder in place of `~`. Raises UserError as `expand_home` does."""
    return Path(expand_home(given))


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError where the file has none; the message ends in `mend`, the
    advice to the user."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):  # the file is no JSON, no text, or nested too deep
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is broken: {mend}")
    return found
