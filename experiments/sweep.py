"""Sweeps: one run for each combination of the values in ``--sweep=KEY=VALUE,...`` flags, each in its own folder."""

import itertools
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from ml_collections import ConfigDict

from apr_jax.errors import UserError
from experiments.command import Command, parse, read_value
from experiments.workspace import at_work


def expand(command: Command) -> list[tuple[str, list[str]]]:
    """Return (folder name, command line) of every point of a sweep, which is one combination of values.

    Raises UserError. All command lines are parsed here, so a wrong value in any of them stops the sweep before its
    first run.
    """
    axes: dict[str, list[str]] = {}
    for sweep in command.sweeps:
        key, sign, values = sweep.partition("=")
        if not sign or not values:
            raise UserError(f"--sweep is KEY=VALUE,VALUE,..., was given {sweep!r}")
        if key in axes:
            raise UserError(f"--sweep has {key} twice: give all its values at once")
        axes[key] = re.split(r",(?![^(]*\))", values)  # a comma in parentheses does not separate values
        if twice := {value for value in axes[key] if axes[key].count(value) > 1}:
            raise UserError(f"--sweep={sweep} has the value {min(twice)} twice")
        if "/" in values:
            raise UserError(f"--sweep={sweep}: a value names a folder, so it holds no '/'")
    points, read = [], set()
    for values in itertools.product(*axes.values()):
        changes = [f"{key}={value}" for key, value in zip(axes, values)]
        folder = command.workdir / ",".join(changes)
        line = [
            f"--config={command.file}", *(f"--config.{change}" for change in (*command.changes, *changes)),
            f"--stage={','.join(command.stages)}", f"--variants={command.variants_given}", f"--workdir={folder}",
            f"--store={command.store}",
            *(["--debug"] if command.debug else []),
        ]  # fmt: skip
        config = ConfigDict(parse(["run", *line]).settings.config)
        # 0.001 and 1e-3 are the same value: they would run one point twice.
        if (same := tuple(read_value(config, *change.split("=", 1)) for change in changes)) in read:
            raise UserError(f"--sweep has the point {folder.name} twice, written in two ways")
        read.add(same)
        points.append((folder.name, line))
    return points


def run_point(line: Sequence[str]) -> int:
    """Run the command of one point in a process, and return its exit code. A SIGTERM is passed on to the process, which
    saves; this process then ends with the same exit code."""
    process = subprocess.Popen([sys.executable, "-m", "experiments.run", *line])
    stopped = threading.Event()

    def stop(*_) -> None:
        stopped.set()
        process.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it had the same signal
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped.is_set():
        sys.exit(code)
    return code


def run_each(command: Command, points: Sequence[tuple[str, list[str]]]) -> None:
    """Run the points of a sweep, given as (folder name, command line), one after the other.

    Each point runs in a process of its own. If another process is already working on a point's folder, the point comes
    after the others. A failed point does not stop the others; at the end UserError is raised with the names of all
    failed points.
    """
    failed, left = [], list(points)
    for number in range(1, len(points) + 1):
        name, line = next((point for point in left if not at_work(command.workdir / point[0])), left[0])
        left.remove((name, line))
        print(f"sweep {number}/{len(points)}: {name} in {command.workdir / name}", flush=True)
        if run_point(line):
            failed.append(name)
    if failed:
        raise UserError(f"{len(failed)} of {len(points)} runs failed: {'; '.join(failed)}")
