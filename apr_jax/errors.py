"""`UserError`, the error for wrong input, and the exit of command lines after an error."""

import errno
import re
import sys
from collections.abc import Callable, Sequence


class UserError(ValueError):
    """Wrong input from a user: a setting, a flag, a file or a folder. The message is one line that names the given
    value and the allowed values, or the remedy. Command lines print this line without a traceback.

    Every other exception is a bug or a failure of the system and keeps its traceback. A function raises a plain
    ValueError where its caller breaks its contract.
    """


def debug_asked(argv: Sequence[str]) -> bool:
    """Return whether a command line has --debug. The flag is searched in the raw arguments: parsing them may be what
    failed."""
    return any(re.fullmatch(r"--?debug(=(true|t|1))?", argument, re.IGNORECASE) for argument in argv[1:])


def with_causes(error: BaseException) -> BaseException:
    """Return the error itself, changed so that its traceback shows all errors before it. `raise ... from None` hides
    them."""
    link = error
    while link is not None:
        link.__suppress_context__ = False
        link = link.__cause__ or link.__context__
    return error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type where the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason(error: BaseException) -> str | None:
    """Return one line for an error that a user can repair: a `UserError` or an error of the operating system. Returns
    None for any other error: it is a bug, and its traceback is needed."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{where}{error.strerror}{'; free some space, then the same command resumes' if full else ''}"
    return first_line(error) if isinstance(error, UserError | OSError) else None


def end_in_error(error: Exception, argv: Sequence[str], *further: Callable[[Exception], str | None]) -> int:
    """Print an error as one line on stderr and return the exit code of the command line.

    The line is the error's `reason`, or else the result of the first function in `further` that returns one. Raises the
    error again where no function returns a line, since it is a bug then, and always with --debug.
    """
    if debug_asked(argv):
        raise with_causes(error)
    for explain in (reason, *further):
        if (line := explain(error)) is not None:
            return fail(line)
    raise error


def fail(line: str) -> int:
    """Print one line on stderr and return 1, the exit code after an error that a user can repair."""
    print(f"error: {line}", file=sys.stderr)
    return 1
