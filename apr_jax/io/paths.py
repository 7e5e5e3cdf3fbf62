"""Paths as users give them on a command line or in a setting, and the JSON files that lie there."""

import json
import os
from pathlib import Path
from typing import Any

from apr_jax.errors import UserError


def expand_home(given: str) -> str:
    """A path whose `~` or `~NAME` at the beginning is that user's home folder, which a shell does not do behind
    ``--flag=``; any other text as it is. Raises UserError where NAME has no home folder."""
    found = os.path.expanduser(given)
    if found.startswith("~"):
        name = found.partition(os.sep)[0]
        raise UserError(f"{name} has no home folder, was given {given}: write ./{given} for a folder of that name")
    return found


def user_path(given: str) -> Path:
    """`expand_home` as a path."""
    return Path(expand_home(given))


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """The JSON object of a file. Raises UserError, with what to do (`mend`), where it holds none."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):  # no JSON, or no text
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is broken: {mend}")
    return found
