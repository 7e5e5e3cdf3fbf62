"""torch is needed to compare with transformers, and for nothing else."""

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


def test_without_torch_a_model_is_exported_and_not_compared(tmp_path, monkeypatch):
    model, folder = make_model(), tmp_path / "hf"
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it fails
    export_hf(model, TOKENIZER, folder, {}, "float32")
    for compare in (
        lambda: check_export(model, TOKENIZER, folder, [[1, 2, 3]]),
        lambda: check_trees(model, TOKENIZER, folder, CountdownProtocol("apr"), [], Budget(64)),
        lambda: greedy_agreement(model, folder, [[1, 2]], 4),
    ):
        with pytest.raises(UserError) as error:
            compare()
        assert "torch is needed" in str(error.value) and "pip install" in str(error.value)
        assert "\n" not in str(error.value)


WITHOUT_TORCH = """
import importlib, pathlib, sys
sys.modules["torch"] = None
for path in sorted(path for room in ("apr_jax", "experiments", "tools") for path in pathlib.Path(room).rglob("*.py")):
    if "sglang/cpu" not in path.as_posix():  # its files are for another environment
        importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
"""


def test_every_module_is_imported_without_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
