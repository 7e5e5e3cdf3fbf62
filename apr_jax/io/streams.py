"""Standard streams that the caller of a process has closed, with `>&-` in a shell or as a daemon."""

import os
import sys


def open_closed() -> None:
    """Open closed standard streams on the null device. Must be called before any file is opened: a file would get the
    descriptor of a closed stream, and output of libraries to stderr would be written into that file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is `number`
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))
