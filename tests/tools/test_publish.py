"""Tests of tools.publish: it copies the weights without the optimizer's state, the tokenizer and the report."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

from apr_jax.model.family import config_json
from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer
from apr_jax.text.hub import find_tokenizer
from apr_jax.train.checkpoint import Checkpoints, fingerprint, load_model
from tests.tiny import make_model
from tools import publish


def weights_of(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))


@pytest.fixture
def run_folder(tmp_path):
    """A finished run with an SFT and a GRPO model."""
    run = tmp_path / "run"
    for name in publish.FILES:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    (run / "config.json").write_text('{"task": "countdown"}')
    (run / "figures").mkdir()
    (run / "figures" / "accuracy.png").write_bytes(b"PNG")
    countdown_tokenizer(99).save(run / "data" / "tokenizer.json")
    for seed, (name, step) in enumerate((("sft_apr", 40), ("grpo_apr", 2))):
        model = make_model(seed=seed)
        checkpoints = Checkpoints(run / name / "checkpoints")
        weights = weights_of(model)
        meta = {"model": config_json(model.config), "task": "countdown", "variant": "apr", "step": step}
        checkpoints.save(step, {"weights": weights, "optimizer": {"mean": weights, "square": weights}}, meta)
        checkpoints.close()
    return run


def call(*arguments):
    return publish.main(["publish", *map(str, arguments)])


def test_the_last_model_and_the_report_are_published(run_folder, tmp_path):
    out = tmp_path / "out"
    assert call(run_folder, out, "--model") == 0 == call(run_folder, out, "--model")  # the second replaces the first
    model, meta = load_model(out / "checkpoints")
    assert (meta["step"], meta["variant"]) == (2, "apr")
    jax.tree.map(np.testing.assert_array_equal, weights_of(model), weights_of(make_model(seed=1)))
    assert find_tokenizer(out / "checkpoints") == out / "tokenizer.json"
    assert (out / "figures" / "accuracy.png").read_bytes() == b"PNG"
    assert (out / "manifest.json").read_text() == "data/manifest.json"
    stored = sum(path.stat().st_size for path in (out / "checkpoints").rglob("*") if path.is_file())
    whole = sum(path.stat().st_size for path in (run_folder / "grpo_apr").rglob("*") if path.is_file())
    assert stored < whole / 2
    assert json.loads((out / "checkpoints" / "2" / "meta" / "metadata").read_text())["step"] == 2


def test_a_report_of_other_weights_is_not_published(run_folder, tmp_path, capsys):
    check = run_folder / "export" / "check.json"
    check.write_text(json.dumps({"model": "grpo_apr", "weights": fingerprint(make_model(seed=0))}))
    assert call(run_folder, tmp_path / "out", "--model") == 1 and not (tmp_path / "out").exists()
    assert re.search(f"{run_folder}/export .*weights .*{run_folder}/grpo_apr", capsys.readouterr().err)
    check.write_text(json.dumps({"model": "grpo_apr", "weights": fingerprint(make_model(seed=1))}))
    assert call(run_folder, tmp_path / "out", "--model") == 0


def test_the_report_is_published_without_a_model(run_folder, tmp_path):
    assert call(run_folder, tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.md", "summary.json", "config.json", "versions.json", "manifest.json", "check.json", "figures",
    }  # fmt: skip


@pytest.mark.parametrize("out", ["", "sft_apr", "grpo_apr", "new", "../other"])
def test_publishing_into_a_run_is_refused(run_folder, out, capsys):
    """In sft_apr, publishing would replace the SFT checkpoint by the GRPO model, without the optimizer's state."""
    if out == "../other":
        (run_folder / out).mkdir()
        (run_folder / out / "metrics.jsonl").write_text("")
    before = sorted(path for path in run_folder.parent.rglob("*"))
    assert call(run_folder, run_folder / out, "--model") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{run_folder / out} " in err
    assert sorted(path for path in run_folder.parent.rglob("*")) == before


def test_an_unfinished_run_is_refused(run_folder, tmp_path, capsys):
    (run_folder / "export" / "check.json").unlink()
    for arguments, says in (
        ([run_folder, tmp_path / "out"], f"{run_folder} .*export/check.json"),
        ([tmp_path / "nothing", tmp_path / "out"], f"{tmp_path}/nothing .*report.md"),
        ([run_folder], "RUN OUT.* 1 "),
    ):
        assert call(*arguments) == 1
        err = capsys.readouterr().err
        assert re.search(says, err) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
