"""Optimisers and schedules. The rules of the model's family, regular expressions on names, say how each parameter is
trained. A parameter that no rule matches raises, so that a new one is never trained by accident."""

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
    """The paper's SFT: adamw, one step of warm-up from a tenth to the peak of 5e-5, cosine to a hundredth, decay 0.01,
    clip 1."""

    name: str = "adamw"  # adamw, or muon: Muon on the matrices, AdamW on the rest
    peak_lr: float = 5e-5
    muon_lr: float = 0.02  # peak rate of the matrices under muon; the update has unit spectral norm
    init_lr_fraction: float = 0.1  # fraction of the peak at the first step, where there is a warm-up
    final_lr_fraction: float = 0.01  # fraction of the peak at the last step
    warmup_steps: int = 1
    schedule: str = "cosine"  # cosine, linear, constant
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0  # global norm of the gradient; 0: none
    beta2: float = 0.999
    frozen: str = ""  # a regular expression: parameters whose names it finds keep their values; "": none

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
    """``layers/q_LxDxNxH`` for a pytree path; Flax's own wrapper level is left out."""
    keys = (str(getattr(key, "key", getattr(key, "name", key))) for key in path)
    return "/".join(key for key in keys if key != "value")


def rule_of(path, rules: Sequence[Rule]) -> Rule:
    """The rule for a parameter's path, the first that matches. Raises ValueError where there is none."""
    name = path_name(path)
    for rule in rules:
        if re.match(rule.pattern, name):
            return rule
    raise ValueError(f"no rule of the model's family matches the parameter {name!r}")


def muon_dimensions(params, rules: Sequence[Rule]):
    """For each parameter Muon's axes, or None for Adam."""

    def axes(path, _):
        muon = rule_of(path, rules).muon
        return None if muon is None else MuonDimensionNumbers(*muon)

    return jax.tree_util.tree_map_with_path(axes, params)


def decayed(params, rules: Sequence[Rule]):
    """True where weight decay applies."""
    return jax.tree_util.tree_map_with_path(lambda path, _: rule_of(path, rules).decay, params)


def rate_schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """The learning rate of step 0 to `steps` - 1: `warmup_steps` below the peak, the peak, and on the last step
    `final_lr_fraction` of it (where that comes after the peak)."""
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
    """The optimiser of a run of `steps` steps; `rules` are those of the model's family."""
    decays, dimensions = functools.partial(decayed, rules=rules), functools.partial(muon_dimensions, rules=rules)

    def muon_or_adam(params):
        kind = lambda path, _: "adam" if rule_of(path, rules).muon is None else "muon"  # noqa: E731
        return jax.tree_util.tree_map_with_path(kind, params)

    adam = optax.adamw(
        rate_schedule(config, config.peak_lr, steps), b2=config.beta2, weight_decay=config.weight_decay, mask=decays
    )
    if config.name == "adamw":
        inner = adam
    else:
        # The rest gets an AdamW of our own: that of `optax.contrib.muon` has Nesterov's momentum and decays gains.
        muon = optax.contrib.muon(
            rate_schedule(config, config.muon_lr, steps),
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
        found = jax.tree_util.tree_map_with_path(label, params)
        if len(kinds := set(jax.tree.leaves(found))) == 1:
            what = "finds no parameter to freeze" if "trained" in kinds else "leaves no parameter to train"
            raise UserError(f"optimizer.frozen ({config.frozen!r}) {what}")
        return found

    return optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)
