"""Signals that end a command reliably, even where the exception of the signal handler gets lost.

JAX calls Python from C++ while it traces, compiles and collects garbage. An exception that a signal handler raises
during such a call is printed and dropped, or turns into another error. So the handler also records the signal: loops
call `check` at each step, and a command calls `given` at its end.
"""

import os
import signal
import threading

_pending: BaseException | None = None


def end_at_once(number: int, frame: object) -> None:
    """End the process at once with code 128 + the signal's number. A signal handler for the time in which modules are
    imported, when there is nothing to save."""
    os.write(2, b"\nstopped; the same command continues from here\n")
    os._exit(128 + number)


class Interrupt:
    """A context manager in which the first signal `number` is recorded and raises `error` (by default
    KeyboardInterrupt). A second signal ends the process at once with code 128 + its number, 130 for SIGINT. Outside the
    main thread the context manager does nothing, since Python allows signal handlers in the main thread alone."""

    def __init__(self, error: BaseException | None = None, number: int = signal.SIGINT):
        self._error, self._number = KeyboardInterrupt() if error is None else error, number

    def __enter__(self):
        global _pending
        _pending, self._before = None, None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(self._number, self._handle)
        return self

    def _handle(self, number, frame) -> None:
        global _pending
        if _pending is not None:
            os._exit(128 + number)
        _pending = self._error
        raise self._error

    def __exit__(self, *_):
        global _pending
        _pending = None
        if self._before is not None:
            signal.signal(self._number, self._before)


def given() -> bool:
    """Return whether the signal of the active `Interrupt` has arrived."""
    return _pending is not None


def check() -> None:
    """Raise the error of the active `Interrupt` where its signal has arrived, else do nothing. Loops call it between
    their steps."""
    if _pending is not None:
        raise _pending
