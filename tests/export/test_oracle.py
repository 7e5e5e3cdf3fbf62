"""Tests of the engine on transformers: its observer, and that only comparisons with transformers need torch."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from apr_jax.errors import UserError
from apr_jax.export.hf import check_export, check_trees, export_hf, greedy_agreement, load_transformers
from apr_jax.export.oracle import TransformersEngine
from apr_jax.tasks.countdown import CountdownProtocol
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner
from tests.threads.recorder import Recorder, check_recorded
from tests.tiny import TOKENIZER, NonsenseProtocol, make_model, spawning_model

ROOT = Path(__file__).resolve().parent.parent.parent


def test_without_torch_export_works_and_checks_raise_one_line(tmp_path, monkeypatch):
    model, folder = make_model(), tmp_path / "hf"
    monkeypatch.setitem(sys.modules, "torch", None)  # makes an import of torch fail
    export_hf(model, TOKENIZER, folder, {}, "float32")
    for compare in (
        lambda: check_export(model, TOKENIZER, folder, [[1, 2, 3]]),
        lambda: check_trees(model, TOKENIZER, folder, CountdownProtocol("apr"), [], Budget(64)),
        lambda: greedy_agreement(model, folder, [[1, 2]], 4),
    ):
        with pytest.raises(UserError) as error:
            compare()
        assert "torch" in str(error.value) and "pip install" in str(error.value)
        assert "\n" not in str(error.value)


def test_an_observer_gets_the_ids_of_every_thread(tmp_path):
    pytest.importorskip("torch")
    export_hf(spawning_model(), TOKENIZER, tmp_path / "hf", {}, "float32")
    engine, recorder = TransformersEngine(load_transformers(tmp_path / "hf"), 64), Recorder()
    runner = TreeRunner(engine, NonsenseProtocol(2), TOKENIZER, Budget(64), Sampling(0.0), recorder)
    check_recorded(recorder, {(0,): asyncio.run(runner.run(0, (0,)))})


WITHOUT_TORCH = """
import importlib, pathlib, sys
sys.modules["torch"] = None
for path in sorted(path for room in ("apr_jax", "experiments", "tools") for path in pathlib.Path(room).rglob("*.py")):
    if "sglang/cpu" not in path.as_posix():  # these files are for SGLang's environment
        importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
"""


def test_every_module_can_be_imported_without_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
