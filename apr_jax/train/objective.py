"""What GRPO maximises: advantages, the weight of every token, and the loss (paper, section 3.2).

The advantage of a tree is its reward minus the mean of its group (divided by the group's deviation where `normalise`
says so), the same for all its threads. Per sampled token, with the model's log-probability p, the sampler's b and the
reference's q, and r = exp(p - b),

    loss = - min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl (exp(q - p) - (q - p) - 1)         (kl_estimator k3)

The sampler's are what the engine drew with. With `importance_cap` the ratio is against the trainer's own p before the
update, o, and what the engine's differ from those is a weight of its own, cut off above:

    r = exp(p - o),    loss = - min(exp(o - b), importance_cap) min(r A, clip(r, ..) A) + ...

The estimator "k1" goes where its gradient is that of the divergence, into the advantage: A - kl (b - q). (As a term of
the loss, p - q has a gradient of 0 on average.)

What it is not: no critic, no importance weights but these.

`aggregate` weighs tokens:

    tree      every tree 1, spread over its sampled tokens; the default
    sequence  every tree 1, every thread of it that wrote something the same share, spread over its tokens
    paper     as the authors' code: a thread is one sequence per request to the server, up to and with each call and
              after the last join; a sequence's mean is divided by its tree's sequences and by those of the step, the
              k3 term by those of the step alone. Without a `kl`, trees of advantage 0 are left out of the step's count
    token     every token of the step the same, those of groups without a signal counted, too
    constant  every token the same, divided by trees and the window (Dr. GRPO: with `normalise` off, longer answers
              are no longer favoured)
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.checks import SEED, above, at_least, between, check_fields
from apr_jax.data.packing import Piece, lay_out
from apr_jax.errors import UserError
from apr_jax.model.llama import Llama
from apr_jax.threads import Thread, ThreadTree
from apr_jax.train.loss import row_logits, token_logprobs, trained_tokens
from apr_jax.train.optimizer import OptimizerConfig
from apr_jax.train.reward import Prices, differ

AGGREGATES = ("tree", "sequence", "paper", "token", "constant")
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
    aggregate: str = "tree"
    importance_cap: float = 0.0  # of the weights between engine and trainer; 0: none, ratios are against the engine
    child_credit: float = 0.0  # weight of a child's own advantage, against its siblings, on top of its tree's
    prices: Prices = Prices()
    fresh_rounds: int = 0  # most times that groups without a signal are replaced by those of fresh prompts
    temperature: float = 1.0
    seed: int = 0
    save_every: int = 5  # steps
    validate_every: int = 0  # steps; 0: never. The best weights are kept beside the last
    validation: int = 200  # training problems that no step samples, for that

    BOUNDS = (
        at_least(0, "steps", "clip_high", "kl", "importance_cap", "child_credit", "fresh_rounds", "validate_every"),
        at_least(1, "prompts", "batch_rows", "row_length", "inner_steps", "save_every", "validation"),
        between(0, 1, "clip_low"), above(0, "temperature"), *SEED,
    )  # fmt: skip

    def __post_init__(self):
        check_fields(self)
        for name, choices in (("aggregate", AGGREGATES), ("kl_estimator", KL_ESTIMATORS)):
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"{name} is one of {', '.join(choices)}, was given {value!r}")
        if self.group < 2:
            raise UserError(f"a group needs at least 2 rollouts to compare, was given {self.group}")


def advantages(rewards: Sequence[float], normalise: bool) -> np.ndarray:
    """Group-relative advantages [G] of one group; all 0 where its rewards are equal but for rounding, which dividing by
    the deviation would make a signal."""
    if not differ(rewards):
        return np.zeros(len(rewards))
    centred = np.asarray(rewards, np.float64) - np.mean(rewards)
    return centred / centred.std() if normalise else centred


def child_advantages(tree: ThreadTree, normalise: bool) -> list[float]:
    """Of each thread, depth first, what its own subtree achieved against its siblings' (`info["child_values"]`, of each
    child `reward.child_value`), summed over the threads above it: a grandchild has its parent's
    part, too. 0 for the root, and where siblings did equally well."""
    worth = iter(tree.info["child_values"])
    values = {id(thread): next(worth) for thread in tree.threads() if thread is not tree.root}
    found: list[float] = []

    def walk(thread: Thread, own: float) -> None:
        found.append(own)
        for spawn in thread.spawns:
            if spawn.children:
                gains = advantages([values[id(child)] for child in spawn.children], normalise)
                for child, gain in zip(spawn.children, gains):
                    walk(child, own + gain)

    walk(tree.root, 0.0)
    return found


def tree_pieces(tree: ThreadTree, advantage: float, config: GrpoConfig, window: int) -> list[Piece]:
    """The pieces of a sampled tree, laid out with the weight and the advantage of each thread's tokens."""
    threads = list(tree.threads())
    total = max(sum(thread.sampled_tokens for thread in threads), 1)
    writing = max(sum(thread.sampled_tokens > 0 for thread in threads), 1)
    of_tree = max(_requests(tree), 1)

    def per_request(thread: Thread, request: int) -> float:
        return 1 / max(thread.request_tokens[request], 1)

    share = {
        "tree": lambda thread, request: 1 / total,
        "sequence": lambda thread, request: 1 / max(thread.sampled_tokens, 1) / writing,
        "paper": lambda thread, request: per_request(thread, request) / of_tree,
        "token": lambda thread, request: 1.0,
        "constant": lambda thread, request: 1 / window,
    }[config.aggregate]
    kl_share = per_request if config.aggregate == "paper" else share
    own = [0.0] * len(threads)
    if config.child_credit:
        own = child_advantages(tree, config.normalise)
    gains = {id(thread): advantage + config.child_credit * gain for thread, gain in zip(threads, own)}
    return [
        lay_out(thread, share, lambda thread: gains[id(thread)], kl_share)
        for thread in threads
        if not thread.inherits
    ]  # fmt: skip


def loss_divisor(trees: Sequence[tuple[ThreadTree, float]], config: GrpoConfig) -> int:
    """By which a step's sum of losses is divided: its trees, sampled tokens or requests, as `aggregate` says. `trees`
    are all of the step, each with its advantage."""
    if config.aggregate == "token":
        return sum(thread.sampled_tokens for tree, _ in trees for thread in tree.threads())
    if config.aggregate == "paper":
        return sum(_requests(tree) for tree, advantage in trees if advantage or config.kl)
    return len(trees)


def _requests(tree: ThreadTree) -> int:
    """How many requests wrote a tree: those that gave no token (a thread at its limit) were never made."""
    return sum(tokens > 0 for thread in tree.threads() for tokens in thread.request_tokens)


def policy_logprobs(model: Llama, rows: dict, temperature: float) -> jax.Array:
    """The trainer's log-probability of each token [B, T] under the distribution that rollouts are drawn from."""
    return token_logprobs(row_logits(model, rows) / temperature, rows["tokens"])


def grpo_loss(model: Llama, rows: dict, config: GrpoConfig) -> tuple[jax.Array, dict]:
    """(sum of weighted token losses, sums for metrics) of packed rows; see the module's equations. `rows` hold
    "reference" where there is a kl, and "old" where there is an importance cap."""
    logits = row_logits(model, rows) / config.temperature
    logprobs_BxT = token_logprobs(logits, rows["tokens"])
    trained = trained_tokens(rows, "sampled")

    def ahead(of, over):
        """of - over where a token is trained: elsewhere they are unrelated, and an exponential could overflow."""
        return jnp.where(trained > 0, of - over, 0.0)

    old, importance = rows["logprobs"], jnp.ones_like(trained)
    if config.importance_cap:
        old = rows["old"]
        importance = jnp.minimum(jnp.exp(ahead(old, rows["logprobs"])), config.importance_cap)
    advantage = rows["advantage"]
    if config.kl and config.kl_estimator == "k1":
        advantage = advantage - config.kl * ahead(rows["logprobs"], rows["reference"])
    ratio = jnp.exp(ahead(logprobs_BxT, old))
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    binds = clipped * advantage < ratio * advantage  # only there the clip takes the gradient away
    gain = importance * jnp.minimum(ratio * advantage, clipped * advantage)
    loss = -jnp.sum(trained * rows["share"] * gain)
    kl = jnp.zeros_like(ratio)
    if config.kl:
        behind = ahead(rows["reference"], logprobs_BxT)
        kl = jnp.exp(behind) - behind - 1
        if config.kl_estimator == "k3":
            loss = loss + config.kl * jnp.sum(trained * rows["kl_share"] * kl)
    plain = jax.nn.log_softmax(logits, axis=-1)
    difference = jnp.abs(ahead(logprobs_BxT, rows["logprobs"]))
    return loss, {
        "weight": jnp.sum(trained * rows["share"]),
        "trained": jnp.sum(trained),
        "difference": jnp.sum(difference),
        "max_difference": jnp.max(difference),
        "clipped_low": jnp.sum(trained * (binds & (ratio < 1))),
        "clipped_high": jnp.sum(trained * (binds & (ratio > 1))),
        "importance": jnp.sum(trained * importance),
        "kl": jnp.sum(trained * kl),
        "entropy": -jnp.sum(trained * jnp.sum(jnp.exp(plain) * plain, axis=-1)),
    }
