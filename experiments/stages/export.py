"""The export stage: writes the model of the task's first variant, after its last training stage, in Hugging Face
format, and compares it with transformers."""

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apr_jax.errors import UserError
from apr_jax.export.hf import check_export, check_trees, export_hf
from apr_jax.io.files import write_text
from apr_jax.model.family import Model
from apr_jax.settings import shaping
from experiments.stages import models, trained
from experiments.stages.run import Run
from experiments.workspace import Output, read_note

EDITION = 1


def output(run: Run, name: str, weights: str) -> Output:
    """Return the `Output` (path and fingerprint) of a model's export. `weights` is the fingerprint of its weights."""
    variant = name.partition("_")[2]
    settings = {
        "model": name, "window": run.settings.window, "context": run.settings.model["context"],
        "budget": shaping(run.settings.budget_of(variant)), "export": shaping(run.settings.export),
    }  # fmt: skip
    trained_model = trained.outputs(run, [variant])[name].fingerprint
    inputs = {"data": run.data_fingerprint, "model": trained_model, "weights": weights}
    return run.workspace.output("export", "export", EDITION, settings, inputs)


def possible(run: Run, note: Mapping[str, Any]) -> Iterator[Output]:
    """Yield the outputs that this run's export has for the weights of a note."""
    for name in trained.outputs(run, run.task.variants[:1]):
        yield output(run, name, note.get("inputs", {}).get("weights", ""))


def exported(run: Run) -> tuple[str, Path] | None:
    """Return (name, folder of its step) of the model to export: after GRPO if there is one, else after SFT; or None."""
    saved = trained.saved(run, run.task.variants[:1])
    return next(reversed(saved.items()), None)


def run(run: Run) -> None:
    """Export the model, unless it is exported already.

    Raises FileNotFoundError if no model is trained, and UserError if the model's training has not ended.
    """
    variant = run.task.variants[0]
    if variant not in run.variants:
        return  # another process may be exporting it, in the same folder
    if (found := exported(run)) is None:
        raise FileNotFoundError(f"no {variant} checkpoint under {run.workdir}: run --stage=sft first")
    name, step = found
    stage = step.parent.parent
    models.check_finished(run, name, stage, "; python -m tools.export_hf exports any checkpoint")
    model, meta = models.load(run, name, step.parent)
    if step.parent.name == "checkpoints" and meta["step"] < (steps := models.reached(run, name, stage)[1]):
        raise UserError(
            f"the newest readable step of {name} is {meta['step']} of {steps}: finish --stage={name.partition('_')[0]} "
            "first"
        )
    described = {"model": name, "step": meta["step"], "weights": models.weights(run, step, model)}
    with run.workspace.making(output(run, name, described["weights"])) as folder:
        check = read_note(folder / "check.json")  # written last, so the export is complete
        if check.items() >= described.items() and (len(check) > len(described) or find_spec("torch") is None):
            return
        meta |= {"window": run.settings.window}
        export_hf(model, run.tokenizer, folder, meta, run.settings.export.dtype)
        check = described | _compared(run, model, variant, folder)
        write_text(folder / "check.json", json.dumps(check, indent=1))
    print(f"export {run.workdir / 'export'}: {json.dumps(check)}")


def _compared(run: Run, model: Model, variant: str, folder: Path) -> dict[str, Any]:
    """Return how the export compares with transformers, or {} if torch is not installed."""
    if find_spec("torch") is None:
        print(f"export {folder}: not compared with transformers, torch is not installed (the extra `check`)")
        return {}
    demonstrations = run.dataset.segments(variant, "validation")
    texts = [demonstrations[i].tokens[:64] for i in range(min(8, len(demonstrations)))]
    check = check_export(model, run.tokenizer, folder, texts)
    if count := run.settings.export.check_trees:
        problems = run.dataset.held_out()[:count]
        equal, total = check_trees(
            model, run.tokenizer, folder, run.task.protocol(variant), problems, run.settings.budget_of(variant),
            progress_title="export check", condition=run.condition(variant),
        )  # fmt: skip
        check |= {"trees_equal": equal, "trees": total}
    return check
