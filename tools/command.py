"""The command line that all tools share: each tool's flags, --help, --debug, and user errors in one line."""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from apr_jax.errors import UserError, end_in_error, first_line
from apr_jax.io import streams
from apr_jax.io.files import write_text
from apr_jax.io.paths import expand_home

ROOT = Path(__file__).resolve().parent.parent  # of the checkout
# (old name, new name). An entry applies to the tools that have a flag of the new name.
RENAMED_FLAGS = (("least_children", "min_children"), ("style", "variant"))


def run(
    doc: str,
    define: Callable[[flags.FlagValues], None],
    work: Callable[[flags.FlagValues, list[str]], int | None],
    argv: Sequence[str],
    *,
    takes: Sequence[str] | None = (),
    required: Sequence[str] = (),
    devices: bool = False,
) -> int:
    """Parse `argv`, whose first item is the program's name, call ``work(values, arguments)``, and return the exit code.

    `define` defines the tool's flags. `takes` has the names of the positional arguments, all of which must be given;
    with None the tool checks them itself. `required` has the names of flags that must be given. With `devices`, JAX
    is started on the GPUs or else on all cores.

    UserError and OSError are errors that a user can correct: they are printed as one line on stderr, and the exit code
    is 1. Any other error is a bug and keeps its traceback; with --debug every error does. `work` may return the exit
    code of a call without errors; None is 0. A value that begins with ~ is read as a path in a home folder. Each call
    has its own `FlagValues`, so that several tools can run in one process.
    """
    streams.open_closed()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every file
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_boolean("help", False, "Print this help and stop.", short_name="h", flag_values=values)
    flags.DEFINE_boolean("debug", False, "Show the whole traceback of an error.", flag_values=values)
    try:
        arguments = _parse(values, argv)
        if values["help"].value:
            print(f"{doc.strip()}\n\nFlags:\n{_flag_help(values)}")
            return 0
        for name in values:
            if isinstance(given := values[name].value, str):
                values[name].value = expand_home(given)
        if takes is not None:
            check_arguments(arguments, takes)
        need(values, *required)
        if devices:
            use_all_cores()
        code = work(values, [expand_home(argument) for argument in arguments])
        sys.stdout.flush()
    except BrokenPipeError:  # whatever reads stdout, e.g. a pager, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return end_in_error(error, argv, _wrong_flag, _no_backend)
    return code or 0


def _parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Set the flags from a command line and return its positional arguments.

    For a renamed flag, raises UserError with the new name.
    """
    try:
        return values(list(argv))[1:]
    except flags.UnrecognizedFlagError as error:
        new = [new for old, new in RENAMED_FLAGS if old == error.flagname and new in values]
        if not new:
            raise
        raise UserError(f"--{error.flagname} was renamed to --{new[0]}") from None


def check_arguments(given: Sequence[str], names: Sequence[str]) -> None:
    """Raise UserError unless there is exactly one positional argument for each name.

    A name in lower case is a subcommand, which the caller has already checked.
    """
    if not names and given:
        raise UserError(f"only flags are allowed, --name=value, was given {given[0]!r} (--help lists the flags)")
    if len(given) != len(names):
        fixed = sum(name.islower() for name in names)  # subcommands
        raise UserError(f"the arguments are {' '.join(names)}, {len(given) - fixed} were given (--help explains)")


def need(values: flags.FlagValues, *names: str) -> None:
    """Raise UserError for the first of the named flags that has no value."""
    for name in names:
        if values[name].value in (None, ""):
            raise UserError(f"--{name} is needed, see --help")


def use_all_cores() -> None:
    """Make every core a virtual device if JAX has no GPU. Must be called before the first use of a JAX device."""
    from apr_jax.devices import start_devices  # imported here, so that --help does not wait for JAX

    start_devices(os.cpu_count() or 1)


def write_json(path: str | None, found: dict) -> None:
    """Write a tool's results to a JSON file; does nothing if `path` is None."""
    if path:
        write_text(Path(path), json.dumps(found, indent=1) + "\n")


def _wrong_flag(error: Exception) -> str | None:
    """Explain an absl error about flags in one line; None for any other error."""
    return f"{first_line(error)} (--help lists the flags)" if isinstance(error, flags.Error) else None


def _no_backend(error: Exception) -> str | None:
    """Explain in one line that JAX cannot start its devices; None for any other error."""
    if "jax" not in sys.modules:  # most tools do not need it
        return None
    from apr_jax.devices import no_backend

    return no_backend(error)


def _flag_help(values: flags.FlagValues) -> str:
    """Return one line per flag: name, help, default."""
    lines = []
    for name in dict.fromkeys(values[name].name for name in values):  # once per flag, without its short name
        flag = values[name]
        default = "" if flag.default in (None, False) else f" (default {flag.default})"
        shown = f"--{name}" if flag.boolean else f"--{name}=..."
        lines.append(f"  {shown:<18} {flag.help}{default}")
    return "\n".join(lines)
