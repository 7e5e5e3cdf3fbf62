"""Optimizers and learning-rate schedules.

A model family has rules, regular expressions on parameter names, that say how each parameter is trained: by Muon or
AdamW, with weight decay or without (`Rule`). A parameter that no rule matches is an error, so that a new parameter is
never trained by accident.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from apr_jax.checks import at_least, check_fields, from_to_below
from apr_jax.errors import UserError
from apr_jax.model.family import Rule


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its learning-rate schedule. The defaults are those of the paper's SFT: AdamW, one warm-up step
    from a tenth of the peak of 5e-5, cosine decay to a hundredth, weight decay 0.01, gradient clipping at norm 1."""

    name: str = "adamw"  # adamw; or muon: Muon for matrices, AdamW for all other parameters
    peak_lr: float = 5e-5
    muon_lr: float = 0.02  # peak rate of the matrices under muon, whose updates have unit spectral norm
    init_lr_fraction: float = 0.1  # rate of the first step over the peak, if there is a warm-up
    final_lr_fraction: float = 0.01  # rate of the last step over the peak
    warmup_steps: int = 1
    schedule: str = "cosine"  # cosine, linear, constant
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0  # the gradient is clipped to this global norm; 0: no clipping
    beta2: float = 0.999
    frozen: str = ""  # regular expression: parameters whose names contain a match are not trained; "": all are

    BOUNDS = (
        at_least(0, "peak_lr", "muon_lr", "init_lr_fraction", "final_lr_fraction", "warmup_steps"),
        at_least(0, "weight_decay", "max_grad_norm"),
        from_to_below(0, 1, "beta2"),
    )

    def __post_init__(self):
        check_fields(self)
        try:
            re.compile(self.frozen)
        except re.error as error:
            raise UserError(f"frozen is a regular expression, was given {self.frozen!r}: {error}") from None
        if self.name not in ("adamw", "muon"):
            raise UserError(f"optimizer name is adamw or muon, was given {self.name!r}")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise UserError(f"schedule is cosine, linear or constant, was given {self.schedule!r}")


def path_name(path) -> str:
    """The name of a pytree path, as ``layers/q_LxDxNxH``. The level "value" that Flax adds is left out."""
    keys = (str(getattr(key, "key", getattr(key, "name", key))) for key in path)
    return "/".join(key for key in keys if key != "value")


def rule_of(path, rules: Sequence[Rule]) -> Rule:
    """The first of the family's rules that matches a parameter's path. Raises ValueError if none does."""
    name = path_name(path)
    for rule in rules:
        if re.match(rule.pattern, name):
            return rule
    raise ValueError(f"no rule of the model's family matches the parameter {name!r}")


def muon_dimensions(params, rules: Sequence[Rule]):
    """A tree like `params` with the axes of each matrix that Muon trains, and None for a parameter of Adam."""

    def axes(path, _):
        muon = rule_of(path, rules).muon
        return None if muon is None else MuonDimensionNumbers(*muon)

    return jax.tree_util.tree_map_with_path(axes, params)


def decayed(params, rules: Sequence[Rule]):
    """A tree like `params`: whether a parameter has weight decay."""
    return jax.tree_util.tree_map_with_path(lambda path, _: rule_of(path, rules).decay, params)


def lr_schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """The learning rate of the steps 0 to `steps` - 1. It rises linearly for `warmup_steps` steps, has its `peak` in
    the next one, and reaches `final_lr_fraction` of the peak in the last step, if that is a later one."""
    warm = optax.linear_schedule(config.init_lr_fraction * peak, peak, config.warmup_steps)
    left = max(steps - 1 - config.warmup_steps, 1)
    if config.schedule == "constant":
        rest = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        rest = optax.linear_schedule(peak, config.final_lr_fraction * peak, left)
    else:
        rest = optax.cosine_decay_schedule(peak, left, config.final_lr_fraction)
    return optax.join_schedules([warm, rest], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int, rules: Sequence[Rule]) -> optax.GradientTransformation:
    """The optax transformation for a run of `steps` steps; `rules` are those of the model's family.

    Clipping sees the gradients of trained parameters alone. Frozen parameters have no optimizer state. Its `init`
    raises UserError if `config.frozen` matches no parameter or all of them.
    """
    decays, dimensions = functools.partial(decayed, rules=rules), functools.partial(muon_dimensions, rules=rules)

    def muon_or_adam(params):
        kind = lambda path, _: "adam" if rule_of(path, rules).muon is None else "muon"  # noqa: E731
        return jax.tree_util.tree_map_with_path(kind, params)

    adam = optax.adamw(
        lr_schedule(config, config.peak_lr, steps), b2=config.beta2, weight_decay=config.weight_decay, mask=decays
    )
    if config.name == "adamw":
        inner = adam
    else:
        # `optax.contrib.muon` would train the other parameters by Adam with Nesterov momentum, and decay norm gains.
        muon = optax.contrib.muon(
            lr_schedule(config, config.muon_lr, steps),
            weight_decay=config.weight_decay,
            weight_decay_mask=decays,
            muon_weight_dimension_numbers=dimensions,
        )
        inner = optax.partition({"muon": muon, "adam": adam}, muon_or_adam)
    chain = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), inner) if config.max_grad_norm else inner
    if not config.frozen:
        return chain

    def labels(params):
        label = lambda path, _: "frozen" if re.search(config.frozen, path_name(path)) else "trained"  # noqa: E731
        labelled = jax.tree_util.tree_map_with_path(label, params)
        if len(kinds := set(jax.tree.leaves(labelled))) == 1:
            problem = "matches no parameter" if "trained" in kinds else "leaves no parameter to train"
            raise UserError(f"optimizer.frozen ({config.frozen!r}) {problem}")
        return labelled

    return optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)
