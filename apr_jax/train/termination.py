"""A job scheduler's notice: SIGTERM ends a run at its next step, after a save."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Terminated(Exception):
    """The run was asked to end and has saved; the same command goes on from there."""


class Notice:
    """Within it a first SIGTERM is only noted, for `given` to tell at a step's end; a second one ends the process.

    With several processes the notice that one of them gets goes to all, at the same step (JAX's own service, which
    `jax.distributed.initialize` starts).
    """

    def __enter__(self):
        self._given, self._before = False, None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number, frame) -> None:
        self._given = True
        signal.signal(number, self._before)

    def given(self, step: int) -> bool:
        """Whether to save and end after this step; with several processes all of them ask at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._given

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
