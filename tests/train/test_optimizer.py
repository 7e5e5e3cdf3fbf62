"""The table of rules: every parameter has one, and what is frozen stays."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from apr_jax.train.optimizer import RULES, OptimizerConfig, decayed, make_optimizer, muon_dimensions, path_name
from tests.tiny import make_model

WEIGHTS = nnx.to_pure_dict(nnx.state(make_model(0)))
GRADIENT = jax.tree.map(lambda x: np.full(x.shape, 0.01, np.float32), WEIGHTS)


def names(tree, chosen):
    return {path_name(path) for path, value in jax.tree.leaves_with_path(tree) if chosen(value)}


def test_every_parameter_has_a_rule_and_gains_do_not_decay():
    every = names(WEIGHTS, lambda _: True)
    gains = {name for name in every if "norm_" in name}
    assert names(decayed(WEIGHTS), bool) == every - gains and len(gains) == 3
    is_axes = lambda x: x is None or hasattr(x, "reduction_axis")  # noqa: E731
    axes = jax.tree.leaves_with_path(muon_dimensions(WEIGHTS), is_leaf=is_axes)
    assert {path_name(path) for path, value in axes if value is not None} == {
        f"layers/{name}" for name in WEIGHTS["layers"] if "norm" not in name
    }


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match="no line of RULES matches the parameter 'gate_of_a_new_kind'"):
        decayed({**WEIGHTS, "gate_of_a_new_kind": np.zeros(3)})
    assert len(RULES) == 5


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("frozen", ["", "embed_|head_", "layers/"])
def test_what_is_frozen_stays_and_needs_no_moments(name, frozen):
    optimizer = make_optimizer(OptimizerConfig(name, peak_rate=0.1, muon_rate=0.1, frozen=frozen), 10)
    state = optimizer.init(WEIGHTS)
    change, _ = jax.jit(optimizer.update)(GRADIENT, state, WEIGHTS)
    new = optax.apply_updates(WEIGHTS, change)
    moved = names(jax.tree.map(lambda a, b: bool(np.any(a != b)), new, WEIGHTS), bool)
    every = names(WEIGHTS, lambda _: True)
    held = {name for name in every if frozen and any(name.startswith(part) for part in frozen.split("|"))}
    assert moved == every - held
    held_size = sum(leaf.size for path, leaf in jax.tree.leaves_with_path(WEIGHTS) if path_name(path) in held)
    whole = sum(leaf.size for leaf in jax.tree.leaves(make_optimizer(OptimizerConfig(name), 10).init(WEIGHTS)))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) <= whole - held_size


def test_the_clip_sees_only_what_is_trained():
    """A large gradient of a frozen parameter must not shrink the others'."""
    large = jax.tree_util.tree_map_with_path(lambda p, g: g * (1e6 if "embed_" in path_name(p) else 1), GRADIENT)
    optimizer = make_optimizer(OptimizerConfig(frozen="embed_"), 10)
    first, second = (optimizer.update(g, optimizer.init(WEIGHTS), WEIGHTS)[0] for g in (GRADIENT, large))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@pytest.mark.parametrize("frozen, says", [(".", "leaves no parameter to train"), ("embd_", "finds no parameter to")])
def test_freezing_all_or_nothing_is_refused(frozen, says):
    with pytest.raises(ValueError, match=f"optimizer.frozen .'{frozen}'. {says}"):
        make_optimizer(OptimizerConfig(frozen=frozen), 10).init(WEIGHTS)
