"""Supervised training on the solvers' trees (paper, section 3.1)."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from apr_jax.model.llama import Llama
from apr_jax.train.checkpoint import Checkpoints
from apr_jax.train.loss import supervised_loss
from apr_jax.train.metrics import MetricsLog, Progress
from apr_jax.train.optimizer import OptimizerConfig, make_optimizer
from apr_jax.train.pack import PackedBatches, Piece
from apr_jax.train.step import Trainer


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """The paper: 19,000 steps of 256 rows of 4,096 tokens, loss on all tokens."""

    steps: int
    batch_rows: int  # rows of one update, over all devices
    row_length: int  # tokens
    optimizer: OptimizerConfig
    loss_tokens: str = "sampled"  # or "all", the paper's
    seed: int = 0
    save_every: int = 200  # steps
    log_every: int = 10  # steps


def run_sft(
    model: Llama,
    pieces: Sequence[Piece],
    validation: Sequence[Piece],
    config: SftConfig,
    mesh,
    folder: Path,
    meta: dict,
) -> Llama:
    """Trains to the last step, from the newest checkpoint under `folder` where there is one.

    `meta` is saved beside the weights. Metrics are written one step late, so that the device never waits
    for the host. Raises FloatingPointError at the first loss that is no number.
    """
    if config.batch_rows % mesh.devices.size:
        raise ValueError(f"batch_rows ({config.batch_rows}) must be a multiple of the {mesh.devices.size} devices")
    batches = PackedBatches(pieces, config.row_length, config.batch_rows, config.seed)
    trainer = Trainer(
        model,
        lambda model, rows: supervised_loss(model, rows, config.loss_tokens),
        make_optimizer(config.optimizer, config.steps),
        mesh,
    )
    state = trainer.init(model)
    checkpoints = Checkpoints(folder / "checkpoints")
    # 1. Goes on where an earlier run of this stage stopped. 2. Else begins with the weights it was given.
    start = 0
    if checkpoints.latest is not None:
        start, state = checkpoints.restore(state)
    if start >= config.steps:
        checkpoints.close()
        return trainer.model(state)
    log = MetricsLog(folder, start)
    progress = Progress(f"sft {folder.name}", config.steps, "steps", start)
    late = None  # the step before, dispatched but not yet read
    seen, began = 0.0, time.monotonic()

    def report(step, sums, norm):
        nonlocal seen
        values = {name: float(value) for name, value in jax.device_get(sums).items()}
        loss = values["loss"] / values["weight"]
        if loss != loss:
            raise FloatingPointError(f"the loss of step {step} is no number; the last checkpoint is before it")
        seen += values["tokens"]
        if step % config.log_every == 0 or step == config.steps:
            slots = config.batch_rows * config.row_length
            log.write(
                step,
                {
                    "loss": loss,
                    "accuracy": values["right"] / values["weight"],
                    "gradient_norm": float(norm),
                    "tokens": values["tokens"],
                    "packing": values["tokens"] / slots,
                    "tokens_per_second": seen / (time.monotonic() - began),
                },
            )
        progress.update(step, f"loss {loss:.3f}")

    try:
        for step in range(start + 1, config.steps + 1):
            state, sums, norm = trainer.step(state, [batches[step - 1]])
            if late is not None:
                report(*late)
            late = (step, sums, norm)
            if step % config.save_every == 0 or step == config.steps:
                report(*late)
                late = None
                if step == config.steps and validation:  # before the save: a finished stage has its line
                    log.write(step, validate(trainer, state, validation, config))
                checkpoints.save(step, state, {**meta, "step": step})
        model = trainer.model(state)
    finally:
        log.close()
        checkpoints.close()
    return model


def validate(trainer: Trainer, state, pieces: Sequence[Piece], config: SftConfig) -> dict[str, float]:
    """Loss and accuracy per token on held-out threads (at most eight batches)."""
    batches = PackedBatches(pieces, config.row_length, config.batch_rows, seed=0)
    count = max(1, min(8, batches.tokens // (config.batch_rows * config.row_length)))
    totals = None
    for index in range(count):
        sums = trainer.measure(state, batches[index])
        totals = sums if totals is None else jax.tree.map(lambda a, b: a + b, totals, sums)
    totals = {name: float(value) for name, value in totals.items()}
    return {
        "validation_loss": totals["loss"] / totals["weight"],
        "validation_accuracy": totals["right"] / totals["weight"],
    }
