"""A job scheduler's notice: SIGTERM ends a run at its next step, after a save."""

import signal
import threading


class Terminated(Exception):
    """The run was asked to end and has saved; the same command goes on from there."""


class PreemptionRequest:
    """Within it a first SIGTERM is only noted, as `given`; a second one ends the process.

    It is this process' own: several must agree before they act on one (`Trainer.step` adds their flags up).
    """

    def __enter__(self):
        self.given, self._before = False, None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number, frame) -> None:
        self.given = True
        signal.signal(number, self._before)

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
