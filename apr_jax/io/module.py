"""Modules that a user names: of the installed packages, or beside them in the current folder."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from apr_jax.errors import UserError


def load_module(name: str) -> ModuleType:
    """The module ``package.module``, looked for also in the current folder. Raises UserError where there is none; an
    import that fails inside the module raises as it is."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last: a file there hides no module of anybody
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(f"no module {error.name}") from None
        raise
