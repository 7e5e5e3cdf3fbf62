"""The trainer compiles once; models are counted and loaded without random weights; paths of checkpoints are checked."""

import jax
import jax.monitoring
import numpy as np
import optax
import pytest
from flax import nnx

from apr_jax.model.family import abstract_model, config_json, parameter_count
from apr_jax.model.llama import Llama, LlamaConfig
from apr_jax.train.checkpoint import CheckpointError, Checkpoints, check_folder, load_model, save_model
from apr_jax.train.loss import supervised_loss
from apr_jax.train.step import Trainer, data_mesh
from tests.tiny import SIZES, make_model

traced = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: traced.append(event) if "trace_duration" in event or "backend_compile" in event else None
)


def test_copying_the_trained_model_compiles_once():
    model = make_model()
    trainer = Trainer(model, lambda model, rows: supervised_loss(model, rows, "sampled"), optax.sgd(0.1), data_mesh(2))
    state = trainer.init(model)
    first = trainer.model(state)
    before = len(traced)
    for _ in range(3):
        again = trainer.model(state)
    assert len(traced) == before
    for a, b, c in zip(*(jax.tree.leaves(nnx.state(one)) for one in (model, first, again)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_without_making_them(tied):
    config = LlamaConfig(vocab_size=50, **SIZES, tie_embeddings=tied)
    real = Llama(config, rngs=nnx.Rngs(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(real)))
    tables = (1 if tied else 2) * 50 * config.width
    assert parameter_count(real) == parameter_count(abstract_model(config)) == (total, total - tables)
    huge = LlamaConfig(10**6, width=2**14, layers=200, heads=128, feed_forward=2**16)
    L, D, F = huge.layers, huge.width, huge.hidden
    assert parameter_count(abstract_model(huge))[1] == L * (4 * D * D + 3 * D * F + 2 * D) + D


def test_loading_a_model_draws_no_random_weights(tmp_path, monkeypatch):
    model = make_model(3)
    meta = {"model": config_json(model.config), "step": 1}
    save_model(tmp_path / "right", model, meta)
    save_model(tmp_path / "wrong", model, meta | {"model": meta["model"] | {"width": 64, "heads": 8}})

    def normal(key, *_, **__):
        assert isinstance(key, jax.core.Tracer), "random weights were drawn"
        return original(key, *_, **__)

    original = jax.random.normal
    monkeypatch.setattr(jax.random, "normal", normal)
    found, _ = load_model(tmp_path / "right")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(model))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(found)))
    with pytest.raises(CheckpointError, match="wrong"):
        load_model(tmp_path / "wrong")


@pytest.mark.parametrize("name", ["r[1]", "a\\b", "x*y", "x?"])
def test_paths_that_orbax_cannot_read_are_refused_before_anything_is_written(tmp_path, name):
    for call in (check_folder, Checkpoints):
        with pytest.raises(CheckpointError):
            call(tmp_path / name / "checkpoints")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_in_a_renamed_folder_is_read_or_its_path_refused(tmp_path):
    model = make_model()
    save_model(tmp_path / "run", model, {"model": config_json(model.config), "step": 1})
    (tmp_path / "run").rename(tmp_path / "r[1]")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_model(tmp_path / "r[1]")[0]), nnx.state(model))
    (tmp_path / "r[1]").rename(tmp_path / "a\\b")
    with pytest.raises(CheckpointError, match="backslash"):
        load_model(tmp_path / "a\\b")
