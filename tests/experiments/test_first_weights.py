"""A run whose SFT begins with the weights of a checkpoint: it has them, goes on without it, refuses another's."""

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
from tests.experiments.conftest import SMOKE

STILL = [f"--config.sft.optimizer.{name}=0" for name in ("peak_lr", "muon_lr", "init_lr_fraction", "final_lr_fraction")]


def weights_of(model) -> dict:
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))


def save_given(folder, tokenizer: Tokenizer, **sizes) -> Llama:
    """A checkpoint as tools.import_hf leaves it, of the smoke preset's sizes but for `sizes`."""
    smoke = read_settings(load_config(SMOKE.removeprefix("--config="))).model
    config = LlamaConfig(**{"vocab_size": len(tokenizer), **smoke, "rope_theta": 700.0, "norm_epsilon": 1e-3} | sizes)
    model = Llama(config, rngs=nnx.Rngs(77))
    save_model(folder, model, {"model": config_json(config), "stage": "imported", "step": 0})
    tokenizer.save(folder / "tokenizer.json")
    return model


@pytest.fixture
def begun(whole_run, tmp_path):
    """A run folder with its data, the tokenizer's and a given checkpoint's."""
    folder = tmp_path / "run"
    shutil.copytree(whole_run.folder / "data", folder / "data")
    return folder, Tokenizer.load(folder / "data" / "tokenizer.json"), tmp_path / "given"


def test_no_step_of_sft_is_a_checkpoint_for_what_follows(begun, main):
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
    assert main(*command, "--stage=sft").code == 0  # nothing is left to do


def test_sft_begins_there_and_goes_on_without_it(begun, main, refused):
    folder, tokenizer, given = begun
    model = save_given(given, tokenizer)
    command = (SMOKE, f"--workdir={folder}", f"--config.model.checkpoint={given}", "--config.sft.tokens=1030",
               "--config.sft.save_every=1", *STILL)  # fmt: skip
    assert main(*command, "--stage=sft").code == 0
    shutil.rmtree(folder / "sft_apr" / "checkpoints" / "2")  # two batches of 1,024 tokens at most
    shutil.rmtree(given)
    assert "sft_apr stands at step 1 of 2: finish --stage=sft first" in refused(*command, "--stage=grpo")
    done = main(*command, "--stage=sft")
    assert done.code == 0, done.err
    found, meta = load_model(folder / "sft_apr" / "checkpoints")
    assert meta["step"] == 2 and found.config.rope_theta == 700.0
    jax.tree.map(np.testing.assert_array_equal, weights_of(found), weights_of(model))


def test_another_model_is_refused_before_anything_is_made(tmp_path, whole_run, refused):
    tokenizer = Tokenizer.load(whole_run.folder / "data" / "tokenizer.json")
    folder = tmp_path / "run"
    for index, (sizes, says) in enumerate(
        [
            ({"width": 64}, "has width 64, the run's model 32: set model.width"),
            ({"kv_heads": 2}, "has kv_heads 2, the run's model 1: set model.kv_heads"),
            ({"tie_embeddings": True}, "has tie_embeddings True, the run's model False: set model.tie_embeddings"),
            ({"context": 128}, "window is at most the context of model.checkpoint (128), was given 256"),
        ]
    ):
        given = tmp_path / f"given{index}"
        save_given(given, tokenizer, **sizes)
        assert says in refused(SMOKE, f"--workdir={folder}", f"--config.model.checkpoint={given}")
    line = refused(SMOKE, f"--workdir={folder}", f"--config.model.checkpoint={tmp_path / 'none'}")
    assert line == f"model.checkpoint: no checkpoint at {tmp_path / 'none'}"
    assert not folder.exists()


def test_another_vocabulary_is_refused(begun, refused):
    folder, tokenizer, given = begun
    command = (SMOKE, f"--workdir={folder}", f"--config.model.checkpoint={given}", "--stage=sft")
    save_given(given, tokenizer, vocab_size=len(tokenizer) + 1)
    assert f"has a vocabulary of {len(tokenizer) + 1}, the run's tokenizer has {len(tokenizer)}" in refused(*command)
    shutil.rmtree(given)
    save_given(given, tokenizer)
    words = json.loads((given / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["8"], vocabulary["9"] = vocabulary["9"], vocabulary["8"]
    (given / "tokenizer.json").write_text(json.dumps(words))
    assert "has other words than the run's tokenizer, such as '" in refused(*command)
    tokenizer.save(given / "tokenizer.json")
    (given / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos, 9]}))
    assert "also ends a text with the token 9, the run's tokenizer does not" in refused(*command)
    assert not (folder / "sft_sos_plus").exists()


def test_a_run_begun_before_there_was_a_setting_goes_on(begun, main, whole_run):
    folder, _, _ = begun
    config = json.loads((whole_run.folder / "config.json").read_text())
    del config["model"]["checkpoint"], config["grpo"]["penalties"]
    (folder / "config.json").write_text(json.dumps(config))
    assert main(SMOKE, f"--workdir={folder}", "--stage=data").code == 0
