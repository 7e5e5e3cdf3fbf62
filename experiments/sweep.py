"""Sweeps: the product of ``KEY=VALUE,...`` flags, each point a run of its own in its own folder."""

import itertools
import re
import subprocess
import sys
from collections.abc import Sequence

from apr_jax.errors import UserError
from experiments.command import Command, parse, read_value


def expand(command: Command) -> list[tuple[str, list[str]]]:
    """(folder, command line) of every point, each one parsed, so that a wrong value stops the sweep at its
    start. Raises UserError."""
    axes: dict[str, list[str]] = {}
    for sweep in command.sweeps:
        key, sign, values = sweep.partition("=")
        if not sign or not values:
            raise UserError(f"--sweep is KEY=VALUE,VALUE,..., was given {sweep!r}")
        if key in axes:
            raise UserError(f"--sweep has {key} twice: give all its values at once")
        axes[key] = re.split(r",(?![^(]*\))", values)  # a list in parentheses is one value
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
            *(["--debug"] if command.debug else []),
        ]  # fmt: skip
        task = parse(["run", *line]).settings.config["task"]
        # Two ways to write one value, as 0.001 and 1e-3, would run one point twice.
        if (same := tuple(read_value(task, *change.split("=", 1)) for change in changes)) in read:
            raise UserError(f"--sweep has the point {folder.name} twice, written in two ways")
        read.add(same)
        points.append((folder.name, line))
    return points


def run_each(command: Command, points: Sequence[tuple[str, list[str]]]) -> None:
    """Runs the points one after the other, each as the command it would be by hand. Raises UserError that
    names those that failed, after all others have run."""
    failed = []
    for number, (name, line) in enumerate(points, 1):
        print(f"sweep {number}/{len(points)}: {name} in {command.workdir / name}", flush=True)
        if subprocess.run([sys.executable, "-m", "experiments.run", *line]).returncode:
            failed.append(name)
    if failed:
        raise UserError(f"{len(failed)} of {len(points)} runs failed: {'; '.join(failed)}")
