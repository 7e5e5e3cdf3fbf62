"""Runs whose SFT begins with the weights of a checkpoint: used, deleted later, or not fitting the run."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from apr_jax.model.family import config_json
from apr_jax.model.llama import Llama, LlamaConfig
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.train.checkpoint import load_meta, load_model, save_model
from experiments.command import load_config
from experiments.settings import read_settings
from tests.experiments.conftest import SMOKE, has

STILL = [f"--config.sft.optimizer.{name}=0" for name in ("peak_lr", "muon_lr", "init_lr_fraction", "final_lr_fraction")]


def weights_of(model) -> dict:
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))


def save_given(folder, tokenizer: Tokenizer, **sizes) -> Llama:
    """Save a checkpoint as tools.import_hf does, with the smoke preset's sizes except for `sizes`. Return its model."""
    smoke = read_settings(load_config(SMOKE.removeprefix("--config="))).model
    config = LlamaConfig(**{"vocab_size": len(tokenizer), **smoke, "rope_theta": 700.0, "norm_epsilon": 1e-3} | sizes)
    model = Llama(config, rngs=nnx.Rngs(77))
    save_model(folder, model, {"model": config_json(config), "stage": "imported", "step": 0})
    tokenizer.save(folder / "tokenizer.json")
    return model


@pytest.fixture
def begun(whole_run, tmp_path):
    """A run folder that has data, the tokenizer of the data, and the folder for a given checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(whole_run.folder / "data", folder / "data")
    return folder, Tokenizer.load(folder / "data" / "tokenizer.json"), tmp_path / "given"


def test_with_no_sft_step_the_given_weights_are_the_supervised_model(begun, main):
    folder, tokenizer, given = begun
    model = save_given(given, tokenizer)
    command = (SMOKE, f"--workdir={folder}", f"--config.model.checkpoint={given}", "--config.sft.steps=0",
               "--config.grpo.steps=1", "--config.evaluate.slots=4")  # fmt: skip
    done = main(*command, "--stage=sft,grpo,evaluate,report")
    assert done.code == 0, done.err
    for name in ("sft_sos_plus", "sft_apr"):
        found, meta = load_model(folder / name / "checkpoints")
        assert (meta["step"], meta["stage"]) == (0, "sft")
        assert (found.config.rope_theta, found.config.norm_epsilon) == (700.0, 1e-3)
        jax.tree.map(np.testing.assert_array_equal, weights_of(found), weights_of(model))
    after, meta = load_meta(folder / "grpo_apr" / "checkpoints")
    assert meta["step"] == 1 and after.rope_theta == 700.0
    assert "| APR SFT |" in done.out and "| APR SFT+GRPO |" in done.out
    shutil.rmtree(given)
    assert main(*command, "--stage=sft").code == 0  # all steps are done, so the checkpoint is not needed


def test_sft_begins_with_a_checkpoint_and_resumes_after_its_deletion(begun, main, refused):
    folder, tokenizer, given = begun
    model = save_given(given, tokenizer)
    command = (SMOKE, f"--workdir={folder}", f"--config.model.checkpoint={given}", "--config.sft.tokens=1030",
               "--config.sft.save_every=1", *STILL)  # fmt: skip
    assert main(*command, "--stage=sft").code == 0
    shutil.rmtree(folder / "sft_apr" / "checkpoints" / "2")  # two batches of 1,024 tokens at most
    shutil.rmtree(given)
    assert has(refused(*command, "--stage=grpo"), "sft_apr", 1, 2, "--stage=sft")
    done = main(*command, "--stage=sft")
    assert done.code == 0, done.err
    found, meta = load_model(folder / "sft_apr" / "checkpoints")
    assert meta["step"] == 2 and found.config.rope_theta == 700.0
    jax.tree.map(np.testing.assert_array_equal, weights_of(found), weights_of(model))


def test_a_checkpoint_of_other_sizes_is_refused_before_anything_is_written(tmp_path, whole_run, refused):
    tokenizer = Tokenizer.load(whole_run.folder / "data" / "tokenizer.json")
    folder = tmp_path / "run"
    for index, (sizes, parts) in enumerate(
        [
            ({"width": 64}, (64, 32, "model.width")),
            ({"kv_heads": 2}, (2, 1, "model.kv_heads")),
            ({"tie_embeddings": True}, ("True", "False", "model.tie_embeddings")),
            ({"context": 128}, ("window", "context", 128, 256)),
        ]
    ):
        given = tmp_path / f"given{index}"
        save_given(given, tokenizer, **sizes)
        assert has(
            refused(SMOKE, f"--workdir={folder}", f"--config.model.checkpoint={given}"), "model.checkpoint", *parts
        )
    line = refused(SMOKE, f"--workdir={folder}", f"--config.model.checkpoint={tmp_path / 'none'}")
    assert has(line, "model.checkpoint", tmp_path / "none")
    assert not folder.exists()


def test_a_checkpoint_with_other_tokens_is_refused(begun, refused):
    folder, tokenizer, given = begun
    command = (SMOKE, f"--workdir={folder}", f"--config.model.checkpoint={given}", "--stage=sft")
    save_given(given, tokenizer, vocab_size=len(tokenizer) + 1)
    assert has(refused(*command), "model.checkpoint", len(tokenizer) + 1, len(tokenizer), "tokenizer.name")
    shutil.rmtree(given)
    save_given(given, tokenizer)
    changed = json.loads((given / "tokenizer.json").read_text())
    vocabulary = changed["model"]["vocab"]
    vocabulary["8"], vocabulary["9"] = vocabulary["9"], vocabulary["8"]
    (given / "tokenizer.json").write_text(json.dumps(changed))
    line = refused(*command)
    assert has(line, "model.checkpoint", "tokens", "tokenizer.name") and ("'8'" in line or "'9'" in line)
    tokenizer.save(given / "tokenizer.json")
    (given / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos, 9]}))
    assert has(refused(*command), "model.checkpoint", "ends", "token 9", "tokenizer.name")
    assert not (folder / "sft_sos_plus").exists()


def test_a_run_from_before_a_setting_existed_resumes(begun, main, whole_run):
    folder, _, _ = begun
    config = json.loads((whole_run.folder / "config.json").read_text())
    del config["model"]["checkpoint"], config["grpo"]["penalties"]
    (folder / "config.json").write_text(json.dumps(config))
    assert main(SMOKE, f"--workdir={folder}", "--stage=data").code == 0
