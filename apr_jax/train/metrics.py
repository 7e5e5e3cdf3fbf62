"""What a stage tells of its steps: JSON lines and TensorBoard."""

import contextlib
import math
import sys
from pathlib import Path

from apr_jax.io import json_lines
from apr_jax.io.files import write_text


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events in one folder.

    A resumed run goes on after `resume_at`: lines from steps that will be done again are taken out, so that
    every step stands there once. A value that is not finite is null there: JSON has no NaN.
    """

    def __init__(self, folder: Path, resume_at: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            rows = [row for _, row in json_lines.read_lines(path, cut_short=True)]
            kept = [row for row in rows if row.get("step", sys.maxsize) <= resume_at]
            write_text(path, "".join(map(json_lines.to_line, kept)))
        self._file = path.open("a")
        from tensorboardX import SummaryWriter  # here, since it brings in torch: 3 s before any message

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        shown = {name: value if math.isfinite(value) else None for name, value in values.items()}
        json_lines.append(self._file, {"step": step, **shown})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Raises nothing on a full disk: every line was flushed when written, and the error on its way says more."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()
