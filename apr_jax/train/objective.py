"""GRPO's objective: advantages, token weights and the loss (paper, section 3.2).

A group is the trees that were sampled for one prompt. The advantage A of a tree is its reward minus the mean reward of
its group, divided by the group's standard deviation if `normalise` is set. All threads of a tree have its advantage.

A sampled token has several log-probabilities: p under the model in training, b under the engine that sampled it, o
under the trainer's weights before the update, q under the reference, the model that GRPO began with. With the ratio
r = exp(p - b) and `kl_estimator` "k3" the loss of a token is

    - min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl (exp(q - p) - (q - p) - 1)

Engine and trainer round differently, so that b and o are not quite equal. If `tis_clip` is above 0 (truncated
importance sampling), the ratio is r = exp(p - o), and the first term has the weight min(exp(o - b), tis_clip):

    - min(exp(o - b), tis_clip) min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + ...

`kl_estimator` "k1" replaces the advantage by A - kl (b - q) and adds no term: in the advantage its gradient is that of
the divergence, while p - q as a term of the loss has a gradient of 0 on average.

There is no critic, and there are no other importance weights. `aggregate` names how token losses are weighted and added
up, see `aggregation`.
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
from apr_jax.settings import execution, shared
from apr_jax.threads import ThreadTree
from apr_jax.train.aggregation import AGGREGATIONS
from apr_jax.train.loss import row_logits, token_logprobs, trained_tokens
from apr_jax.train.optimizer import OptimizerConfig
from apr_jax.train.reward import Penalties, differ

Array = jax.Array
KL_ESTIMATORS = ("k1", "k3")


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """Settings of GRPO. The paper's are 150 steps of 64 prompts with 5 rollouts each, 2 inner steps, a learning rate of
    1e-5, clips of 0.2 and a kl of 0.001."""

    steps: int = 10
    prompts: int = 12  # groups of a step
    group: int = 6  # rollouts of each prompt
    optimizer: OptimizerConfig = OptimizerConfig()
    batch_rows: int = execution(8)  # rows of one microbatch, over all devices
    row_length: int = 896  # tokens, at least the window and a thread's calls
    inner_steps: int = 1  # updates on the trees of one step
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0  # weight of the divergence from the reference; 0: no reference is kept
    kl_estimator: str = "k3"
    normalise: bool = True  # divide advantages by the group's standard deviation
    aggregate: str = "tree"  # a name in `aggregation.AGGREGATIONS`
    tis_clip: float = 0.0  # largest weight exp(o - b); 0: no such weight, ratios are against the engine
    penalties: Penalties = Penalties()
    dynamic_sampling_rounds: int = 0  # of replacing groups of equal rewards by groups of fresh prompts
    temperature: float = 1.0
    seed: int = shared("seed", 0)
    save_every: int = execution(5)  # steps
    validate_every: int = 0  # steps; 0: never. Weights with the best accuracy are kept in best/
    validation: int = 200  # training problems held out for it: no step samples them

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
    """The advantages [G] of one group. All are 0 if the rewards differ by rounding alone: divided by their standard
    deviation these differences would become advantages of about 1."""
    if not differ(rewards_G):
        return np.zeros(len(rewards_G))
    centred_G = np.asarray(rewards_G, np.float64) - np.mean(rewards_G)
    return centred_G / centred_G.std() if normalise else centred_G


def step_segments(
    trees: Sequence[tuple[ThreadTree, float]], config: GrpoConfig, window: int
) -> tuple[list[Segment], float]:
    """(segments, divisor) of a step, for its trees with their advantages and a window in tokens.

    A segment is a thread in the flat form that rows are packed from. Trees with advantage 0 give segments only if there
    is a kl, since their policy loss is 0. The step's sum of token losses is to be divided by the divisor.
    """
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
    """The model's log-probability of each token [B, T] at the temperature at which rollouts are sampled."""
    return token_logprobs(row_logits(model, batch) / temperature, batch.tokens)


def grpo_loss(model: Model, batch: PackedBatch, config: GrpoConfig) -> tuple[Array, dict[str, Array]]:
    """The sum of weighted token losses of packed rows, by the equations of this module, and sums for metrics by name.

    The batch must have `reference_logprobs` if `config.kl` is above 0, and `old_logprobs` if `config.tis_clip` is.

    Sums over trained tokens: "weight", of loss weights; "trained", their number; "logprob_mismatch", of |p - b|;
    "clipped_low" and "clipped_high", the number whose gradient the lower or the upper clip removes; "importance", of
    the weights min(exp(o - b), tis_clip), 1 without tis_clip; "kl", of the k3 estimates, 0 without a kl; "entropy", in
    nats. "max_logprob_mismatch" is the largest |p - b|.
    """
    logits_BxTxV = row_logits(model, batch) / config.temperature
    logprobs_BxT = token_logprobs(logits_BxTxV, batch.tokens)
    trained_BxT = trained_tokens(batch, "sampled")

    def log_ratio(logprobs_BxT, other_logprobs_BxT):
        """Their difference [B, T] at trained tokens, 0 elsewhere. Other tokens have no log-probability of an engine:
        the exponential of a meaningless difference could overflow."""
        return jnp.where(trained_BxT > 0, logprobs_BxT - other_logprobs_BxT, 0.0)

    old_BxT, importance_BxT = batch.logprobs, jnp.ones_like(trained_BxT)
    if config.tis_clip:
        old_BxT = batch.old_logprobs
        importance_BxT = jnp.minimum(jnp.exp(log_ratio(old_BxT, batch.logprobs)), config.tis_clip)
    advantage_BxT = batch.advantage
    if config.kl and config.kl_estimator == "k1":
        advantage_BxT = advantage_BxT - config.kl * log_ratio(batch.logprobs, batch.reference_logprobs)
    ratio_BxT = jnp.exp(log_ratio(logprobs_BxT, old_BxT))
    clipped_BxT = jnp.clip(ratio_BxT, 1 - config.clip_low, 1 + config.clip_high)
    binds_BxT = clipped_BxT * advantage_BxT < ratio_BxT * advantage_BxT  # elsewhere the clip changes no gradient
    surrogate_BxT = importance_BxT * jnp.minimum(ratio_BxT * advantage_BxT, clipped_BxT * advantage_BxT)
    loss = -jnp.sum(trained_BxT * batch.loss_weight * surrogate_BxT)
    kl_BxT = jnp.zeros_like(ratio_BxT)
    if config.kl:
        reference_log_ratio_BxT = log_ratio(batch.reference_logprobs, logprobs_BxT)
        kl_BxT = jnp.exp(reference_log_ratio_BxT) - reference_log_ratio_BxT - 1
        if config.kl_estimator == "k3":
            loss = loss + config.kl * jnp.sum(trained_BxT * batch.kl_weight * kl_BxT)
    all_logprobs_BxTxV = jax.nn.log_softmax(logits_BxTxV, axis=-1)
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
        "entropy": -jnp.sum(trained_BxT * jnp.sum(jnp.exp(all_logprobs_BxTxV) * all_logprobs_BxTxV, axis=-1)),
    }
