"""A signal that ends a command, also where the exception that it raises is lost.

JAX calls Python from C++, as it traces, compiles and collects garbage. An exception that a signal's handler raises in
there is printed and dropped, or comes out as another error. So the signal is noted as well: loops call `check` at each
step, and a command asks `given` where it ends.
"""

import os
import signal
import threading

_pending: BaseException | None = None


def end_at_once(number: int, frame: object) -> None:
    """A handler for the time before anything is begun, while modules are imported."""
    os.write(2, b"\nstopped; the same command goes on from here\n")
    os._exit(128 + number)


class Interrupt:
    """Within it the first signal of a kind raises `error` and is noted; a second one ends the process at once, with
    code 128 + its number (130 of a SIGINT). In another thread than the main one it does nothing."""

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
    """Whether a signal has come."""
    return _pending is not None


def check() -> None:
    """Raises what the signal raised, if one has come: for the boundaries of steps."""
    if _pending is not None:
        raise _pending
