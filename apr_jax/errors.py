"""The one error that says: a user can mend this. And what --debug of a command line shows of any error."""

import re
from collections.abc import Sequence


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
