"""Logs a stage's metrics per step, as JSON lines and TensorBoard events."""

import contextlib
import math
import sys
from pathlib import Path

from apr_jax.io import json_lines
from apr_jax.io.files import write_text


class MetricsLog:
    """A writer of `metrics.jsonl` and of TensorBoard events (`tensorboard/`) in one folder.

    A run resumes after step `resume_at`. Existing lines of later steps are removed, since those steps will be done
    again: each step is logged once. A value that is NaN or infinite becomes null in the JSON, which has no NaN.
    """

    def __init__(self, folder: Path, resume_at: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            rows = [row for _, row in json_lines.read_lines(path, cut_short=True)]
            kept = [row for row in rows if row.get("step", sys.maxsize) <= resume_at]
            write_text(path, "".join(map(json_lines.to_line, kept)))
        self._file = path.open("a")
        from tensorboardX import SummaryWriter  # imported here: it imports torch, which takes 3 s

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the values of one step: append a JSON line, flushed at once, and TensorBoard events. Raises OSError if
        the line cannot be written, as on a full disk."""
        shown = {name: value if math.isfinite(value) else None for name, value in values.items()}
        json_lines.append(self._file, {"step": step, **shown})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close both files, without an OSError of a full disk: each line was flushed when it was written, and that
        write has raised the error already."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()
