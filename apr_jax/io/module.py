"""Import of a module that a user names in a setting."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from apr_jax.errors import UserError


def load_module(name: str) -> ModuleType:
    """Import the module ``package.module`` from the installed packages or from the current folder. Raises UserError
    where there is no such module. An ImportError for a module that it imports is raised unchanged."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that files of the current folder hide no installed module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(f"no module {error.name}") from None
        raise
