"""GRPO on whole thread trees (paper, section 3.2): sample groups, reward roots, update on every thread.

Which GRPO this is: the advantage of a tree is its reward minus the mean of its group (divided by the
group's deviation where `normalise` says so), the same for all its threads; per sampled token, with
r = exp(logprob - logprob when sampled),

    loss = - min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl (exp(q - p) - (q - p) - 1)

where p is the model's log-probability and q the reference's (k3). What it is not: no critic, no
importance weights beyond r, no reward but the correctness of the root's answer. Groups whose rewards are
all equal have no gradient and are left out of the update (kl aside, which then sees fewer trees).

`aggregate` weighs tokens: "tree" (default) gives every tree 1, spread over its sampled tokens;
"sequence" the paper's: every thread of a tree the same share; "token" every token of the step the same.
"""

import asyncio
import dataclasses
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apr_jax.model.llama import Llama
from apr_jax.rollout.engine import JaxEngine
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import ThreadTree
from apr_jax.threads.engine import Sampling
from apr_jax.threads.metrics import children, sequential_tokens, total_tokens
from apr_jax.threads.protocol import TaskProtocol
from apr_jax.threads.run import Budget, TreeRunner, run_all
from apr_jax.train.checkpoint import Checkpoints
from apr_jax.train.loss import row_logits, token_logprobs, trained_tokens
from apr_jax.train.metrics import MetricsLog, Progress
from apr_jax.train.optimizer import OptimizerConfig, make_optimizer
from apr_jax.train.pack import Piece, first_fit, lay_out, pack_rows
from apr_jax.train.step import Trainer
from apr_jax.train.termination import Notice, Terminated

AGGREGATES = ("tree", "sequence", "token")


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
    normalise: bool = True  # divide advantages by the group's deviation
    aggregate: str = "tree"
    temperature: float = 1.0
    seed: int = 0
    save_every: int = 5  # steps

    def __post_init__(self):
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"aggregate is one of {AGGREGATES}, was given {self.aggregate!r}")
        if self.group < 2:
            raise ValueError(f"a group needs at least 2 rollouts to compare, was given {self.group}")
        if self.temperature <= 0:
            raise ValueError(f"rollouts need a temperature above 0, was given {self.temperature}")


def advantages(rewards: Sequence[float], normalise: bool) -> np.ndarray:
    """Group-relative advantages [G] of one group; all 0 where its rewards are equal."""
    if min(rewards) == max(rewards):
        return np.zeros(len(rewards))
    centred = np.asarray(rewards, np.float64) - np.mean(rewards)
    return centred / centred.std() if normalise else centred


def grpo_loss(model: Llama, rows: dict, config: GrpoConfig) -> tuple[jax.Array, dict]:
    """(sum of weighted token losses, sums for metrics) of packed rows; see the module's equation."""
    logits = row_logits(model, rows) / config.temperature
    logprobs_BxT = token_logprobs(logits, rows["tokens"])
    trained = trained_tokens(rows, "sampled")
    weight = trained * rows["share"]
    # Outside the mask the difference would be of unrelated numbers, and its exponential could overflow.
    difference = jnp.where(trained > 0, logprobs_BxT - rows["logprobs"], 0.0)
    ratio = jnp.exp(difference)
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    gain = jnp.minimum(ratio * rows["advantage"], clipped * rows["advantage"])
    loss = -gain
    kl = jnp.zeros_like(loss)
    if config.kl:
        ahead = jnp.where(trained > 0, rows["reference"] - logprobs_BxT, 0.0)
        kl = jnp.exp(ahead) - ahead - 1
        loss = loss + config.kl * kl
    plain = jax.nn.log_softmax(logits, axis=-1)
    return jnp.sum(weight * loss), {
        "weight": jnp.sum(weight),
        "trained": jnp.sum(trained),
        "difference": jnp.sum(trained * jnp.abs(difference)),
        "clipped": jnp.sum(trained * (ratio != clipped)),
        "kl": jnp.sum(trained * kl),
        "entropy": -jnp.sum(trained * jnp.sum(jnp.exp(plain) * plain, axis=-1)),
    }


def tree_pieces(tree: ThreadTree, advantage: float, aggregate: str) -> list[Piece]:
    """The pieces of a sampled tree, laid out with the weight of each thread's tokens."""
    threads = list(tree.threads())
    total = max(sum(thread.sampled_tokens for thread in threads), 1)
    share = {
        "tree": lambda thread: 1 / total,
        "sequence": lambda thread: 1 / (max(thread.sampled_tokens, 1) * len(threads)),
        "token": lambda thread: 1.0,
    }[aggregate]
    return [lay_out(thread, share, advantage) for thread in threads if not thread.inherits]


class GrpoTrainer:
    """The parts of one GRPO run, and one step of it: `sample`, then `update`."""

    def __init__(
        self,
        model: Llama,
        protocol: TaskProtocol,
        tokenizer: Tokenizer,
        budget: Budget,
        config: GrpoConfig,
        mesh,
        slots: int,
    ):
        if config.batch_rows % mesh.devices.size:
            raise ValueError(f"batch_rows ({config.batch_rows}) must be a multiple of the {mesh.devices.size} devices")
        self.config = config
        self.engine = JaxEngine(model, mesh, slots=slots, context=budget.context, seed=config.seed)
        self.runner = TreeRunner(self.engine, protocol, tokenizer, budget, Sampling(config.temperature))
        optimizer = make_optimizer(config.optimizer, config.steps * config.inner_steps)
        self.trainer = Trainer(
            model, lambda model, rows: grpo_loss(model, rows, config), optimizer, mesh,
            whole_layers=config.optimizer.name == "muon",
        )  # fmt: skip
        self.reference = nnx.to_pure_dict(nnx.state(model)) if config.kl else None
        self._score = jax.jit(
            lambda weights, rows: token_logprobs(
                row_logits(self.trainer.rebuild(weights), rows) / config.temperature, rows["tokens"]
            )
        )

    def sample(self, state, step: int, problems: Sequence[Any]) -> list[list[ThreadTree]]:
        """A group of trees for each problem. A tree's name, and so its draws, hold the step: a step that is
        done again after a kill samples the same."""
        self.engine.load(nnx.state(self.trainer.model(state)))

        def job(prompt: int, rollout: int):
            return lambda: self.runner.run(problems[prompt], (step, prompt, rollout))

        G = self.config.group
        jobs = [job(prompt, rollout) for prompt in range(len(problems)) for rollout in range(G)]
        trees = asyncio.run(run_all(jobs))
        return [trees[start : start + G] for start in range(0, len(trees), G)]

    def update(self, state, groups: Sequence[Sequence[ThreadTree]]):
        """The inner steps on one batch of groups: (state, metrics). A batch without a signal is no update."""
        config = self.config
        pieces: list[Piece] = []
        for group in groups:
            gains = advantages([float(tree.info["correct"]) for tree in group], config.normalise)
            if gains.any():
                for tree, gain in zip(group, gains):
                    pieces += tree_pieces(tree, gain, config.aggregate)
        # A piece holds calls, and children that inherit, beside its thread's window: cut by no one, so counted.
        fitting = [piece for piece in pieces if len(piece) <= config.row_length]
        metrics = {"train/threads": len(fitting), "train/threads_too_long": len(pieces) - len(fitting)}
        if not fitting:
            return state, metrics
        rows = first_fit([len(piece) for piece in fitting], config.row_length)
        batches = [
            pack_rows(
                [[fitting[i] for i in row] for row in rows[at : at + config.batch_rows]],
                config.row_length,
                config.batch_rows,
            )
            for at in range(0, len(rows), config.batch_rows)
        ]
        if self.reference is not None:
            for batch in batches:
                batch["reference"] = np.asarray(self._score(self.reference, batch))
        divisor = sum(map(len, groups)) if config.aggregate != "token" else None
        for inner in range(config.inner_steps):
            state, sums = self.trainer.step(state, batches, divisor)
            if inner == 0:
                # Before any update the trainer must find the engine's own log-probabilities again.
                metrics["train/engine_difference"] = float(sums["difference"] / sums["trained"])
        sums = {name: float(value) for name, value in sums.items()}
        if sums["skipped"]:
            raise FloatingPointError(f"a gradient of the GRPO updates up to {int(state.step)} is not finite")
        for name in ("clipped", "kl", "entropy"):
            metrics[f"train/{name}"] = sums[name] / sums["trained"]
        metrics |= {"train/gradient_norm": sums["gradient_norm"], "train/tokens": sums["trained"]}
        metrics["train/rows"] = len(rows)
        return state, metrics


def rollout_metrics(groups: Sequence[Sequence[ThreadTree]]) -> dict[str, float]:
    """What a step's trees were like: reward, size, shape, and what went wrong in them."""
    trees = [tree for group in groups for tree in group]
    n = len(trees)
    failures = Counter(kind for tree in trees for kind in tree.info["failures"])
    return {
        "rollout/reward": sum(tree.info["correct"] for tree in trees) / n,
        "rollout/claimed": sum(tree.info["claimed"] for tree in trees) / n,
        "rollout/groups_with_signal": sum(0 < sum(t.info["correct"] for t in g) < len(g) for g in groups) / len(groups),
        "rollout/children": sum(children(tree) for tree in trees) / n,
        "rollout/total_tokens": sum(total_tokens(tree) for tree in trees) / n,
        "rollout/sequential_tokens": sum(sequential_tokens(tree) for tree in trees) / n,
        "rollout/guarded": sum(tree.info["guarded"] for tree in trees) / n,
        **{f"rollout/failed_{kind}": count / n for kind, count in sorted(failures.items())},
    }


def run_grpo(
    model: Llama, problems: Sequence[Any], protocol: TaskProtocol, tokenizer: Tokenizer, budget: Budget,
    config: GrpoConfig, mesh, slots: int, folder: Path, meta: dict,
) -> Llama:  # fmt: skip
    """Trains to the last step, from the newest checkpoint under `folder` where there is one. A step is a
    pure function of (weights, optimiser, step, seed), so a killed run ends in the same bits."""
    trainer = GrpoTrainer(model, protocol, tokenizer, budget, config, mesh, slots)
    state = trainer.trainer.init(model)
    checkpoints = Checkpoints(folder / "checkpoints")
    start = 0
    if checkpoints.latest is not None:
        start, state = checkpoints.restore(state)
    log = MetricsLog(folder, start)
    progress = Progress(f"grpo {folder.name}", config.steps, "steps", start)
    try:
        with Notice() as notice:
            for step in range(start + 1, config.steps + 1):
                began = time.monotonic()
                chosen = random.Random(f"{config.seed}/{step}").sample(range(len(problems)), config.prompts)
                groups = trainer.sample(state, step, [problems[i] for i in chosen])
                sampled = time.monotonic()
                state, metrics = trainer.update(state, groups)
                metrics = rollout_metrics(groups) | metrics
                metrics |= {"seconds/sample": sampled - began, "seconds/update": time.monotonic() - sampled}
                log.write(step, metrics)
                progress.update(step, f"reward {metrics['rollout/reward']:.3f}")
                told = notice.given
                if told or step == config.steps or step % config.save_every == 0:
                    checkpoints.save(step, state, {**meta, "step": step})
                if told:
                    break
            checkpoints.wait()
            if notice.given:
                raise Terminated(f"grpo {folder.name} is saved at step {step} of {config.steps}")
        return trainer.trainer.model(state)
    finally:
        log.close()
        checkpoints.close()
