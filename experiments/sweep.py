"""Sweeps: the product of ``KEY=VALUE,...`` flags, each point a run of its own in its own folder."""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ml_collections


def expand(sweeps: Sequence[str], config: ml_collections.ConfigDict) -> list[dict[str, str]]:
    """All points of the sweeps as {key: value}; raises ValueError for a key that the config lacks."""
    axes = []
    for sweep in sweeps:
        key, sign, values = sweep.partition("=")
        if not sign or not values:
            raise ValueError(f"a sweep is KEY=VALUE,VALUE,..., was given {sweep!r}")
        here = config
        for part in key.split("."):
            if not isinstance(here, ml_collections.ConfigDict) or part not in here:
                raise ValueError(f"no setting {key!r} to sweep over; {part!r} is not among {', '.join(sorted(here))}")
            here = here[part]
        axes.append([(key, value) for value in values.split(",")])
    return [dict(point) for point in itertools.product(*axes)]


def run_each(points: Sequence[dict[str, str]], workdir: Path, argv: Sequence[str]) -> None:
    """Runs the points one after the other, each as the command it would be by hand; points that failed are
    named at the end, after all others have run."""
    kept = [arg for arg in argv[1:] if not arg.startswith(("--sweep", "--workdir"))]
    failed = []
    for point in points:
        name = ",".join(f"{key}={value}" for key, value in point.items())
        flags = [f"--config.{key}={value}" for key, value in point.items()]
        print(f"sweep {name}", flush=True)
        command = [sys.executable, "-m", "experiments.run", *kept, *flags, f"--workdir={workdir / name}"]
        if subprocess.run(command).returncode:
            failed.append(name)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(points)} runs failed: {'; '.join(failed)}")
