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

from apr_jax.data.packing import Piece, first_fit, pack_rows
from apr_jax.errors import UserError
from apr_jax.io.progress import Progress
from apr_jax.model.llama import Llama
from apr_jax.rollout.engine import JaxEngine
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import ThreadTree
from apr_jax.threads.engine import Sampling
from apr_jax.threads.protocol import TaskProtocol
from apr_jax.threads.run import Budget, TreeRunner, run_all
from apr_jax.train.checkpoint import Checkpoints
from apr_jax.train.metrics import MetricsLog
from apr_jax.train.objective import GrpoConfig, advantages, grpo_loss, loss_divisor, policy_logprobs, tree_pieces
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.reward import Groups, child_value, differ, rewards, rollout_metrics
from apr_jax.train.step import NotFiniteError, Trainer
from apr_jax.train.termination import Notice, Terminated

VALIDATION_TAG = -2  # first in the names of validation's trees; a step's begin with the step


class GrpoTrainer:
    """The parts of one GRPO run, and one step of it: `sample`, then `update`. `validate` measures between steps.

    The model is what GRPO begins with: the reference of the divergence, if there is one. `conditions` says how many of
    the demonstrations had which condition first on the root's prompt (`TreeRunner.run`), in a fixed order. Each prompt
    of a step draws one by these counts, the same for its whole group; validation takes the most frequent one.
    """

    def __init__(
        self,
        model: Llama,
        protocol: TaskProtocol,
        tokenizer: Tokenizer,
        budget: Budget,
        config: GrpoConfig,
        mesh,
        slots: int,
        conditions: Mapping[str, int] = {},
    ):
        self.conditions = conditions
        if config.batch_rows % mesh.devices.size:
            raise UserError(f"batch_rows ({config.batch_rows}) must be a multiple of the {mesh.devices.size} devices")
        self.config = config
        self.engine = JaxEngine(model, mesh, slots=slots, context=budget.context, seed=config.seed)
        self._runner = lambda sampling: TreeRunner(self.engine, protocol, tokenizer, budget, sampling)
        self._window = budget.context
        self.trainer = Trainer(
            model,
            lambda model, rows: grpo_loss(model, rows, config),
            make_optimizer(config.optimizer, config.steps * config.inner_steps),
            mesh,
            whole_layers=config.optimizer.name == "muon",
        )
        self._score = self.trainer.per_row(lambda model, rows: policy_logprobs(model, rows, config.temperature))
        self.reference = self.trainer.init(model).weights if config.kl else None

    # ------------------------------------------------------------------ sampling

    def sample(self, state, step: int, problems: Sequence[Any]) -> tuple[list[list[ThreadTree]], list]:
        """(groups, replaced): a group of trees for each of the first `config.prompts` problems. The problems behind
        those are fresh ones: in each of `config.fresh_rounds` they take the place of those whose trees were all worth
        the same, as far as they last. A tree's name, and so its draws, hold step and problem: a step that is done again
        after a kill samples the same."""
        config = self.config
        self._load(state)
        first = min(config.prompts, len(problems))
        groups, replaced = self._groups(step, problems, range(first)), []
        for _ in range(config.fresh_rounds):
            blank = [i for i, group in enumerate(groups) if not differ(rewards(group, config.prices))]
            fresh = range(first, min(first + len(blank), len(problems)))
            for i, group in zip(blank, self._groups(step, problems, fresh)):
                replaced.append(groups[i])
                groups[i] = group
            first = fresh.stop
        return groups, replaced

    def _groups(self, step: int, problems: Sequence[Any], prompts: range) -> list[list[ThreadTree]]:
        runner, G = self._runner(Sampling(self.config.temperature)), self.config.group

        def job(prompt: int, rollout: int):
            return lambda: runner.run(problems[prompt], (step, prompt, rollout), self.condition(step, prompt))

        trees = asyncio.run(run_all([job(prompt, rollout) for prompt in prompts for rollout in range(G)]))
        if self.config.child_credit:
            for tree in trees:
                tree.info["child_values"] = [
                    child_value(runner.protocol, runner.text(thread), thread.failure, self.config.prices)
                    for thread in tree.threads()
                    if thread is not tree.root
                ]
        return [trees[start : start + G] for start in range(0, len(trees), G)]

    def condition(self, step: int, prompt: int) -> str:
        """What stands first on the prompt of a group: a function of the seed, the step and the prompt's number."""
        if not self.conditions:
            return ""
        draw = random.Random(f"{self.config.seed}/{step}/{prompt}/condition")
        return draw.choices(list(self.conditions), list(self.conditions.values()))[0]

    def validate(self, state, problems: Sequence[Any], sampling: Sampling) -> float:
        """The share of problems whose tree is right."""
        self._load(state)
        runner, condition = self._runner(sampling), most_frequent(self.conditions)
        jobs = [lambda i=i: runner.run(problems[i], (VALIDATION_TAG, i), condition) for i in range(len(problems))]
        return float(np.mean([tree.info["correct"] for tree in asyncio.run(run_all(jobs))]))

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
            for tree, advantage in zip(group, advantages(rewards(group, config.prices), config.normalise))
        ]
        batches, metrics = self._batches(trees)
        clock.lap("pack")
        if not batches:
            return state, metrics | clock.laps
        for batch in batches:
            if self.reference is not None:
                batch["reference"] = np.asarray(self._score(self.reference, batch))
            if config.importance_cap:
                batch["old"] = np.asarray(self._score(state.weights, batch))
        clock.lap("score")
        divisor = loss_divisor(trees, config)
        for inner in range(config.inner_steps):
            state, sums = self.trainer.step(state, batches, divisor)
            if inner == 0:
                # Before any update the trainer must find the engine's own log-probabilities again.
                metrics["train/engine_difference"] = float(sums["difference"] / sums["trained"])
                metrics["train/engine_difference_most"] = float(sums["max_difference"])
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

    def _batches(self, trees: Sequence[tuple[ThreadTree, float]]) -> tuple[list[dict[str, np.ndarray]], dict]:
        """Packed rows of all that has a gradient, all of one shape, and how many threads they hold. `trees` have their
        advantages. Rows of a batch cost about the same, so that no device waits for another."""
        config = self.config
        pieces: list[Piece] = []
        for tree, advantage in trees:
            if advantage or config.child_credit or config.kl:
                pieces += tree_pieces(tree, advantage, config, self._window)
        if not config.kl:
            pieces = [piece for piece in pieces if piece.advantage.any()]
        # A piece holds calls, and children that inherit, beside its thread's window: cut by no one, so counted.
        fitting = [piece for piece in pieces if len(piece) <= config.row_length]
        counts = {
            "train/threads": len(fitting), "train/threads_too_long": len(pieces) - len(fitting),
            "train/tokens": config.inner_steps * sum(map(len, fitting)),  # those that were given, too, as SFT counts
        }  # fmt: skip
        rows = first_fit([len(piece) for piece in fitting], config.row_length) if fitting else []
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


def _identity(problem: Any) -> Hashable:
    """What two problems share that are the same to their task: their `key` where they have one."""
    return getattr(problem, "key", problem)


def hold_back(problems: Sequence[Any], config: GrpoConfig) -> tuple[Sequence[Any], list]:
    """(problems to sample from, problems of validation): the last `validation` ones where there is validation, and no
    problem that is the same as one of them is sampled. Raises UserError where none is left to sample."""
    held_back = _last(problems, min(config.validation, len(problems)) if config.validate_every else 0)
    known = set(map(_identity, held_back))
    sampled = [problem for problem in problems if _identity(problem) not in known] if known else problems
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


def run_grpo(
    model: Llama, problems: Sequence[Any], protocol: TaskProtocol, tokenizer: Tokenizer, budget: Budget,
    config: GrpoConfig, mesh, slots: int, folder: Path, meta: dict, validation: Sampling = Sampling(0.0),
    conditions: Mapping[str, int] = {},
) -> Llama:  # fmt: skip
    """Trains to the last step, from the newest checkpoint under `folder` where there is one. A step is a
    pure function of (weights, optimiser, step, seed), so a run killed at any moment ends in the same bits.

    With `validate_every` some of the problems are held back from sampling and tried with `validation` before the first
    step, every so many steps and after the last; `folder`/best keeps the weights that did best. `conditions` as in
    `GrpoTrainer`.
    """
    sampled, held_back = hold_back(problems, config)
    trainer = GrpoTrainer(model, protocol, tokenizer, budget, config, mesh, slots, conditions)
    state = trainer.trainer.init(model)
    meta = {"model": dataclasses.asdict(model.config), **meta}
    checkpoints = Checkpoints(folder / "checkpoints")
    start = 0
    if checkpoints.latest is not None:
        start, state = checkpoints.restore(state)
    log = MetricsLog(folder, start if start else -1)  # -1: what validation said before the first step comes again
    progress = Progress(f"grpo {folder.name}", config.steps, "steps", start)
    best = _Best(folder / "best") if config.validate_every else None

    def validate(step: int) -> dict[str, float]:
        began = time.monotonic()
        accuracy = trainer.validate(state, held_back, validation)
        best.offer(step, state, meta, accuracy)
        return {"validation/accuracy": accuracy, "seconds/validate": time.monotonic() - began}

    try:
        with Notice() as notice:
            if best is not None and not start:
                log.write(0, validate(0))
            told, step, ended = False, start, time.monotonic()
            for step in range(start + 1, config.steps + 1):
                clock = _Clock()
                count = min(config.prompts * (1 + config.fresh_rounds), len(sampled))
                chosen = random.Random(f"{config.seed}/{step}").sample(range(len(sampled)), count)
                groups, replaced = trainer.sample(state, step, [sampled[i] for i in chosen])
                clock.lap("sample")
                metrics = rollout_metrics(groups + replaced, config.prices)
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
                told = notice.given
                if told or last or step % config.save_every == 0:
                    checkpoints.save(step, state, {**meta, "step": step})
                progress.update(step, f"right {metrics['rollout/correct']:.3f}")
                if told:
                    break
            checkpoints.wait()
            if told or notice.given:
                raise Terminated(f"grpo {folder.name} is saved at step {step} of {config.steps}")
        return trainer.trainer.model(state)
    finally:
        log.close()
        try:
            checkpoints.close()
        finally:
            if best is not None:
                best.close()
