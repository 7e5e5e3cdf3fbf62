"""What the tools' command lines share: flags of their own, a --help for newcomers, errors in one line."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from apr_jax.errors import UserError, debug_asked, with_causes
from apr_jax.io import streams
from apr_jax.io.files import write_text
from apr_jax.io.paths import expand_home


def run(doc: str, define: Callable[[flags.FlagValues], None], work: Callable[..., None], argv: Sequence[str]) -> int:
    """Parses `argv` (the program's name first), calls ``work(values, arguments)``, returns the exit code.

    Each call has its own `FlagValues`, so that tools may share names and run within one process. UserError
    and OSError are a user's: one line on stderr and code 1. Anything else is ours and keeps its traceback, with --debug
    any error does. A flag or argument that begins with ~ is read as a path in a home folder.
    """
    streams.open_closed()
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
        work(values, [expand_home(argument) for argument in arguments])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, a pager perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if debug_asked(argv):
            raise with_causes(error)
        if isinstance(error, flags.Error):
            return fail(f"{_first_line(error)} (--help lists the flags)")
        if not isinstance(error, UserError | OSError):
            if line := _no_backend(error):
                return fail(line)
            raise
        return fail(_first_line(error))
    return 0


def use_all_cores() -> None:
    """Makes a virtual device of every core where JAX has no GPU; before its first device is asked for."""
    from apr_jax.devices import set_cpu_devices  # here: --help of other tools need not wait for JAX

    set_cpu_devices(os.cpu_count() or 1)


def write_json(path: str | None, found: dict) -> None:
    """Writes figures to a file, if one is named."""
    if path:
        write_text(Path(path), json.dumps(found, indent=1) + "\n")


def fail(message: str) -> int:
    """Prints one line; returns the exit code of bad input."""
    print(f"error: {message}", file=sys.stderr)
    return 1


def _no_backend(error: Exception) -> str | None:
    if "jax" not in sys.modules:  # most tools do not need it
        return None
    from apr_jax.devices import no_backend

    return no_backend(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _flag_help(values: flags.FlagValues) -> str:
    lines = []
    for name in dict.fromkeys(values[name].name for name in values):  # short names left out
        flag = values[name]
        default = "" if flag.default in (None, False) else f" (default {flag.default})"
        shown = f"--{name}" if flag.boolean else f"--{name}=..."
        lines.append(f"  {shown:<18} {flag.help}{default}")
    return "\n".join(lines)
