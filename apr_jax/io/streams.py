"""The standard streams of a process, which a caller may have closed (`>&-`, a daemon)."""

import os
import sys


def open_closed() -> None:
    """Sends what is written to a closed stdout or stderr to nowhere. Called before any file is opened: a file would
    take the number of a closed stream, and what a library writes to stderr would land in it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))
