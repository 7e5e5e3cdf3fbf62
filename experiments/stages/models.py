"""Trained models in their checkpoints, for the stages after training."""

from pathlib import Path

from apr_jax.errors import UserError
from apr_jax.model.family import Model
from apr_jax.train.checkpoint import fingerprint, load_meta, load_model, newest_step
from experiments.stages.run import Run


def load(run: Run, name: str, folder: Path) -> tuple[Model, dict]:
    """Return the model `name` from a folder of checkpoints, and its metadata.

    Raises UserError if the checkpoint has another task, stage or variant than `name`, or another vocabulary than the
    data set.
    """
    model, meta = load_model(folder)
    theirs = f"{meta.get('stage')}_{meta.get('variant')}"
    if (meta.get("task"), theirs) != (run.task.spec, name) or not isinstance(meta.get("step"), int):
        raise UserError(
            f"{folder} holds no checkpoint of {run.task.spec}'s {name}, but step {meta.get('step')} of "
            f"{meta.get('task')}'s {theirs}: move it back where it was made"
        )
    if model.config.vocab_size != len(run.tokenizer):
        raise UserError(
            f"{folder} has a vocabulary of {model.config.vocab_size}, the tokenizer of {run.data.path} has "
            f"{len(run.tokenizer)}: give the data set the tokenizer.json back that it was made with"
        )
    return run.with_context(model), meta


def weights(run: Run, step: Path, model: Model | None = None) -> str:
    """Return the fingerprint of a saved step's weights. `model` is the step's model, if it is loaded already."""
    if (step := step.resolve()) not in run.fingerprints:
        run.fingerprints[step] = fingerprint(model or load_model(step.parent)[0])
    return run.fingerprints[step]


def reached(run: Run, name: str, folder: Path) -> tuple[int, int]:
    """Return (newest saved step, last step) of a model's training. The two differ until training has ended."""
    steps = (run.settings.sft if name.startswith("sft") else run.settings.grpo).steps
    if (step := newest_step(folder / "checkpoints")) is None:
        return 0, steps
    meta = load_meta(step)[1]
    return meta["step"], meta.get("steps", steps)  # the last step may come before sft.steps, by the limit sft.tokens


def check_finished(run: Run, name: str, folder: Path, also: str = "") -> None:
    """Raise UserError if the training of a model has not ended. `also` is the end of the message."""
    step, steps = reached(run, name, folder)
    if step < steps:
        stage = name.partition("_")[0]
        raise UserError(f"{name} stands at step {step} of {steps}: finish --stage={stage} first{also}")
