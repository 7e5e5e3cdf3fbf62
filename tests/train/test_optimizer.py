"""Optimizers: every parameter has a rule, frozen ones do not change, updates and schedules are those of the config."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from apr_jax.model.llama import RULES
from apr_jax.train.optimizer import (
    OptimizerConfig,
    decayed,
    lr_schedule,
    make_optimizer,
    muon_dimensions,
    path_name,
    rule_of,
)
from tests.tiny import make_model

WEIGHTS = nnx.to_pure_dict(nnx.state(make_model(0)))
GRADIENT = jax.tree.map(lambda x: np.full(x.shape, 0.01, np.float32), WEIGHTS)


def names(tree, chosen):
    return {path_name(path) for path, value in jax.tree.leaves_with_path(tree) if chosen(value)}


def test_every_parameter_has_a_rule_and_gains_do_not_decay():
    every = names(WEIGHTS, lambda _: True)
    gains = {name for name in every if "norm_" in name}
    assert names(decayed(WEIGHTS, RULES), bool) == every - gains and len(gains) == 3
    is_axes = lambda x: x is None or hasattr(x, "reduction_axis")  # noqa: E731
    axes = jax.tree.leaves_with_path(muon_dimensions(WEIGHTS, RULES), is_leaf=is_axes)
    assert {path_name(path) for path, value in axes if value is not None} == {
        f"layers/{name}" for name in WEIGHTS["layers"] if "norm" not in name
    }


def test_a_parameter_without_a_rule_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'gate_of_a_new_kind'"):
        decayed({**WEIGHTS, "gate_of_a_new_kind": np.zeros(3)}, RULES)
    assert len(RULES) == 5


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("frozen", ["", "embed_|head_", "layers/"])
def test_frozen_parameters_do_not_change_and_have_no_moments(name, frozen):
    optimizer = make_optimizer(OptimizerConfig(name, peak_lr=0.1, muon_lr=0.1, frozen=frozen), 10, RULES)
    state = optimizer.init(WEIGHTS)
    change, _ = jax.jit(optimizer.update)(GRADIENT, state, WEIGHTS)
    new = optax.apply_updates(WEIGHTS, change)
    moved = names(jax.tree.map(lambda a, b: bool(np.any(a != b)), new, WEIGHTS), bool)
    every = names(WEIGHTS, lambda _: True)
    held = {name for name in every if frozen and any(name.startswith(part) for part in frozen.split("|"))}
    assert moved == every - held
    held_size = sum(leaf.size for path, leaf in jax.tree.leaves_with_path(WEIGHTS) if path_name(path) in held)
    whole = sum(leaf.size for leaf in jax.tree.leaves(make_optimizer(OptimizerConfig(name), 10, RULES).init(WEIGHTS)))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) <= whole - held_size


def test_clipping_ignores_frozen_parameters():
    """A large gradient of a frozen parameter must not shrink the gradients of the others."""
    large = jax.tree_util.tree_map_with_path(lambda p, g: g * (1e6 if "embed_" in path_name(p) else 1), GRADIENT)
    optimizer = make_optimizer(OptimizerConfig(frozen="embed_"), 10, RULES)
    first, second = (optimizer.update(g, optimizer.init(WEIGHTS), WEIGHTS)[0] for g in (GRADIENT, large))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@pytest.mark.parametrize("frozen", [".", "embd_"])
def test_freezing_all_parameters_or_none_is_refused(frozen):
    with pytest.raises(ValueError, match=f"optimizer.frozen .'{frozen}'"):
        make_optimizer(OptimizerConfig(frozen=frozen), 10, RULES).init(WEIGHTS)


# ---------------------------------------------------------------------- updates by kind of parameter

BETA, ADAM = 0.95, (0.9, 0.99)
DECAY, RATE, MUON_RATE = 0.3, 3e-3, 0.02


def adamw(weight, gradients, decays):
    """AdamW in float64: the parameter after one update for each of the gradients."""
    first = second = np.zeros(weight.shape)
    for step, gradient in enumerate(gradients, 1):
        first = ADAM[0] * first + (1 - ADAM[0]) * gradient
        second = ADAM[1] * second + (1 - ADAM[1]) * gradient**2
        change = first / (1 - ADAM[0] ** step) / (np.sqrt(second / (1 - ADAM[1] ** step)) + 1e-8)
        weight = weight - RATE * (change + decays * DECAY * weight)
    return weight


def muon(weight, gradients, shape):
    """Muon in float64: the parameter after one update for each of the gradients. `shape` is [layers, in, out], the
    shape of a stacked parameter as matrices."""
    weight, buffer = weight.reshape(shape), np.zeros(shape)
    for step, gradient in enumerate(gradients, 1):
        gradient = gradient.reshape(shape)
        buffer = BETA * buffer + (1 - BETA) * gradient
        ahead = BETA * buffer / (1 - BETA ** (step + 1)) + (1 - BETA) * gradient / (1 - BETA**step)  # Nesterov's
        x = ahead / (np.linalg.norm(ahead, axis=(1, 2), keepdims=True) + 1e-8)
        turned = shape[1] > shape[2]
        x = x.swapaxes(1, 2) if turned else x
        for _ in range(5):
            a = x @ x.swapaxes(1, 2)
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.swapaxes(1, 2) if turned else x
        weight = weight - MUON_RATE * (max(1, shape[2] / shape[1]) ** 0.5 * x + DECAY * weight)
    return weight


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_kind_of_parameter_is_updated_by_its_rule(name):
    """Three updates of matrices, of embedding and head, and of gains, against `muon` and `adamw`. Gains never decay."""
    config = OptimizerConfig(
        name, RATE, MUON_RATE, 1.0, schedule="constant", weight_decay=DECAY, max_grad_norm=0.0, beta2=0.99
    )
    optimizer, draw = make_optimizer(config, 10, RULES), np.random.default_rng(0)
    gradients = [jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), WEIGHTS) for _ in range(3)]
    state, new, step = optimizer.init(WEIGHTS), WEIGHTS, jax.jit(optimizer.update)
    for gradient in gradients:
        change, state = step(gradient, state, new)
        new = optax.apply_updates(new, change)
    seen = set()
    for (path, weight), found, *given in zip(
        jax.tree.leaves_with_path(WEIGHTS), *map(jax.tree.leaves, (new, *gradients)), strict=True
    ):
        rule, weight = rule_of(path, RULES), np.asarray(weight, np.float64)
        given = [np.asarray(one, np.float64) for one in given]
        if name == "muon" and rule.muon:
            rows = int(np.prod([weight.shape[axis] for axis in rule.muon[0]]))
            right, kind = muon(weight, given, (weight.shape[0], rows, weight[0].size // rows)), "matrix"
        else:
            right, kind = adamw(weight, given, rule.decay), "decayed" if rule.decay else "gain"
        np.testing.assert_allclose(found, right.reshape(found.shape), atol=1e-6, err_msg=path_name(path))
        seen.add(kind)
    assert seen == {"decayed", "gain"} | ({"matrix"} if name == "muon" else set())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_with_a_gradient_of_0_weights_decay_and_gains_do_not_change(name):
    config = OptimizerConfig(name, 0.01, 0.01, schedule="constant", weight_decay=0.5, warmup_steps=0)
    optimizer = make_optimizer(config, 10, RULES)
    change, _ = optimizer.update(jax.tree.map(np.zeros_like, GRADIENT), optimizer.init(WEIGHTS), WEIGHTS)
    for path, value in jax.tree.leaves_with_path(optax.apply_updates(WEIGHTS, change)):
        before = {path_name(p): w for p, w in jax.tree.leaves_with_path(WEIGHTS)}[path_name(path)]
        kept = 1.0 if "norm_" in path_name(path) else 1 - 0.01 * 0.5
        np.testing.assert_allclose(value, kept * np.asarray(before), rtol=1e-6, err_msg=path_name(path))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup, steps", [(0, 2), (1, 12), (20, 100), (0, 2000)])
def test_learning_rates_have_the_config_s_first_highest_and_last_value(schedule, warmup, steps):
    config = OptimizerConfig(init_lr_fraction=0.2, final_lr_fraction=0.05, warmup_steps=warmup, schedule=schedule)
    rates = [float(lr_schedule(config, 2.0, steps)(step)) for step in range(steps)]
    assert rates[0] == pytest.approx(0.4 if warmup else 2.0)
    assert max(rates) == rates[warmup] == 2.0
    assert rates[-1] == pytest.approx(0.1) and min(rates[warmup:-1]) > 0.1


def test_the_default_is_the_paper_s_schedule():
    """The rate rises from 5e-6 to 5e-5 in one step and falls to 5e-7."""
    rate = lr_schedule(OptimizerConfig(), OptimizerConfig().peak_lr, 19_000)
    assert [float(rate(step)) for step in (0, 1, 18_999)] == pytest.approx([5e-6, 5e-5, 5e-7])
