"""Preemption requests: on SIGTERM, a job scheduler's signal, a run saves at its next step and ends."""

import signal
import threading


class Terminated(Exception):
    """Raised by a run that was preempted and has saved. The same command resumes it."""


class PreemptionRequest:
    """A context that catches the first SIGTERM and sets `received`. A second SIGTERM has its usual effect again.

    Signals reach one process alone. Several processes must agree before they act on a request: `Trainer.step` adds up
    their flags. Outside the main thread the context does nothing, since Python allows no signal handlers there.
    """

    def __enter__(self):
        self.received, self._before = False, None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, number, frame) -> None:
        self.received = True
        signal.signal(number, self._before)

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
