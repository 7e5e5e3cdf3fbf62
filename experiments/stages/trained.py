"""The outputs of a run's training stages, for the stages after training."""

from collections.abc import Sequence
from pathlib import Path

from apr_jax.train.checkpoint import last_step
from experiments.stages import grpo, sft
from experiments.stages.run import Run
from experiments.workspace import Output

KINDS = {"sft": sft, "grpo": grpo}  # in the order of training


def outputs(run: Run, variants: Sequence[str] = ()) -> dict[str, Output]:
    """Return the `Output` of each trained model by name, sft_VARIANT and grpo_VARIANT; by default for the run's
    variants."""
    variants = variants or run.variants
    return {f"{kind}_{variant}": module.output(run, variant) for kind, module in KINDS.items() for variant in variants}


def saved(run: Run, variants: Sequence[str] = ()) -> dict[str, Path]:
    """Return the folder of each trained model's last step by name. For GRPO with validation it is the best step."""
    return {name: step for name, made in outputs(run, variants).items() if (step := last_step(made.path))}
