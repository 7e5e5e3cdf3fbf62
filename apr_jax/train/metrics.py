"""What a run tells while it runs: JSON lines, TensorBoard, and one line of progress."""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

from apr_jax import interrupt


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events in one folder.

    A resumed run goes on after `resume_at`: lines from steps that will be done again are taken out, so that
    every step stands there once. A value that is not finite is null there: JSON has no NaN.
    """

    def __init__(self, folder: Path, resume_at: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step(line) <= resume_at]
            part = path.with_name(path.name + ".part")
            part.write_text("".join(line + "\n" for line in lines))
            os.replace(part, path)
        self._file = path.open("a")
        from tensorboardX import SummaryWriter  # here, since it brings in torch: 3 s before any message

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        shown = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **shown}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Raises nothing on a full disk: every line was flushed when written, and the error on its way says more."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line cut short by a kill
        return sys.maxsize


class Progress:
    """One line with a rate and the time left: rewritten on a terminal, else printed now and then."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0):
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._began, self._first = time.monotonic(), done
        self._last = 0.0
        self._live = sys.stderr.isatty()

    def update(self, done: int, note: str = "") -> None:
        """Raises KeyboardInterrupt where a Ctrl-C was lost."""
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
        with contextlib.suppress(OSError):  # a closed terminal or a full disk behind it is no reason to end
            print(f"\r\x1b[K{line}" if self._live else line, end=end, file=sys.stderr, flush=True)
