"""Supervised training on the solvers' trees (paper, section 3.1)."""

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
from apr_jax.train.checkpoint import CheckpointError, Checkpoints, load_model
from apr_jax.train.loss import KINDS, loss_by_kind, supervised_loss
from apr_jax.train.metrics import MetricsLog
from apr_jax.train.optimizer import OptimizerConfig, make_optimizer
from apr_jax.train.step import NotFiniteError, Trainer
from apr_jax.train.termination import PreemptionRequest, Terminated

VALIDATION_BATCHES = 8  # at most


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """The paper: 19,000 steps of 256 rows of 4,096 tokens, loss on all tokens."""

    steps: int  # at most
    batch_rows: int  # rows of one update, over all devices and microbatches
    row_length: int  # tokens
    optimizer: OptimizerConfig
    loss_tokens: str = "sampled"  # or "all", the paper's
    tokens: int = 0  # after which it ends, if that is before `steps`; 0: no limit
    microbatches: int = 1  # parts of a batch whose gradients are added up, to need the memory of one
    seed: int = 0
    save_every: int = 200  # steps
    log_every: int = 10  # steps
    validate_every: int = 0  # steps; 0: at the end alone
    max_skipped_steps: int = 10  # steps without an update (loss or gradient not finite) before the run stops

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
    """One run of supervised training: what is trained on what, and where it is kept."""

    model: Model  # training begins with it
    config: SftConfig
    segments: Sequence[Segment]  # of training
    mesh: Mesh
    folder: Path  # gets checkpoints/ and metrics.jsonl
    validation: Sequence[Segment] = ()  # measured, not trained on
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON, saved beside the weights with the step


class SftRun:
    """What one run's loop and its reports share."""

    def __init__(self, job: SftJob, batches: PackedBatches, start: int):
        self.config, self.batches = job.config, batches
        self._model = job.model.config
        self._main = jax.process_index() == 0  # one process writes and tells
        self.log = MetricsLog(job.folder, start) if self._main else None
        self._progress = Progress(f"sft {job.folder.name}", job.config.steps, "steps", start)
        peak = peak_flops(job.mesh.devices.flat[0], self._model.dtype)
        self._peak = None if peak is None else peak * job.mesh.size
        self._seen: dict[str, float] = {"tokens": 0.0, "seen": 0.0}
        self._began = time.monotonic()

    def microbatches(self, step: int) -> Iterator[PackedBatch]:
        """This process' rows of a step (counted from 1), microbatch by microbatch."""
        rows = self.batches.rows(step - 1)
        size = len(rows) // self.config.microbatches
        own = size // jax.process_count()
        for first in range(0, len(rows), size):
            at = first + jax.process_index() * own
            yield self.batches.pack(rows[at : at + own])

    def report(self, step: int, sums: dict) -> float:
        """Reads what a step left on the device, and writes it where it is the step's turn; the flags that were raised.
        Raises NotFiniteError where too many steps were skipped."""
        config = self.config
        values = {name: float(value) for name, value in jax.device_get(sums).items()}
        if values["skipped"] > config.max_skipped_steps:
            raise NotFiniteError(
                f"the losses or gradients of {values['skipped']:.0f} steps up to step {step} were not finite "
                f"(max_skipped_steps is {config.max_skipped_steps}): begin in a new folder with lower rates or "
                "another seed"
            )
        for name in self._seen:
            self._seen[name] += values[name]
        if not self._main:
            return values["flags"]
        loss = values["loss"] / values["weight"]
        if step % config.log_every == 0 or step == config.steps:
            seconds = time.monotonic() - self._began
            flops = training_flops(self._model, self._seen["tokens"], self._seen["seen"]) / seconds
            line = {
                "loss": loss,
                "accuracy": values["right"] / values["weight"],
                "gradient_norm": values["gradient_norm"],
                "tokens": values["tokens"],
                "packing": values["tokens"] / (config.batch_rows * config.row_length),
                "tokens_saved": 1 - values["tokens"] / values["unshared"],  # by forwarding shared prefixes once
                "tokens_per_second": self._seen["tokens"] / seconds,
                "model_flops_per_second": flops,
                "skipped": values["skipped"],
                "threads_too_long": self.batches.too_long,  # for a row: left out
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
    """Trains to the last step (`steps`, or the one that ends `tokens`), from the newest checkpoint under the job's
    folder where there is one.

    The last step is saved beside the weights, too (`steps`). A step is read when the next one is on
    its way, so that the device never waits for the host. A step whose loss or gradient is not finite is counted and
    changes nothing. Raises NotFiniteError after too many of those, or before the save where a validation loss is not
    finite; and `Terminated`, after a save, where the process got a SIGTERM.
    """
    config, mesh, folder = job.config, job.mesh, job.folder
    parts = mesh.size * config.microbatches
    if config.batch_rows % parts:
        raise UserError(
            f"batch_rows ({config.batch_rows}) must be a multiple of the {mesh.size} devices"
            + (f" times {config.microbatches} microbatches" if config.microbatches > 1 else "")
        )
    batches = PackedBatches(job.segments, config.row_length, config.batch_rows, config.seed)
    _tell_too_long(folder.name, batches, len(job.segments))
    if job.validation:  # refused now where none fits, not after the last step
        measured = PackedBatches(job.validation, config.row_length, config.batch_rows // config.microbatches, seed=0)
        _tell_too_long(f"{folder.name} validation", measured, len(job.validation))
    if config.tokens:  # the rates' schedule ends there, too
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
    # 1. A finished run is only read. 2. Goes on where an earlier run of this stage stopped. 3. Else begins with the
    # weights it was given, which without a step to do are the result.
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
    if not config.steps:
        checkpoints.save(0, state, {**meta, "step": 0, "steps": 0})
        checkpoints.close()
        return job.model
    run = SftRun(job, batches, start)
    late = None  # the step before, dispatched but not yet read
    try:
        with PreemptionRequest() as request:
            preempted = False
            for step in range(start + 1, config.steps + 1):
                interrupt.check()
                state, sums = trainer.step(state, run.microbatches(step), flag=request.given)
                if late is not None:
                    preempted = run.report(*late) > 0
                late = (step, sums)
                if jax.process_count() == 1:  # several go by what all of them read
                    preempted = request.given
                last = step == config.steps
                validates = last or (config.validate_every and step % config.validate_every == 0)
                saves = last or preempted or step % config.save_every == 0
                if validates or saves:
                    preempted = run.report(*late) > 0 or preempted
                    saves, late = saves or preempted, None
                if validates and job.validation:  # before the save: a finished stage has its line
                    found = validate(trainer, state, job.validation, config)
                    if run.log is not None:
                        run.log.write(step, found)
                    if wrong := [name for name, value in found.items() if not math.isfinite(value)]:
                        raise NotFiniteError(f"{wrong[0]} is {found[wrong[0]]} at step {step}, which is not saved")
                if saves:
                    checkpoints.save(step, state, {**meta, "step": step, "steps": config.steps})
                if preempted:
                    break
            model = trainer.model(state)
            checkpoints.wait()
            # Of several processes one alone must not end: a notice after the last step's flags goes unheard there.
            if preempted or (request.given and jax.process_count() == 1):
                raise Terminated(f"sft {folder.name} is saved at step {step} of {config.steps}")
    finally:
        run.close()
        checkpoints.close()
    return model


def _tell_too_long(title: str, batches: PackedBatches, threads: int) -> None:
    """One line where threads are left out because no row holds them."""
    if batches.too_long and jax.process_index() == 0:
        print(
            f"sft {title}: {batches.too_long} of {threads} threads are longer than a row of {batches.row_length} "
            "tokens and are left out (sft.row_length)",
            file=sys.stderr,
        )


def validate(trainer: Trainer, state, segments: Sequence[Segment], config: SftConfig) -> dict[str, float]:
    """Loss and accuracy per token on held-out threads: of the tokens that the loss trains on, and of each of `KINDS`
    that occurs."""
    own = config.batch_rows // config.microbatches
    batches = PackedBatches(segments, config.row_length, own, seed=0)
    count = max(1, min(VALIDATION_BATCHES, batches.tokens // (own * config.row_length)))
    share = own // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    totals: dict[str, float] = {}
    for index in range(count):
        sums = trainer.measure(state, batches.pack(batches.rows(index)[mine]))
        for name, value in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return validation_metrics(totals, config.loss_tokens)


def validation_metrics(totals: dict[str, float], loss_tokens: str) -> dict[str, float]:
    """Means from the sums of `loss_by_kind`, by the names under which they are logged."""
    trained = tuple(KINDS) if loss_tokens == "all" else ("written", "call")
    of = lambda what, kinds: sum(totals[f"{what}/{kind}"] for kind in kinds)  # noqa: E731
    groups = {"": trained} | {f"/{kind}": (kind,) for kind in KINDS if totals[f"count/{kind}"]}
    found = {}
    for name, kinds in groups.items():
        count = max(of("count", kinds), 1.0)
        found[f"validation_loss{name}"] = of("loss", kinds) / count
        found[f"validation_accuracy{name}"] = of("right", kinds) / count
    return found
