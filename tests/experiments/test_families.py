"""A model family of a user's own, through all stages by the same command."""

import json

import pytest

from apr_jax.train.checkpoint import load_meta, load_model
from tests.experiments.conftest import SMOKE, has
from tests.model.qwen3 import Qwen3, Qwen3Config

OWN = "--config.model.family=tests.model.qwen3"
SMALL = (
    "--config.data.train=60", "--config.data.held_out=4", "--config.sft.steps=6", "--config.grpo.penalties.token=0.001",
    "--config.evaluate.extra_temperatures=()", "--config.export.check_trees=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """The folder of a run of all stages on Qwen3."""
    folder = tmp_path_factory.mktemp("family") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.config.update", lambda *_: None)
        from experiments.run import main

        # Muon and fsdp both depend on the family: on its rules for matrices, and on the names of its axes.
        changes = ("--config.sft.optimizer.name=muon", "--config.fsdp=2")
        assert main(["run", SMOKE, OWN, f"--workdir={folder}", *SMALL, *changes]) == 0
    return folder


def test_every_stage_uses_the_model_of_the_family(own_run):
    for name in ("sft_apr", "sft_sos_plus", "grpo_apr"):
        model, meta = load_model(own_run / name / "checkpoints")
        assert type(model) is Qwen3 and type(model.config) is Qwen3Config
        assert (model.config.head_size, model.config.width) == (24, 32)
        assert meta["model"]["family"] == "tests.model.qwen3" and meta["model"]["head_dim"] == 24
        assert float(abs(model.layers["q_norm_LxH"][...] - 1).max()) > 0, "the gains were not trained"
        assert len((own_run / "evaluate" / f"{name}.jsonl").read_text().splitlines()) == 4
    check = json.loads((own_run / "export" / "check.json").read_text())
    assert check["model"] == "grpo_apr" and check["max_logit_difference"] < 1e-4
    assert check["trees_equal"] == check["trees"] == 2
    assert json.loads((own_run / "export" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert "A small Qwen3 trained" in (own_run / "export" / "README.md").read_text()


def test_rollouts_and_the_trainer_give_the_same_log_probabilities(own_run):
    rows = [json.loads(line) for line in (own_run / "grpo_apr" / "metrics.jsonl").read_text().splitlines()]
    found = [row["train/max_logprob_mismatch"] for row in rows if "train/max_logprob_mismatch" in row]
    assert len(found) == 2 and max(found) < 1e-4


def test_sizes_that_are_not_settings_come_from_the_checkpoint(own_run, tmp_path, main, refused):
    given = f"--config.model.checkpoint={own_run / 'sft_apr' / 'checkpoints'}"
    command = (SMOKE, f"--workdir={tmp_path / 'run'}", given, *SMALL)
    line = refused(*command)
    assert has(line, "model.checkpoint", "tests.model.qwen3", "llama", "model.family")
    assert not (tmp_path / "run").exists()
    assert main(*command, OWN, "--config.sft.steps=0", "--stage=data,sft").code == 0
    assert load_meta(tmp_path / "run" / "sft_apr" / "checkpoints")[0].head_size == 24


@pytest.mark.parametrize(
    "changes, parts",
    [
        (["family=mamba"], ("family", "llama", "'mamba'")),
        (["family=tests.tiny"], ("tests.tiny", "FAMILY")),
        (["family=tests.model.qwen3", "preset=base"], ("model.preset", "tiny", "'base'")),
        (["family=tests.model.qwen3", "kv_heads=3"], ("heads", 2, "kv_heads", 3)),
    ],
)
def test_a_wrong_family_is_refused(refused, changes, parts):
    assert has(refused(SMOKE, *(f"--config.model.{change}" for change in changes)), *parts)
