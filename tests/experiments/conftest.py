"""Fixtures and helpers: one whole run of the smoke preset, and commands in this process or in one of their own.

All tests share the whole run: a test that changes it works on a copy.
"""

import os
import re
import shutil
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
    """Start `experiments.run` on the smoke preset in a process of its own, as a user does.

    If `most` is given, no file that the process writes can grow past this number of bytes.
    """
    begin = ["-m", "experiments.run"] if most is None else ["-c", LIMITED, str(most)]
    line = [sys.executable, *begin, SMOKE, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, cwd=ROOT, **pipes | options)


def finish(process: subprocess.Popen) -> SimpleNamespace:
    """Wait for a process. Return its exit code and what it printed."""
    out, err = process.communicate(timeout=900)
    return SimpleNamespace(code=process.returncode, out=out, err=err)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The folder of an uninterrupted run of all stages, and what the run printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = finish(start(f"--workdir={folder}"))
    assert done.code == 0, done.err
    return SimpleNamespace(folder=folder, out=done.out, err=done.err)


@pytest.fixture
def main(monkeypatch, capfd):
    """Runs a command in this process. Returns its exit code and what it printed."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # keeps the JAX settings of the tests

    def call(*arguments):
        capfd.readouterr()
        code = run.main(["run", *map(str, arguments)])
        captured = capfd.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call


@pytest.fixture
def refused(main):
    """Runs a wrong command in this process. Returns the one line that it printed, without "error: "."""

    def call(*arguments):
        done = main(*arguments)
        assert done.code == 1 and done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        assert "Traceback" not in done.out
        return done.err.removeprefix("error: ").strip()

    return call


def has(message: str, *parts: object) -> bool:
    """Return whether a message has all parts as whole words: a setting, the given value, the allowed values.

    Numbers must be whole, too: 1 is not in "10", "1.5" or "x1".
    """
    return all(re.search(rf"(?<![\w.]){re.escape(str(part))}(?!\w|\.\d)", message) for part in parts)


def copy_run(run: Path, folder: Path, *without: str) -> Path:
    """Copy a run with its store and links, without the files and folders that match any of some patterns.

    The pattern "grpo*" matches the links and the outputs of GRPO. Return the folder of the copy.
    """
    return shutil.copytree(run, folder, symlinks=True, ignore=shutil.ignore_patterns(*without), dirs_exist_ok=True)


def snapshot(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Return the content of each file that matches a pattern, by its path in the folder."""
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def same_weights(a: Path, b: Path) -> bool:
    """Return whether two folders of checkpoints have the same last weights and metadata."""
    (one, one_meta), (two, two_meta) = load_model(a), load_model(b)
    equal = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), *(nnx.to_pure_dict(nnx.state(m)) for m in (one, two)))
    return one_meta == two_meta and all(jax.tree.leaves(equal))
