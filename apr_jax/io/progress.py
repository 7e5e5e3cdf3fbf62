"""A progress line on stderr."""

import contextlib
import sys
import time

from apr_jax import interrupt


class Progress:
    """A line with the number done, the rate and the time left. On a terminal it is rewritten at most every 0.5 seconds;
    elsewhere a new line is printed at most every 15 seconds. The last update is always shown.

    `done` is the number of units that an earlier process had done; the rate is without them.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0):
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._began, self._first = time.monotonic(), done
        self._last = 0.0
        self._live = sys.stderr.isatty()

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` units are done. Raises the error of a signal whose exception was lost
        (`apr_jax.interrupt`)."""
        interrupt.check()
        self.done = done
        now = time.monotonic()
        if done < self.total and now - self._last < (0.5 if self._live else 15.0):
            return
        self._last = now
        rate = (done - self._first) / max(now - self._began, 1e-9)
        left = (self.total - done) / rate if rate > 0 else float("inf")
        clock = f"{int(left // 60)}:{int(left % 60):02d}" if left < 1e6 else "?"
        speed = f"{rate:.0f}" if rate >= 1000 else f"{rate:.3g}"
        line = f"{self.title}: {done}/{self.total} {self.unit}, {speed}/s, {clock} left{', ' + note if note else ''}"
        end = "\n" if not self._live or done >= self.total else ""
        with contextlib.suppress(OSError):  # a closed terminal or a full disk must not end the work
            print(f"\r\x1b[K{line}" if self._live else line, end=end, file=sys.stderr, flush=True)
