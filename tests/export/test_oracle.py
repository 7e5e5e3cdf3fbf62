"""Tests that only comparisons with transformers need torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from apr_jax.errors import UserError
from apr_jax.export.hf import check_export, check_trees, export_hf, greedy_agreement
from apr_jax.tasks.countdown import CountdownProtocol
from apr_jax.threads.run import Budget
from tests.tiny import TOKENIZER, make_model

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
