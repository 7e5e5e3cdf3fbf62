"""GRPO on whole thread trees in one process: sample groups, reward roots, update on every thread.

Engine and trainer share the devices of one mesh, and weights go from one to the other without leaving them. What is
maximised is in `objective`, what a tree is worth in `reward`; here is what happens in which order.
"""

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from apr_jax.data.packing import PackedBatch, Segment, first_fit, pack_rows
from apr_jax.errors import UserError
from apr_jax.io.progress import Progress
from apr_jax.model.family import Model, config_json, family_of
from apr_jax.rollout.engine import JaxEngine
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import ThreadTree
from apr_jax.threads.engine import Sampling
from apr_jax.threads.protocol import TaskProtocol
from apr_jax.threads.run import Budget, TreeRunner, run_all
from apr_jax.train.checkpoint import Checkpoints
from apr_jax.train.metrics import MetricsLog
from apr_jax.train.objective import GrpoConfig, advantages, grpo_loss, policy_logprobs, step_segments
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.reward import Groups, differ, rewards, rollout_metrics
from apr_jax.train.step import NotFiniteError, Trainer
from apr_jax.train.termination import PreemptionRequest, Terminated

VALIDATION_TAG = -2  # first in the names of validation's trees; a step's begin with the step


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """How the model makes a tree of a problem."""

    protocol: TaskProtocol  # what a spawn means, and what is right
    tokenizer: Tokenizer
    budget: Budget  # of one tree; its context is the window
    slots: int  # threads that are decoded at the same time, over all devices
    # A condition, the text first on the root's prompt (`TreeRunner.run`) -> how many demonstrations had it. In a fixed
    # order: each prompt of a step draws one by these counts, the same for its whole group, and validation takes the
    # most frequent one. Empty: no condition.
    conditions: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class GrpoJob:
    """One GRPO run: what is trained on what, and where it is kept."""

    model: Model  # GRPO begins with it; it is also the reference of the divergence, where there is one
    config: GrpoConfig
    rollouts: RolloutSpec
    problems: Sequence[Any]  # of training; the last ones are held back where there is validation
    mesh: Mesh  # its devices sample and train
    folder: Path  # gets checkpoints/, best/ and metrics.jsonl
    key: Callable[[Any], Hashable] = lambda problem: problem  # equal for problems that are the same (`Task.key`)
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON, saved beside the weights with the step
    validation_sampling: Sampling = Sampling(0.0)


class GrpoTrainer:
    """The parts of one GRPO run, and one step of it: `sample`, then `update`. `validate` measures between steps. The
    model is the one that GRPO begins with: the reference of the divergence, if there is one."""

    def __init__(self, model: Model, config: GrpoConfig, rollouts: RolloutSpec, mesh: Mesh):
        if config.batch_rows % mesh.devices.size:
            raise UserError(f"batch_rows ({config.batch_rows}) must be a multiple of the {mesh.devices.size} devices")
        self.config, self.rollouts = config, rollouts
        self.window = rollouts.budget.context
        self.engine = JaxEngine(model, mesh, slots=rollouts.slots, context=self.window, seed=config.seed)
        self.trainer = Trainer(
            model,
            lambda model, batch: grpo_loss(model, batch, config),
            make_optimizer(config.optimizer, config.steps * config.inner_steps, family_of(model.config).rules),
            mesh,
            whole_layers=config.optimizer.name == "muon",
        )
        self._score = self.trainer.per_row(lambda model, batch: policy_logprobs(model, batch, config.temperature))
        self.reference = self.trainer.init(model).weights if config.kl else None

    # ------------------------------------------------------------------ sampling

    def runner(self, sampling: Sampling) -> TreeRunner:
        """What makes trees with the weights that the engine has."""
        spec = self.rollouts
        return TreeRunner(self.engine, spec.protocol, spec.tokenizer, spec.budget, sampling)

    def sample(self, state, step: int, problems: Sequence[Any]) -> tuple[list[list[ThreadTree]], list]:
        """(groups, replaced): a group of trees for each of the first `config.prompts` problems.

        Problems after these are spare ones. In each of `config.dynamic_sampling_rounds` rounds they replace problems
        whose trees all have the same reward, as long as there are any left. A tree's name holds its step and problem,
        and draws depend on the name: a step that is done again after a kill samples the same."""
        config = self.config
        self._load(state)
        first = min(config.prompts, len(problems))
        groups, replaced = self._groups(step, problems, range(first)), []
        for _ in range(config.dynamic_sampling_rounds):
            blank = [i for i, group in enumerate(groups) if not differ(rewards(group, config.penalties))]
            fresh = range(first, min(first + len(blank), len(problems)))
            for i, group in zip(blank, self._groups(step, problems, fresh)):
                replaced.append(groups[i])
                groups[i] = group
            first = fresh.stop
        return groups, replaced

    def _groups(self, step: int, problems: Sequence[Any], prompts: range) -> list[list[ThreadTree]]:
        runner, G = self.runner(Sampling(self.config.temperature)), self.config.group

        def job(prompt: int, rollout: int):
            return lambda: runner.run(problems[prompt], (step, prompt, rollout), self.condition(step, prompt))

        trees = asyncio.run(run_all([job(prompt, rollout) for prompt in prompts for rollout in range(G)]))
        return [trees[start : start + G] for start in range(0, len(trees), G)]

    def condition(self, step: int, prompt: int) -> str:
        """What stands first on the prompt of a group: a function of the seed, the step and the prompt's number."""
        conditions = self.rollouts.conditions
        if not conditions:
            return ""
        draw = random.Random(f"{self.config.seed}/{step}/{prompt}/condition")
        return draw.choices(list(conditions), list(conditions.values()))[0]

    def validate(self, state, problems: Sequence[Any], sampling: Sampling) -> float:
        """The share of problems whose tree is right."""
        self._load(state)
        runner, condition = self.runner(sampling), most_frequent(self.rollouts.conditions)
        jobs = [lambda i=i: runner.run(problems[i], (VALIDATION_TAG, i), condition) for i in range(len(problems))]
        return float(np.mean([tree.outcome.correct for tree in asyncio.run(run_all(jobs))]))

    def _load(self, state) -> None:
        self.engine.load(nnx.state(self.trainer.model(state)))

    # ------------------------------------------------------------------ updating

    def update(self, state, groups: Groups, between: Callable[[int], None] = lambda inner: None):
        """The inner steps on one batch of groups: (state, metrics). A batch without a signal is no update.
        `between(n)` is called after the n-th inner step."""
        config, clock = self.config, _Clock()
        trees = [
            (tree, float(advantage))
            for group in groups
            for tree, advantage in zip(group, advantages(rewards(group, config.penalties), config.normalise))
        ]
        segments, divisor = step_segments(trees, config, self.window)
        batches, metrics = self._batches(segments)
        clock.lap("pack")
        if not batches:
            return state, metrics | clock.laps
        batches = [self._scored(state, batch) for batch in batches]
        clock.lap("score")
        for inner in range(config.inner_steps):
            state, sums = self.trainer.step(state, batches, divisor)
            if inner == 0:
                # Before any update the trainer must find the engine's own log-probabilities again.
                metrics["train/logprob_mismatch"] = float(sums["logprob_mismatch"] / sums["trained"])
                metrics["train/max_logprob_mismatch"] = float(sums["max_logprob_mismatch"])
            between(inner + 1)
        sums = {name: float(value) for name, value in sums.items()}
        if sums["skipped"]:
            raise NotFiniteError(
                f"a loss or gradient of the GRPO updates up to {int(state.step)} is not finite: begin in a new folder "
                "with lower rates or another seed"
            )
        for name in ("clipped_low", "clipped_high", "importance", "kl", "entropy"):
            metrics[f"train/{name}"] = sums[name] / sums["trained"]
        metrics |= {"train/gradient_norm": sums["gradient_norm"], "train/sampled_tokens": sums["trained"]}
        clock.lap("update")
        return state, metrics | clock.laps

    def _scored(self, state, batch: PackedBatch) -> PackedBatch:
        """The batch with the log-probabilities that the loss needs beside the engine's."""
        reference = None if self.reference is None else np.asarray(self._score(self.reference, batch))
        old = np.asarray(self._score(state.weights, batch)) if self.config.tis_clip else None
        return dataclasses.replace(batch, reference_logprobs=reference, old_logprobs=old)

    def _batches(self, segments: Sequence[Segment]) -> tuple[list[PackedBatch], dict[str, float]]:
        """The segments as batches of one shape, and metrics: how many threads and tokens they hold. Rows of a batch
        cost about the same, so that no device waits for another."""
        config = self.config
        # A segment holds calls, and children that inherit, beside its thread's window: cut by no one, so counted.
        fitting = [segment for segment in segments if len(segment) <= config.row_length]
        counts = {
            "train/threads": len(fitting), "train/threads_too_long": len(segments) - len(fitting),
            "train/tokens": config.inner_steps * sum(map(len, fitting)),  # those that were given, too, as SFT counts
        }  # fmt: skip
        rows = first_fit([len(segment) for segment in fitting], config.row_length) if fitting else []
        rows.sort(key=lambda row: sum(int(fitting[i].positions.sum()) for i in row), reverse=True)
        batches = [
            pack_rows(
                [[fitting[i] for i in row] for row in rows[at : at + config.batch_rows]],
                config.row_length,
                config.batch_rows,
            )
            for at in range(0, len(rows), config.batch_rows)
        ]
        return batches, counts | {"train/rows": len(rows)}


def most_frequent(conditions: Mapping[str, int]) -> str:
    """The condition with the highest count, of equal ones the first; "" where there is none."""
    return max(conditions, key=conditions.__getitem__, default="")


def _last(items: Sequence, count: int) -> list:
    return [items[i] for i in range(len(items) - count, len(items))]


def hold_back(
    problems: Sequence[Any], config: GrpoConfig, key: Callable[[Any], Hashable] = lambda problem: problem
) -> tuple[Sequence[Any], list]:
    """(problems to sample from, problems of validation): the last `validation` ones where there is validation, and no
    problem that has the `key` of one of them is sampled. Raises UserError where none is left to sample."""
    held_back = _last(problems, min(config.validation, len(problems)) if config.validate_every else 0)
    known = set(map(key, held_back))
    sampled = [problem for problem in problems if key(problem) not in known] if known else problems
    if not len(sampled):
        raise UserError(
            f"GRPO has no problem left to sample: the last {len(held_back)} of {len(problems)} are held back for "
            "validation, and the others are the same as these: give more problems, or a smaller grpo.validation"
        )
    return sampled, held_back


class _Clock:
    """Seconds of a step's parts, as metrics."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[f"seconds/{name}"] = now - self._last
        self._last = now


class _Best:
    """The weights that validated best so far, in a folder of their own, with what they reached."""

    def __init__(self, folder: Path):
        self._checkpoints = Checkpoints(folder, keep=1)
        step = self._checkpoints.latest
        self.reached = -1.0 if step is None else self._checkpoints.meta(step)["validation_accuracy"]

    def offer(self, step: int, state, meta: dict, accuracy: float) -> None:
        if accuracy > self.reached:
            self.reached = accuracy
            self._checkpoints.save(
                step, {"weights": state.weights}, {**meta, "step": step, "validation_accuracy": accuracy}
            )
            self._checkpoints.wait()  # a run that goes on from this step would not validate it again

    def close(self) -> None:
        self._checkpoints.close()


def run_grpo(job: GrpoJob) -> Model:
    """Trains to the last step, from the newest checkpoint under the job's folder where there is one. A step is a
    pure function of (weights, optimiser, step, seed), so a run killed at any moment ends in the same bits.

    With `validate_every` some of the problems are held back from sampling and tried before the first step, every so
    many steps and after the last; best/ keeps the weights that did best. Raises `Terminated`, after a save, where the
    process got a SIGTERM.
    """
    config, folder = job.config, job.folder
    sampled, held_back = hold_back(job.problems, config, job.key)
    trainer = GrpoTrainer(job.model, config, job.rollouts, job.mesh)
    state = trainer.trainer.init(job.model)
    meta = {"model": config_json(job.model.config), **job.meta}
    checkpoints = Checkpoints(folder / "checkpoints")
    start = 0
    if checkpoints.latest is not None:
        start, state = checkpoints.restore(state)
    log = MetricsLog(folder, start if start else -1)  # -1: what validation said before the first step comes again
    progress = Progress(f"grpo {folder.name}", config.steps, "steps", start)
    best = _Best(folder / "best") if config.validate_every else None

    def validate(step: int) -> dict[str, float]:
        began = time.monotonic()
        accuracy = trainer.validate(state, held_back, job.validation_sampling)
        best.offer(step, state, meta, accuracy)
        return {"validation/accuracy": accuracy, "seconds/validate": time.monotonic() - began}

    try:
        with PreemptionRequest() as request:
            if best is not None and not start:
                log.write(0, validate(0))
            preempted, step, ended = False, start, time.monotonic()
            for step in range(start + 1, config.steps + 1):
                clock = _Clock()
                count = min(config.prompts * (1 + config.dynamic_sampling_rounds), len(sampled))
                chosen = random.Random(f"{config.seed}/{step}").sample(range(len(sampled)), count)
                groups, replaced = trainer.sample(state, step, [sampled[i] for i in chosen])
                clock.lap("sample")
                metrics = rollout_metrics(groups + replaced, config.penalties)
                metrics["rollout/groups_replaced"] = len(replaced)
                state, trained = trainer.update(state, groups)
                metrics |= clock.laps | trained
                last = step == config.steps
                if best is not None and (last or step % config.validate_every == 0):
                    metrics |= validate(step)
                # The line comes before the save, whose time is the next step's: a step saved without its line would
                # never get one.
                parts = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
                whole, ended = time.monotonic() - ended, time.monotonic()
                log.write(step, metrics | {"seconds/step": whole, "seconds/rest": whole - parts})
                preempted = request.given
                if preempted or last or step % config.save_every == 0:
                    checkpoints.save(step, state, {**meta, "step": step})
                progress.update(step, f"right {metrics['rollout/correct']:.3f}")
                if preempted:
                    break
            checkpoints.wait()
            if preempted or request.given:
                raise Terminated(f"grpo {folder.name} is saved at step {step} of {config.steps}")
        return trainer.trainer.model(state)
    finally:
        log.close()
        try:
            checkpoints.close()
        finally:
            if best is not None:
                best.close()
