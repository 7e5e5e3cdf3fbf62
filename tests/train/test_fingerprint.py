"""Fingerprints of models depend on the weights, and on nothing else."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from apr_jax.model.family import config_json
from apr_jax.model.llama import Llama
from apr_jax.train.checkpoint import fingerprint, load_model, save_model
from tests.tiny import make_model


def test_a_fingerprint_depends_on_the_weights_alone(tmp_path):
    model = make_model(0)
    mine = fingerprint(model)
    assert mine == fingerprint(make_model(0)) != fingerprint(make_model(1)) and len(mine) == 16
    for step in (3, 70):
        save_model(tmp_path / str(step), model, {"step": step, "model": config_json(model.config)})
        assert fingerprint(load_model(tmp_path / str(step))[0]) == mine
    other = Llama(dataclasses.replace(model.config, remat="full", dtype="bfloat16"), rngs=nnx.Rngs(5))
    nnx.update(other, nnx.state(model))
    assert fingerprint(other) == mine, "dtype and remat of the computation do not matter"


def test_the_last_bit_of_any_parameter_changes_the_fingerprint():
    model = make_model(0)
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    found = {fingerprint(model)}
    for i, leaf in enumerate(leaves):
        array = np.array(leaf)
        array.flat[-1] = np.nextafter(array.flat[-1], np.inf, dtype=array.dtype)
        changed = jax.tree.unflatten(tree, [*leaves[:i], jax.numpy.asarray(array), *leaves[i + 1 :]])
        found.add(fingerprint(nnx.merge(graphdef, changed)))
    assert len(found) == 1 + len(leaves)
