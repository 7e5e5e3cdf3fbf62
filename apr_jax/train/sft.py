"""Supervised fine-tuning on demonstration trees (paper, section 3.1)."""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from apr_jax import interrupt
from apr_jax.checks import SEED, FieldError, at_least, check_fields
from apr_jax.data.packing import PackedBatch, PackedBatches, Segment
from apr_jax.errors import UserError
from apr_jax.io.progress import Progress
from apr_jax.model.family import Model, config_json, family_of
from apr_jax.model.flops import peak_flops, training_flops
from apr_jax.settings import execution, shared
from apr_jax.train.checkpoint import CheckpointError, Checkpoints, load_model
from apr_jax.train.loss import KINDS, loss_by_kind, supervised_loss
from apr_jax.train.metrics import MetricsLog
from apr_jax.train.optimizer import OptimizerConfig, make_optimizer
from apr_jax.train.step import NotFiniteError, Trainer
from apr_jax.train.termination import PreemptionRequest, Terminated

VALIDATION_BATCHES = 8  # at most so many batches are measured


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Settings of SFT. The paper trains 19,000 steps of 256 rows of 4,096 tokens, with the loss on all tokens."""

    steps: int = 1000  # at most
    batch_rows: int = 4  # rows of one update, over all devices and microbatches
    row_length: int = 768  # tokens, at least the window
    optimizer: OptimizerConfig = OptimizerConfig()
    loss_tokens: str = "sampled"  # tokens with a loss: "sampled", which the model writes, or "all" (the paper's)
    tokens: int = 0  # training ends after so many tokens, if that is before `steps`; 0: no limit
    microbatches: int = execution(1)  # parts of a batch whose gradients are added up, to need the memory of one part
    seed: int = shared("seed", 0)
    save_every: int = execution(200)  # steps
    log_every: int = execution(10)  # steps
    validate_every: int = execution(0)  # steps; 0: only at the end
    max_skipped_steps: int = execution(10)  # steps without an update (loss or gradient not finite) before the run stops

    BOUNDS = (
        at_least(0, "steps", "tokens", "validate_every", "max_skipped_steps"),
        at_least(1, "batch_rows", "row_length", "microbatches", "save_every", "log_every"), *SEED,
    )  # fmt: skip

    def __post_init__(self):
        check_fields(self)
        if self.loss_tokens not in ("sampled", "all"):
            raise FieldError("loss_tokens", f"is sampled or all, was given {self.loss_tokens!r}")


@dataclasses.dataclass(frozen=True)
class SftJob:
    """One run of supervised training: the model, the data it is trained on, and the folder for results."""

    model: Model  # the model before the first step
    config: SftConfig
    segments: Sequence[Segment]  # training data: flat threads
    mesh: Mesh
    folder: Path  # for checkpoints/, metrics.jsonl and tensorboard/
    validation: Sequence[Segment] = ()  # held-out data, measured and not trained on
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON, saved with each checkpoint


class SftRun:
    """The batches and the log of one run, after step `start`. With several processes only the first one logs."""

    def __init__(self, job: SftJob, batches: PackedBatches, start: int):
        self.config, self.batches = job.config, batches
        self._model = job.model.config
        self._main = jax.process_index() == 0  # the process that logs
        self.log = MetricsLog(job.folder, start) if self._main else None
        self._progress = Progress(f"sft {job.folder.name}", job.config.steps, "steps", start)
        peak = peak_flops(job.mesh.devices.flat[0], self._model.dtype)
        self._peak = None if peak is None else peak * job.mesh.size  # FLOP/s of all devices, if known
        self._totals: dict[str, float] = {"tokens": 0.0, "attended": 0.0}  # since the start
        self._began = time.monotonic()

    def microbatches(self, step: int) -> Iterator[PackedBatch]:
        """The microbatches of a step (counted from 1), each with the rows of this process."""
        rows = self.batches.rows(step - 1)
        size = len(rows) // self.config.microbatches
        own = size // jax.process_count()
        for first in range(0, len(rows), size):
            at = first + jax.process_index() * own
            yield self.batches.pack(rows[at : at + own])

    def report(self, step: int, sums: dict) -> float:
        """Wait for the sums of a step, and log its metrics every `log_every` steps and at the end. Returns the sum
        "flags" of `Trainer.step`. Raises NotFiniteError if more than `max_skipped_steps` steps were skipped."""
        config = self.config
        values = {name: float(value) for name, value in jax.device_get(sums).items()}
        if values["skipped"] > config.max_skipped_steps:
            raise NotFiniteError(
                f"the losses or gradients of {values['skipped']:.0f} steps up to step {step} were not finite "
                f"(max_skipped_steps is {config.max_skipped_steps}): begin in a new folder with lower rates or "
                "another seed"
            )
        for name in self._totals:
            self._totals[name] += values[name]
        if not self._main:
            return values["flags"]
        loss = values["loss"] / values["weight"]
        if step % config.log_every == 0 or step == config.steps:
            seconds = time.monotonic() - self._began
            flops = training_flops(self._model, self._totals["tokens"], self._totals["attended"]) / seconds
            line = {
                "loss": loss,
                "accuracy": values["correct"] / values["weight"],
                "gradient_norm": values["gradient_norm"],
                "tokens": values["tokens"],
                "packing": values["tokens"] / (config.batch_rows * config.row_length),
                "tokens_saved": 1 - values["tokens"] / values["unshared"],  # by computing shared prefixes once
                "tokens_per_second": self._totals["tokens"] / seconds,
                "model_flops_per_second": flops,
                "skipped": values["skipped"],
                "threads_too_long": self.batches.too_long,  # longer than a row, so left out
            }
            if self._peak is not None:
                line["model_flops_utilisation"] = flops / self._peak
            self.log.write(step, line)
        self._progress.update(step, f"loss {loss:.3f}")
        return values["flags"]

    def close(self) -> None:
        if self.log is not None:
            self.log.close()


def run_sft(job: SftJob) -> Model:
    """Train to the last step and return the model, starting from the newest checkpoint in the job's folder if there is
    one. The last step is `steps`, or an earlier one after which `tokens` tokens were trained on; its number is saved in
    the meta as "steps".

    The sums of a step are read after the next step was dispatched, so that the device never waits for the host. A step
    whose loss or gradient is not finite is counted and not applied.

    Raises NotFiniteError if more than `max_skipped_steps` steps were not finite, or if a validation loss is not: that
    step is not saved. Raises `Terminated`, after a save, if the process got a SIGTERM; UserError if rows do not split
    over devices and microbatches, or if no thread fits a row.
    """
    config, mesh, folder = job.config, job.mesh, job.folder
    parts = mesh.size * config.microbatches
    if config.batch_rows % parts:
        raise UserError(
            f"batch_rows ({config.batch_rows}) must be a multiple of the {mesh.size} devices"
            + (f" times {config.microbatches} microbatches" if config.microbatches > 1 else "")
        )
    batches = PackedBatches(job.segments, config.row_length, config.batch_rows, config.seed)
    _warn_too_long(folder.name, batches, len(job.segments))
    if job.validation:  # packed here already, to raise now if no thread fits a row, not after the last step
        measured = PackedBatches(job.validation, config.row_length, config.batch_rows // config.microbatches, seed=0)
        _warn_too_long(f"{folder.name} validation", measured, len(job.validation))
    if config.tokens:  # the learning-rate schedule must end there, too
        config = dataclasses.replace(config, steps=batches.steps_for(config.tokens, most=config.steps))
        job = dataclasses.replace(job, config=config)
    trainer = Trainer(
        job.model,
        lambda model, batch: supervised_loss(model, batch, config.loss_tokens),
        make_optimizer(config.optimizer, config.steps, family_of(job.model.config).rules),
        mesh,
        loss_by_kind,
        whole_layers=config.optimizer.name == "muon",
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    # A finished run is only loaded. If its last step turns out to be broken, it is renamed, and training resumes from
    # the step before.
    while (start := checkpoints.latest or 0) >= config.steps and checkpoints.latest is not None:
        try:
            model = load_model(folder / "checkpoints" / str(start))[0]
        except CheckpointError as error:
            checkpoints.set_aside(start, str(error))
        else:
            checkpoints.close()
            return model
    state = trainer.init(job.model)
    if start:
        start, state = checkpoints.restore(state)
    meta = {"model": config_json(job.model.config), **job.meta}
    if not config.steps:  # the model before training is the result
        checkpoints.save(0, state, {**meta, "step": 0, "steps": 0})
        checkpoints.close()
        return job.model
    run = SftRun(job, batches, start)
    unread = None  # (step, sums) of a step that was dispatched and whose sums are not yet read
    try:
        with PreemptionRequest() as request:
            preempted = False
            for step in range(start + 1, config.steps + 1):
                interrupt.check()
                state, sums = trainer.step(state, run.microbatches(step), flag=request.received)
                if unread is not None:
                    preempted = run.report(*unread) > 0
                unread = (step, sums)
                if jax.process_count() == 1:  # several processes must all act on the flags of the same step
                    preempted = request.received
                last = step == config.steps
                validates = last or (config.validate_every and step % config.validate_every == 0)
                saves = last or preempted or step % config.save_every == 0
                if validates or saves:
                    preempted = run.report(*unread) > 0 or preempted
                    saves, unread = saves or preempted, None
                if validates and job.validation:  # logged before the save, so that no finished stage lacks the line
                    metrics = validate(trainer, state, job.validation, config)
                    if run.log is not None:
                        run.log.write(step, metrics)
                    if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
                        raise NotFiniteError(f"{wrong[0]} is {metrics[wrong[0]]} at step {step}, which is not saved")
                if saves:
                    checkpoints.save(step, state, {**meta, "step": step, "steps": config.steps})
                if preempted:
                    break
            model = trainer.model(state)
            checkpoints.wait()
            # One of several processes must not end alone: they ignore a request that came after the last step's flags.
            if preempted or (request.received and jax.process_count() == 1):
                raise Terminated(f"sft {folder.name} is saved at step {step} of {config.steps}")
    finally:
        run.close()
        checkpoints.close()
    return model


def _warn_too_long(title: str, batches: PackedBatches, threads: int) -> None:
    """Print one line on stderr if threads are left out because they are longer than a row."""
    if batches.too_long and jax.process_index() == 0:
        print(
            f"sft {title}: {batches.too_long} of {threads} threads are longer than a row of {batches.row_length} "
            "tokens and are left out (sft.row_length)",
            file=sys.stderr,
        )


def validate(trainer: Trainer, state, segments: Sequence[Segment], config: SftConfig) -> dict[str, float]:
    """Metrics of held-out threads: loss and accuracy per token, see `validation_metrics`. At most VALIDATION_BATCHES
    batches of the size of a microbatch are measured, the same ones each time."""
    batch_rows = config.batch_rows // config.microbatches
    batches = PackedBatches(segments, config.row_length, batch_rows, seed=0)
    count = max(1, min(VALIDATION_BATCHES, batches.tokens // (batch_rows * config.row_length)))
    local = batch_rows // jax.process_count()
    local_rows = slice(jax.process_index() * local, (jax.process_index() + 1) * local)
    totals: dict[str, float] = {}
    for index in range(count):
        sums = trainer.measure(state, batches.pack(batches.rows(index)[local_rows]))
        for name, value in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return validation_metrics(totals, config.loss_tokens)


def validation_metrics(totals: dict[str, float], loss_tokens: str) -> dict[str, float]:
    """Means by the names under which they are logged, from sums of `loss_by_kind`: `validation_loss` and
    `validation_accuracy` over the tokens that are trained on with `loss_tokens`, and `validation_loss/KIND` and
    `validation_accuracy/KIND` for each kind of `KINDS` that occurs."""
    trained = tuple(KINDS) if loss_tokens == "all" else ("written", "call")
    total = lambda quantity, kinds: sum(totals[f"{quantity}/{kind}"] for kind in kinds)  # noqa: E731
    groups = {"": trained} | {f"/{kind}": (kind,) for kind in KINDS if totals[f"count/{kind}"]}
    metrics = {}
    for name, kinds in groups.items():
        count = max(total("count", kinds), 1.0)
        metrics[f"validation_loss{name}"] = total("loss", kinds) / count
        metrics[f"validation_accuracy{name}"] = total("correct", kinds) / count
    return metrics
