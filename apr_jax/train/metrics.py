"""What a stage tells of its steps: JSON lines and TensorBoard."""

import contextlib
import json
import math
import os
import sys
from pathlib import Path


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
