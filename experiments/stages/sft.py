"""The supervised stage (SFT): trains a model for each variant, or one model for all variants."""

import dataclasses
from collections.abc import Sequence

from apr_jax.data.folder import PARTS
from apr_jax.data.packing import MixedSegments, Segment
from apr_jax.model.family import Model, make_model
from apr_jax.train.checkpoint import newest_step
from apr_jax.train.sft import SftConfig, SftJob, run_sft
from experiments.stages import first_weights
from experiments.stages.run import Run
from experiments.workspace import Output

EDITION = 1
JOINT = "joint"  # stands for a variant in the name of the one model of all variants


def output(run: Run, variant: str) -> Output:
    """Return the `Output` (path and fingerprint) of a variant's supervised model, or of the one for all variants
    (`JOINT`).

    The model for all variants is also saved under the name of each variant.
    """
    settings = {"variant": variant, "seed": run.settings.seed} | run.section("sft", run.settings.sft)
    inputs = {"data": run.data_fingerprint}
    if run.settings.joint and variant != JOINT:
        inputs["joint"] = output(run, JOINT).fingerprint
    elif run.first_weights:
        inputs["checkpoint"] = run.first_weights.fingerprint
    return run.workspace.output(
        f"sft_{variant}", "sft", EDITION, settings | run.model_settings | run.task_settings, inputs
    )


def run(run: Run) -> None:
    """Train the supervised models of the run's variants."""
    settings = run.settings
    segments = {  # read for all variants before training, so that missing or broken files are reported at once
        variant: [run.dataset.segments(variant, part, settings.sft.children, settings.seed) for part in PARTS]
        for variant in (run.task.variants if settings.joint else run.variants)
    }
    config, joint = settings.sft, None
    if settings.joint:  # each variant gets the one model, with no further step
        joint = _train(run, JOINT, config, *(MixedSegments(part) for part in zip(*segments.values())))
        config = dataclasses.replace(config, steps=0)
    for variant, (train, validation) in segments.items():
        _train(run, variant, config, train, validation, joint)


def _train(
    run: Run, variant: str, config: SftConfig, train: Sequence[Segment], validation: Sequence[Segment],
    model: Model | None = None,
) -> Model:  # fmt: skip
    """Train the model of a variant, or of all variants, and return it. Training begins with `model` if it is given."""
    with run.workspace.making(place := output(run, variant)) as folder:
        model = model or _first_model(run, place)
        meta = run.meta(model.config, variant, "sft")
        return run_sft(SftJob(model, config, train, run.mesh, folder, validation, meta))


def _first_model(run: Run, place: Output) -> Model:
    """Return a model with random weights, or with the weights of the given checkpoint (`model.checkpoint`).

    After the run's first saved step, its weights are returned instead of the given ones: the given checkpoint may be
    deleted by then. Raises UserError or CheckpointError if the given checkpoint cannot be used.
    """
    if not run.first_weights:
        return make_model(run.model_config, run.settings.seed)
    own = place.path / "checkpoints"
    if newest_step(own) is not None:
        return first_weights.load(run.settings, run.model_config, run.tokenizer, own)
    return first_weights.load(run.settings, run.model_config, run.tokenizer, run.first_weights.place, run.first_weights)
