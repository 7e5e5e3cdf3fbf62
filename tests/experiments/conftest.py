"""One whole run of the smoke preset, shared by all tests here (read it, or copy it and change the copy), and the
command in this process."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from apr_jax.train.checkpoint import load_model
from experiments import run

ROOT = Path(__file__).resolve().parent.parent.parent
SMOKE = "--config=experiments/configs/smoke.py"
LIMITED = """
import resource, runpy, sys
most = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
runpy.run_module("experiments.run", run_name="__main__", alter_sys=True)
"""


def start(*arguments, most: int | None = None, **options) -> subprocess.Popen:
    """The command in a process of its own, as a user starts it; no file that it writes grows past `most` bytes."""
    begin = ["-m", "experiments.run"] if most is None else ["-c", LIMITED, str(most)]
    line = [sys.executable, *begin, SMOKE, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, cwd=ROOT, **pipes | options)


def finish(process: subprocess.Popen) -> SimpleNamespace:
    out, err = process.communicate(timeout=900)
    return SimpleNamespace(code=process.returncode, out=out, err=err)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The folder of an uninterrupted run, and what the run printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = finish(start(f"--workdir={folder}"))
    assert done.code == 0, done.err
    return SimpleNamespace(folder=folder, out=done.out, err=done.err)


@pytest.fixture
def main(monkeypatch, capfd):
    """Runs a command in this process: its exit code, what it printed on stderr, and that as one line."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the tests' own settings stay

    def call(*arguments):
        capfd.readouterr()
        code = run.main(["run", *map(str, arguments)])
        captured = capfd.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call


@pytest.fixture
def refused(main):
    """The one line that a wrong command ends in."""

    def call(*arguments):
        done = main(*arguments)
        assert done.code == 1 and done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        assert "Traceback" not in done.out
        return done.err.removeprefix("error: ").strip()

    return call


def snapshot(folder: Path, *patterns: str) -> dict[str, bytes]:
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def same_weights(a: Path, b: Path) -> bool:
    (one, one_meta), (two, two_meta) = load_model(a), load_model(b)
    equal = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), *(nnx.to_pure_dict(nnx.state(m)) for m in (one, two)))
    return one_meta == two_meta and all(jax.tree.leaves(equal))
