"""The one error that says: a user can mend this. And how all command lines end in an error."""

import errno
import re
import sys
from collections.abc import Callable, Sequence


class UserError(ValueError):
    """Wrong input: a setting, a flag, a file, a folder. The message is one line that names the value given and the
    values allowed, or what to do. Command lines print the line alone.

    Every other exception is a bug or a failure of the system, and keeps its traceback. A function that is called in a
    way its contract excludes raises a plain ValueError.
    """


def debug_asked(argv: Sequence[str]) -> bool:
    """Whether a command line has --debug. It counts before the other flags are read, since those may be what is
    wrong."""
    return any(re.fullmatch(r"--?debug(=(true|t|1))?", argument, re.IGNORECASE) for argument in argv[1:])


def with_causes(error: BaseException) -> BaseException:
    """The error itself, with all errors that led to it shown in its traceback: `raise ... from None` hides them."""
    link = error
    while link is not None:
        link.__suppress_context__ = False
        link = link.__cause__ or link.__context__
    return error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason(error: BaseException) -> str | None:
    """One line for an error that a user can mend: a `UserError`, or one of the operating system. None for any other: it
    is a bug, and its traceback is needed."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{where}{error.strerror}{'; make room, the same command then goes on' if full else ''}"
    return first_line(error) if isinstance(error, UserError | OSError) else None


def end_in_error(error: Exception, argv: Sequence[str], *further: Callable[[Exception], str | None]) -> int:
    """The exit code of a command line that ended in an error, which is told in one line on stderr.

    The line is the error's `reason`, or else that of the first of the `further` functions that has one. An error
    without a line is a bug and is raised again, with --debug any error is.
    """
    if debug_asked(argv):
        raise with_causes(error)
    for explain in (reason, *further):
        if (line := explain(error)) is not None:
            return fail(line)
    raise error


def fail(line: str) -> int:
    """Prints one line on stderr; returns the exit code of an error that a user can mend."""
    print(f"error: {line}", file=sys.stderr)
    return 1
