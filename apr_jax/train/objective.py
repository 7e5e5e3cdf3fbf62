"""What GRPO maximises: advantages, the weight of every token, and the loss (paper, section 3.2).

The advantage of a tree is its reward minus the mean of its group (divided by the group's deviation where `normalise`
says so), the same for all its threads. Per sampled token, with the model's log-probability p, the sampler's b and the
reference's q, and r = exp(p - b),

    loss = - min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl (exp(q - p) - (q - p) - 1)         (kl_estimator k3)

The sampler's are what the engine drew with. With `tis_clip` the ratio is against the trainer's own p before the
update, o, and what the engine's differ from those is a weight of its own, cut off above:

    r = exp(p - o),    loss = - min(exp(o - b), tis_clip) min(r A, clip(r, ..) A) + ...

The estimator "k1" goes where its gradient is that of the divergence, into the advantage: A - kl (b - q). (As a term of
the loss, p - q has a gradient of 0 on average.)

What it is not: no critic, no importance weights but these.

`aggregate` weighs tokens: see `aggregation`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.checks import SEED, above, at_least, between, check_fields
from apr_jax.data.packing import PackedBatch, Segment, flatten_thread
from apr_jax.errors import UserError
from apr_jax.model.family import Model
from apr_jax.threads import ThreadTree
from apr_jax.train.aggregation import AGGREGATIONS
from apr_jax.train.loss import row_logits, token_logprobs, trained_tokens
from apr_jax.train.optimizer import OptimizerConfig
from apr_jax.train.reward import Penalties, differ

Array = jax.Array
KL_ESTIMATORS = ("k1", "k3")


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """The paper: 64 prompts x 5 rollouts, 150 steps of 2 inner steps, rate 1e-5, clip 0.2, kl 0.001."""

    steps: int
    prompts: int  # per step
    group: int  # rollouts of each prompt
    optimizer: OptimizerConfig
    batch_rows: int  # rows of one microbatch, over all devices
    row_length: int  # tokens
    inner_steps: int = 2
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0  # coefficient against the model that GRPO began with; 0: no reference is kept
    kl_estimator: str = "k3"
    normalise: bool = True  # divide advantages by the group's deviation
    aggregate: str = "tree"  # a name in `aggregation.AGGREGATIONS`
    tis_clip: float = 0.0  # of the weights between engine and trainer; 0: none, ratios are against the engine
    penalties: Penalties = Penalties()
    dynamic_sampling_rounds: int = 0  # most times that groups without a signal are replaced by those of fresh prompts
    temperature: float = 1.0
    seed: int = 0
    save_every: int = 5  # steps
    validate_every: int = 0  # steps; 0: never. The best weights are kept beside the last
    validation: int = 200  # training problems that no step samples, for that

    BOUNDS = (
        at_least(0, "steps", "clip_high", "kl", "tis_clip", "dynamic_sampling_rounds", "validate_every"),
        at_least(1, "prompts", "batch_rows", "row_length", "inner_steps", "save_every", "validation"),
        between(0, 1, "clip_low"), above(0, "temperature"), *SEED,
    )  # fmt: skip

    def __post_init__(self):
        check_fields(self)
        for name, choices in (("aggregate", AGGREGATIONS), ("kl_estimator", KL_ESTIMATORS)):
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"{name} is one of {', '.join(choices)}, was given {value!r}")
        if self.group < 2:
            raise UserError(f"a group needs at least 2 rollouts to compare, was given {self.group}")


def advantages(rewards_G: Sequence[float], normalise: bool) -> np.ndarray:
    """Group-relative advantages [G] of one group; all 0 where its rewards are equal but for rounding, which dividing by
    the deviation would make a signal."""
    if not differ(rewards_G):
        return np.zeros(len(rewards_G))
    centred_G = np.asarray(rewards_G, np.float64) - np.mean(rewards_G)
    return centred_G / centred_G.std() if normalise else centred_G


def step_segments(
    trees: Sequence[tuple[ThreadTree, float]], config: GrpoConfig, window: int
) -> tuple[list[Segment], float]:
    """(segments, divisor) of all trees of a step, each with its advantage. The segments are those of the trees that are
    trained on: with a kl all, else those whose advantage is not 0. The divisor divides the step's sum of losses."""
    segments, divisor = [], 0
    for tree, advantage in trees:
        trained = bool(advantage or config.kl)
        weights = AGGREGATIONS[config.aggregate](tree, window, trained)
        divisor += weights.divisor
        if trained:
            threads = [thread for thread in tree.threads() if not thread.inherits]
            segments += [flatten_thread(thread, weights.loss, advantage, weights.kl) for thread in threads]
    return segments, divisor


def policy_logprobs(model: Model, batch: PackedBatch, temperature: float) -> Array:
    """The trainer's log-probability of each token [B, T] under the distribution that rollouts are drawn from."""
    return token_logprobs(row_logits(model, batch) / temperature, batch.tokens)


def grpo_loss(model: Model, batch: PackedBatch, config: GrpoConfig) -> tuple[Array, dict[str, Array]]:
    """(sum of weighted token losses, sums for metrics) of packed rows; see the module's equations. The batch has
    `reference_logprobs` where there is a kl, and `old_logprobs` where there is an importance cap."""
    logits_BxTxV = row_logits(model, batch) / config.temperature
    logprobs_BxT = token_logprobs(logits_BxTxV, batch.tokens)
    trained_BxT = trained_tokens(batch, "sampled")

    def log_ratio(of_BxT, over_BxT):
        """of - over [B, T] where a token is trained: elsewhere they are unrelated, and an exponential could
        overflow."""
        return jnp.where(trained_BxT > 0, of_BxT - over_BxT, 0.0)

    old_BxT, importance_BxT = batch.logprobs, jnp.ones_like(trained_BxT)
    if config.tis_clip:
        old_BxT = batch.old_logprobs
        importance_BxT = jnp.minimum(jnp.exp(log_ratio(old_BxT, batch.logprobs)), config.tis_clip)
    advantage_BxT = batch.advantage
    if config.kl and config.kl_estimator == "k1":
        advantage_BxT = advantage_BxT - config.kl * log_ratio(batch.logprobs, batch.reference_logprobs)
    ratio_BxT = jnp.exp(log_ratio(logprobs_BxT, old_BxT))
    clipped_BxT = jnp.clip(ratio_BxT, 1 - config.clip_low, 1 + config.clip_high)
    binds_BxT = clipped_BxT * advantage_BxT < ratio_BxT * advantage_BxT  # only there the clip takes the gradient away
    surrogate_BxT = importance_BxT * jnp.minimum(ratio_BxT * advantage_BxT, clipped_BxT * advantage_BxT)
    loss = -jnp.sum(trained_BxT * batch.loss_weight * surrogate_BxT)
    kl_BxT = jnp.zeros_like(ratio_BxT)
    if config.kl:
        reference_ratio_BxT = log_ratio(batch.reference_logprobs, logprobs_BxT)
        kl_BxT = jnp.exp(reference_ratio_BxT) - reference_ratio_BxT - 1
        if config.kl_estimator == "k3":
            loss = loss + config.kl * jnp.sum(trained_BxT * batch.kl_weight * kl_BxT)
    plain_BxTxV = jax.nn.log_softmax(logits_BxTxV, axis=-1)
    mismatch_BxT = jnp.abs(log_ratio(logprobs_BxT, batch.logprobs))
    return loss, {
        "weight": jnp.sum(trained_BxT * batch.loss_weight),
        "trained": jnp.sum(trained_BxT),
        "logprob_mismatch": jnp.sum(mismatch_BxT),
        "max_logprob_mismatch": jnp.max(mismatch_BxT),
        "clipped_low": jnp.sum(trained_BxT * (binds_BxT & (ratio_BxT < 1))),
        "clipped_high": jnp.sum(trained_BxT * (binds_BxT & (ratio_BxT > 1))),
        "importance": jnp.sum(trained_BxT * importance_BxT),
        "kl": jnp.sum(trained_BxT * kl_BxT),
        "entropy": -jnp.sum(trained_BxT * jnp.sum(jnp.exp(plain_BxTxV) * plain_BxTxV, axis=-1)),
    }
