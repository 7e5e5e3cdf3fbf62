"""The GRPO stage: trains the supervised models of some variants further, on trees that the models sample."""

from pathlib import Path
from typing import Any

from apr_jax.errors import UserError
from apr_jax.train.checkpoint import fingerprint, last_step, load_meta, newest_step
from apr_jax.train.grpo import GrpoJob, RolloutSpec, run_grpo
from experiments.stages import models, sft
from experiments.stages.run import Run
from experiments.workspace import Output

EDITION = 1


def output(run: Run, variant: str) -> Output:
    """Return the `Output` (path and fingerprint) of a variant's model after GRPO."""
    settings: dict[str, Any] = {"variant": variant, "window": run.settings.window, "seed": run.settings.seed}
    left_out = () if run.settings.grpo.validate_every else ("validation",)
    settings |= run.section("grpo", run.settings.grpo, *left_out) | run.section(
        "budget", run.settings.budget_of(variant)
    )
    if run.settings.grpo.validate_every:
        settings |= {"evaluate": vars(run.settings.evaluate.sampling())}
    inputs = {"data": run.data_fingerprint, "sft": sft.output(run, variant).fingerprint}
    return run.workspace.output(
        f"grpo_{variant}", "grpo", EDITION, settings | run.model_settings | run.task_settings, inputs
    )


def run(run: Run) -> None:
    """Train the models of those variants that are in `grpo.variants` and in the run."""
    for variant in run.settings.grpo_variants if run.settings.grpo.steps else ():
        if variant in run.variants:
            with run.workspace.making(output(run, variant)) as folder:
                _train(run, variant, folder)


def _train(run: Run, variant: str, folder: Path) -> None:
    """Train the model of a variant, in the output's folder.

    Raises FileNotFoundError if there is no supervised model. Raises UserError if its training has not ended, or if GRPO
    in this folder began with other supervised weights.
    """
    supervised = sft.output(run, variant).path
    if newest_step(supervised / "checkpoints") is None:
        raise FileNotFoundError(f"no checkpoint at {supervised / 'checkpoints'}: run --stage=sft first")
    models.check_finished(run, f"sft_{variant}", supervised)
    model, _ = models.load(run, f"sft_{variant}", supervised / "checkpoints")
    began_with = fingerprint(model)
    begun = last_step(folder)
    if begun and load_meta(begun)[1].get("began_with", began_with) != began_with:
        raise UserError(f"{folder} began with other weights than sft_{variant} has now: remove it")
    settings = run.settings
    rollouts = RolloutSpec(
        run.task.protocol(variant), run.tokenizer, settings.budget_of(variant), settings.grpo.slots,
        run.dataset.conditions(variant),
    )  # fmt: skip
    job = GrpoJob(
        model, settings.grpo, rollouts, run.dataset.problems("train"), run.mesh, folder, key=run.task.key,
        meta=run.meta(model.config, variant, "grpo") | {"began_with": began_with},
        validation_sampling=settings.evaluate.sampling(),
    )  # fmt: skip
    run_grpo(job)
