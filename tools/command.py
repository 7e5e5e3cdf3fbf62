"""The command line that all tools share: flags of their own, a --help for newcomers, errors in one line."""

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

ROOT = Path(__file__).resolve().parent.parent  # the checkout


def run(
    doc: str,
    define: Callable[[flags.FlagValues], None],
    work: Callable[[flags.FlagValues, list[str]], None],
    argv: Sequence[str],
    *,
    takes: Sequence[str] | None = (),
    required: Sequence[str] = (),
    devices: bool = False,
) -> int:
    """Parses `argv` (the program's name first), calls ``work(values, arguments)``, returns the exit code.

    `takes` names the arguments that are no flags, each of them needed; None leaves them to the tool. `required` names
    the flags that are needed. With `devices` JAX is started for work on all cores, or on the GPUs.

    Each call has its own `FlagValues`, so that tools may share names and run within one process. UserError and OSError
    are a user's: one line on stderr and code 1. Anything else is ours and keeps its traceback, with --debug any error
    does. A flag or argument that begins with ~ is read as a path in a home folder.
    """
    streams.open_closed()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_boolean("help", False, "Show this and stop.", short_name="h", flag_values=values)
    flags.DEFINE_boolean("debug", False, "Show the whole traceback of any error.", flag_values=values)
    try:
        arguments = values(list(argv))[1:]
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
        work(values, [expand_home(argument) for argument in arguments])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, a pager perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        return end_in_error(error, argv, _wrong_flag, _no_backend)
    return 0


def check_arguments(given: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError unless there is one argument for each name."""
    if not names and given:
        raise UserError(f"only flags are taken, --name=value, was given {given[0]!r} (--help lists the flags)")
    if len(given) != len(names):
        fixed = sum(name.islower() for name in names)  # a command's own word
        raise UserError(f"the arguments are {' '.join(names)}, {len(given) - fixed} were given (--help explains)")


def need(values: flags.FlagValues, *names: str) -> None:
    """Raises UserError for the first flag without a value."""
    for name in names:
        if values[name].value in (None, ""):
            raise UserError(f"--{name} is needed, see --help")


def use_all_cores() -> None:
    """Makes a virtual device of every core where JAX has no GPU; before its first device is asked for."""
    from apr_jax.devices import start_devices  # here: --help of other tools need not wait for JAX

    start_devices(os.cpu_count() or 1)


def write_json(path: str | None, found: dict) -> None:
    """Writes figures to a file, if one is named."""
    if path:
        write_text(Path(path), json.dumps(found, indent=1) + "\n")


def _wrong_flag(error: Exception) -> str | None:
    return f"{first_line(error)} (--help lists the flags)" if isinstance(error, flags.Error) else None


def _no_backend(error: Exception) -> str | None:
    if "jax" not in sys.modules:  # most tools do not need it
        return None
    from apr_jax.devices import no_backend

    return no_backend(error)


def _flag_help(values: flags.FlagValues) -> str:
    lines = []
    for name in dict.fromkeys(values[name].name for name in values):  # short names left out
        flag = values[name]
        default = "" if flag.default in (None, False) else f" (default {flag.default})"
        shown = f"--{name}" if flag.boolean else f"--{name}=..."
        lines.append(f"  {shown:<18} {flag.help}{default}")
    return "\n".join(lines)
