"""GRPO on whole thread trees: sample groups of trees, reward each tree's root, update on every thread.

The engine that samples and the trainer share the devices of one mesh in one process. Weights go from the trainer to the
engine on these devices. The loss is in `objective`, the reward in `reward`; this module is the loop around them.
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

VALIDATION_TAG = -2  # first number in the name of a validation tree; the name of a sampled tree begins with its step


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """How trees are sampled: the task, the budget and the engine's size."""

    protocol: TaskProtocol  # the text format of spawns, and which answers are correct
    tokenizer: Tokenizer
    budget: Budget  # of one tree; its context is the window
    slots: int  # threads that are decoded at the same time, over all devices
    # A condition is a text at the start of the root's prompt, such as a budget of children. For each condition its
    # number of demonstrations, in a fixed order. Each group draws one condition with these frequencies; validation
    # uses the most frequent one. Empty: no condition.
    conditions: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class GrpoJob:
    """One GRPO run: the model, the problems it is trained on, and the folder for results."""

    model: Model  # the model before the first step; also the reference if `config.kl` is above 0
    config: GrpoConfig
    rollouts: RolloutSpec
    problems: Sequence[Any]  # for training; the last ones are held out if there is validation
    mesh: Mesh  # its devices sample and train
    folder: Path  # for checkpoints/, best/, metrics.jsonl and tensorboard/
    key: Callable[[Any], Hashable] = lambda problem: problem  # equal for two forms of one problem (`Task.key`)
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON, saved with each checkpoint
    validation_sampling: Sampling = Sampling(0.0)


class GrpoTrainer:
    """The engine, the trainer and the reference of one GRPO run. A step is `sample`, then `update`; `validate` measures
    accuracy between steps. `model` is the model before the first step.

    Raises UserError if `config.batch_rows` is no multiple of the number of devices.
    """

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
        """A runner that samples trees with the engine's current weights."""
        spec = self.rollouts
        return TreeRunner(self.engine, spec.protocol, spec.tokenizer, spec.budget, sampling)

    def sample(self, state, step: int, problems: Sequence[Any]) -> tuple[list[list[ThreadTree]], list]:
        """(groups, replaced): a group of trees for each of the first `config.prompts` problems, and the groups that
        were sampled but replaced.

        The problems after these are spares. In each of `config.dynamic_sampling_rounds` rounds, groups whose trees all
        have the same reward are replaced by groups of spares, until no spare is left. A tree's name contains its step
        and problem, and random draws depend on the name: a step that is repeated after a kill samples the same trees.
        """
        config = self.config
        self._load(state)
        first = min(config.prompts, len(problems))
        groups, replaced = self._groups(step, problems, range(first)), []
        for _ in range(config.dynamic_sampling_rounds):
            no_signal = [i for i, group in enumerate(groups) if not differ(rewards(group, config.penalties))]
            fresh = range(first, min(first + len(no_signal), len(problems)))
            for i, group in zip(no_signal, self._groups(step, problems, fresh)):
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
        """The condition of a group, "" if there are none: a function of the seed, the step and the prompt's number."""
        conditions = self.rollouts.conditions
        if not conditions:
            return ""
        draw = random.Random(f"{self.config.seed}/{step}/{prompt}/condition")
        return draw.choices(list(conditions), list(conditions.values()))[0]

    def validate(self, state, problems: Sequence[Any], sampling: Sampling) -> float:
        """The fraction of problems that are answered correctly, with one tree each."""
        self._load(state)
        runner, condition = self.runner(sampling), most_frequent(self.rollouts.conditions)
        jobs = [lambda i=i: runner.run(problems[i], (VALIDATION_TAG, i), condition) for i in range(len(problems))]
        return float(np.mean([tree.outcome.correct for tree in asyncio.run(run_all(jobs))]))

    def _load(self, state) -> None:
        self.engine.load(nnx.state(self.trainer.model(state)))

    # ------------------------------------------------------------------ updating

    def update(self, state, groups: Groups, after_inner_step: Callable[[int], None] = lambda inner: None):
        """The inner steps on the groups of one step. Returns (state, metrics); the state is unchanged if there is no
        thread to train on, as when all rewards of each group are equal and there is no kl.

        `after_inner_step(n)` is called after the n-th inner step. Raises NotFiniteError if a loss or gradient is NaN or
        infinite.
        """
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
                # Before the first update the trainer's log-probabilities must equal those of the engine.
                metrics["train/logprob_mismatch"] = float(sums["logprob_mismatch"] / sums["trained"])
                metrics["train/max_logprob_mismatch"] = float(sums["max_logprob_mismatch"])
            after_inner_step(inner + 1)
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
        """The batch with the log-probabilities of the reference (if there is a kl) and of the trainer before the update
        (if there is a tis_clip)."""
        reference_BxT = None if self.reference is None else np.asarray(self._score(self.reference, batch))
        old_BxT = np.asarray(self._score(state.weights, batch)) if self.config.tis_clip else None
        return dataclasses.replace(batch, reference_logprobs=reference_BxT, old_logprobs=old_BxT)

    def _batches(self, segments: Sequence[Segment]) -> tuple[list[PackedBatch], dict[str, float]]:
        """The segments packed into batches of one shape, and counts of their threads, tokens and rows as metrics. The
        rows of a batch cost about the same, so that devices do not wait for each other."""
        config = self.config
        # A segment can be longer than the window: it also contains calls, and children that inherit its context. One
        # that is longer than a row is left out, not cut, and counted.
        fitting = [segment for segment in segments if len(segment) <= config.row_length]
        counts = {
            "train/threads": len(fitting), "train/threads_too_long": len(segments) - len(fitting),
            "train/tokens": config.inner_steps * sum(map(len, fitting)),  # prompts included, as in SFT
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
    """The condition with the highest count, the first of equal ones; "" if there are none."""
    return max(conditions, key=conditions.__getitem__, default="")


def _last(items: Sequence, count: int) -> list:
    return [items[i] for i in range(len(items) - count, len(items))]


def hold_back(
    problems: Sequence[Any], config: GrpoConfig, key: Callable[[Any], Hashable] = lambda problem: problem
) -> tuple[Sequence[Any], list]:
    """(problems to sample, problems for validation). With validation, the last `config.validation` problems are held
    out, and problems with the key of one of these are not sampled. Raises UserError if no problem is left to sample."""
    held_back = _last(problems, min(config.validation, len(problems)) if config.validate_every else 0)
    held_back_keys = set(map(key, held_back))
    sampled = [problem for problem in problems if key(problem) not in held_back_keys] if held_back_keys else problems
    if not len(sampled):
        raise UserError(
            f"GRPO has no problem left to sample: the last {len(held_back)} of {len(problems)} are held back for "
            "validation, and the others are the same as these: give more problems, or a smaller grpo.validation"
        )
    return sampled, held_back


class _Clock:
    """A stopwatch: `laps` has the seconds of each part of a step, by the metric's name."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[f"seconds/{name}"] = now - self._last
        self._last = now


class _Best:
    """The weights with the best validation accuracy so far, in a folder of their own; their accuracy is in its meta."""

    def __init__(self, folder: Path):
        self._checkpoints = Checkpoints(folder, keep=1)
        step = self._checkpoints.latest
        self.accuracy = -1.0 if step is None else self._checkpoints.meta(step)["validation_accuracy"]

    def offer(self, step: int, state, meta: dict, accuracy: float) -> None:
        """Save the weights of a state if their accuracy is the highest so far."""
        if accuracy > self.accuracy:
            self.accuracy = accuracy
            self._checkpoints.save(
                step, {"weights": state.weights}, {**meta, "step": step, "validation_accuracy": accuracy}
            )
            self._checkpoints.wait()  # a run that resumes from this step does not repeat its validation

    def close(self) -> None:
        self._checkpoints.close()


def run_grpo(job: GrpoJob) -> Model:
    """Train to the last step and return the model, starting from the newest checkpoint in the job's folder if there is
    one. A step is a pure function of (weights, optimizer state, step, seed), so a run that was killed at any time and
    resumed ends in the same bits.

    If `validate_every` is set, held-out problems are validated before the first step, every `validate_every` steps and
    after the last step; best/ keeps the weights with the best accuracy. Raises `Terminated`, after a save, if the
    process got a SIGTERM; NotFiniteError as `GrpoTrainer.update`; UserError if no problem is left to sample, or rows
    do not split over the devices.
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
    log = MetricsLog(folder, start if start else -1)  # -1: a new start repeats the validation at step 0
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
                # The line is written before the save: a step that was saved without its line would never get one. The
                # time of the save counts for the next step.
                parts = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
                whole, ended = time.monotonic() - ended, time.monotonic()
                log.write(step, metrics | {"seconds/step": whole, "seconds/rest": whole - parts})
                preempted = request.received
                if preempted or last or step % config.save_every == 0:
                    checkpoints.save(step, state, {**meta, "step": step})
                progress.update(step, f"correct {metrics['rollout/correct']:.3f}")
                if preempted:
                    break
            checkpoints.wait()
            if preempted or request.received:
                raise Terminated(f"grpo {folder.name} is saved at step {step} of {config.steps}")
        return trainer.trainer.model(state)
    finally:
        log.close()
        try:
            checkpoints.close()
        finally:
            if best is not None:
                best.close()
